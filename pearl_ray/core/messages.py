"""What the processes of a deployment tell each other, off the Ray RPC path.

Every message carries the number of the round or the epoch it belongs to. Plans, stamps and summaries are msgpack
(typed on both ends, never pickle); windows and verdicts, once a round on the bridge, are flat arrays.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
import numpy as np

from pearl_ray.core.params import SamplingParams

MAX_PROPOSALS = 64  # the draft's distribution under `rejection` is its top 64, renormalised (DESIGN: "The test")


class Join(msgspec.Struct, frozen=True, tag=True):
    """A sequence enters the batch; ``tokens`` are committed, the first ``num_prompt`` of them the prompt."""

    seq_id: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    rejection: bool
    seed: int
    sample_index: int
    window: int
    max_total: int
    target_blocks: list[int]
    draft_blocks: list[int]
    target_cached: int = 0
    draft_cached: int = 0
    stop_mask: list[int] = []


class Leave(msgspec.Struct, frozen=True, tag=True):
    """A sequence leaves the batch: finished, aborted or preempted. Its blocks are free from this change on."""

    seq_id: int


class Extend(msgspec.Struct, frozen=True, tag=True):
    """More cache blocks for a sequence, in order."""

    seq_id: int
    target_blocks: list[int]
    draft_blocks: list[int]


class SetWindow(msgspec.Struct, frozen=True, tag=True):
    """How many tokens the draft makes per round for a sequence from now on; 0 decodes it autoregressively."""

    seq_id: int
    window: int


class SetPace(msgspec.Struct, frozen=True, tag=True):
    """How fast long prompts go beside decoding sequences from now on; see ``schedule.Pace``."""

    tokens: int
    every: int


Change = Join | Leave | Extend | SetWindow | SetPace


class PlanDiff(msgspec.Struct, frozen=True, tag=True):
    """The coordinator's decisions since the last epoch, in the order in which they apply."""

    epoch: int
    changes: list[Change]


class Stamp(msgspec.Struct, frozen=True, tag=True):
    """The target leader's word that ``round`` runs on the batch as of ``epoch``.

    ``ahead``: the round after it will have the same sequences and windows, so that its target pass can be queued before
    this one's verdict is known.
    """

    round: int
    epoch: int
    ahead: bool = False


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The coordinator ends the loop; the shard returns from its run."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: the token that is there and its rank (from 1), then the likeliest ids.

    Natural logarithms of the target's softmax over the raw logits, before temperature, penalties and filters.
    """

    token: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class SequenceSummary(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One sequence's part of a round: enough to repeat its transition.

    ``logprobs``: per committed token, where the request asks for them; ``prompt_logprobs``: per prompt token whose
    distribution a prefill chunk gave, from position ``prompt_start`` on. None rather than empty lists: those would be
    made, and looked through by the garbage collector, for every sequence and round.
    """

    seq_id: int
    drafted: list[int]
    num_accepted: int
    token: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_start: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None


class RoundSummary(msgspec.Struct, frozen=True, tag=True):
    """A round as the target leader saw it. Times are seconds on that process's monotonic clock.

    ``gap_s``: on a GPU, how long its device had no forward pass between the last round's and this one's.
    ``through_host``: on a GPU, the host judged the round, for what some of its rows ask; it takes longer than others.
    """

    round: int
    epoch: int
    checksum: int
    sequences: list[SequenceSummary]
    started: float
    finished: float
    forward_s: float
    wait_s: float
    num_target_rows: int
    gap_s: float = 0.0
    through_host: bool = False


class DraftSummary(msgspec.Struct, frozen=True, tag=True):
    """The draft's side of a round: its times, and the checksum of its replica before the round.

    ``advance_s``: from the verdict until the next round could begin. ``num_fed``: rows of the first step; prompts too.
    """

    round: int
    checksum: int
    started: float
    finished: float
    forward_s: float
    wait_s: float
    num_steps: int
    advance_s: float = 0.0
    num_fed: int = 0


class ShardFailed(msgspec.Struct, frozen=True, tag=True):
    """A shard's loop ended by an error; its traceback's last line."""

    shard: str
    error: str


Message = PlanDiff | Stamp | Stop | RoundSummary | DraftSummary | ShardFailed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """The inverse of :func:`encode`; raises ``msgspec.ValidationError`` on anything else."""
    return _decoder.decode(payload)


@dataclass(frozen=True, slots=True)
class Window:
    """What the draft made in one round, sequence after sequence in the plan's order.

    Attributes:
        round: the round that drafted it.
        checksum: of the draft's replica before the round.
        lengths_S: int32, tokens per sequence (0: none this round).
        tokens_N: int32, N = sum of lengths.
        parents_N: int32, how many nodes back each token's parent stands (see :class:`Node`); 1 throughout a chain.
        proposal_ids_MK, proposal_probs_MK: int32 and float32, K = 64, the distribution each token was drawn from, for
            the M tokens of sequences under `rejection`; unused entries have probability 0.
    """

    round: int
    checksum: int
    lengths_S: np.ndarray
    tokens_N: np.ndarray
    parents_N: np.ndarray
    proposal_ids_MK: np.ndarray
    proposal_probs_MK: np.ndarray

    def to_bytes(self) -> bytes:
        """Little-endian header (round, checksum, S, N, M), then the arrays."""
        m = len(self.proposal_ids_MK)
        head = struct.pack("<qqiii", self.round, self.checksum, len(self.lengths_S), len(self.tokens_N), m)
        parts = (self.lengths_S, self.tokens_N, self.parents_N, self.proposal_ids_MK, self.proposal_probs_MK)
        return head + b"".join(p.tobytes() for p in parts)

    @staticmethod
    def from_bytes(payload: bytes | memoryview) -> Window:
        """The inverse of :meth:`to_bytes`."""
        number, checksum, s, n, m = struct.unpack_from("<qqiii", payload)
        at = struct.calcsize("<qqiii")
        arrays = []
        for count, dtype in ((s, np.int32), (n, np.int32), (n, np.int32), (m * MAX_PROPOSALS, np.int32)):
            arrays.append(np.frombuffer(payload, dtype, count, at))
            at += 4 * count
        probs = np.frombuffer(payload, np.float32, m * MAX_PROPOSALS, at)
        shape = (m, MAX_PROPOSALS)
        return Window(number, checksum, arrays[0], arrays[1], arrays[2], arrays[3].reshape(shape), probs.reshape(shape))


@dataclass(frozen=True, slots=True)
class VerdictMessage:
    """The target's judgement of one round, in the plan's order: accepted counts, and the extra token (-1: none)."""

    round: int
    num_accepted_S: np.ndarray
    tokens_S: np.ndarray

    def to_bytes(self) -> bytes:
        """Little-endian header (round, S), then the arrays."""
        head = struct.pack("<qi", self.round, len(self.tokens_S))
        return head + self.num_accepted_S.tobytes() + self.tokens_S.tobytes()

    @staticmethod
    def from_bytes(payload: bytes | memoryview) -> VerdictMessage:
        """The inverse of :meth:`to_bytes`."""
        number, s = struct.unpack_from("<qi", payload)
        at = struct.calcsize("<qi")
        accepted = np.frombuffer(payload, np.int32, s, at)
        return VerdictMessage(number, accepted, np.frombuffer(payload, np.int32, s, at + 4 * s))

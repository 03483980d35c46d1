"""The batch as one process knows it: sequences, their states and blocks. Coordinator and shards hold one each.

All replicas apply the same diffs at the same epochs and the same transitions after the same rounds, so they agree; a
checksum in every message proves it. Knows nothing of processes, models or text.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pearl_ray.core.messages import Extend, Join, Leave, PlanDiff, SetPace, SetWindow
from pearl_ray.core.phases import Commit, Node, Round, SequenceState, transition
from pearl_ray.core.sampling import Row
from pearl_ray.core.schedule import Limits, Member, Pace, RoundPlan, Work, plan_round


@dataclass(slots=True, kw_only=True)
class BatchSequence(Member):
    """A sequence of the batch: beside what the schedule sees, how it joined, its committed tokens, its blocks."""

    join: Join
    tokens: list[int]
    target_blocks: list[int] = field(default_factory=list)
    draft_blocks: list[int] = field(default_factory=list)

    def extend(self, target_blocks: Sequence[int], draft_blocks: Sequence[int], block_size: int) -> None:
        """Hold more blocks."""
        self.target_blocks += target_blocks
        self.draft_blocks += draft_blocks
        self.target_capacity = len(self.target_blocks) * block_size
        self.draft_capacity = len(self.draft_blocks) * block_size

    def row(self, position: int, drafted: Sequence[int] = ()) -> Row:
        """What decides the token at ``position``, given the drafted tokens between the committed ones and it."""
        params, num_prompt = self.join.params, self.state.num_prompt
        masked = self.join.stop_mask if position - num_prompt < params.min_tokens else ()
        if not params.has_penalties:
            return Row(params, self.join.seed, self.join.sample_index, position, masked=masked)
        output = [*self.tokens[num_prompt:], *drafted]
        assert num_prompt + len(output) == position
        return Row(
            params, self.join.seed, self.join.sample_index, position, self.tokens[:num_prompt], output, masked=masked
        )


class Replica:
    """The batch, moved by :meth:`apply` (diffs) and :meth:`advance` (rounds)."""

    def __init__(self, limits: Limits, block_size: int) -> None:
        self.limits = limits
        self.block_size = block_size
        self.epoch = 0
        self.pace = Pace(limits.max_num_batched_tokens)  # of long prompts; this one is no limit
        self.debt = 0  # see ``RoundPlan``
        self.sequences: dict[int, BatchSequence] = {}

    def apply(self, diff: PlanDiff) -> None:
        """Apply the coordinator's decisions; epochs must be consecutive."""
        assert diff.epoch == self.epoch + 1, f"epoch {diff.epoch} after {self.epoch}"
        self.epoch = diff.epoch
        for change in diff.changes:
            match change:
                case Join():
                    self.sequences[change.seq_id] = _joined(change, self.block_size)
                case Leave():
                    del self.sequences[change.seq_id]
                case Extend():
                    sequence = self.sequences[change.seq_id]
                    sequence.extend(change.target_blocks, change.draft_blocks, self.block_size)
                case SetWindow():
                    sequence = self.sequences[change.seq_id]
                    sequence.state = msgspec.structs.replace(sequence.state, window=change.window)
                case SetPace():
                    self.pace = Pace(change.tokens, change.every)

    def plan(self) -> RoundPlan:
        """The next round's work."""
        return plan_round(self.sequences.values(), self.limits, self.pace, self.debt)

    def advance(
        self, plan: RoundPlan, drafted: Sequence[tuple[Node, ...]], verdicts: Sequence[tuple[int, int]]
    ) -> list[Commit]:
        """Apply a finished round: per work of the plan, what was drafted, and (accepted, token) of the verdict."""
        sequences, commits = self.sequences, []
        for work, nodes, (num_accepted, token) in zip(plan.works, drafted, verdicts, strict=True):
            sequence = sequences[work.seq_id]
            event = Round(work.target_fed, work.draft_fed, nodes, work.num_tested, num_accepted, token)
            sequence.state, commit = transition(sequence.state, event)
            sequence.tokens.extend(commit.tokens)
            commits.append(commit)
        self.debt = plan.debt
        return commits

    def checksum(self) -> int:
        """A number that two replicas share only if their sequences, lengths, windows, pace and epochs agree."""
        counts = [self.epoch, self.pace.tokens, self.pace.every, self.debt]
        for seq_id, sequence in self.sequences.items():
            s = sequence.state
            counts += (seq_id, s.num_committed, len(s.pending), s.window, s.target_kv, s.draft_kv)
        return zlib.crc32(array("q", counts))

    def target_entry(self, work: Work, drafted: Sequence[Node] = ()) -> tuple[list[int], int]:
        """The tokens the target feeds for a work and the position of the first; ``drafted`` only in SD."""
        sequence = self.sequences[work.seq_id]
        start = sequence.state.target_kv
        return _slice(sequence, start, work.target_fed, drafted), start

    def draft_entry(self, work: Work) -> tuple[list[int], int]:
        """The tokens the draft feeds in its first step, and the position of the first."""
        sequence = self.sequences[work.seq_id]
        start = sequence.state.draft_kv
        return _slice(sequence, start, work.draft_fed, ()), start


def _slice(sequence: BatchSequence, start: int, count: int, drafted: Sequence[Node]) -> list[int]:
    """``count`` tokens from position ``start`` of committed + pending + drafted."""
    tokens = sequence.tokens[start : start + count]
    if len(tokens) < count:
        tail = [*sequence.state.pending, *drafted]
        skip = max(start - len(sequence.tokens), 0)
        tokens += [node.token for node in tail[skip : skip + count - len(tokens)]]
    assert len(tokens) == count
    return tokens


def _joined(join: Join, block_size: int) -> BatchSequence:
    state = SequenceState(
        num_prompt=join.num_prompt,
        num_committed=len(join.tokens),
        max_total=join.max_total,
        window=join.window,
        target_kv=join.target_cached,
        draft_kv=join.draft_cached,
    )
    sequence = BatchSequence(join.seq_id, state, 0, 0, join.rejection, join=join, tokens=list(join.tokens))
    sequence.extend(join.target_blocks, join.draft_blocks, block_size)
    return sequence

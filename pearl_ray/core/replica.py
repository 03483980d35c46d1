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

from pearl_ray.core.messages import Extend, Join, Leave, PlanDiff, SetWindow
from pearl_ray.core.phases import Commit, Node, Round, SequenceState, transition
from pearl_ray.core.sampling import Row
from pearl_ray.core.schedule import Limits, Member, RoundPlan, Work, plan_round


@dataclass(slots=True)
class BatchSequence:
    """A sequence of the batch: how it joined, its committed tokens, its state, its blocks in each cache."""

    join: Join
    state: SequenceState
    tokens: list[int]
    target_blocks: list[int] = field(default_factory=list)
    draft_blocks: list[int] = field(default_factory=list)

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
        self.sequences: dict[int, BatchSequence] = {}

    def apply(self, diff: PlanDiff) -> None:
        """Apply the coordinator's decisions; epochs must be consecutive."""
        assert diff.epoch == self.epoch + 1, f"epoch {diff.epoch} after {self.epoch}"
        self.epoch = diff.epoch
        for change in diff.changes:
            match change:
                case Join():
                    self.sequences[change.seq_id] = _joined(change)
                case Leave():
                    del self.sequences[change.seq_id]
                case Extend():
                    sequence = self.sequences[change.seq_id]
                    sequence.target_blocks.extend(change.target_blocks)
                    sequence.draft_blocks.extend(change.draft_blocks)
                case SetWindow():
                    sequence = self.sequences[change.seq_id]
                    sequence.state = msgspec.structs.replace(sequence.state, window=change.window)

    def plan(self) -> RoundPlan:
        """The next round's work."""
        size = self.block_size
        members = [
            Member(seq_id, s.state, len(s.target_blocks) * size, len(s.draft_blocks) * size, s.join.rejection)
            for seq_id, s in self.sequences.items()
        ]
        return plan_round(members, self.limits)

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
        return commits

    def checksum(self) -> int:
        """A number that two replicas share only if their sequences, lengths, windows and epochs agree."""
        counts = [self.epoch]
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


def _joined(join: Join) -> BatchSequence:
    state = SequenceState(
        num_prompt=join.num_prompt,
        num_committed=len(join.tokens),
        max_total=join.max_total,
        window=join.window,
        target_kv=join.target_cached,
        draft_kv=join.draft_cached,
    )
    return BatchSequence(join, state, list(join.tokens), list(join.target_blocks), list(join.draft_blocks))

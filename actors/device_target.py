"""The target's rounds on a GPU: one wait per round, and where nothing stands in the way the next pass is queued first.

A round whose sequences all decode by plain rows, of either rule, goes through ``Verification``. It may be *ahead*:
promised to the others before the verdict of the round before is known (see ``epochs``), it is queued behind that
verdict on the device, and the host's work of the round before runs while it computes. All other rounds (prefill,
penalties, bias, masks, grammars, log-probabilities) run pass, then verdict, with the host between. Knows no Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from pearl_ray.actors.device_scribe import is_plain
from pearl_ray.actors.epochs import LeaderEpochs
from pearl_ray.actors.target_loop import Drafted, Finished, Logprobs, TargetLoop
from pearl_ray.core.costs import FREE_ROWS
from pearl_ray.core.errors import ReplicaDivergedError
from pearl_ray.core.logits import adjusted_logits
from pearl_ray.core.phases import Node, Proposal
from pearl_ray.core.replica import BatchSequence
from pearl_ray.core.schedule import RoundPlan, Work
from pearl_ray.kernels.sampler import Sampler, judge_segments
from pearl_ray.model.batching import Entry
from pearl_ray.model.passes import PassRunner
from pearl_ray.model.verification import Decoding, Verification

ROUNDS_UNKNOWN = 2  # whose verdicts are still out when a round is promised


@dataclass(slots=True)
class DeviceTargetLoop(TargetLoop):
    """The loop of one target rank on its device.

    Attributes:
        sampler, verification: of this rank.
        free_rows: a pass that is queued ahead is made for the longest windows; at most so many rows.
        num_ahead: rounds that were queued ahead.
    """

    sampler: Sampler | None = None
    verification: Verification | None = None
    free_rows: int = FREE_ROWS
    num_ahead: int = 0
    _is_ahead: bool = False
    _judged: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert isinstance(self.runner, PassRunner) and self.sampler is not None and self.verification is not None
        if isinstance(self.epochs, LeaderEpochs):
            self.epochs.may_run_ahead = self.may_run_ahead

    @torch.inference_mode()
    def do_round(self, number: int, plan: RoundPlan) -> None:
        """One round: pass (unless it is under way), window, verdict, perhaps the next pass, transition."""
        assert isinstance(self.runner, PassRunner) and self.verification is not None
        started = time.monotonic()
        epoch, checksum = self.replica.epoch, self.replica.checksum()
        drafted: Drafted = [()] * len(plan.works)
        wait_s = 0.0
        in_turn = self.replica.limits.mode == "sd"
        if in_turn:
            drafted, wait_s = self._receive_window(number, plan, checksum)
        is_plain_round = self._is_ahead or self._is_plain(plan)
        logits_RV = None
        began = time.monotonic()
        if self._is_ahead:
            self._check_ahead(plan)
        elif is_plain_round:
            self.runner.tables.keep(self.replica.sequences)
            self._judged = [work for work in plan.works if work.num_rows]
            of = dict(zip((work.seq_id for work in plan.works), drafted, strict=True))
            self.verification.begin([self._decoding(work, of[work.seq_id]) for work in self._judged])
        else:
            self.verification.interrupt()
            self.runner.tables.keep(self.replica.sequences)
            logits_RV = self.runner.logits(self._entries(plan, drafted))
        if not in_turn:
            drafted, wait_s = self._receive_window(number, plan, checksum)
        logprobs: Logprobs = {}
        if is_plain_round:
            of = dict(zip((work.seq_id for work in plan.works), drafted, strict=True))
            tokens = [[node.token for node in of[work.seq_id]] for work in self._judged]
            works = {work.seq_id: work for work in plan.works}  # those judged are the round before's, if it is ahead
            proposals = [self._proposals(works[work.seq_id], of[work.seq_id]) for work in self._judged]
            self.verification.judge(tokens, proposals)
            goes_on = self.epochs.ahead
            if goes_on:
                self.verification.go_on([self.replica.sequences[work.seq_id].target_blocks for work in self._judged])
                self.epochs.keep_promise(number + 1)
                self.num_ahead += 1
            found = dict(zip((work.seq_id for work in self._judged), self.verification.verdicts(), strict=True))
            verdicts = [found.get(work.seq_id, (0, -1)) for work in plan.works]
            forward_s, gap_s = self.verification.times(behind=int(goes_on))
            wait_s = wait_s if in_turn else max(wait_s - forward_s, 0.0)  # the pass ran while the window was awaited
            self._is_ahead = goes_on
        else:
            verdicts = self._judge(plan, drafted, logits_RV)
            forward_s, gap_s = time.monotonic() - began - wait_s, 0.0
            logprobs = self._logprobs(plan, drafted, verdicts, logits_RV)
        times = (started, forward_s, wait_s, gap_s)
        self._finish(
            Finished(
                number, epoch, plan, drafted, verdicts, logprobs, checksum, *times, through_host=not is_plain_round
            )
        )

    def may_run_ahead(self, plan: RoundPlan) -> bool:
        """Whether the round after the one now stamped can follow without the host, as known up to two verdicts before.

        Every sequence decodes by plain rows and drafts its whole window, with room for what those rounds may commit
        and for the round itself, so that nothing is clipped and the plan is known: the same works again.
        """
        if self.replica.limits.mode == "sd" or not plan.works or not self._is_plain(plan):
            return False
        rows = 0
        for work in plan.works:
            sequence = self.replica.sequences[work.seq_id]
            state, width = sequence.state, max(work.num_drafted, 1)
            if state.window != work.num_drafted or work.num_rows != len(state.pending) + 1:
                return False
            if work.num_drafted == 0 and state.window > 0:
                return False
            reach = state.num_committed + (ROUNDS_UNKNOWN + 1) * width + width
            size = self.replica.block_size
            room = min(state.max_total, len(sequence.target_blocks) * size)
            if work.num_drafted:
                room = min(room, len(sequence.draft_blocks) * size)
            if reach > room:
                return False
            rows += width
        assert isinstance(self.runner, PassRunner)
        return rows <= min(self.free_rows, self.runner.max_rows) and len(plan.works) == len(self.replica.sequences)

    def _is_plain(self, plan: RoundPlan) -> bool:
        """Whether all sequences with target work decode by plain rows that fit a fixed shape."""
        assert isinstance(self.runner, PassRunner)
        rows = 0
        for work in plan.works:
            if work.target_fed == 0:
                continue
            sequence = self.replica.sequences[work.seq_id]
            if work.num_rows != work.target_fed or not sequence.state.is_decoding or not _draws_plainly(sequence):
                return False
            rows += work.num_rows
        return 0 < rows <= self.runner.max_rows and len(plan.works) <= self.runner.max_seqs

    def _decoding(self, work: Work, nodes: tuple[Node, ...]) -> Decoding:
        sequence = self.replica.sequences[work.seq_id]
        state = sequence.state
        tokens, start = self.replica.target_entry(work, nodes)
        window = [node.token for node in state.pending + nodes]
        tested = window[: work.num_tested]
        entry = Entry(tokens, start, sequence.target_blocks, work.num_rows, work.seq_id)
        tests_newest = not nodes and work.num_tested > len(state.pending)
        row = sequence.row(start + 1)
        return Decoding(entry, row, tested, tests_newest, work.num_drafted, sequence.join.rejection)

    def _proposals(self, work: Work, nodes: tuple[Node, ...]) -> list[Proposal]:
        """What the tokens tested this round were drawn from, under `rejection`: a pending one's came a round before."""
        sequence = self.replica.sequences[work.seq_id]
        if not sequence.join.rejection:
            return []
        tested = (sequence.state.pending + nodes)[: work.num_tested]
        return [node.proposal for node in tested if node.proposal is not None]

    def _check_ahead(self, plan: RoundPlan) -> None:
        """The device has begun the round; the plan, now that it is known, must be what it did."""
        same = [(work.seq_id, work.num_drafted) for work in self._judged]
        for work in plan.works:
            state = self.replica.sequences[work.seq_id].state
            if work.num_rows != len(state.pending) + 1 or work.num_drafted != state.window:
                raise ReplicaDivergedError(f"sequence {work.seq_id} was queued ahead and would be clipped: {work}")
        if [(work.seq_id, work.num_drafted) for work in plan.works] != same:
            raise ReplicaDivergedError("the batch of a round that was queued ahead has changed")

    def _judge(self, plan: RoundPlan, drafted: Drafted, logits_RV: torch.Tensor | None) -> list[tuple[int, int]]:
        """See ``TargetLoop``; one wait."""
        assert isinstance(self.runner, PassRunner) and self.sampler is not None
        verdicts = [(0, -1)] * len(plan.works)
        judged = [(i, work) for i, work in enumerate(plan.works) if work.num_rows]
        if not judged:
            self.runner.wait()  # a prefill chunk: nothing to read, but rounds mustn't pile up
            return verdicts
        assert logits_RV is not None
        segments = [self._segment(work, drafted[i]) for i, work in judged]
        rows = self._judged_rows(plan)
        own_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
        start = sum(self.runner.vocab_sizes[: self.runner.group.rank])
        adjusted_RV = adjusted_logits(own_RV, [row for s in segments for row in s.rows], vocab_start=start)
        found = torch.stack(judge_segments(self.sampler, adjusted_RV, segments))
        told = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        told.copy_(found, non_blocking=True)
        self.runner.wait()  # the round's one wait
        accepted, tokens = told.tolist()
        for (i, _), one, token in zip(judged, accepted, tokens, strict=True):
            verdicts[i] = (one, token)
        return verdicts


def _draws_plainly(sequence: BatchSequence) -> bool:
    return sequence.join.params.logprobs is None and is_plain(sequence.row(sequence.state.num_committed))

"""The target's rounds: verify what is pending while the draft writes on, judge, tell, go on. Knows no Ray.

One object per target rank; rank 0 leads: it stamps rounds, sends verdicts to the draft and summaries to the
coordinator. All ranks compute the verdict themselves, from the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pearl_ray.actors.epochs import Epochs, Sends
from pearl_ray.actors.grammars import Grammars
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.core.errors import ReplicaDivergedError
from pearl_ray.core.logprobs import token_logprobs
from pearl_ray.core.messages import RoundSummary, SequenceSummary, TokenLogprobs, VerdictMessage, Window
from pearl_ray.core.phases import Node, Proposal
from pearl_ray.core.replica import BatchSequence, Replica
from pearl_ray.core.schedule import RoundPlan, Work
from pearl_ray.core.verify import Segment, verify_sharded
from pearl_ray.model.batching import Entry
from pearl_ray.model.runner import ModelRunner

Drafted = Sequence[tuple[Node, ...]]
Logprobs = dict[int, tuple[list[TokenLogprobs], int, list[TokenLogprobs]]]


class Finished(NamedTuple):
    """A round that has been judged; ``epoch`` and ``checksum`` are of the replica before it, times are seconds."""

    number: int
    epoch: int
    plan: RoundPlan
    drafted: Drafted
    verdicts: list[tuple[int, int]]
    logprobs: Logprobs
    checksum: int
    started: float
    forward_s: float
    wait_s: float
    gap_s: float = 0.0
    through_host: bool = False


@dataclass(slots=True)
class TargetLoop:
    """The loop of one target rank.

    Attributes:
        bridge: to the draft; None in AR mode.
        coordinator: where the leader's summaries go; None on other ranks.
        timeout_s: how long the draft may take for its window.
        grammars: of the sequences that have one.
    """

    replica: Replica
    epochs: Epochs
    runner: ModelRunner
    bridge: Bridge | None
    coordinator: Sends | None
    timeout_s: float
    grammars: Grammars | None = None

    def run(self) -> int:
        """Do rounds until the deployment stops; returns how many."""
        number = 0
        while (plan := self.epochs.next_round(number)) is not None:
            self.do_round(number, plan)
            number += 1
        return number

    @torch.inference_mode()
    def do_round(self, number: int, plan: RoundPlan) -> None:
        """One round: forward, window, verdict, transition."""
        started = time.monotonic()
        epoch, checksum = self.replica.epoch, self.replica.checksum()
        drafted: Drafted = [()] * len(plan.works)
        wait_s = 0.0
        in_turn = self.replica.limits.mode == "sd"
        if in_turn:
            drafted, wait_s = self._receive_window(number, plan, checksum)
        forward_started = time.monotonic()
        logits = self.runner.logits(self._entries(plan, drafted))
        forward_s = time.monotonic() - forward_started
        if not in_turn:
            drafted, wait_s = self._receive_window(number, plan, checksum)
        verdicts = self._judge(plan, drafted, logits)
        logprobs = self._logprobs(plan, drafted, verdicts, logits)
        self._finish(Finished(number, epoch, plan, drafted, verdicts, logprobs, checksum, started, forward_s, wait_s))

    def _finish(self, done: Finished) -> None:
        """Tell the draft, move the replica, tell the coordinator."""
        number, plan = done.number, done.plan
        if self.bridge is not None and self.runner.group.rank == 0:
            counts = np.array([v[0] for v in done.verdicts], dtype=np.int32)
            tokens = np.array([v[1] for v in done.verdicts], dtype=np.int32)
            self.bridge.send_verdict(VerdictMessage(number, counts, tokens))
        self.replica.advance(plan, done.drafted, done.verdicts)
        if self.grammars is not None:
            self.grammars.drop_absent(self.replica.sequences)
        if self.coordinator is not None:
            sequences = [
                SequenceSummary(
                    work.seq_id, [node.token for node in nodes], *verdict, *done.logprobs.get(work.seq_id, ())
                )
                for work, nodes, verdict in zip(plan.works, done.drafted, done.verdicts, strict=True)
            ]
            times = (done.started, time.monotonic(), done.forward_s, done.wait_s)
            device = (plan.num_target_rows, done.gap_s, done.through_host)
            self.coordinator.send(RoundSummary(number, done.epoch, done.checksum, sequences, *times, *device))

    def _entries(self, plan: RoundPlan, drafted: Drafted) -> list[Entry]:
        entries = []
        for work, nodes in zip(plan.works, drafted, strict=True):
            if work.target_fed:
                tokens, start = self.replica.target_entry(work, nodes)
                blocks = self.replica.sequences[work.seq_id].target_blocks
                entries.append(Entry(tokens, start, blocks, self._num_outputs(work), work.seq_id))
        return entries

    def _num_outputs(self, work: Work) -> int:
        """Rows of the pass whose logits are wanted: more than the plan's where a prompt's log-probabilities are."""
        sequence = self.replica.sequences[work.seq_id]
        wants_prompt = sequence.join.params.prompt_logprobs is not None
        return work.target_fed if wants_prompt and work.target_fed and _in_prompt(sequence) else work.num_rows

    def _receive_window(self, number: int, plan: RoundPlan, checksum: int) -> tuple[Drafted, float]:
        """The draft's tokens per work of the plan, and the seconds waited for them."""
        if plan.num_drafted == 0:
            return [()] * len(plan.works), 0.0
        assert self.bridge is not None
        started = time.monotonic()
        window = self.bridge.receive_window(number, self.timeout_s)
        if window.checksum != checksum or window.lengths_S.tolist() != [w.num_drafted for w in plan.works]:
            raise ReplicaDivergedError(f"round {number}: draft and target disagree about the batch")
        return self._nodes(plan, window), time.monotonic() - started

    def _nodes(self, plan: RoundPlan, window: Window) -> Drafted:
        tokens, parents = window.tokens_N.tolist(), window.parents_N.tolist()
        at = proposal_at = 0
        drafted: list[tuple[Node, ...]] = []
        for work in plan.works:
            nodes = []
            for i in range(at, at + work.num_drafted):
                proposal = None
                if self.replica.sequences[work.seq_id].join.rejection:
                    ids, probs = window.proposal_ids_MK[proposal_at], window.proposal_probs_MK[proposal_at]
                    proposal = Proposal(ids, probs)
                    proposal_at += 1
                nodes.append(Node(tokens[i], parents[i], proposal))
            drafted.append(tuple(nodes))
            at += work.num_drafted
        return drafted

    def _judge(self, plan: RoundPlan, drafted: Drafted, logits_RV: torch.Tensor | None) -> list[tuple[int, int]]:
        """(accepted, token) per work; (0, -1) where a work has no rows."""
        verdicts = [(0, -1)] * len(plan.works)
        judged = [(i, work) for i, work in enumerate(plan.works) if work.num_rows]
        if judged:
            assert logits_RV is not None
            segments = [self._segment(work, drafted[i]) for i, work in judged]
            group, sizes = self.runner.group, self.runner.vocab_sizes
            rows = self._judged_rows(plan)
            own_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
            found = verify_sharded(own_RV, segments, group, sizes, num_valid=self.runner.num_valid)
            for (i, _), verdict in zip(judged, found, strict=True):
                verdicts[i] = (verdict.num_accepted, verdict.token)
        return verdicts

    def _judged_rows(self, plan: RoundPlan) -> list[int]:
        """Which rows of the logits are judged: the last ``num_rows`` of each work's."""
        rows: list[int] = []
        end = 0
        for work in plan.works:
            end += self._num_outputs(work)
            rows += range(end - work.num_rows, end)
        return rows

    def _logprobs(
        self, plan: RoundPlan, drafted: Drafted, verdicts: list[tuple[int, int]], logits_RV: torch.Tensor | None
    ) -> Logprobs:
        """Per sequence that asks: those of its committed tokens, and of the prompt tokens this round fed."""
        found: Logprobs = {}
        end = 0
        for work, nodes, (num_accepted, token) in zip(plan.works, drafted, verdicts, strict=True):
            outputs = self._num_outputs(work)
            begin, end = end, end + outputs
            sequence = self.replica.sequences[work.seq_id]
            params = sequence.join.params
            wants_output = params.logprobs is not None and work.num_rows > 0
            if logits_RV is None or not (wants_output or outputs > work.num_rows):
                continue
            whole_RV = self.runner.group.all_gather(logits_RV[begin:end].contiguous(), self.runner.vocab_sizes)
            output: list[TokenLogprobs] = []
            if params.logprobs is not None and work.num_rows:
                window = [node.token for node in sequence.state.pending + nodes]
                committed = window[:num_accepted] + ([token] if token >= 0 else [])
                first = outputs - work.num_rows
                rows_RV = whole_RV[first : first + len(committed)]
                output = token_logprobs(rows_RV, committed, params.logprobs, num_valid=self.runner.num_valid)
            start = sequence.state.target_kv + 1
            known = sequence.tokens[start : start + outputs] if outputs > work.num_rows or _in_prompt(sequence) else []
            prompt: list[TokenLogprobs] = []
            if params.prompt_logprobs is not None and known:
                rows_RV = whole_RV[: len(known)]
                prompt = token_logprobs(rows_RV, known, params.prompt_logprobs, num_valid=self.runner.num_valid)
            found[work.seq_id] = (output, start, prompt)
        return found

    def _segment(self, work: Work, nodes: tuple[Node, ...]) -> Segment:
        sequence = self.replica.sequences[work.seq_id]
        window = (sequence.state.pending + nodes)[: work.num_tested]
        tokens = [node.token for node in window]
        first = sequence.state.target_kv + work.target_fed - work.num_rows + 1
        rows = tuple(sequence.row(first + i, tokens[:i]) for i in range(work.num_rows))
        if sequence.join.params.structured_outputs is not None:
            assert self.grammars is not None
            rows = self.grammars.masked_window(sequence, rows, tokens)
        if not sequence.join.rejection or not window:
            return Segment(rows, tuple(tokens), sequence.join.rejection, None, None)
        proposals = [node.proposal for node in window]
        ids = np.stack([p.ids_K for p in proposals if p is not None])
        probs = np.stack([p.probs_K for p in proposals if p is not None])
        return Segment(rows, tuple(tokens), True, ids, probs)


def _in_prompt(sequence: BatchSequence) -> bool:
    """Whether the sequence's prompt is being fed for the first time."""
    return not sequence.state.is_decoding and sequence.state.num_committed == sequence.state.num_prompt

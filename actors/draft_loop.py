"""The draft's rounds: write the next window while the target verifies the last, then learn the verdict. Knows no Ray.

One object per draft rank; all ranks compute the same tokens, rank 0 sends them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pearl_ray.actors.device_scribe import DeviceScribe
from pearl_ray.actors.epochs import Epochs, Sends
from pearl_ray.actors.grammars import Grammars
from pearl_ray.cluster.bridge import Bridge
from pearl_ray.core.messages import MAX_PROPOSALS, DraftSummary, Window
from pearl_ray.core.phases import Node
from pearl_ray.core.replica import Replica
from pearl_ray.core.sampling import Row, coupled_tokens_sharded, propose
from pearl_ray.core.schedule import RoundPlan, Work
from pearl_ray.model.batching import Entry
from pearl_ray.model.draft_steps import DraftSteps
from pearl_ray.model.runner import ModelRunner


@dataclass(slots=True)
class DraftLoop:
    """The loop of one draft rank; ``coordinator`` is where the leader's summaries go, None on other ranks.

    ``grammars``: with them the draft proposes only what the target's grammar allows (host work, which on the CPU costs
    no more than the noise); without, it proposes freely, and the target refuses.
    ``steps``: with them the steps of plain rounds feed each other on the device.
    """

    replica: Replica
    epochs: Epochs
    runner: ModelRunner
    bridge: Bridge
    coordinator: Sends | None
    timeout_s: float
    grammars: Grammars | None = None
    steps: DraftSteps | None = None

    def run(self) -> int:
        """Do rounds until the deployment stops; returns how many."""
        number = 0
        while (plan := self.epochs.next_round(number)) is not None:
            self.do_round(number, plan)
            number += 1
        return number

    @torch.inference_mode()
    def do_round(self, number: int, plan: RoundPlan) -> None:
        """One round: draft, send, wait for the verdict, transition."""
        started = time.monotonic()
        checksum = self.replica.checksum()
        scribe = self._scribe(plan)
        drafted = scribe.write()
        forward_s = time.monotonic() - started
        if plan.num_drafted and self.runner.group.rank == 0:
            self.bridge.send_window(scribe.window(number, checksum))
        finished = time.monotonic()
        verdict = self.bridge.receive_verdict(number, self.timeout_s)
        received = time.monotonic()
        wait_s = received - finished
        pairs = list(zip(verdict.num_accepted_S.tolist(), verdict.tokens_S.tolist(), strict=True))
        self.replica.advance(plan, drafted, pairs)
        if self.grammars is not None:
            self.grammars.drop_absent(self.replica.sequences)
        advance_s = time.monotonic() - received
        if self.coordinator is not None:
            times = (started, finished, forward_s, wait_s)
            num_fed = sum(work.draft_fed for work in plan.works)
            self.coordinator.send(DraftSummary(number, checksum, *times, scribe.num_steps, advance_s, num_fed))

    def _scribe(self, plan: RoundPlan) -> _Scribe | DeviceScribe:
        first = self._first_entries(plan)
        if self.steps is not None:
            self.steps.keep(self.replica.sequences)
            scribe = DeviceScribe(self.replica, self.steps, plan, first)
            if scribe.is_able(with_grammars=self.grammars is not None):
                return scribe
        return _Scribe(self.replica, self.runner, plan, first, self.grammars, self.steps)

    def _first_entries(self, plan: RoundPlan) -> list[Entry]:
        """Step 1: what the cache lacks, prefill chunks too."""
        entries = []
        for work in plan.works:
            if work.draft_fed:
                tokens, start = self.replica.draft_entry(work)
                blocks = self.replica.sequences[work.seq_id].draft_blocks
                entries.append(Entry(tokens, start, blocks, int(work.num_drafted > 0), work.seq_id))
        return entries


class _Scribe:
    """One round's drafting: step 1 feeds ``first``, the others one token each.

    ``steps``: where other rounds draft on the device; proposals then are its kernels' here too.
    """

    def __init__(
        self,
        replica: Replica,
        runner: ModelRunner,
        plan: RoundPlan,
        first: list[Entry],
        grammars: Grammars | None,
        steps: DraftSteps | None = None,
    ) -> None:
        self._replica = replica
        self._runner = runner
        self._plan = plan
        self._first = first
        self._grammars = grammars
        self._steps = steps
        self._made: dict[int, list[int]] = {work.seq_id: [] for work in plan.works}
        self._proposals: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {work.seq_id: [] for work in plan.works}
        self.num_steps = 0

    def write(self) -> list[tuple[Node, ...]]:
        """Draft; returns the nodes per work of the plan."""
        writing = [work for work in self._plan.works if work.num_drafted]
        if self._first:
            self._step(self._first, writing)
        while writing := [w for w in writing if len(self._made[w.seq_id]) < w.num_drafted]:
            self._step([self._next_entry(work) for work in writing], writing)
        return [tuple(map(Node, self._made[work.seq_id])) for work in self._plan.works]

    def _next_entry(self, work: Work) -> Entry:
        sequence = self._replica.sequences[work.seq_id]
        made = self._made[work.seq_id]
        start = sequence.state.num_committed + len(sequence.state.pending) + len(made) - 1
        return Entry((made[-1],), start, sequence.draft_blocks, 1, work.seq_id)

    def _step(self, entries: list[Entry], writing: list[Work]) -> None:
        """One forward pass of the draft, and a token for each of ``writing``."""
        logits = self._runner.logits(entries)
        self.num_steps += 1
        if not writing:
            return
        assert logits is not None
        rows = [self._row(work) for work in writing]
        runner = self._runner
        rejecting = [i for i, w in enumerate(writing) if self._replica.sequences[w.seq_id].join.rejection]
        if len(rejecting) < len(writing):
            tokens = coupled_tokens_sharded(
                logits, rows, runner.group, runner.vocab_sizes, draft=True, num_valid=runner.num_valid
            )
        else:
            tokens = [-1] * len(writing)
        if rejecting:
            drawn, ids, probs = self._propose(logits[rejecting], [rows[i] for i in rejecting])
            for at, i in enumerate(rejecting):
                tokens[i] = drawn[at]
                self._proposals[writing[i].seq_id].append((ids[at], probs[at]))
        for work, token in zip(writing, tokens, strict=True):
            self._made[work.seq_id].append(token)

    def _propose(
        self, logits_RV: torch.Tensor, rows: list[Row]
    ) -> tuple[list[int], NDArray[np.int32], NDArray[np.float32]]:
        if self._steps is not None:
            return self._steps.propose(logits_RV, rows)
        whole_RV = self._runner.group.all_gather(logits_RV, self._runner.vocab_sizes)
        return propose(whole_RV, rows, num_valid=self._runner.num_valid)

    def _row(self, work: Work) -> Row:
        sequence = self._replica.sequences[work.seq_id]
        drafted = [node.token for node in sequence.state.pending] + self._made[work.seq_id]
        row = sequence.row(sequence.state.num_committed + len(drafted), drafted)
        if self._grammars is None or sequence.join.params.structured_outputs is None:
            return row
        return self._grammars.masked_after(sequence, row, drafted)

    def window(self, number: int, checksum: int) -> Window:
        """What was drafted, for the bridge."""
        made = [self._made[work.seq_id] for work in self._plan.works]
        pairs = [pair for work in self._plan.works for pair in self._proposals[work.seq_id]]
        ids = np.array([p[0] for p in pairs], dtype=np.int32).reshape(-1, MAX_PROPOSALS)
        probs = np.array([p[1] for p in pairs], dtype=np.float32).reshape(-1, MAX_PROPOSALS)
        return Window(
            number,
            checksum,
            np.array([len(tokens) for tokens in made], dtype=np.int32),
            np.array([token for tokens in made for token in tokens], dtype=np.int32),
            np.ones(sum(map(len, made)), np.int32),
            ids,
            probs,
        )

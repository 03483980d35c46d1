"""The whole machine without processes or models: a controller, a target and a draft replica, fake models and caches.

The fake models are tables from the last tokens to logits, so the right answer can be computed token by token. The fake
caches remember, per slot, which prefix was written there, and every read is checked: a block that leaked, was shared
by two writers, hashed too early or not truncated shows up at once as a wrong prefix.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.controller import Controller, ControllerConfig
from pearl_ray.core.messages import PlanDiff, RoundSummary, SequenceSummary
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Mode, Node, Proposal
from pearl_ray.core.replica import Replica
from pearl_ray.core.requests import Update
from pearl_ray.core.sampling import Row, coupled_tokens, propose
from pearl_ray.core.schedule import Limits, RoundPlan
from pearl_ray.core.verify import Segment, Verdict, verify
from pearl_ray.core.windows import WindowPolicy

VOCAB = 12
EOS = 11


class FakeModel:
    """A known distribution: float64 logits that depend on the last two tokens; ``blur`` of another makes a draft."""

    def __init__(self, seed: int, scale: float = 2.0) -> None:
        self._table = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB, VOCAB)) * scale
        self._table[:, :, EOS] -= 3.0

    def blurred(self, seed: int, noise: float) -> FakeModel:
        other = FakeModel(seed)
        other._table = self._table + np.random.default_rng(seed).normal(size=self._table.shape) * noise
        return other

    def logits(self, prefix: Sequence[int]) -> np.ndarray:
        return self._table[prefix[-2] if len(prefix) > 1 else 0, prefix[-1]]


class FakeCache:
    """Slots that remember the prefix whose last token was written there."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._slots: list[int | None] = [None] * (num_blocks * block_size)
        self._size = block_size

    def feed(self, tokens: Sequence[int], start: int, count: int, blocks: Sequence[int]) -> None:
        """Write ``tokens[start : start + count]``; everything before must be there already, exactly."""
        prefix = 0
        for position, token in enumerate(tokens[: start + count]):
            prefix = hash((prefix, token))
            slot = blocks[position // self._size] * self._size + position % self._size
            if position >= start:
                self._slots[slot] = prefix
            assert self._slots[slot] == prefix, f"position {position} holds another prefix"


class Simulation:
    """Rounds in lockstep; diffs and summaries wait in queues that the test empties when it likes."""

    def __init__(
        self,
        *,
        mode: Mode = "pearl",
        window: int = 3,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 64,
        max_waiting_requests: int | None = None,
        verification: str = "coupled",
        target: FakeModel | None = None,
        draft: FakeModel | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.target = target or FakeModel(1)
        self.draft = draft or self.target.blurred(2, 1.0)
        self.mode: Mode = mode
        limits = Limits(mode, max_num_batched_tokens)
        self.pools = [BlockPool(num_blocks, block_size, prefix_caching=prefix_caching) for _ in range(2)]
        config = ControllerConfig(
            limits=limits,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_waiting_requests=max_waiting_requests,
            verification=verification,
            eos_token_ids=frozenset({EOS}),
            vocab_size=VOCAB,
            seed=7,
        )
        self.clock = itertools.count()
        self.controller = Controller(
            config,
            self.pools[0],
            self.pools[1] if mode != "ar" else None,
            WindowPolicy(mode, window, None),
            decode=lambda ids: "".join(chr(97 + i) for i in ids if i != EOS),
            clock=lambda: float(next(self.clock)),
        )
        self.shards = [Replica(limits, block_size) for _ in range(2)]
        self.caches = [FakeCache(num_blocks, block_size) for _ in range(2)]
        self.diffs: deque[PlanDiff] = deque()
        self.summaries: deque[RoundSummary] = deque()
        self.updates: list[Update] = []
        self.num_rounds = 0
        self.num_target_rows = 0
        self._expected: dict[tuple[object, ...], list[int]] = {}

    # -- messages ---------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Take what the controller has to say."""
        diff = self.controller.take_diff()
        if diff is not None:
            self.diffs.append(diff)
        self.updates += self.controller.take_updates()

    def deliver_summary(self) -> bool:
        """Hand the oldest summary to the controller."""
        if not self.summaries:
            return False
        self.controller.on_round(self.summaries.popleft())
        self.collect()
        return True

    def round(self, num_diffs: int | None = None) -> bool:
        """One round of both shards after the next ``num_diffs`` diffs (None: all); False if there was no work."""
        for _ in range(len(self.diffs) if num_diffs is None else min(num_diffs, len(self.diffs))):
            diff = self.diffs.popleft()
            for shard in self.shards:
                shard.apply(diff)
        target, draft = self.shards
        plan = target.plan()
        assert plan == draft.plan() and target.checksum() == draft.checksum()
        if not plan.works:
            return False
        epoch, checksum = target.epoch, target.checksum()
        drafted = self._draft(plan)
        verdicts = self._verify(plan, drafted)
        pairs = [(v.num_accepted, v.token) for v in verdicts]
        target.advance(plan, drafted, pairs)
        draft.advance(plan, [tuple(Node(n.token, n.parent) for n in nodes) for nodes in drafted], pairs)
        sequences = [
            SequenceSummary(work.seq_id, [n.token for n in nodes], *pair)
            for work, nodes, pair in zip(plan.works, drafted, pairs, strict=True)
        ]
        rows = plan.num_target_rows
        self.summaries.append(RoundSummary(self.num_rounds, epoch, checksum, sequences, 0.0, 0.0, 0.0, 0.0, rows))
        self.num_rounds += 1
        self.num_target_rows += rows
        return True

    def run(self, max_rounds: int = 10_000) -> None:
        """Until nothing is left to do."""
        self.collect()
        for _ in range(max_rounds):
            worked = self.round()
            told = self.deliver_summary()
            if not worked and not told and not self.diffs:
                return
        raise AssertionError("the machine doesn't come to rest")

    # -- the two models ---------------------------------------------------------------------------------------------

    def _draft(self, plan: RoundPlan) -> list[tuple[Node, ...]]:
        replica, cache = self.shards[1], self.caches[1]
        drafted: list[tuple[Node, ...]] = []
        for work in plan.works:
            sequence = replica.sequences[work.seq_id]
            state = sequence.state
            made: list[Node] = []
            base = sequence.tokens + [n.token for n in state.pending]
            if work.draft_fed:
                tokens, start = replica.draft_entry(work)
                assert start == state.draft_kv and tokens == base[start : start + work.draft_fed]
                cache.feed(base, start, work.draft_fed, sequence.draft_blocks)
            while len(made) < work.num_drafted:
                known = base + [n.token for n in made]
                if made:
                    cache.feed(known, len(known) - 1, 1, sequence.draft_blocks)
                row = sequence.row(len(known), known[len(sequence.tokens) :])
                made.append(self._propose(self.draft.logits(known), row, sequence.join.rejection))
            drafted.append(tuple(made))
        return drafted

    def _propose(self, logits: np.ndarray, row: Row, rejection: bool) -> Node:
        logits_RV = torch.from_numpy(logits)[None]
        if not rejection:
            return Node(coupled_tokens(logits_RV, [row], draft=True)[0])
        tokens, ids, probs = propose(logits_RV, [row])
        return Node(tokens[0], proposal=Proposal(ids[0], probs[0]))

    def _verify(self, plan: RoundPlan, drafted: list[tuple[Node, ...]]) -> list[Verdict]:
        replica, cache = self.shards[0], self.caches[0]
        verdicts = [Verdict(0, -1)] * len(plan.works)
        for index, (work, nodes) in enumerate(zip(plan.works, drafted, strict=True)):
            sequence = replica.sequences[work.seq_id]
            if not work.target_fed:
                continue
            known = sequence.tokens + [n.token for n in sequence.state.pending + nodes]
            start = sequence.state.target_kv
            tokens, first = replica.target_entry(work, nodes)
            assert first == start and tokens == known[start : start + work.target_fed]
            cache.feed(known, start, work.target_fed, sequence.target_blocks)
            if not work.num_rows:
                continue
            window = (sequence.state.pending + nodes)[: work.num_tested]
            begin = start + work.target_fed - work.num_rows + 1
            drafted_ids = [n.token for n in window]
            rows = tuple(sequence.row(begin + i, drafted_ids[:i]) for i in range(work.num_rows))
            logits = torch.from_numpy(np.stack([self.target.logits(known[: begin + i]) for i in range(work.num_rows)]))
            ids = probs = None
            if sequence.join.rejection and window:
                ids = np.stack([n.proposal.ids_K for n in window if n.proposal])
                probs = np.stack([n.proposal.probs_K for n in window if n.proposal])
            segment = Segment(rows, tuple(drafted_ids), sequence.join.rejection, ids, probs)
            verdicts[index] = verify(logits, [segment])[0]
        return verdicts

    # -- the right answer -------------------------------------------------------------------------------------------

    def expected(self, prompt: Sequence[int], params: SamplingParams, sample_index: int = 0) -> list[int]:
        """The target's own text for a request with a seed (`coupled`), token by token, stops included."""
        key = (tuple(prompt), repr(params), sample_index)
        if key not in self._expected:
            self._expected[key] = self._sequential(prompt, params, sample_index)
        return self._expected[key]

    def _sequential(self, prompt: Sequence[int], params: SamplingParams, sample_index: int) -> list[int]:
        tokens = list(prompt)
        limit = min(len(prompt) + (params.max_tokens or 10**9), self.controller.config.max_model_len)
        while len(tokens) < limit:
            output = tokens[len(prompt) :]
            stops = () if params.ignore_eos else (EOS,)
            masked = (*params.stop_token_ids, *stops) if len(output) < params.min_tokens else ()
            row = Row(params, (params.seed or 0) % 2**64, sample_index, len(tokens), prompt, output, masked=masked)
            token = coupled_tokens(torch.from_numpy(self.target.logits(tokens))[None], [row])[0]
            tokens.append(token)
            if len(output) + 1 >= params.min_tokens and (token in params.stop_token_ids or token in stops):
                break
        return tokens[len(prompt) :]

    def assert_at_rest(self) -> None:
        """Nothing is left: no sequence anywhere, every block free."""
        assert self.controller.num_running == self.controller.num_waiting == 0 and not self.controller.requests
        assert all(not shard.sequences for shard in self.shards)
        for pool in self.pools:
            assert pool.num_free == pool.num_blocks

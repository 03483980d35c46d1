"""Traffic as users send it, what serves it, and the one check: every text is the one that the request gets alone.

Serves on :class:`Simulation` (fake models, every cache slot checked) and on :class:`LocalEngine` (the tiny pair). Knows
which fields there are to mix; what a text should be it asks an engine that has nothing else to do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from pearl_ray.core.blocks import BlockPool
from pearl_ray.core.controller import Controller
from pearl_ray.core.errors import RequestRefusedError
from pearl_ray.core.messages import DraftSummary, RoundSummary
from pearl_ray.core.pacing import PacingPolicy
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Node, Proposal
from pearl_ray.core.requests import Request
from pearl_ray.core.sampling import coupled_tokens, propose
from pearl_ray.core.schedule import RoundPlan
from pearl_ray.core.verify import Segment, Verdict, verify
from tests.local_engine import LocalEngine
from tests.simulation import FakeCache, Simulation

Answer = tuple[tuple[int, ...], str, str | None, object]  # tokens, text, finish reason, stop reason
MODEL_LEN = 32_768
CROWD = 12


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and the number of the round before which it is submitted."""

    round: int
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Ids that prompts are made of, and strings that may be in the text."""

    ids: range
    stops: tuple[str, ...]


LETTERS = Alphabet(range(11), ("a", "bc", "dad", "kk", "jig", "fe"))  # of the simulation
TINY = Alphabet(range(2, 64), ("e", "th", "OK", "a b", "\n", "7"))


def random_params(chance: random.Random, alphabet: Alphabet, longest: int = 48) -> SamplingParams:
    """Any mixture of fields; always a seed, so that there is one right answer."""
    most = chance.choices([round(24 ** chance.random()), longest], [3, 1])[0]
    options: dict[str, object] = {"max_tokens": most}

    def maybe(name: str, share: float, value: Callable[[], object]) -> None:
        if chance.random() < share:
            options[name] = value()

    maybe("top_p", 0.25, lambda: chance.choice([0.3, 0.8, 0.95]))
    maybe("top_k", 0.25, lambda: chance.choice([1, 3, 8]))
    maybe("min_p", 0.2, lambda: chance.choice([0.02, 0.2]))
    maybe("presence_penalty", 0.2, lambda: chance.uniform(-2, 2))
    maybe("frequency_penalty", 0.2, lambda: chance.uniform(-2, 2))
    maybe("repetition_penalty", 0.2, lambda: chance.uniform(0.7, 1.8))
    maybe("logit_bias", 0.2, lambda: {chance.choice(alphabet.ids): chance.uniform(-5, 5) for _ in range(3)})
    maybe("n", 0.15, lambda: 2)
    maybe("stop", 0.2, lambda: chance.sample(alphabet.stops, chance.randint(1, 2)))
    maybe("stop_token_ids", 0.15, lambda: [chance.choice(alphabet.ids)])
    maybe("min_tokens", 0.3, lambda: chance.randint(0, options["max_tokens"]))  # type: ignore[arg-type]
    maybe("ignore_eos", 0.75, lambda: True)
    maybe("draft_temperature", 0.15, lambda: chance.choice([0.0, 0.5, 2.0]))
    maybe("verification", 0.5, lambda: chance.choice(["coupled", "rejection"]))
    maybe("num_speculative_tokens", 0.4, lambda: chance.choice([0, 1, 2, 3, 6]))
    temperature = chance.choice([0.0, 0.6, 1.0, 1.5])
    return SamplingParams(temperature=temperature, seed=chance.getrandbits(64), **options)  # type: ignore[arg-type]


def traffic(
    seed: int,
    count: int,
    alphabet: Alphabet,
    *,
    rate: float,
    prompts: tuple[int, int] = (10, 4000),
    hopeless: int = 20,
    room: int,
) -> list[Arrival]:
    """Poisson arrivals, ``rate`` a round; prompt lengths log-uniform; half the prompts go on from an earlier one.

    Every ``hopeless``-th asks for more tokens than the ``room`` of the cache. The first ``CROWD`` all fit at first, and
    together want half as much again as there is when they have grown.
    """
    chance = random.Random(seed)
    arrivals: list[Arrival] = []
    at = 0.0
    for number in range(count):
        at += chance.expovariate(rate)
        length = round(prompts[0] * (prompts[1] / prompts[0]) ** chance.random())
        earlier = chance.choice(arrivals).prompt if arrivals and chance.random() < 0.5 else ()
        prompt = (*earlier[: length - 1], *chance.choices(alphabet.ids, k=length))[:length]
        params = random_params(chance, alphabet, longest=80 if length < 300 else 24)
        if number < CROWD:
            prompt = tuple(chance.choices(alphabet.ids, k=max(room // CROWD - 48, 12)))
            grown = {"max_tokens": min(room // CROWD // 2 + 48, 160), "min_tokens": 0, "ignore_eos": True}
            params = replace(params, n=1, stop=(), stop_token_ids=(), **grown)  # type: ignore[arg-type]
        if number % hopeless == hopeless - 1:
            params = replace(params, max_tokens=room + chance.randint(1, room))
        arrivals.append(Arrival(int(at), prompt, params))
    return arrivals


@dataclass(slots=True)
class Outcome:
    """What became of the traffic: answers by its index, in order of ``n``; who was refused; what the caches went
    through, per model."""

    answers: dict[int, list[Answer]] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)
    preemptions: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    num_paced: int = 0  # rounds behind which a long prompt has to rest


class Desk:
    """Submits arrivals when their round comes, and collects what the requests end as."""

    def __init__(self, controller: Controller, pools: Sequence[BlockPool], arrivals: Sequence[Arrival]) -> None:
        self._controller, self._pools = controller, pools
        self._due = list(enumerate(arrivals))
        self._requests: dict[int, Request] = {}
        self._outcome = Outcome()
        self._kept = [_digests_kept(pool) for pool in pools]

    @property
    def is_done(self) -> bool:
        return not self._due

    def submit_due(self, number: int) -> bool:
        """Those of this round and before; whether there were any."""
        count = 0
        while self._due and self._due[0][1].round <= number:
            index, arrival = self._due.pop(0)
            count += 1
            try:
                request = self._controller.submit(f"r{index}", None, arrival.prompt, arrival.params)
            except RequestRefusedError as error:
                assert "needs a cache of" in str(error)
                self._outcome.refused.append(index)
            else:
                self._requests[index] = request
        return count > 0

    def next_round(self) -> int:
        return self._due[0][1].round

    def outcome(self) -> Outcome:
        """Once all has come to rest."""
        outcome = self._outcome
        still = list(self._controller.requests)
        assert not still and not self._controller.num_running and not self._controller.num_waiting, f"{still} never end"
        for pool in self._pools:
            assert pool.num_free == pool.num_blocks and pool.usage().num_held == 0, "a block is still held"
        for index, request in self._requests.items():
            assert request.finished
            outcome.answers[index] = answers_of(request)
        outcome.preemptions = self._controller.statistics.preemptions
        outcome.hit_tokens = min(pool.usage().hit_tokens for pool in self._pools)
        # No more hashes than blocks can be findable: the others were evicted.
        outcome.evictions = min(len(kept) - pool.num_blocks for kept, pool in zip(self._kept, self._pools, strict=True))
        return outcome


def _digests_kept(pool: BlockPool) -> set[bytes]:
    """All that the pool was ever told to keep findable."""
    kept: set[bytes] = set()
    keep = pool.keep

    def counted(block: int, digest: bytes) -> None:
        kept.add(digest)
        keep(block, digest)

    pool.keep = counted  # type: ignore[method-assign]
    return kept


def answers_of(request: Request) -> list[Answer]:
    outputs = request.output().outputs
    return [(tuple(o.token_ids), o.text, o.finish_reason, o.stop_reason) for o in outputs]


class QuickCache(FakeCache):
    """The same checks a block at a time: prompts here are a hundred times as long."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self._num_fed = 0
        self._known: dict[int, tuple[list[int], list[int]]] = {}  # by first block: tokens, hashes of their prefixes

    def feed(self, tokens: Sequence[int], start: int, count: int, blocks: Sequence[int]) -> None:
        end, size = start + count, self._size
        known, hashes = self._known.get(blocks[0], ([], []))
        common = min(len(known), end)
        while common and known[:common] != tokens[:common]:
            common = max(common - size, 0)
        hashes = hashes[:common]
        for token in tokens[common:end]:
            hashes.append(hash((hashes[-1] if hashes else 0, token)))
        self._known[blocks[0]] = (list(tokens[:end]), hashes)
        self._num_fed += 1
        whole = self._num_fed % 8 == 0  # else the newest blocks only: a prompt has a thousand
        for at in range(0 if whole else max(start // size - 4, 0) * size, end, size):
            written, first = min(size, end - at), blocks[at // size] * size
            old = max(min(start - at, written), 0)
            assert self._slots[first : first + old] == hashes[at : at + old], f"block {at // size} holds another prefix"
            self._slots[first + old : first + written] = hashes[at + old : at + written]


class BatchedSimulation(Simulation):
    """Draws for all sequences of a round together, as the shards do: a row at a time costs ten times as much."""

    def __init__(self, **options: object) -> None:
        super().__init__(**({"max_model_len": MODEL_LEN} | options))  # type: ignore[arg-type]
        self.caches = [QuickCache(pool.num_blocks, pool.block_size) for pool in self.pools]

    def _draft(self, plan: RoundPlan) -> list[tuple[Node, ...]]:
        replica, cache = self.shards[1], self.caches[1]
        made: dict[int, list[Node]] = {work.seq_id: [] for work in plan.works}
        known = {}
        for work in plan.works:
            sequence = replica.sequences[work.seq_id]
            known[work.seq_id] = sequence.tokens + [n.token for n in sequence.state.pending]
            if work.draft_fed:
                tokens, start = replica.draft_entry(work)
                assert start == sequence.state.draft_kv
                assert tokens == known[work.seq_id][start : start + work.draft_fed]
                cache.feed(known[work.seq_id], start, work.draft_fed, sequence.draft_blocks)
        while writing := [w.seq_id for w in plan.works if len(made[w.seq_id]) < w.num_drafted]:
            rows = []
            for seq_id in writing:
                sequence, path = replica.sequences[seq_id], known[seq_id]
                if made[seq_id]:
                    cache.feed(path, len(path) - 1, 1, sequence.draft_blocks)
                rows.append(sequence.row(len(path), path[len(sequence.tokens) :]))
            logits = torch.from_numpy(np.stack([self.draft.logits(known[seq_id]) for seq_id in writing]))
            for rejection in (False, True):
                some = [i for i, s in enumerate(writing) if replica.sequences[s].join.rejection == rejection]
                if not some:
                    continue
                own, theirs = logits[some], [rows[i] for i in some]
                if rejection:
                    drawn = [(t, Proposal(i, q)) for t, i, q in zip(*propose(own, theirs), strict=True)]
                else:
                    drawn = [(token, None) for token in coupled_tokens(own, theirs, draft=True)]
                for i, (token, proposal) in zip(some, drawn, strict=True):
                    made[writing[i]].append(Node(token, proposal=proposal))
                    known[writing[i]].append(token)
        return [tuple(made[work.seq_id]) for work in plan.works]

    def _verify(self, plan: RoundPlan, drafted: list[tuple[Node, ...]]) -> list[Verdict]:
        replica, cache = self.shards[0], self.caches[0]
        verdicts = [Verdict(0, -1)] * len(plan.works)
        segments: dict[int, Segment] = {}
        logits = []
        for index, (work, nodes) in enumerate(zip(plan.works, drafted, strict=True)):
            if not work.target_fed:
                continue
            sequence = replica.sequences[work.seq_id]
            known = sequence.tokens + [n.token for n in sequence.state.pending + nodes]
            tokens, start = replica.target_entry(work, nodes)
            assert start == sequence.state.target_kv and tokens == known[start : start + work.target_fed]
            cache.feed(known, start, work.target_fed, sequence.target_blocks)
            if not work.num_rows:
                continue
            window = (sequence.state.pending + nodes)[: work.num_tested]
            begin = start + work.target_fed - work.num_rows + 1
            ids = [n.token for n in window]
            rows = tuple(sequence.row(begin + i, ids[:i]) for i in range(work.num_rows))
            logits += [self.target.logits(known[: begin + i]) for i in range(work.num_rows)]
            proposals = [n.proposal for n in window if n.proposal]
            stacked = [np.stack(column) for column in zip(*proposals, strict=True)] or [None, None]
            segments[index] = Segment(rows, tuple(ids), sequence.join.rejection, *stacked)
        if segments:
            found = verify(torch.from_numpy(np.stack(logits)), list(segments.values()))
            for index, verdict in zip(segments, found, strict=True):
                verdicts[index] = verdict
        return verdicts


# -- the two machines -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """Says how long the rounds of a simulation took: longer with more rows, and never quite the same."""

    chance: random.Random
    now: float = 100.0
    num_paced: int = 0

    def stamp(self, simulation: Simulation) -> None:
        """Of the newest round."""
        summary = simulation.summaries.pop()
        started = self.now
        self.now += (0.01 + 0.0002 * summary.num_target_rows) * self.chance.uniform(0.9, 1.1)
        simulation.summaries.append(msgspec.structs.replace(summary, started=started, finished=self.now))
        self.num_paced += simulation.shards[0].debt > 0


def serve_simulation(
    arrivals: Sequence[Arrival], *, lag: int = 1, decode_share: float = 0.0, **options: object
) -> Outcome:
    """Rounds in lockstep; the coordinator hears of each ``lag`` rounds late, as a real one does.

    ``decode_share``: long prompts are paced, on a clock of the simulation's own.
    """
    simulation = BatchedSimulation(**options)
    if decode_share:
        budget = simulation.controller.config.limits.max_num_batched_tokens
        simulation.controller.pacing = PacingPolicy(decode_share, budget)
    watch = Watch(random.Random(8))
    pools = simulation.pools[: 1 if simulation.mode == "ar" else 2]
    desk = Desk(simulation.controller, pools, arrivals)
    number = 0
    while True:
        if desk.submit_due(number):
            simulation.collect()
        worked = simulation.round()
        if worked:
            watch.stamp(simulation)
        while len(simulation.summaries) > (lag if worked else 0):
            simulation.deliver_summary()
        number += 1
        if worked or simulation.diffs:
            continue
        if desk.is_done:
            break
        number = max(number, desk.next_round())
    outcome = desk.outcome()
    outcome.num_paced = watch.num_paced
    simulation.assert_at_rest()
    return outcome


class PressedEngine(LocalEngine):
    """A :class:`LocalEngine` that is sent traffic; a round has come when its summary is heard."""

    def serve(self, arrivals: Sequence[Arrival]) -> Outcome:
        pools = self.pools[: 1 if len(self._tp) == 1 else 2]
        desk = Desk(self.controller, pools, arrivals)
        number = num_paced = 0
        while self.controller.requests or not desk.is_done:
            if not self.controller.requests and not desk.is_done:
                number = max(number, desk.next_round())
            if desk.submit_due(number):
                self.flush()
                continue
            message = self._inbox.receive(5.0)
            if self.errors:
                raise self.errors[0]
            if isinstance(message, RoundSummary):
                self.controller.on_round(message)
                number += 1
                num_paced += self.controller.replica.debt > 0
            elif isinstance(message, DraftSummary):
                self.controller.on_draft(message)
            self.flush()
            if isinstance(message, RoundSummary):
                self._pace.hear()
        outcome = desk.outcome()
        outcome.num_paced = num_paced
        return outcome


def serve_tiny_pair(
    arrivals: Sequence[Arrival], dirs: tuple[Path, Path], *, decode_share: float = 0.0, **options: object
) -> Outcome:
    """On the tiny pair, in float64, in real loops; ``decode_share``: long prompts are paced by what rounds take."""
    with PressedEngine(dirs, **({"max_model_len": MODEL_LEN} | options)) as engine:  # type: ignore[arg-type]
        if decode_share:
            budget = engine.controller.config.limits.max_num_batched_tokens
            engine.controller.pacing = PacingPolicy(decode_share, budget)
        return engine.serve(arrivals)


# -- the check ------------------------------------------------------------------------------------------------------


def alone(serve: Callable[..., Outcome], arrival: Arrival, mode: str, **options: object) -> list[Answer]:
    """The request's answers from a fresh engine with plenty of blocks: in AR under `coupled`, else in its own mode."""
    own = mode if arrival.params.verification == "rejection" else "ar"
    blocks = 2 * (len(arrival.prompt) + (arrival.params.max_tokens or 0)) + 128 * (arrival.params.n + 1)
    outcome = serve([replace(arrival, round=0)], mode=own, num_blocks=blocks, **options)
    assert outcome.preemptions == 0
    return outcome.answers[0]


def check_texts(arrivals: Sequence[Arrival], outcome: Outcome, alone: Callable[[Arrival], list[Answer]]) -> None:
    """Every request is refused or answered; every answer is the one that it gets alone."""
    assert sorted([*outcome.answers, *outcome.refused]) == list(range(len(arrivals)))
    for index, answers in outcome.answers.items():
        arrival = arrivals[index]
        expected = alone(arrival)
        assert answers == expected, f"request {index} differs from its text alone: {arrival.params}"

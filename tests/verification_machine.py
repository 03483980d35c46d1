"""``Verification`` driven over thousands of sequences at once by table models, as the target's loop drives it.

Its passes are the table models' of ``distribution``; draft and transition are ``core``'s. A hook lets a test break it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from pearl_ray.core.comm import SingleGroup
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.phases import Node, Proposal, Round, SequenceState, transition
from pearl_ray.core.rng import request_seed
from pearl_ray.core.sampling import Row, coupled_tokens, propose
from pearl_ray.core.verify import Segment
from pearl_ray.kernels.sampler import Sampler, judge_segments, make_sampler
from pearl_ray.model.batching import Entry
from pearl_ray.model.graphs import GraphPool
from pearl_ray.model.passes import PassRunner, Shape
from pearl_ray.model.verification import Decoding, Verification
from tests.distribution import DRAFT, NUM_TOKENS, PADDED, PROMPT, TARGET, VOCAB

BLOCK_SIZE = 64  # a sequence's whole text fits in its one block
FAR = 1000  # no sequence ends


class TablePasses(PassRunner):
    """Passes of the target's table: the cache holds each slot's token, and a row's logits need the last two."""

    def __init__(self, num_seqs: int, most_rows: int, device: torch.device) -> None:
        model = SimpleNamespace(device=device, dtype=torch.float32, vocab_sizes=[PADDED])
        super().__init__(
            model,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            SingleGroup(),
            block_size=BLOCK_SIZE,
            num_valid=VOCAB,
            max_num_seqs=num_seqs,
            max_model_len=BLOCK_SIZE,
            graphs=GraphPool(device, enabled=False, budget_s=0.0, budget_bytes=0),
            max_rows=most_rows,
        )
        prompt = torch.tensor(PROMPT, device=device)
        self._tokens = torch.zeros((num_seqs, BLOCK_SIZE), dtype=torch.int64, device=device)
        self._tokens[:, : len(PROMPT)] = prompt
        self._table = torch.from_numpy(TARGET.table).to(device)

    def forward(self, arrays: Mapping[str, torch.Tensor], shape: Shape) -> torch.Tensor:
        """See ``PassRunner``."""
        ids, positions, slots = (arrays[name][: shape.rows].long() for name in ("token_ids", "positions", "slots"))
        starts = arrays["query_start"][: shape.seqs + 1].long()
        is_row = torch.arange(shape.rows, device=self.device) < starts[-1]
        of_row = torch.searchsorted(starts[1:], torch.arange(shape.rows, device=self.device), right=True)
        lanes = arrays["lanes"][: shape.seqs].long()[of_row.clamp(max=shape.seqs - 1)]
        blocks = self.tables.tables_LB[lanes, 0].long()
        flat = self._tokens.view(-1)
        assert bool((slots == torch.where(is_row, blocks * BLOCK_SIZE + positions, -1)).all())
        flat[slots[is_row]] = ids[is_row]
        before = self._tokens[blocks, (positions - 1).clamp(min=0)]
        return self._table[(positions + 1) % 4, before, ids]


@dataclass(slots=True)
class Member:
    """A sequence: its wishes, its committed tokens, its state, its block."""

    params: SamplingParams
    is_rejection: bool
    seed: int
    tokens: list[int]
    state: SequenceState
    blocks: list[int]

    def row(self, path: Sequence[int]) -> Row:
        """How the token behind the committed ones and ``path`` is drawn."""
        return Row(self.params, self.seed, 0, len(self.tokens) + len(path))

    def tested(self, nodes: tuple[Node, ...], *, in_turn: bool) -> tuple[Node, ...]:
        """What a round tests."""
        return self.state.pending + (nodes if in_turn else nodes[:1])


Tamper = Callable[[Member, tuple[Node, ...], list[Proposal]], list[Proposal]]


def members(count: int, kinds: Sequence[tuple[SamplingParams, bool, int]], engine_seed: int = 0) -> list[Member]:
    """``count`` sequences of (wishes, rule, width) in turn. The prompt's last token passes for its first answer."""
    made = []
    for i in range(count):
        params, is_rejection, width = kinds[i % len(kinds)]
        size = len(PROMPT)
        state = SequenceState(size - 1, size, FAR, width, target_kv=size - 1)
        made.append(Member(params, is_rejection, request_seed(engine_seed, i), list(PROMPT), state, [i]))
    return made


def run(
    batch: Sequence[Member],
    mode: str,
    device: torch.device,
    *,
    num_rounds: int = NUM_TOKENS,
    is_ahead: bool = True,
    with_host: bool = False,
    sampler: Sampler | None = None,
    tamper: Tamper = lambda member, nodes, proposals: proposals,
) -> Verification:
    """Rounds of the whole batch, in PEARL queued ahead but for the first; commits to the members.

    ``with_host``: each verdict is held against the one that rounds with the host between get on the same logits.
    ``tamper``: what stands in place of a member's proposals, given its new nodes.
    """
    in_turn = mode == "sd"
    widest = max(member.state.window for member in batch)
    runner = TablePasses(len(batch), len(batch) * (widest + 1), device)
    sampler = sampler or make_sampler(device, SingleGroup(), [PADDED], VOCAB)
    verification = Verification(runner, sampler, max(widest, 1))
    queued = False
    for number in range(num_rounds):
        drafted = _draft(batch)
        if not queued:
            verification.begin([_decoding(m, nodes, in_turn) for m, nodes in zip(batch, drafted, strict=True)])
        proposals = [
            tamper(m, nodes, _proposals(m.tested(nodes, in_turn=in_turn))) if m.is_rejection else []
            for m, nodes in zip(batch, drafted, strict=True)
        ]
        verification.judge([[node.token for node in nodes] for nodes in drafted], proposals)
        expected = []
        if with_host:
            pairs = zip(batch, drafted, strict=True)
            segments = [_segment(m, m.tested(nodes, in_turn=in_turn), in_turn) for m, nodes in pairs]
            total = sum(len(segment.rows) for segment in segments)
            told = judge_segments(sampler, runner.logits_RV[:total].float(), segments)
            expected = list(zip(*(found.tolist() for found in told), strict=True))
        queued = is_ahead and not in_turn and number + 1 < num_rounds
        if queued:
            verification.go_on([member.blocks for member in batch])
        verdicts = verification.verdicts()
        assert not with_host or verdicts == expected
        for member, nodes, (accepted, token) in zip(batch, drafted, verdicts, strict=True):
            tests = len(member.tested(nodes, in_turn=in_turn))
            event = Round(FAR, 1, nodes, tests, accepted, token)
            member.state, commit = transition(member.state, event)
            member.tokens += commit.tokens
    return verification


def counts_of(batch: Sequence[Member]) -> np.ndarray:
    """How often each row of next tokens came; see ``distribution``."""
    counts = np.zeros((VOCAB,) * NUM_TOKENS, int)
    outputs = np.array([member.tokens[len(PROMPT) : len(PROMPT) + NUM_TOKENS] for member in batch])
    np.add.at(counts, tuple(outputs.T), 1)
    return counts


def _draft(batch: Sequence[Member]) -> list[tuple[Node, ...]]:
    drafted: list[list[Node]] = [[] for _ in batch]
    for step in range(max(member.state.window for member in batch)):
        for rule in (False, True):
            which = [i for i, m in enumerate(batch) if m.state.window > step and m.is_rejection == rule]
            if not which:
                continue
            paths = [[node.token for node in batch[i].state.pending + tuple(drafted[i])] for i in which]
            rows = [batch[i].row(path) for i, path in zip(which, paths, strict=True)]
            logits = DRAFT.logits([batch[i].tokens + path for i, path in zip(which, paths, strict=True)])
            if rule:
                found = zip(*propose(logits, rows, num_valid=VOCAB), strict=True)
                made = [Node(token, proposal=Proposal(ids, probs)) for token, ids, probs in found]
            else:
                made = [Node(t) for t in coupled_tokens(logits, rows, draft=True, num_valid=VOCAB)]
            for i, node in zip(which, made, strict=True):
                drafted[i].append(node)
    return [tuple(nodes) for nodes in drafted]


def _proposals(tested: Sequence[Node]) -> list[Proposal]:
    return [node.proposal for node in tested if node.proposal is not None]


def _decoding(member: Member, nodes: tuple[Node, ...], in_turn: bool) -> Decoding:
    state = member.state
    known = [node.token for node in state.pending + (nodes if in_turn else ())]
    entry = Entry([member.tokens[-1], *known], state.target_kv, member.blocks, len(known) + 1, member.blocks[0])
    return Decoding(entry, member.row(()), known, not in_turn and bool(nodes), state.window, member.is_rejection)


def _segment(member: Member, tested: tuple[Node, ...], in_turn: bool) -> Segment:
    tokens = tuple(node.token for node in tested)
    num_rows = len(tokens) + (in_turn or not tokens)
    rows = tuple(member.row(tokens[:i]) for i in range(num_rows))
    if not member.is_rejection or not tokens:
        return Segment(rows, tokens, member.is_rejection)
    proposals = _proposals(tested)
    return Segment(rows, tokens, True, np.stack([p.ids_K for p in proposals]), np.stack([p.probs_K for p in proposals]))

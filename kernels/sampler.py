"""The end of a round on a device: draws, verdicts and proposals from tensors of parameters, without the host.

Two implementations of one interface: ``TorchSampler`` is ``core.sampling`` and ``core.verify`` row by row, the
reference, which waits for the device; ``TritonSampler`` launches the kernels and waits for nothing. Knows logits and
their parameters; knows no requests, rounds or caches. Penalties, bias and masks are in the logits already.

Shapes: R rows, V ids of this rank, S segments, K = 64 entries of a proposal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from pearl_ray.core.comm import Group
from pearl_ray.core.messages import MAX_PROPOSALS
from pearl_ray.core.params import SamplingParams
from pearl_ray.core.sampling import Row, coupled_tokens_sharded, propose
from pearl_ray.core.verify import Segment, verify_sharded


@dataclass(frozen=True, slots=True)
class RowDraws:
    """What each row is drawn with, on the logits' device, ``[R]`` each.

    Attributes:
        seeds: int64, the bits of the 64-bit seed. positions, samples: int32.
        temperatures: float32, 0 is greedy. top_ks: int32, 0 keeps all. top_ps: float64. min_ps: float32.
        is_filtered, has_both: whether any row has a filter; whether any has top-k and top-p. Host knowledge: it decides
            which kernels are launched.
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    samples: torch.Tensor
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    is_filtered: bool = False
    has_both: bool = False


@dataclass(frozen=True, slots=True)
class Proposals:
    """Of the rejection rule, per row: int32 and float32 ``[R, 64]``; bool ``[R]``, whether the rule is the row's."""

    ids: torch.Tensor
    probs: torch.Tensor
    is_rejection: torch.Tensor


class Sampler(Protocol):
    """Collective where the vocabulary is sharded: every rank gets the same answer, bit for bit."""

    def draw(self, logits_RV: torch.Tensor, draws: RowDraws) -> torch.Tensor:
        """The `coupled` token of each row, int32 ``[R]``."""

    def propose(self, logits_RV: torch.Tensor, draws: RowDraws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The `rejection` rule's draft: tokens int32 ``[R]``, ids int32 and probabilities float32 ``[R, 64]``."""

    def judge(
        self,
        logits_RV: torch.Tensor,
        draws: RowDraws,
        row_start_S1: torch.Tensor,
        tested_R: torch.Tensor,
        max_rows: int,
        proposals: Proposals | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Verdicts: accepted int32 ``[S]`` and next token int32 ``[S]``, -1 if all pass and no row is left.

        Args:
            row_start_S1: int32, each segment's first row, and R. An empty segment gets (0, -1). Rows from
                ``row_start_S1[S]`` on are padding.
            tested_R: int32, the drafted token that the row tests; -1 on a row that tests none.
            max_rows: bound of a segment's rows.
            proposals: None: every segment is `coupled`.
        """


def make_sampler(device: torch.device, group: Group, vocab_sizes: Sequence[int], num_valid: int) -> Sampler:
    """The kernels on a GPU that has Triton, the reference elsewhere; ids from ``num_valid`` on are never chosen."""
    if device.type == "cuda":
        from pearl_ray.kernels.sampler_triton import TritonSampler

        return TritonSampler(group, vocab_sizes, num_valid)
    return TorchSampler(group, vocab_sizes, num_valid)


class TorchSampler:
    """See ``Sampler``; logits may be float64, which stays."""

    def __init__(self, group: Group, vocab_sizes: Sequence[int], num_valid: int) -> None:
        self._group, self._vocab_sizes, self._num_valid = group, vocab_sizes, num_valid

    def draw(self, logits_RV: torch.Tensor, draws: RowDraws) -> torch.Tensor:
        """See ``Sampler``."""
        rows = _rows(draws, len(logits_RV))
        tokens = coupled_tokens_sharded(
            logits_RV, rows, self._group, self._vocab_sizes, num_valid=self._num_valid, draft=False
        )
        return torch.tensor(tokens, dtype=torch.int32, device=logits_RV.device)

    def propose(self, logits_RV: torch.Tensor, draws: RowDraws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See ``Sampler``."""
        whole_RV = self._group.all_gather(logits_RV.contiguous(), self._vocab_sizes)
        tokens, ids, probs = propose(whole_RV, _rows(draws, len(logits_RV)), num_valid=self._num_valid)
        device = logits_RV.device
        found = torch.tensor(tokens, dtype=torch.int32, device=device)
        return found, torch.from_numpy(ids).to(device), torch.from_numpy(probs).to(device)

    def judge(
        self,
        logits_RV: torch.Tensor,
        draws: RowDraws,
        row_start_S1: torch.Tensor,
        tested_R: torch.Tensor,
        max_rows: int,
        proposals: Proposals | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Sampler``."""
        starts, tested = row_start_S1.tolist(), tested_R.tolist()
        rows = _rows(draws, starts[-1])
        judged, segments = [], []
        for s, (begin, end) in enumerate(pairwise(starts)):
            if begin == end:
                continue
            assert end - begin <= max_rows
            judged.append(s)
            segments.append(_segment(rows[begin:end], tested[begin:end], proposals, begin))
        accepted, tokens = [0] * (len(starts) - 1), [-1] * (len(starts) - 1)
        if judged:
            found = verify_sharded(
                logits_RV[: starts[-1]], segments, self._group, self._vocab_sizes, num_valid=self._num_valid
            )
            for s, verdict in zip(judged, found, strict=True):
                accepted[s], tokens[s] = verdict.num_accepted, verdict.token
        device = logits_RV.device
        return (
            torch.tensor(accepted, dtype=torch.int32, device=device),
            torch.tensor(tokens, dtype=torch.int32, device=device),
        )


def _segment(rows: Sequence[Row], tested: Sequence[int], proposals: Proposals | None, begin: int) -> Segment:
    window = tuple(token for token in tested if token >= 0)
    assert list(tested[: len(window)]) == list(window), "rows that test nothing come last"
    if proposals is None or not bool(proposals.is_rejection[begin]):
        return Segment(tuple(rows), window, False, None, None)
    if not window:
        return Segment(tuple(rows), window, True, None, None)
    at = slice(begin, begin + len(window))
    return Segment(tuple(rows), window, True, proposals.ids[at].cpu().numpy(), proposals.probs[at].cpu().numpy())


def _rows(draws: RowDraws, count: int) -> list[Row]:
    """The rows as ``core`` knows them; temperatures are float32 on both sides of the comparison that tests make."""
    whole = (draws.seeds, draws.positions, draws.samples, draws.temperatures, draws.top_ks, draws.top_ps, draws.min_ps)
    columns = [column[:count].tolist() for column in whole]
    return [
        Row(
            SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
            seed & (2**64 - 1),
            sample,
            position,
        )
        for seed, position, sample, temperature, top_k, top_p, min_p in zip(*columns, strict=True)
    ]


def draws_of(rows: Sequence[Row], device: torch.device, *, draft: bool = False) -> RowDraws:
    """The tensors of these rows: one copy to the device, no wait."""
    return RowDraws(*to_device(draw_columns(rows, draft=draft), device), **filter_flags(rows, draft))


def filter_flags(rows: Sequence[Row], draft: bool = False) -> dict[str, bool]:
    """What ``RowDraws`` says of all its rows."""
    filtered = [row.params for row in rows if row.is_filtered(draft)]
    return {"is_filtered": bool(filtered), "has_both": any(p.top_k > 0 and p.top_p < 1.0 for p in filtered)}


def draw_columns(rows: Sequence[Row], *, draft: bool = False) -> tuple[np.ndarray, ...]:
    """The columns of ``RowDraws``, on the host."""
    count = len(rows)
    params = [row.params for row in rows]
    return (
        np.fromiter((row.seed for row in rows), np.uint64, count).view(np.int64),
        np.fromiter((row.position for row in rows), np.int32, count),
        np.fromiter((row.sample_index for row in rows), np.int32, count),
        np.fromiter((row.temperature(draft) for row in rows), np.float32, count),
        np.fromiter((max(p.top_k, 0) for p in params), np.int32, count),
        np.fromiter((p.top_p for p in params), np.float64, count),
        np.fromiter((p.min_p for p in params), np.float32, count),
    )


def to_device(columns: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Flat arrays of any types in one copy; the host doesn't wait.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for addresses that don't.
    """
    sizes = [math.ceil(column.nbytes / 16) * 16 for column in columns]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat, at = whole.numpy(), 0
    for column, size in zip(columns, sizes, strict=True):
        flat[at : at + column.nbytes] = column.view(np.uint8)
        at += size
    moved = whole.to(device, non_blocking=True)
    tensors, at = [], 0
    for column, size in zip(columns, sizes, strict=True):
        kind = torch.from_numpy(column[:0]).dtype
        tensors.append(moved[at : at + column.nbytes].view(kind))
        at += size
    return tensors


def judge_segments(
    sampler: Sampler, logits_RV: torch.Tensor, segments: Sequence[Segment]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verdicts of segments given as the host knows them: accepted and next tokens, int32 ``[S]``, on the device.

    ``logits_RV`` holds the segments' rows one after the other, adjusted (``core.logits.adjusted_logits``).
    """
    device = logits_RV.device
    rows = [row for segment in segments for row in segment.rows]
    assert len(rows) == len(logits_RV)
    starts = np.zeros(len(segments) + 1, np.int32)
    np.cumsum([len(segment.rows) for segment in segments], out=starts[1:])
    tested = np.full(len(rows), -1, np.int32)
    for segment, start in zip(segments, starts, strict=False):
        tested[start : start + len(segment.tested)] = segment.tested
    columns = [*draw_columns(rows), starts, tested]
    has_proposals = any(segment.rejection and segment.tested for segment in segments)
    if has_proposals:
        columns += _proposal_columns(segments, starts)
    moved = to_device(columns, device)
    draws = RowDraws(*moved[:7], **filter_flags(rows))
    proposals = None
    if has_proposals:
        shape = (len(rows), MAX_PROPOSALS)
        proposals = Proposals(moved[9].view(shape), moved[10].view(shape), moved[11])
    longest = max(len(segment.rows) for segment in segments)
    return sampler.judge(logits_RV, draws, moved[7], moved[8], longest, proposals)


def _proposal_columns(segments: Sequence[Segment], starts: np.ndarray) -> list[np.ndarray]:
    count = int(starts[-1])
    ids, probs = np.zeros((count, MAX_PROPOSALS), np.int32), np.zeros((count, MAX_PROPOSALS), np.float32)
    is_rejection = np.zeros(count, np.bool_)
    for segment, start in zip(segments, starts.tolist(), strict=False):
        is_rejection[start : start + len(segment.rows)] = segment.rejection
        if segment.proposal_ids is not None and segment.proposal_probs is not None:
            ids[start : start + len(segment.tested)] = segment.proposal_ids
            probs[start : start + len(segment.tested)] = segment.proposal_probs
    return [ids.reshape(-1), probs.reshape(-1), is_rejection]

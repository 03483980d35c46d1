"""Rounds of plain decoding on the target's device: a pass, its verdict, and the next pass queued right behind it.

Plain: rows of either rule whose logits need no penalty, bias or mask. The host fills a round in one copy and waits
once, for the verdict; or it lets :meth:`Verification.go_on` make the next round's input on the device, and then the
device goes from verdict to forward pass without the host. Knows passes, windows and verdicts; knows no requests.

Shapes: S sequences, T rows, W the widest window.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from pearl_ray.core.phases import Proposal
from pearl_ray.core.sampling import Row
from pearl_ray.kernels.advance import RoundInput, RoundState, advance, place
from pearl_ray.kernels.sampler import Proposals, RowDraws, Sampler, draw_columns, filter_flags
from pearl_ray.model.batching import Entry
from pearl_ray.model.draft_steps import DRAWS
from pearl_ray.model.passes import QUERY_BUCKETS, SEQUENCE_BUCKETS, PassRunner, Shape, padded
from pearl_ray.model.proposals import ProposalRows
from pearl_ray.model.staging import Staging


class Decoding(NamedTuple):
    """A sequence that decodes: what it feeds, and what its rows test.

    Attributes:
        entry: every row gives logits.
        row: how the token after the first fed one is drawn; the rows behind it differ in position only.
        tested: the drafted tokens that the first rows test, as far as they are known before the pass.
        tests_newest: whether the row behind those tests the first token of the window that is being drafted.
        width: w, tokens that the draft makes this round.
        is_rejection: the rule.
    """

    entry: Entry
    row: Row
    tested: Sequence[int]
    tests_newest: bool
    width: int
    is_rejection: bool = False


class Verification:
    """One rank of the target. Collective over its ranks.

    Attributes:
        num_waits, num_filled, num_advanced: waits for the device, and rounds begun by the host and by the device.
    """

    def __init__(self, runner: PassRunner, sampler: Sampler, max_window: int) -> None:
        self.num_waits = self.num_filled = self.num_advanced = 0
        self._runner, self._sampler = runner, sampler
        self._is_cuda = runner.device.type == "cuda"
        device, rows, seqs = runner.device, runner.max_rows, padded(runner.max_seqs, SEQUENCE_BUCKETS)
        self._width = max_window
        layout: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"tested": ((rows + 1,), np.int32)}
        layout |= {"newest_rows": ((seqs,), np.int64)}
        layout |= {f"row_{name}": ((rows,), kind) for name, kind in DRAWS}
        layout |= {f"seq_{name}": ((seqs,), kind) for name, kind in DRAWS}
        layout |= {name: ((seqs,), np.int32) for name in ("committed", "newest", "num_pending", "widths")}
        layout |= {"pending": ((seqs, max_window), np.int32)}
        self._arrays = Staging(layout, device)
        self._drafted = Staging({"drafted": ((seqs, max_window), np.int32)}, device)
        self._found = torch.zeros((2, seqs), dtype=torch.int32, pin_memory=self._is_cuda)
        self._verdict: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shape = self._next_shape = Shape(0, 0, 0)
        self._proposals = ProposalRows(rows, device)
        self._count, self._seq_ids = 0, list[int]()
        # Per sequence: its rule and width; rows of the pass under way, and how many of them test a token.
        self._rejects, self._widths, self._num_rows, self._num_tested = list[bool](), *(list[int]() for _ in range(3))
        self._flags = {"is_filtered": False, "has_both": False}
        # (begin, end) of the last passes: the one judged, the one before it, and the one queued ahead.
        self._timers: list[Any] = [tuple(_events(2, self._is_cuda, timed=True)) for _ in range(3)]
        self._num_passes, self._first = 0, 1  # the first pass since another kind of round
        [self._done] = _events(1, self._is_cuda, timed=False)

    def begin(self, sequences: Sequence[Decoding]) -> None:
        """Queue the pass of these sequences; the verdict of the pass before must have been taken."""
        host, trash = self._arrays.host, self._runner.max_rows
        count = len(sequences)
        rows = [item.row for item in sequences]
        per_seq = [len(item.entry.tokens) for item in sequences]
        total = sum(per_seq)
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(per_seq, out=starts[1:])
        columns = draw_columns(rows)
        of_row = np.repeat(np.arange(count), per_seq)
        for (name, _), column in zip(DRAWS, columns, strict=True):
            host[f"seq_{name}"][:count] = column
            host[f"row_{name}"][:total] = column[of_row]
        host["row_positions"][:total] += (np.arange(total) - starts[of_row]).astype(np.int32)
        host["tested"][:] = -1
        host["newest_rows"][:] = trash
        for index, (entry, _, tested, tests_newest, width, _) in enumerate(sequences):
            start, pending = int(starts[index]), len(entry.tokens) - 1
            host["tested"][start : start + len(tested)] = tested
            if tests_newest:
                host["newest_rows"][index] = start + len(tested)
            host["committed"][index], host["newest"][index] = entry.start + 1, entry.tokens[0]
            host["num_pending"][index], host["widths"][index] = pending, width
            host["pending"][index, :pending] = entry.tokens[1 : self._width + 1]
        self._arrays.upload()
        shape = self._runner.fill([item.entry for item in sequences])
        self._count, self._flags = count, filter_flags(rows)
        self._seq_ids = [item.entry.seq_id for item in sequences]
        self._rejects, self._widths = [item.is_rejection for item in sequences], [item.width for item in sequences]
        self._num_rows, self._num_tested = per_seq, [len(item.tested) + item.tests_newest for item in sequences]
        bound = sum(max(width, 1) for width in self._widths)
        longest = max(self._widths, default=1)
        self._next_shape = self._runner.shape(min(bound, trash), count, max(longest, 1))
        self.num_filled += 1
        self._queue(shape)

    def judge(self, drafted: Sequence[Sequence[int]], proposals: Sequence[Sequence[Proposal]]) -> None:
        """Queue the verdict on the pass under way.

        Args:
            drafted: the window of this round, per sequence.
            proposals: per sequence what each token that it tests now was drawn from, pending ones first; none if it is
                `coupled`.
        """
        host = self._drafted.host["drafted"]
        for index, tokens in enumerate(drafted):
            host[index, : len(tokens)] = tokens
        self._drafted.upload()
        device, shape, count = self._arrays.device, self._shape, self._count
        place(device["tested"], device["newest_rows"], self._drafted.device["drafted"])
        draws = RowDraws(*(device[f"row_{name}"][: shape.rows] for name, _ in DRAWS), **self._flags)
        starts = self._runner.arrays.device["query_start"][: count + 1]
        logits_RV, tested = self._runner.logits_RV[: shape.rows], device["tested"][: shape.rows]
        sent = self._send(proposals, shape.rows)
        self._verdict = self._sampler.judge(logits_RV, draws, starts, tested, shape.query, sent)
        for found, told in zip(self._found, self._verdict, strict=True):
            found[:count].copy_(told, non_blocking=True)
        if self._is_cuda:
            self._done.record()

    def _send(self, proposals: Sequence[Sequence[Proposal]], num_rows: int) -> Proposals | None:
        """Queue the copy of what the tokens tested now were drawn from; None where no sequence tests by `rejection`."""
        due = [count if by_it else 0 for count, by_it in zip(self._num_tested, self._rejects, strict=True)]
        assert [len(some) for some in proposals] == due, "a tested token without its proposal, or another round's"
        starts = [0, *accumulate(self._num_rows)][:-1]
        return self._proposals.send(num_rows, starts, proposals) if any(due) else None

    def go_on(self, blocks: Sequence[Sequence[int]]) -> None:
        """Queue the next round's pass behind the verdict: same sequences, same widths, nothing clipped.

        ``blocks``: the sequences' tables, which may have grown.
        """
        assert self._verdict is not None and len(blocks) == self._count
        for seq_id, table in zip(self._seq_ids, blocks, strict=True):
            self._runner.tables.lane(seq_id, table)
        self._advance()
        self.num_advanced += 1
        self._queue(self._next_shape)

    def warm_up(self, longest: int) -> None:
        """Launch once what rounds launch besides passes, so that kernels are compiled before any round. Collective.

        ``longest``: rows of a sequence, at most.
        """
        device, inputs, runner = self._arrays.device, self._runner.arrays, self._runner
        for array in (*self._arrays.host.values(), *inputs.host.values()):
            array[:] = 0
        self._arrays.host["row_top_ps"][:] = 1
        self._arrays.host["newest_rows"][:] = runner.max_rows
        self._arrays.upload()
        inputs.upload()
        columns = [device[f"row_{name}"][:1] for name, _ in DRAWS]
        starts, tested, logits_RV = inputs.device["query_start"][:2], device["tested"][:1], runner.logits_RV[:1]
        most = padded(longest, QUERY_BUCKETS)
        sent = self._proposals.send(1, [], [])
        for flags in ((False, False), (True, False), (True, True)):
            self._sampler.judge(logits_RV, RowDraws(*columns, *flags), starts, tested, 1)
            self._sampler.judge(logits_RV, RowDraws(*columns, *flags), starts, tested, most, sent)
        # What needs penalties, masks or probabilities is judged in float32.
        self._sampler.judge(logits_RV.float(), RowDraws(*columns), starts, tested, 1)
        rows = 2
        while rows < 2 * most:
            self._sampler.judge(logits_RV, RowDraws(*columns), starts, tested, rows)
            rows *= 2
        self._count, self._next_shape = 1, runner.shape(1, 1, 1)
        nothing = torch.zeros(1, dtype=torch.int32, device=runner.device)
        self._verdict = nothing, nothing
        self._advance()
        runner.wait()
        self._verdict, self._count = None, 0

    def _advance(self) -> None:
        """Queue the next round's input, from the verdict."""
        assert self._verdict is not None
        device, inputs = self._arrays.device, self._runner.arrays.device
        count, rows, seqs = self._count, self._next_shape.rows, self._next_shape.seqs
        names = ("committed", "newest", "num_pending", "pending", "widths")
        state = RoundState(
            *(device[name][:count] for name in names),
            inputs["lanes"][:count],
            RowDraws(*(device[f"seq_{name}"][:count] for name, _ in DRAWS)),
        )
        following = RoundInput(
            token_ids=inputs["token_ids"][:rows],
            positions=inputs["positions"][:rows],
            slots=inputs["slots"][:rows],
            query_start_S1=inputs["query_start"][: seqs + 1],
            context_lens=inputs["context_lens"][:seqs],
            tested=device["tested"],
            newest_rows=device["newest_rows"],
            draws=RowDraws(*(device[f"row_{name}"][:rows] for name, _ in DRAWS)),
        )
        tables, size = self._runner.tables.tables_LB, self._runner.block_size
        advance(state, *self._verdict, self._drafted.device["drafted"][:count], tables, size, following)

    def verdicts(self) -> list[tuple[int, int]]:
        """(accepted, token) per sequence: the round's one wait."""
        count = self._count
        if self._is_cuda:
            self._runner.wait(self._done)
        self.num_waits += 1
        accepted, tokens = self._found[:, :count].tolist()
        # The rows of the next pass, if it is queued ahead (``advance``); all of them test, but AR's.
        self._num_rows = [1 if token >= 0 else width for token, width in zip(tokens, self._widths, strict=True)]
        self._num_tested = [rows if width else 0 for rows, width in zip(self._num_rows, self._widths, strict=True)]
        return list(zip(accepted, tokens, strict=True))

    def times(self, behind: int = 0) -> tuple[float, float]:
        """Seconds of the last pass but ``behind``, and from the one before to it, on the device; it must be over.

        0 for the latter where there is none before it, or a round of another kind between (:meth:`interrupt`).
        """
        begin, end = self._timers[(self._num_passes - behind) % 3]
        _, before = self._timers[(self._num_passes - behind - 1) % 3]
        is_first = self._num_passes - behind <= self._first
        if not self._is_cuda:
            return end - begin, 0.0 if is_first else begin - before
        return begin.elapsed_time(end) / 1000, 0.0 if is_first else before.elapsed_time(begin) / 1000

    def interrupt(self) -> None:
        """A round of another kind runs: the device doesn't idle before the next pass."""
        self._first = self._num_passes + 1

    def _queue(self, shape: Shape) -> None:
        self._shape = shape
        self._num_passes += 1
        at = self._num_passes % 3
        if self._is_cuda:
            begin, end = self._timers[at]
            begin.record()
            self._runner.queue(shape)
            end.record()
        else:
            began = time.monotonic()
            self._runner.queue(shape)
            self._timers[at] = (began, time.monotonic())


def _events(count: int, is_cuda: bool, *, timed: bool) -> list[Any]:
    """CUDA events; on a CPU times that haven't been taken."""
    if not is_cuda:
        return [0.0] * count
    return [torch.cuda.Event(enable_timing=timed) for _ in range(count)]  # type: ignore[no-untyped-call]

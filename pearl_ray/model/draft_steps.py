"""A window's drafting on a device: the first pass, then steps that feed each other, and one wait at the end.

Knows logits, draws and positions; knows no rounds, verdicts or requests. Rows whose logits need the host (penalties,
bias, masks) don't come here.

Shapes: S sequences that draft, W tokens at most, K = 64 entries of a proposal.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pearl_ray.core.logits import adjusted_logits
from pearl_ray.core.messages import MAX_PROPOSALS
from pearl_ray.core.sampling import Row
from pearl_ray.kernels.draft_step import StepState, feed
from pearl_ray.kernels.sampler import RowDraws, Sampler, draw_columns, draws_of, filter_flags
from pearl_ray.model.batching import Entry
from pearl_ray.model.passes import SEQUENCE_BUCKETS, PassRunner, Shape, padded
from pearl_ray.model.staging import Staging

DRAWS = (
    ("seeds", np.int64),
    ("positions", np.int32),
    ("samples", np.int32),
    ("temperatures", np.float32),
    ("top_ks", np.int32),
    ("top_ps", np.float64),
    ("min_ps", np.float32),
)


class Writer(NamedTuple):
    """A sequence that drafts: how its first token is drawn, how many it drafts, and where its cache lies."""

    seq_id: int
    blocks: Sequence[int]
    row: Row
    limit: int
    is_rejection: bool


class Drafted(NamedTuple):
    """Tokens int32 ``[W, S]``, and of the rejection rule ids int32 and probabilities float32 ``[W, S, 64]``, or None.

    A sequence's column holds its tokens in its first ``limit`` rows.
    """

    tokens_WS: np.ndarray
    ids_WSK: np.ndarray | None
    probs_WSK: np.ndarray | None


class Variant(NamedTuple):
    """What the batch's sequences ask of the end of a step."""

    is_filtered: bool = False
    has_both: bool = False
    any_rejection: bool = False
    any_coupled: bool = True


class DraftSteps:
    """One rank of the draft. Collective over its ranks.

    Attributes:
        num_steps, num_waits: counted over all windows.
    """

    def __init__(self, runner: PassRunner, sampler: Sampler, max_window: int) -> None:
        self.num_steps = self.num_waits = 0
        self._runner, self._sampler, self._max_window = runner, sampler, max_window
        device = runner.device
        self._num = seqs = padded(runner.max_seqs, SEQUENCE_BUCKETS)
        names = ("token_ids", "positions", "slots", "context_lens", "limits", "lanes")
        layout = {name: ((seqs,), np.int32) for name in names}
        layout |= {
            "query_start": ((seqs + 1,), np.int32),
            "step": ((1,), np.int32),
            "is_rejection": ((seqs,), np.bool_),
        }
        layout |= {f"draw_{name}": ((seqs,), kind) for name, kind in DRAWS}
        self._arrays = Staging(layout, device)
        pinned = device.type == "cuda"
        self._window_WS = torch.zeros((max_window, seqs), dtype=torch.int32, device=device)
        self._found_WS = torch.zeros((max_window, seqs), dtype=torch.int32, pin_memory=pinned)
        self._proposals: tuple[torch.Tensor, torch.Tensor] | None = None

    def write(self, first: Sequence[Entry], writers: Sequence[Writer]) -> Drafted:
        """Feed ``first`` (whose output rows belong to the writers, in their order) and draft.

        Waits for the device once, at the end: what the host has written for it may be written again then.
        """
        assert len(writers) <= self._num
        steps = max((writer.limit for writer in writers), default=0)
        assert steps <= self._max_window, f"a window of {steps}, room for {self._max_window}"
        if writers:
            self._fill(writers)
        logits_SV = self._runner.logits(first)
        self.num_steps += 1
        if not writers:
            self._runner.wait()
            return Drafted(np.zeros((0, 0), np.int32), None, None)
        assert logits_SV is not None and len(logits_SV) == len(writers)
        count = len(writers)
        variant = _variant(writers)
        self._end(logits_SV, count, variant)
        size = padded(count, SEQUENCE_BUCKETS)
        for _ in range(1, steps):
            self._next(size, variant)
            self.num_steps += 1
        return self._collect(steps, count, variant)

    def propose(
        self, logits_RV: torch.Tensor, rows: Sequence[Row]
    ) -> tuple[list[int], NDArray[np.int32], NDArray[np.float32]]:
        """``core.sampling.propose`` of this rank's logits, for a round in which the host looks at every step; waits.

        By the kernels that draft the other rounds: else who shares a round would decide how a proposal is rounded.
        """
        runner = self._runner
        start = sum(runner.vocab_sizes[: runner.group.rank])
        adjusted_RV = adjusted_logits(logits_RV, rows, vocab_start=start)
        tokens, ids, probs = self._sampler.propose(adjusted_RV, draws_of(rows, runner.device, draft=True))
        drawn: list[int] = tokens.tolist()
        return drawn, ids.cpu().numpy(), probs.cpu().numpy()

    def keep(self, seq_ids: Container[int]) -> None:
        """Forget the block tables of all other sequences."""
        self._runner.tables.keep(seq_ids)

    def capture(self, batches: Iterable[int]) -> None:
        """Make graphs of plain steps for so many sequences, then of the others' passes, as far as the budget goes."""
        sizes = sorted({padded(batch, SEQUENCE_BUCKETS) for batch in batches}, reverse=True)
        for size in sizes:
            self._clear()
            self._runner.graphs.capture(("step", size), lambda size=size: self._step(size))
        for size in sizes:
            self._clear()
            self._runner.graphs.capture(("pass", size), lambda size=size: self._pass(size))

    def warm_up(self) -> None:
        """Launch what ends a step once, so that its kernels are compiled before the rounds. Collective, before them."""
        self._clear()
        logits_RV, size = self._runner.logits_RV, 1
        while size <= min(self._num, len(logits_RV)):
            self._end(logits_RV[:size], size, Variant())
            size *= 2
        for has_both in (False, True):
            self._end(logits_RV[:1], 1, Variant(is_filtered=True, has_both=has_both))
        self._runner.wait()

    def _clear(self) -> None:
        """Steps that are no sequence's."""
        host = self._arrays.host
        for array in host.values():
            array[:] = 0
        host["slots"][:] = -1
        host["draw_top_ps"][:] = 1
        self._arrays.upload()

    def _fill(self, writers: Sequence[Writer]) -> None:
        """Send what the steps need; ``positions`` hold the last token that the first pass feeds."""
        host, count = self._arrays.host, len(writers)
        for name, column in zip(DRAWS, draw_columns([w.row for w in writers], draft=True), strict=True):
            host[f"draw_{name[0]}"][:count] = column
            host[f"draw_{name[0]}"][count:] = 1 if name[0] == "top_ps" else 0
        host["positions"][:count] = host["draw_positions"][:count] - 1
        for name in ("positions", "limits", "context_lens", "lanes", "token_ids"):
            host[name][count:] = 0
        host["slots"][:] = -1
        host["limits"][:count] = [w.limit for w in writers]
        host["lanes"][:count] = [self._runner.tables.lane(w.seq_id, w.blocks) for w in writers]
        host["query_start"][: count + 1] = range(count + 1)
        host["query_start"][count + 1 :] = count
        host["is_rejection"][:count] = [w.is_rejection for w in writers]
        host["is_rejection"][count:] = False
        host["step"][0] = 0
        self._arrays.upload()

    def _draws(self, count: int, variant: Variant) -> RowDraws:
        device = self._arrays.device
        columns = (device[f"draw_{name}"][:count] for name, _ in DRAWS)
        return RowDraws(*columns, is_filtered=variant.is_filtered, has_both=variant.has_both)

    def _next(self, size: int, variant: Variant) -> None:
        """Queue a step. A plain one is one graph; of the others the pass is, which is most of their launches."""
        if variant == Variant():
            self._runner.graphs.run(("step", size), lambda: self._step(size))
            return
        self._runner.graphs.run(("pass", size), lambda: self._pass(size))
        self._end(self._runner.logits_RV[:size], size, variant)

    def _step(self, size: int) -> None:
        """One token per sequence, from the last one drawn; plain."""
        self._end(self._logits(size), size, Variant())

    def _pass(self, size: int) -> None:
        """The same without its end: the logits stay where no graph's own memory is."""
        self._runner.logits_RV[:size] = self._logits(size)

    def _logits(self, size: int) -> torch.Tensor:
        return self._runner.forward(self._arrays.device, Shape(size, size, 1))

    def _end(self, logits_SV: torch.Tensor, count: int, variant: Variant) -> None:
        """Draw a token per sequence, keep it, and make it the next step's input."""
        device = self._arrays.device
        draws = self._draws(count, variant)
        tokens = None
        if variant.any_coupled:
            tokens = self._sampler.draw(logits_SV, draws)
        if variant.any_rejection:
            drawn, ids, probs = self._sampler.propose(logits_SV, draws)
            step = device["step"].long()
            for store, found in zip(self._proposal_stores(), (ids, probs), strict=True):
                store[:, :count].index_copy_(0, step, found[None])
            tokens = drawn if tokens is None else torch.where(device["is_rejection"][:count], drawn, tokens)
        assert tokens is not None
        names = ("token_ids", "positions", "slots", "context_lens", "limits", "lanes")
        state = StepState(*(device[name][:count] for name in names), device["step"], self._window_WS[:, :count], draws)
        feed(state, tokens, self._runner.tables.tables_LB, self._runner.block_size)

    def _proposal_stores(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._proposals is None:
            shape, device = (self._max_window, self._num, MAX_PROPOSALS), self._runner.device
            self._proposals = (
                torch.zeros(shape, dtype=torch.int32, device=device),
                torch.zeros(shape, dtype=torch.float32, device=device),
            )
        return self._proposals

    def _collect(self, steps: int, count: int, variant: Variant) -> Drafted:
        found = self._found_WS[:steps]
        found.copy_(self._window_WS[:steps], non_blocking=True)
        copies: list[torch.Tensor] = []
        for store in self._proposal_stores() if variant.any_rejection else ():
            whole = store[:steps]
            copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
            copies.append(copy.copy_(whole, non_blocking=True))
        self._runner.wait()  # the draft's one wait of a round
        self.num_waits += 1
        ids, probs = (copy[:, :count].numpy() for copy in copies) if copies else (None, None)
        return Drafted(found[:, :count].numpy(), ids, probs)


def _variant(writers: Sequence[Writer]) -> Variant:
    num_rejecting = sum(writer.is_rejection for writer in writers)
    flags = filter_flags([writer.row for writer in writers], draft=True)
    return Variant(**flags, any_rejection=num_rejecting > 0, any_coupled=num_rejecting < len(writers))

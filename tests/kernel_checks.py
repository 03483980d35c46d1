"""What the kernel tests share: the device they run on, the error they measure, and a paged cache full of traps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
CAN_RUN = INTERPRETING or torch.cuda.is_available()
REASON = "needs a CUDA device (or TRITON_INTERPRET=1)"


def mend_interpreter() -> None:
    """Lets Triton 3.6's interpreter loop to a bound that a kernel computed: numpy 2.4 refuses ``int(array([n]))``."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def sum_products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter's dot give a row the same bits wherever it stands; numpy's library doesn't (GPUs do)."""
    from triton.runtime import interpreter

    def dot(self: object, a: Any, b: Any, d: Any, input_precision: object, max_imprecise: object) -> Any:
        left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        products = left[:, None, :] * np.ascontiguousarray(right.T)[None, :, :]
        return interpreter.TensorHandle(products.sum(-1) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


if INTERPRETING:
    mend_interpreter()


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN if anything is."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm())


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """NaN everywhere, so that what isn't written shows."""
    return torch.full(tuple(shape), math.nan, dtype=dtype, device=DEVICE)


def fresh(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers nobody has seen before."""
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


class PagedCase:
    """Sequences of given ``(num_query, context_len)`` in a cache whose other slots are all NaN."""

    def __init__(
        self,
        sequences: Sequence[tuple[int, int]],
        q_to_kv: Sequence[int],
        *,
        width: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.q_to_kv, self.block_size, self.sequences = tuple(q_to_kv), block_size, tuple(sequences)
        num_kv = q_to_kv[-1] + 1
        counts = [-(-context // block_size) for _, context in sequences]
        order = torch.randperm(sum(counts) + 3).tolist()
        num_tokens = sum(n for n, _ in sequences)
        self.q = fresh(num_tokens, len(q_to_kv), width, dtype=dtype)
        self.cache = poisoned((2, sum(counts) + 3, block_size, num_kv, width), dtype)
        self.keys = [fresh(2, context, num_kv, width, dtype=dtype) for _, context in sequences]
        tables = torch.zeros(len(sequences), max(counts), dtype=torch.int64)
        slots, self.new = [], torch.cat([k[:, c - n :] for k, (n, c) in zip(self.keys, sequences, strict=True)], 1)
        self.query_start = [0]
        for index, ((count, context), keys) in enumerate(zip(sequences, self.keys, strict=True)):
            table = torch.tensor([order.pop() for _ in range(counts[index])])
            tables[index, : len(table)] = table
            at = torch.arange(context)
            where = (table[at // block_size] * block_size + at % block_size).to(DEVICE)
            self.cache.flatten(1, 2)[:, where[: context - count]] = keys[:, : context - count]
            slots.append(where[context - count :])
            self.query_start.append(self.query_start[-1] + count)
        self.slots, self.tables = torch.cat(slots), tables.to(DEVICE)
        self.context_lens = [context for _, context in sequences]

    def expected(self, seen: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Attention in float32; ``seen``: per sequence bool ``[num_query, context]``, None is causal."""
        outputs = []
        for index, ((count, context), kv) in enumerate(zip(self.sequences, self.keys, strict=True)):
            start = self.query_start[index]
            k, v = kv.float()[:, :, list(self.q_to_kv)]
            q = self.q[start : start + count].float()
            scores = torch.einsum("thd,lhd->htl", q, k) / math.sqrt(q.shape[-1])
            rows = torch.arange(context - count, context, device=DEVICE)
            visible = torch.arange(context, device=DEVICE) <= rows[:, None] if seen is None else seen[index].to(DEVICE)
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("htl,lhd->thd", weights, v))
        return torch.cat(outputs)

"""Every kernel compiles for Hopper and fits its shared memory, on a machine without a GPU: Triton brings its compiler.

The interpreter accepts what the compiler refuses (a name that changes its type in a branch, say). Run as a program,
this file compiles; the test runs it in a process of its own, whose driver it replaces.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_SHARED = 227 * 1024  # bytes that a Hopper block can have


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which brings the compiler")
def test_every_kernel_compiles_for_hopper_and_fits() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr[-6000:]
    shared = {name: int(size) for name, size in (line.split() for line in done.stdout.splitlines())}
    kernels = {"attend", "join", "_race", "_judge", "_pass", "_finish", "_collect", "_propose", "_accept", "_residual"}
    kernels |= {"_advance", "_feed", "products", "dots", "_begin"}
    assert kernels <= set(shared)
    assert {name: size for name, size in shared.items() if size > MAX_SHARED} == {}


def compile_all() -> dict[str, int]:
    """Calls the wrappers on CPU tensors with launches replaced by compilation; shared bytes of each kernel, at most."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        """As much of a driver as the compiler asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    shared: dict[str, int] = {}

    def compiling(kernel: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            name = kernel.fn.__name__
            shared[name] = max(shared.get(name, 0), compiled.metadata.shared)

        return launch

    driver.set_active(Hopper())
    JITFunction.__getitem__ = compiling
    call_attention(torch)
    call_the_rest(torch)
    call_rounds(torch)
    return shared


def call_attention(torch: Any) -> None:
    """Every head width; windows of one, a few and many tokens; one sequence and a batch."""
    from pearl_ray.kernels import attention_triton
    from pearl_ray.kernels.attention_triton import TritonAttention

    attention_triton.num_multiprocessors = lambda device: 132  # type: ignore[assignment]
    for backend in (TritonAttention(), TritonAttention(deterministic=True)):
        call_backend(torch, backend)


def call_backend(torch: Any, backend: Any) -> None:
    """Both plans over all shapes."""
    from pearl_ray.kernels.attention_triton import TritonMetadata

    for width, num_q, num_kv in ((64, 32, 8), (80, 6, 2), (128, 64, 8), (256, 16, 4)):
        for batch, count, context in ((1, 1, 600), (4, 8, 32768), (1, 16, 32768), (1, 128, 32768), (1, 512, 2048)):
            q = torch.empty((batch * count, num_q, width), dtype=torch.bfloat16)
            cache = torch.empty((2, 4, 16, num_kv, width), dtype=torch.bfloat16)
            heads = backend.heads([head * num_kv // num_q for head in range(num_q)], torch.device("cpu"))
            lens = torch.zeros(batch, dtype=torch.int32)
            slots = torch.zeros(batch * count, dtype=torch.int64)
            tables = torch.zeros((batch, context // 16), dtype=torch.int64)
            starts = torch.zeros(batch + 1, dtype=torch.int32)
            metadata = TritonMetadata(starts, lens, tables, slots, *heads, count, context, 16)
            backend.paged_attention(q, cache[0], cache[1], metadata)
            if count == 8:
                metadata = dataclasses.replace(metadata, masks_T=slots, window_starts_S=lens)
                backend.paged_attention(q, cache[0], cache[1], metadata)


def call_the_rest(torch: Any) -> None:
    """One call of each wrapper, with and without what it may lack."""
    from pearl_ray.kernels import activation, filters, kv_store, linear, noise, norm, proposal, race, rejection, rotary

    rows, bf16 = 8, torch.bfloat16
    logits, ones = torch.empty((rows, 151_936), dtype=bf16), torch.ones(rows)
    whole, ids_R = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    draws, start = race.Draws(whole, ids_R, ids_R, ones), torch.zeros(3, dtype=torch.int32)
    for some in (draws, dataclasses.replace(draws, cuts_R=ones, last_ids_R=ids_R)):
        race.judge(*race.race(logits, some), start, whole, 8)
        _, ids, probs = proposal.propose(logits, some)
        rejection.verify(logits, some, start, whole, torch.ones(rows, dtype=torch.bool), ids, probs, 8)
    race.judge(torch.empty(64, 300), torch.empty((64, 300), dtype=torch.int32), start, whole, 64)
    filters.find_cuts(logits, ones, ids_R, ones.double(), ones)
    noise.gumbel(whole, ids_R, ids_R, 0, vocab_start=0, vocab_size=1000)
    x, weight = torch.empty((4, 5120), dtype=bf16), torch.empty(5120, dtype=bf16)
    norm.rms_norm(x, weight, 1e-6)
    norm.rms_norm(x, weight, 1e-6, torch.empty_like(x))
    activation.silu_mul(x)
    heads, cache = torch.empty((4, 8, 128), dtype=bf16), torch.empty((2, 4, 16, 8, 128), dtype=bf16)
    turn, slots, qkv = torch.empty((4, 1, 128), dtype=bf16), whole[:4], torch.empty((4, 80 * 128), dtype=bf16)
    rotary.turn_and_store(qkv, turn, turn, cache[0], cache[1], slots, num_q=64)
    rotary.turn_and_store(
        qkv, turn[:, 0], turn[:, 0], cache[0], cache[1], slots, num_q=64, positions_T=slots, norm_weight=qkv[0]
    )
    kv_store.store_kv(heads, heads, cache[0], cache[1], slots)
    scratch = linear.Scratch(torch.device("cpu"))
    for count in (1, 4, 13, 64):
        x, weight = torch.empty((count, 1024), dtype=bf16), torch.empty((64, 1024), dtype=bf16)
        for choice in linear.candidates(count, *weight.shape, is_gate_up=True):
            if choice != linear.TORCH:
                linear.linear(x, weight, None, choice, scratch)
        linear.fixed_linear(x, weight, None)
    call_beginning(torch)


def call_beginning(torch: Any) -> None:
    """Of one row and of many, with tables to copy or not; with an embedding or, as one of several ranks, without."""
    from pearl_ray.kernels.begin_pass import PassInput
    from pearl_ray.kernels.begin_pass_kernel import begin_pass

    for rows, seqs, width in ((1, 1, 1024), (64, 8, 5120)):
        ints = torch.zeros(rows + 1, dtype=torch.int32)
        given = PassInput(ints[:rows], ints[:rows], ints[: seqs + 1], ints[:seqs], ints.expand(9, -1), ints[:seqs], 16)
        weight = torch.empty(width, dtype=torch.bfloat16)
        for lanes in (given.lanes_S, None):
            for embedding in (torch.empty((1000, width), dtype=torch.bfloat16), None):
                begin_pass(given._replace(lanes_S=lanes), embedding, weight, 1e-6)


def call_rounds(torch: Any) -> None:
    """Between two rounds, and between two draft steps: one sequence and row (constants to Triton), and many."""
    from pearl_ray.kernels.advance import RoundInput, RoundState
    from pearl_ray.kernels.advance_kernel import advance
    from pearl_ray.kernels.draft_step import StepState
    from pearl_ray.kernels.draft_step_kernel import feed
    from pearl_ray.kernels.sampler import RowDraws

    def ints(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.int32)

    def draws(count: int) -> Any:
        kinds = (torch.int64, torch.int32, torch.int32, torch.float32, torch.int32, torch.float64, torch.float32)
        return RowDraws(*(torch.zeros(count, dtype=kind) for kind in kinds))

    for seqs, padded, rows in ((1, 1, 1), (3, 4, 12), (16, 16, 128), (200, 256, 512)):
        one = [ints(seqs) for _ in range(3)]
        state = RoundState(*one, ints(seqs, 64), ints(seqs), ints(seqs), draws(seqs))
        following = RoundInput(
            *(ints(rows) for _ in range(3)), ints(padded + 1), ints(padded), ints(rows + 1),
            torch.zeros(padded, dtype=torch.int64), draws(rows),
        )  # fmt: skip
        advance(state, ints(seqs), ints(seqs), ints(seqs, 64), ints(1025, 13), 16, following)
        step = StepState(*(ints(seqs) for _ in range(6)), ints(1), ints(64, seqs), draws(seqs))
        feed(step, ints(seqs), ints(1025, 13), 16)


if __name__ == "__main__":
    for kernel_name, size in compile_all().items():
        sys.stdout.write(f"{kernel_name} {size}\n")

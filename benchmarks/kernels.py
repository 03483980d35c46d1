"""Times the kernels on this GPU against its measured copy bandwidth. Knows kernels; knows no models.

    python -m benchmarks.kernels [--only attention,linear,sampler,small] [--sweep]

Times are medians of single calls with cold caches (a 256 MB buffer is overwritten before each), in microseconds, and
hold what a kernel that does nothing takes: about 4 of them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch
import triton

from pearl_ray.kernels.activation import silu_mul
from pearl_ray.kernels.attention_triton import Plan, TritonAttention, TritonMetadata, make_plan
from pearl_ray.kernels.begin_pass import PassInput
from pearl_ray.kernels.begin_pass_kernel import begin_pass
from pearl_ray.kernels.filters import find_cuts
from pearl_ray.kernels.linear import TORCH, Scratch, candidates
from pearl_ray.kernels.linear_choice import COLD_BYTES, milliseconds
from pearl_ray.kernels.norm import rms_norm
from pearl_ray.kernels.ops import TorchLayerOps
from pearl_ray.kernels.proposal import propose
from pearl_ray.kernels.race import Draws, judge, race
from pearl_ray.kernels.rejection import verify
from pearl_ray.kernels.rotary import turn_and_store

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16


def microseconds(call: Callable[[], object], repeats: int = 25) -> float:
    """Median time of one call, caches cold, launch not counted: the device is kept busy while the host launches."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    for _ in range(3):
        call()
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        flush.amax()  # reads: else writing the zeros back would be the kernel's time
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return 1000 * sorted(a.elapsed_time(b) for a, b in pairs)[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes per microsecond of a 2 GB device copy, read plus written."""
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source))


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: its launches cost what they cost in a captured forward."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def attention_case(
    batch: int, count: int, context: int, num_q: int, num_kv: int, width: int, block_size: int
) -> tuple[TritonAttention, torch.Tensor, torch.Tensor, TritonMetadata]:
    """A backend, queries, a cache with scattered blocks, and metadata."""
    backend, blocks = TritonAttention(), -(-context // block_size)
    cache = torch.randn((2, batch * blocks, block_size, num_kv, width), dtype=DTYPE, device=DEVICE)
    q = torch.randn((batch * count, num_q, width), dtype=DTYPE, device=DEVICE)
    tables = torch.randperm(batch * blocks, device=DEVICE).view(batch, blocks).int()
    head_start, group = backend.heads([h * num_kv // num_q for h in range(num_q)], DEVICE)
    start = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * count
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    slots = torch.zeros(batch * count, dtype=torch.int64, device=DEVICE)
    return backend, q, cache, TritonMetadata(start, lens, tables, slots, head_start, group, count, context, block_size)


def bench_attention(copy: float, sweep: bool) -> None:
    """Goal: 32k context, 8 query tokens, batch 4 at 0.75 of the copy bandwidth."""
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    print("attention: batch x query tokens @ context, heads/KV heads x width, block size: time, bandwidth / copy")
    shapes = [(4, 8, 32768, 64, 8, 128, 16), (4, 8, 32768, 32, 8, 128, 16), (4, 8, 32768, 32, 8, 128, 256)]
    shapes += [(1, 1, 32768, 32, 8, 128, 16), (1, 16, 32768, 64, 8, 128, 16), (32, 1, 2048, 16, 8, 128, 16)]
    shapes += [(8, 8, 4096, 64, 8, 128, 16), (1, 1, 600, 16, 8, 128, 16), (1, 2048, 2048, 32, 8, 128, 16)]
    shapes += [(4, 8, 16384, 16, 4, 256, 16), (4, 8, 32768, 32, 8, 64, 16)]
    for shape in shapes:
        batch, count, context, num_q, num_kv, width, block_size = shape
        backend, q, cache, metadata = attention_case(*shape)
        out = torch.empty_like(q)

        def call(
            plan: Plan | None = None,
            backend: TritonAttention = backend,
            q: torch.Tensor = q,
            cache: torch.Tensor = cache,
            metadata: TritonMetadata = metadata,
            out: torch.Tensor = out,
        ) -> object:
            return backend.paged_attention_into(out, q, cache[0], cache[1], metadata, plan)

        plan = make_plan(metadata, num_kv, width, sms)
        plans = [plan]
        if sweep:
            for block in (32, 64, 128):
                for stages in (2, 3, 4):
                    for warps in (4, 8):
                        changed = dataclasses.replace(plan, block=block, stages=stages, warps=warps)
                        plans += [changed, dataclasses.replace(changed, parts=max(1, plan.parts // 2))]
        name = f"{batch} x {count} @ {context}, {num_q}/{num_kv} x {width}, {block_size}"
        moved = batch * 2 * context * num_kv * width * 2
        lines = []
        for candidate in plans:
            try:
                one = lambda candidate=candidate: call(candidate)  # noqa: E731
                time = microseconds(one, 9) if sweep else microseconds(graphed(one))  # capturing takes most of a second
            except triton.runtime.errors.OutOfResources:
                continue
            lines.append((time, candidate))
        for time, candidate in sorted(lines, key=lambda line: line[0])[:5] + lines[:1]:
            print(f"  {name}: {time:.1f} us, {moved / time / copy:.3f}  {candidate}")
            if not sweep:
                break


def bench_linear(copy: float) -> None:
    """Each shape's ways at 1 to 64 rows: weight bytes over the time of map and norm over the copy bandwidth."""
    print("linear [out, in] x rows, with the norm before it, as a model runs it: cuBLAS; the best kernels")
    print("gate+up: with SiLU·mul behind it, or inside the kernel")
    shapes = [(51200, 5120, True), (6144, 1024, True), (51200, 5120, False), (10240, 5120, False), (5120, 8192, False)]
    shapes += [(5120, 25600, False), (6144, 1024, False), (1024, 3072, False)]
    for outputs, inputs, is_gate_up in shapes:
        count = max(4, min(16, COLD_BYTES // (2 * outputs * inputs)))
        scratch = Scratch(DEVICE)
        weights = [torch.randn((outputs, inputs), dtype=DTYPE, device=DEVICE) for _ in range(count)]
        for rows in (1, 4, 8, 32, 64):
            ways = candidates(rows, outputs, inputs, is_gate_up=is_gate_up)
            times = {way: 1000 * milliseconds(weights, rows, way, scratch, is_gate_up=is_gate_up) for way in ways}
            library = times.pop(TORCH)
            shares = [f"{library:.1f} us {weights[0].nbytes / library / copy:.3f}"]
            fastest = sorted(times, key=times.__getitem__)
            best = fastest[:2]
            if is_gate_up:
                best = [next(way for way in fastest if way.has_silu == has_silu) for has_silu in (False, True)]
            for choice in best:
                sizes = (choice.block_n, choice.block_k, choice.warps, choice.stages, choice.splits)
                shown = f"{choice.kind}{' with SiLU' if choice.has_silu else ''} {' '.join(map(str, sizes))}"
                shares.append(f"{times[choice]:.1f} us {weights[0].nbytes / times[choice] / copy:.3f} {shown}")
            name = "gate+up " if is_gate_up else ""
            print(f"  {name}[{outputs}, {inputs}] x {rows}: {'; '.join(shares)}", flush=True)


def draws_of(rows: int, temperature: float) -> Draws:
    """Any draws."""
    return Draws(
        torch.randint(-(2**63), 2**63 - 1, (rows,), device=DEVICE),
        torch.arange(rows, dtype=torch.int32, device=DEVICE),
        torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        torch.full((rows,), temperature, device=DEVICE),
    )


def bench_sampler(copy: float) -> None:
    """Noise, argmax and verdict over a 152k vocabulary."""
    print("end of a round, coupled, 151936 ids: time; logits' bytes over the copy bandwidth")
    for rows, seqs in ((1, 1), (8, 1), (32, 32), (64, 8), (256, 32)):
        logits = torch.randn((rows, 151_936), dtype=DTYPE, device=DEVICE)
        row_start = torch.arange(seqs + 1, dtype=torch.int32, device=DEVICE) * (rows // seqs)
        tested = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        for temperature in (0.0, 1.0):
            draws = draws_of(rows, temperature)

            def call(logits=logits, draws=draws, row_start=row_start, tested=tested, most=rows // seqs):  # type: ignore[no-untyped-def]
                return judge(*race(logits, draws), row_start, tested, most)

            time = microseconds(graphed(call))
            print(f"  {rows} rows of {seqs}, T={temperature}: {time:.1f} us, {logits.nbytes / time / copy:.3f}")


def bench_rules() -> None:
    """What filters, the draft's proposal and the rejection rule cost."""
    print("filters (top-k 50 and top-p 0.9), proposal, rejection verdict, 151936 ids: us")
    for rows, seqs in ((1, 1), (8, 1), (32, 32), (64, 8)):
        logits = torch.randn((rows, 151_936), dtype=DTYPE, device=DEVICE) * 3
        draws, tested = draws_of(rows, 1.0), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        top_k = torch.full((rows,), 50, dtype=torch.int32, device=DEVICE)
        top_p = torch.full((rows,), 0.9, dtype=torch.float64, device=DEVICE)
        min_p, ones = torch.zeros(rows, device=DEVICE), torch.ones(rows, dtype=torch.bool, device=DEVICE)
        row_start = torch.arange(seqs + 1, dtype=torch.int32, device=DEVICE) * (rows // seqs)
        _, ids, probs = propose(logits, draws)
        filters = microseconds(graphed(lambda: find_cuts(logits, draws.temperatures_R, top_k, top_p, min_p)))  # noqa: B023
        proposal = microseconds(graphed(lambda: propose(logits, draws)))  # noqa: B023
        verdict = microseconds(
            graphed(lambda: verify(logits, draws, row_start, tested, ones, ids, probs, rows // seqs))  # noqa: B023
        )
        print(f"  {rows} rows of {seqs}: filters {filters:.1f}, proposal {proposal:.1f}, verdict {verdict:.1f}")


def beginning(rows: int) -> PassInput:
    """So many sequences of one row, each with 900 tokens, in tables that reach to 32k."""
    ints = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)
    tables = torch.zeros((2 * rows + 1, 2080), dtype=torch.int32, device=DEVICE)
    return PassInput(ints[:rows], ints[:rows], ints, torch.full_like(ints[:rows], 900), tables, ints[1:], 16)


def bench_small() -> None:
    """The small kernels of a layer, and a pass's beginning in one launch and in torch, at one and 32 rows."""
    print("small kernels, 5120 wide, 64 + 2 x 8 heads of 128: us at 1 and 32 rows")
    for rows in (1, 32):
        x = torch.randn((rows, 5120), dtype=DTYPE, device=DEVICE)
        residual, weight = torch.randn_like(x), torch.randn(5120, dtype=DTYPE, device=DEVICE)
        joint = torch.randn((rows, 51200), dtype=DTYPE, device=DEVICE)
        qkv = torch.randn((rows, 80 * 128), dtype=DTYPE, device=DEVICE)
        cache = torch.zeros((2, 64, 16, 8, 128), dtype=DTYPE, device=DEVICE)
        slots, cos = torch.arange(rows, device=DEVICE), torch.randn((rows, 1, 128), dtype=DTYPE, device=DEVICE)
        embedding = torch.randn((151_936, 5120), dtype=DTYPE, device=DEVICE)
        given = beginning(rows)
        library = TorchLayerOps()
        calls = {
            "beginning": lambda g=given, e=embedding, w=weight: begin_pass(g, e, w, 1e-6),
            "beginning in torch": lambda g=given, e=embedding, w=weight, ops=library: ops.begin_pass(g, e, w, 1e-6),
            "norm": lambda x=x, w=weight, r=residual: rms_norm(x, w, 1e-6, r),
            "silu": lambda joint=joint: silu_mul(joint),
            "rotary": lambda qkv=qkv, cos=cos, cache=cache, slots=slots: turn_and_store(
                qkv, cos, cos, cache[0], cache[1], slots, num_q=64
            ),
        }
        times = {name: microseconds(graphed(call)) for name, call in calls.items()}  # type: ignore[arg-type]
        print(f"  {rows}: " + ", ".join(f"{name} {time:.1f}" for name, time in times.items()))


def main() -> None:
    """Runs what ``--only`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="attention,linear,sampler,small")
    parser.add_argument("--sweep", action="store_true", help="try many attention plans, print the best five")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    tiny = torch.zeros(1, device=DEVICE)
    nothing = microseconds(graphed(tiny.zero_))
    print(f"copy, read + written: {copy / 1e6:.3f} TB/s; a kernel that does nothing: {nothing:.1f} us")
    wanted = arguments.only.split(",")
    if "attention" in wanted:
        bench_attention(copy, arguments.sweep)
    if "linear" in wanted:
        bench_linear(copy)
    if "sampler" in wanted:
        bench_sampler(copy)
        bench_rules()
    if "small" in wanted:
        bench_small()


if __name__ == "__main__":
    main()

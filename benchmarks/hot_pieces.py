"""The pieces of a round alone, on one device and in one process: target passes, draft steps, and their kernels.

What ``hot_path --only pieces`` runs. Builds each model as a shard does; knows no engine, no rounds, no requests.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch

from pearl_ray import SamplingParams, env
from pearl_ray.actors.device import DeviceParts, can_capture, make_parts
from pearl_ray.actors.worker import SETTLED_ROWS
from pearl_ray.core.comm import SingleGroup
from pearl_ray.core.sampling import Row
from pearl_ray.model.batching import Entry
from pearl_ray.model.draft_steps import Writer
from pearl_ray.model.loading import load_model, open_models

CONTEXT = 256  # tokens
REPEATS = 20
BLOCK_SIZE = 16
PROFILED = 5  # runs of a piece under the profiler
MOST_KERNELS = 14  # lines of a profile


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read plus written."""
    size = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source), device)


def fastest(call: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _await_memory(device: torch.device) -> None:
    """The processes of an engine that ran before may still be ending: the driver gives their memory back late."""
    deadline = time.monotonic() + 30
    free, total = torch.cuda.mem_get_info(device)
    while free < 0.9 * total and time.monotonic() < deadline:
        time.sleep(0.2)
        free, _ = torch.cuda.mem_get_info(device)


def pieces(args: argparse.Namespace) -> list[dict[str, object]]:
    """Passes and draft steps alone, of ``--roles`` at ``--batches``; each is printed as it is measured."""
    device = torch.device("cuda:0" if args.device == "cuda" else "cpu")
    if device.type == "cuda":
        _await_memory(device)
    batches = [int(b) for b in args.batches.split(",")]
    results: list[dict[str, object]] = []
    for role in args.roles.split(","):
        parts, tables = _built(args, role, max(batches), device)
        measure = _verification if role == "target" else _drafting
        with torch.inference_mode():
            for said, run in measure(parts, tables, batches, device):
                print("      " + ", ".join(f"{name} {value}" for name, value in said.items()), flush=True)
                if args.profile and device.type == "cuda":
                    _print_kernels(run, device)
                results.append(said)
        del parts
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _built(
    args: argparse.Namespace, role: str, widest: int, device: torch.device
) -> tuple[DeviceParts, list[list[int]]]:
    """The role's model and what its rounds need, and a block table for each of ``widest`` sequences."""
    began = time.monotonic()
    cache_dir, group = str(env.cache_dir()), SingleGroup()
    backend = "triton" if device.type == "cuda" else "torch"
    models = open_models(args.target, args.draft, cache_dir, with_draft=True)
    model = load_model(
        target_model=args.target,
        draft_model=args.draft,
        cache_dir=cache_dir,
        role=role,
        rank=0,
        group=group,
        dtype=args.dtype if args.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32"),
        device=device,
        attention_backend=backend,
        block_size=BLOCK_SIZE,
        on_layer_loaded=lambda done, total: None,
    )
    loaded = time.monotonic()
    model.transformer.settle(SETTLED_ROWS)
    print(f"      {role}: made in {loaded - began:.1f} s, settled in {time.monotonic() - loaded:.1f} s", flush=True)
    blocks = -(-(CONTEXT + 32) // BLOCK_SIZE)
    parts = make_parts(
        role,
        model.transformer,
        model.make_cache(blocks * widest, BLOCK_SIZE),
        group,
        block_size=BLOCK_SIZE,
        num_valid=models.num_valid[role],
        max_num_seqs=widest,
        max_model_len=model.transformer.config.max_position_embeddings,  # as an engine's: passes are made for it
        max_window=32,
        use_graphs=can_capture(group, backend, enforce_eager=False),
    )
    return parts, [list(range(blocks * i, blocks * (i + 1))) for i in range(widest)]


def _verification(
    parts: DeviceParts, tables: list[list[int]], batches: list[int], device: torch.device
) -> Iterator[tuple[dict[str, object], Callable[[], object]]]:
    """A line and what it measured, for each batch and number of tokens per sequence."""
    for batch in batches:
        alone = 0.0
        for width in (1, 4, 8, 16):
            if batch * width > parts.runner.max_rows:
                continue
            entries = [Entry([0] * width, CONTEXT, tables[i], width, i) for i in range(batch)]
            parts.runner.capture([parts.runner.shape(batch * width, batch, width)])

            def run(entries: list[Entry] = entries) -> object:
                return parts.runner.logits(entries)

            seconds = fastest(run, device)
            alone = alone or seconds
            said = {"target pass, batch": batch, "tokens each": width, "ms": round(1e3 * seconds, 3)}
            yield said | {"over one token": round(seconds / alone, 3)}, run


def _drafting(
    parts: DeviceParts, tables: list[list[int]], batches: list[int], device: torch.device
) -> Iterator[tuple[dict[str, object], Callable[[], object]]]:
    """A line and what it measured, for each batch and temperature."""
    steps = parts.steps
    assert steps is not None
    for batch in batches:
        parts.runner.capture([parts.runner.shape(batch, batch, 1)])
        steps.capture([batch])
        first = [Entry([0], CONTEXT, tables[i], 1, i) for i in range(batch)]
        for temperature in (0.0, 1.0):
            row = Row(SamplingParams(temperature=temperature), 1, 0, CONTEXT + 1)

            def window(limit: int, first: list[Entry] = first, row: Row = row) -> object:
                return steps.write(first, [Writer(i, tables[i], row, limit, False) for i in range(len(first))])

            one, several = (fastest(lambda limit=limit: window(limit), device) for limit in (1, 9))
            each = round(1e3 * (several - one) / 8, 3)
            said = {"draft step, batch": batch, "temperature": temperature, "ms": each}
            yield said | {"window of one ms": round(1e3 * one, 3)}, lambda window=window: window(9)


def _print_kernels(run: Callable[[], object], device: torch.device) -> None:
    """Where the device's time goes: kernels by their total, per run, and how much of a run none was at work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            run()
        torch.cuda.synchronize(device)
    totals: defaultdict[str, list[float]] = defaultdict(list)
    spans = []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name].append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
    spans.sort()
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    print(f"        {len(spans) / PROFILED:.0f} launches, {whole / PROFILED:.0f} us a run, idle {1 - busy / whole:.3f}")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]:
        count, total = len(times) / PROFILED, sum(times) / PROFILED
        print(f"        {total:>9.1f} us = {count:>6.1f} x {total / count:>8.2f}  {name[:90]}", flush=True)

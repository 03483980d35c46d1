"""Figures of a load: percentiles, throughput, goodput, as table, JSON and picture. Knows answers; sends nothing.

Words and keys are those of ``vllm bench serve``, except that its ITL, the time between two chunks, is called
inter-chunk latency (ICL) here, and ITL is per token: a speculating server sends several tokens in a chunk.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pearl_ray.commands.load import Answer

# Key in the results -> (title of the table's section, name in its rows).
LATENCIES: Mapping[str, tuple[str, str]] = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "icl": ("Inter-chunk Latency", "ICL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
# What --goodput may bound: a request's own figure, in seconds. Its inter-token latency is its mean one.
GOODPUT_METRICS = ("ttft", "tpot", "itl", "e2el")
MS = 1e3


@dataclass(frozen=True, slots=True)
class Run:
    """What was sent, and what came back; ``duration`` in seconds.

    ``client_cpu_s``: processor seconds of this client meanwhile; close to ``duration`` it measures itself.
    """

    answers: Sequence[Answer]
    duration: float
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    client_cpu_s: float = 0.0

    @property
    def succeeded(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]


def parse_goodput(items: Iterable[str]) -> dict[str, float]:
    """Bounds in milliseconds by metric, out of ``ttft:200 itl:50``.

    Raises:
        ValueError: an item that isn't METRIC:MS, an unknown metric, or one given twice.
    """
    bounds: dict[str, float] = {}
    for item in (part for text in items for part in text.replace(",", " ").split()):
        name, _, value = item.partition(":")
        try:
            bound = float(value)
        except ValueError:
            bound = -1.0
        if name not in GOODPUT_METRICS or not bound > 0 or name in bounds:
            raise ValueError(f"{item!r} is not METRIC:MILLISECONDS with METRIC once of {', '.join(GOODPUT_METRICS)}")
        bounds[name] = bound
    return bounds


def is_good(answer: Answer, bounds: Mapping[str, float]) -> bool:
    """Whether a request succeeded within all bounds (milliseconds). An answer of one token has no time per token."""
    if answer.error is not None or answer.ttft is None:
        return False
    mean = answer.tpot() or 0.0
    values = {"ttft": answer.ttft, "tpot": mean, "itl": mean, "e2el": answer.e2e}
    return all(values[name] * MS <= bound for name, bound in bounds.items())


def samples(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """All measured latencies in seconds, by key of ``LATENCIES``."""
    return {
        "ttft": [a.ttft for a in answers if a.ttft is not None],
        "tpot": [value for a in answers if (value := a.tpot()) is not None],
        "itl": [value for a in answers for value in a.inter_token()],
        "icl": [value for a in answers for value in a.inter_chunk()],
        "e2el": [a.e2e for a in answers],
    }


def peaks(answers: Sequence[Answer]) -> tuple[float, int]:
    """Most tokens in any second of the run, and most requests out at one time."""
    per_second: dict[int, int] = {}
    events: list[tuple[float, int]] = []
    for a in answers:
        for when, count in zip(a.arrivals, a.num_tokens, strict=True):
            second = int(a.started + when)
            per_second[second] = per_second.get(second, 0) + count
        events += [(a.started, 1), (a.started + a.e2e, -1)]
    out = most = 0
    for _, change in sorted(events):
        out += change
        most = max(most, out)
    return float(max(per_second.values(), default=0)), most


def results(run: Run, percentiles: Sequence[float], goodput: Mapping[str, float]) -> dict[str, Any]:
    """Every figure, by vLLM's keys; latencies in milliseconds, the lists of single requests in seconds."""
    done = run.succeeded
    inputs, outputs = sum(a.input_tokens for a in done), sum(a.output_tokens for a in done)
    peak_tokens, peak_requests = peaks(done)
    seconds = run.duration or float("inf")
    found: dict[str, Any] = {
        "num_prompts": len(run.answers),
        "completed": len(done),
        "failed": len(run.answers) - len(done),
        "duration": run.duration,
        "client_cpu_s": run.client_cpu_s,
        "request_rate": run.request_rate if run.request_rate != float("inf") else "inf",
        "burstiness": run.burstiness if run.burstiness != float("inf") else "inf",
        "max_concurrency": run.max_concurrency,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "output_throughput": outputs / seconds,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "total_token_throughput": (inputs + outputs) / seconds,
    }
    if goodput:
        found["goodput"] = dict(goodput)
        found["request_goodput"] = sum(is_good(a, goodput) for a in done) / seconds
    for key, values in samples(done).items():
        if not values:
            continue
        found[f"mean_{key}_ms"] = statistics.fmean(values) * MS
        found[f"median_{key}_ms"] = float(np.median(values)) * MS
        found[f"std_{key}_ms"] = float(np.std(values)) * MS
        for percentile in percentiles:
            found[f"p{percentile:g}_{key}_ms"] = float(np.percentile(values, percentile)) * MS
    return found


def single(run: Run) -> dict[str, Any]:
    """What each request showed, in the order of the prompts; a failed one has its error. Seconds."""
    return {
        "input_lens": [a.input_tokens for a in run.answers],
        "output_lens": [a.output_tokens for a in run.answers],
        "start_times": [a.started for a in run.answers],
        "ttfts": [a.ttft for a in run.answers],
        "e2els": [a.e2e for a in run.answers],
        "itls": [a.inter_token() for a in run.answers],
        "icls": [a.inter_chunk() for a in run.answers],
        "errors": [a.error or "" for a in run.answers],
    }


def table(found: Mapping[str, Any], percentiles: Sequence[float]) -> Table:
    """The figures as vLLM's client prints them."""
    made = Table(title="Serving Benchmark Result", title_justify="left", show_header=False)
    made.add_column()
    made.add_column(justify="right")
    rows: list[tuple[str, str]] = [
        ("Successful requests", str(found["completed"])),
        ("Failed requests", str(found["failed"])),
    ]
    if found["max_concurrency"] is not None:
        rows.append(("Maximum request concurrency", str(found["max_concurrency"])))
    if found["request_rate"] != "inf":
        rows.append(("Request rate configured (RPS)", f"{found['request_rate']:.2f}"))
    rows += [
        ("Benchmark duration (s)", f"{found['duration']:.2f}"),
        ("Total input tokens", str(found["total_input_tokens"])),
        ("Total generated tokens", str(found["total_output_tokens"])),
        ("Request throughput (req/s)", f"{found['request_throughput']:.2f}"),
    ]
    if "request_goodput" in found:
        rows.append(("Request goodput (req/s)", f"{found['request_goodput']:.2f}"))
    rows += [
        ("Output token throughput (tok/s)", f"{found['output_throughput']:.2f}"),
        ("Peak output token throughput (tok/s)", f"{found['max_output_tokens_per_s']:.2f}"),
        ("Peak concurrent requests", str(found["max_concurrent_requests"])),
        ("Total Token throughput (tok/s)", f"{found['total_token_throughput']:.2f}"),
    ]
    for row in rows:
        made.add_row(*row)
    for key, (title, name) in LATENCIES.items():
        if f"mean_{key}_ms" not in found:
            continue
        made.add_section()
        made.add_row(title, "", style="bold")
        made.add_row(f"Mean {name} (ms)", f"{found[f'mean_{key}_ms']:.2f}")
        made.add_row(f"Median {name} (ms)", f"{found[f'median_{key}_ms']:.2f}")
        for p in percentiles:
            made.add_row(f"P{p:g} {name} (ms)", f"{found[f'p{p:g}_{key}_ms']:.2f}")
    return made


def draw(answers: Sequence[Answer], percentiles: Sequence[float], path: Path) -> None:
    """Time to first token and inter-token latency as cumulative distributions, with the percentiles marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    every = samples(answers)
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axes, key in zip(panels, ("ttft", "itl"), strict=True):
        values = np.sort(np.asarray(every[key])) * MS
        axes.set_xlabel(f"{LATENCIES[key][0]} (ms)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if not values.size:
            continue
        axes.step(values, np.arange(1, values.size + 1) / values.size, where="post", color="#3b6fb6")
        for p in percentiles:
            at = float(np.percentile(values, p))
            axes.plot([at], [p / 100], "o", color="#d98032", markersize=4)
            axes.annotate(f"P{p:g} {at:.1f}", (at, p / 100), xytext=(6, -10), textcoords="offset points", fontsize=8)
    panels[0].set_ylabel("share of the samples")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

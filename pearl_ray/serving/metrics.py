"""Figures for Prometheus, under vLLM's names with ``pearl:``. Latencies are measured here, where users feel them.

Everything else is the coordinator's ``stats()``, asked for at each scrape. Knows no routes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Key of stats(), which is the metric's name too -> (its label or None, help).
GAUGES: dict[str, tuple[str | None, str]] = {
    "num_requests_running": (None, "Sequences in the batch."),
    "num_requests_waiting": (None, "Sequences that wait for room in the batch."),
    "kv_cache_usage_perc": ("model", "Part of the cache's blocks that running sequences hold, 0 to 1."),
    "phase_sequences": ("phase", "Sequences by phase of the algorithm."),
    "window_tokens": (None, "Longest window in use, in tokens; 0: no drafting."),
    "acceptance_rate": (None, "Part of the tested tokens that is accepted, as the window policy sees it, 0 to 1."),
    "draft_available": (None, "1 while a draft works beside the target."),
}
COUNTERS: dict[str, tuple[str | None, str]] = {
    "prompt_tokens_total": (None, "Prompt tokens taken in."),
    "generation_tokens_total": (None, "Tokens generated."),
    "request_success_total": ("finished_reason", "Answers ended, by reason."),
    "spec_decode_num_drafts_total": (None, "Windows tested."),
    "spec_decode_num_draft_tokens_total": (None, "Tokens drafted."),
    "spec_decode_num_accepted_tokens_total": (None, "Drafted tokens accepted."),
    "spec_decode_num_accepted_tokens_per_pos_total": ("position", "Drafted tokens accepted, by place in the window."),
    "num_preemptions_total": (None, "Sequences put back into the queue for want of cache blocks."),
    "num_rounds_total": (None, "Rounds of the target."),
    "prefix_cache_queries": ("model", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("model", "Prompt tokens found in the prefix cache."),
    "recoveries_total": ("role", "Shards replaced after a death."),
}
# stats()[key][side] is {"sum": seconds, "count": rounds}.
SUMMARIES: dict[str, tuple[str, str]] = {
    "round_seconds": ("side", "Time of a round."),
    "bridge_wait_seconds": ("side", "Time that a side waited for the other, per round."),
}

_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_ITL = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_E2E = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)


class Metrics:
    """One server's figures; seconds, from the arrival of the request's body here.

    Attributes:
        time_to_first_token, e2e_latency: one observation per HTTP request; the latter if it succeeded.
        inter_token_latency: one per token after an answer's first: the time since the answer's last tokens, divided
            among those that came together.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._coordinator = _Coordinator()
        self._registry.register(self._coordinator)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"pearl:{name}", text, buckets=buckets, registry=self._registry)

        self.time_to_first_token = histogram("time_to_first_token_seconds", "Until the first token.", _TTFT)
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between tokens of an answer.", _ITL)
        self.e2e_latency = histogram("e2e_request_latency_seconds", "Until the last token.", _E2E)

    def text(self, stats: Mapping[str, Any]) -> bytes:
        """All figures in Prometheus' text format."""
        self._coordinator.stats = stats
        return generate_latest(self._registry)


class _Coordinator(Collector):
    """The coordinator's figures as metric families; those it doesn't have are left out."""

    def __init__(self) -> None:
        self.stats: Mapping[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        for table, family in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, (label, text) in table.items():
                value = self.stats.get(name)
                if value is None:
                    continue
                metric = family(f"pearl:{name}", text, labels=[label] if label else [])
                for key, number in value.items() if label else ((None, value),):
                    metric.add_metric([str(key)] if label else [], float(number))
                yield metric
        for name, (label, text) in SUMMARIES.items():
            if name in self.stats:
                summary = SummaryMetricFamily(f"pearl:{name}", text, labels=[label])
                for key, total in self.stats[name].items():
                    summary.add_metric([str(key)], total["count"], total["sum"])
                yield summary

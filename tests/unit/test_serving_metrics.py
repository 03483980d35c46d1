"""What a scrape shows, that the dashboard asks for nothing else, and what the page may do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pearl_ray.core.outputs import RequestMetrics, RequestOutput
from pearl_ray.core.params import SamplingParams
from pearl_ray.serving.answers import LOWEST, Pieces, completion_logprobs, speculation_of
from pearl_ray.serving.metrics import Metrics
from pearl_ray.serving.routes import PAGE
from tests.serving_fakes import FakeEngine, FakeTokenizer, Logprob, asking

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_success_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
    "phase_sequences",
    "window_tokens",
    "round_seconds",
    "bridge_wait_seconds",
    "draft_available",
    "recoveries_total",
]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a server that has given one answer, whose first token came well before the others."""
    engine = FakeEngine(delay_s=0.002, held=True)
    with asking(engine) as client:
        body = {"prompt": "x", "max_tokens": 12, "n": 2, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            engine.held = False
            assert list(lines)[-2] == "data: [DONE]"
        yield client


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_a_scrape_has_the_coordinators_figures_under_their_names(client: httpx.Client) -> None:
    found = samples(client.get("/metrics").text)
    none: frozenset[tuple[str, str]] = frozenset()
    assert found["pearl:num_requests_running", none] == 0
    assert found["pearl:kv_cache_usage_perc", frozenset({("model", "draft")})] == 0.5
    assert found["pearl:request_success_total", frozenset({("finished_reason", "stop")})] == 2
    assert found["pearl:spec_decode_num_accepted_tokens_per_pos_total", frozenset({("position", "1")})] == 3
    assert found["pearl:round_seconds_sum", frozenset({("side", "target")})] == 1.5
    assert found["pearl:recoveries_total", frozenset({("role", "draft")})] == 0
    assert not any("unknown" in name for name, _ in found)


def test_latencies_are_counted_once_per_request_and_once_per_later_token(client: httpx.Client) -> None:
    found = samples(client.get("/metrics").text)
    none: frozenset[tuple[str, str]] = frozenset()
    assert found["pearl:time_to_first_token_seconds_count", none] == 1
    assert found["pearl:e2e_request_latency_seconds_count", none] == 1
    assert found["pearl:inter_token_latency_seconds_count", none] == 2 * 11
    whole, tokens = (found[f"pearl:{n}_seconds_sum", none] for n in ("e2e_request_latency", "inter_token_latency"))
    assert 0 < tokens <= 2 * whole


def test_every_name_of_the_contract_is_exposed_once_the_coordinator_has_it() -> None:
    labelled = {"kv_cache_usage_perc", "request_success_total", "phase_sequences", "recoveries_total"}
    stats: dict[str, object] = {name: {"a": 1} if name in labelled or "per_pos" in name else 1 for name in CONTRACT}
    stats |= {name: {"target": {"sum": 1.0, "count": 2}} for name in ("round_seconds", "bridge_wait_seconds")}
    text = Metrics().text(stats).decode()
    names = {name for name, _ in samples(text)}
    for name in CONTRACT:
        assert {f"pearl:{name}", f"pearl:{name}_count"} & names, name


def test_each_panel_of_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text("utf-8"))
    labelled = {"kv_cache_usage_perc", "request_success_total", "phase_sequences", "recoveries_total"}
    stats: dict[str, object] = {name: {"a": 1} if name in labelled or "per_pos" in name else 1 for name in CONTRACT}
    stats |= {name: {"target": {"sum": 1.0, "count": 2}} for name in ("round_seconds", "bridge_wait_seconds")}
    stats |= {"num_preemptions_total": 1, "prefix_cache_queries": {"target": 2}, "prefix_cache_hits": {"target": 1}}
    names = {name for name, _ in samples(Metrics().text(stats).decode())}
    asked = 0
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            used = re.findall(r"pearl:\w+", target["expr"])
            assert used and set(used) <= names, (panel["title"], set(used) - names)
            asked += 1
    assert asked >= 10


def test_the_page_runs_only_its_own_script_and_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html") and "unsafe" not in policy
    assert policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    page = PAGE.read_text("utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and " style=" not in page and " onclick=" not in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page


def test_pieces_follow_stops_and_the_end_of_sequence() -> None:
    pieces = Pieces(FakeTokenizer(), [120], SamplingParams(stop=("lo",), max_tokens=9))
    first = pieces.take([ord("h"), ord("e")], ["prefill", "pre_verify"], None, None)
    second = pieces.take([ord("l"), ord("l"), ord("o")], ["post_verify"] * 3, "stop", "lo")
    assert "".join(first["texts"] + second["texts"]) == "hel" and len(second["texts"]) == 3
    ended = Pieces(FakeTokenizer(), [120], SamplingParams()).take([ord("a"), 0], ["target"] * 2, "stop", None)
    assert ended["texts"] == ["a", ""]


def test_figures_of_several_prompts_are_weighted_by_their_forwards() -> None:
    def output(forwards: int, rate: float) -> RequestOutput:
        metrics = RequestMetrics(num_target_forwards=forwards, tokens_per_target_forward=rate, rounds={"pre_verify": 1})
        return RequestOutput(
            request_id="r", prompt=None, prompt_token_ids=[1], outputs=[], finished=True, metrics=metrics, seed=3
        )

    spec = speculation_of([output(1, 4.0), output(3, 2.0)])
    assert spec.tokens_per_target_forward == 2.5 and spec.rounds == {"pre_verify": 2} and spec.seeds == [3, 3]


def test_a_token_without_probability_is_written_as_a_number() -> None:
    written = completion_logprobs([{5: Logprob(float("-inf"), 9, "x")}], 0, 4, FakeTokenizer())
    assert written["token_logprobs"] == [LOWEST] and written["text_offset"] == [4] and written["top_logprobs"] is None

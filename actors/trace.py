"""Rounds as a Chrome trace (the Trace Event Format: complete events, microseconds). Knows summaries only."""

from __future__ import annotations

from collections.abc import Iterable

from pearl_ray.core.messages import DraftSummary, RoundSummary

TARGET, DRAFT = 1, 2


def chrome_trace(rounds: Iterable[RoundSummary], drafts: Iterable[DraftSummary]) -> dict[str, object]:
    """One track per side; times are those of the hosts' monotonic clocks, comparable on one host."""
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((TARGET, "target"), (DRAFT, "draft"))
    ]
    for r in rounds:
        committed = sum(s.num_accepted + (s.token >= 0) for s in r.sequences)
        args = {"round": r.round, "rows": r.num_target_rows, "committed": committed, "epoch": r.epoch}
        events.append(_event(TARGET, f"verify {r.round}", r.started, r.forward_s, args))
        if r.wait_s:
            events.append(_event(TARGET, "wait for window", r.started + r.forward_s, r.wait_s, args))
    for d in drafts:
        args = {"round": d.round, "steps": d.num_steps}
        events.append(_event(DRAFT, f"draft {d.round}", d.started, d.forward_s, args))
        events.append(_event(DRAFT, "wait for verdict", d.finished, d.wait_s, args))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(tid: int, name: str, start_s: float, seconds: float, args: dict[str, int]) -> dict[str, object]:
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": start_s * 1e6, "dur": seconds * 1e6, "args": args}

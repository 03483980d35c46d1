"""What the engine has done since it started: counters for /metrics and ``stats()``. Counts only; knows no format."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from pearl_ray.core.messages import DraftSummary, RoundSummary, SequenceSummary
from pearl_ray.core.requests import Request
from pearl_ray.core.schedule import Work

KEPT_ROUNDS = 20_000  # the newest rounds kept for traces and round times


@dataclass(slots=True)
class Statistics:
    """Totals since the start, and the newest rounds as the shards reported them; seconds per side of the bridge."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: Counter[int] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    work_s: dict[str, float] = field(default_factory=lambda: {"target": 0.0, "draft": 0.0})
    wait_s: dict[str, float] = field(default_factory=lambda: {"target": 0.0, "draft": 0.0})
    num_draft_rounds: int = 0
    rounds: deque[RoundSummary] = field(default_factory=lambda: deque(maxlen=KEPT_ROUNDS))
    draft_rounds: deque[DraftSummary] = field(default_factory=lambda: deque(maxlen=KEPT_ROUNDS))

    def count_round(self, summary: RoundSummary) -> None:
        """A round of the target."""
        self.num_rounds += 1
        self.work_s["target"] += summary.forward_s
        self.wait_s["target"] += summary.wait_s
        self.rounds.append(summary)

    def count_draft(self, summary: DraftSummary) -> None:
        """The draft's side of a round."""
        self.num_draft_rounds += 1
        self.work_s["draft"] += summary.forward_s
        self.wait_s["draft"] += summary.wait_s
        self.draft_rounds.append(summary)

    def count_tests(self, work: Work, entry: SequenceSummary) -> None:
        """One sequence's verdict."""
        self.num_drafts += work.num_drafted > 0
        self.num_draft_tokens += work.num_drafted
        self.num_accepted_tokens += entry.num_accepted
        for position in range(entry.num_accepted):
            self.accepted_per_position[position] += 1

    def count_finished(self, request: Request) -> None:
        """A request ended, in each of its answers."""
        for answer in request.answers:
            self.finished[answer.finish_reason or "abort"] += 1

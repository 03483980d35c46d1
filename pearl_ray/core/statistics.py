"""What the engine has done since it started: counters for /metrics and ``stats()``. Counts only; knows no format."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from pearl_ray.core.messages import DraftSummary, Message, RoundSummary, decode, encode
from pearl_ray.core.requests import Request

KEPT_BYTES = 8 << 20  # of each side's newest rounds, kept for traces and round times


class Newest:
    """The newest messages, encoded: a long run's would otherwise be millions of objects that the garbage collector
    looks through again and again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._payloads: deque[bytes] = deque()
        self._room = max_bytes

    def append(self, message: Message) -> None:
        """Keep it, and forget the oldest where there are too many bytes."""
        payload = encode(message)
        self._payloads.append(payload)
        self._room -= len(payload)
        while self._room < 0:
            self._room += len(self._payloads.popleft())

    def __len__(self) -> int:
        return len(self._payloads)

    def __iter__(self) -> Iterator[Message]:
        return map(decode, self._payloads)


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
    finished: Counter[str] = field(default_factory=Counter)
    work_s: dict[str, float] = field(default_factory=lambda: {"target": 0.0, "draft": 0.0})
    wait_s: dict[str, float] = field(default_factory=lambda: {"target": 0.0, "draft": 0.0})
    num_draft_rounds: int = 0
    _verdicts: Counter[int] = field(default_factory=Counter)  # by number of accepted tokens
    _rounds: Newest = field(default_factory=lambda: Newest(KEPT_BYTES))
    _draft_rounds: Newest = field(default_factory=lambda: Newest(KEPT_BYTES))

    @property
    def rounds(self) -> list[RoundSummary]:
        """The newest rounds of the target, oldest first."""
        return cast("list[RoundSummary]", list(self._rounds))

    @property
    def draft_rounds(self) -> list[DraftSummary]:
        """The newest rounds of the draft, oldest first."""
        return cast("list[DraftSummary]", list(self._draft_rounds))

    @property
    def accepted_per_position(self) -> Counter[int]:
        """How often the token at each position of what was tested was accepted; positions from 0."""
        longest = max(self._verdicts, default=0)
        counts: Counter[int] = Counter(dict.fromkeys(range(longest), 0))
        at_least = 0
        for num_accepted in range(longest, 0, -1):
            at_least += self._verdicts[num_accepted]
            counts[num_accepted - 1] = at_least
        return counts

    def count_round(self, summary: RoundSummary) -> None:
        """A round of the target."""
        self.num_rounds += 1
        self.work_s["target"] += summary.forward_s
        self.wait_s["target"] += summary.wait_s
        self._rounds.append(summary)

    def count_draft(self, summary: DraftSummary) -> None:
        """The draft's side of a round."""
        self.num_draft_rounds += 1
        self.work_s["draft"] += summary.forward_s
        self.wait_s["draft"] += summary.wait_s
        self._draft_rounds.append(summary)

    def count_verdicts(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """A round's decoding sequences: how many tokens were drafted in it for each, and how many accepted."""
        self.num_drafts += len(drafted) - drafted.count(0)
        self.num_draft_tokens += sum(drafted)
        self.num_accepted_tokens += sum(accepted)
        self._verdicts.update(accepted)

    def count_finished(self, request: Request) -> None:
        """A request ended, in each of its answers."""
        for answer in request.answers:
            self.finished[answer.finish_reason or "abort"] += 1

"""The answers that wait to join the batch, and which of them may join next. Knows no blocks: whether one fits is asked.

First come, first served, with two rules for the ones that don't fit:

* An answer that doesn't fit may be overtaken by those behind it that do, so that room isn't left empty beside a large
  one; but only for ``PATIENCE_ROUNDS`` rounds from the first in which it didn't fit. From then on whatever the running
  sequences leave is saved for it: nobody behind it joins before it does, and with the batch empty it fits.
* An answer that was preempted goes to the front, and nobody overtakes it.

Rounds are counted, not seconds: the same requests and rounds give the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from pearl_ray.core.requests import Answer

PATIENCE_ROUNDS = 64
LOOK_AHEAD = 16  # how many are asked whether they fit, at most: a round's cost doesn't grow with the queue


@dataclass(slots=True)
class _Place:
    """``refused_at``: the round in which the answer was first found not to fit."""

    answer: Answer
    was_preempted: bool = False
    refused_at: int | None = None


class WaitingQueue:
    """See the module."""

    def __init__(self) -> None:
        self._places: deque[_Place] = deque()

    def __len__(self) -> int:
        return len(self._places)

    def extend(self, answers: Iterable[Answer]) -> None:
        """Newcomers, behind all others."""
        self._places.extend(_Place(answer) for answer in answers)

    def put_back(self, answer: Answer) -> None:
        """A preempted answer, in front of all others."""
        self._places.appendleft(_Place(answer, was_preempted=True))

    def remove(self, answer: Answer) -> None:
        """Take out an answer that was aborted."""
        self._places = deque(place for place in self._places if place.answer is not answer)

    def take(self, fits: Callable[[Answer], bool], number: int) -> Answer | None:
        """Take out the next answer to join in round ``number``; None where nobody who may go fits."""
        for index, place in enumerate(islice(self._places, LOOK_AHEAD)):
            if fits(place.answer):
                del self._places[index]
                return place.answer
            if place.refused_at is None:
                place.refused_at = number
            if place.was_preempted or number - place.refused_at >= PATIENCE_ROUNDS:
                return None
        return None

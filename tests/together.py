"""Several parties of one process at once, in threads, and waiting for what they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_S = 120.0  # longer than any deadline that a party has of its own: loaded machines stall


def together(*jobs: Callable[[], object]) -> list[object]:
    """What each job returns or raises, all run at once in threads."""
    results: list[object] = [None] * len(jobs)

    def run(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a party hangs"
    return results


def holds_within(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it holds, now or by then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


class Pace:
    """Holds one party back until another has heard of all but ``most_ahead`` of what it told; None: never."""

    def __init__(self, most_ahead: int | None) -> None:
        self._most_ahead, self._num_ahead, self._changed = most_ahead, 0, threading.Condition()

    def wait(self) -> None:
        """Something was told."""
        if self._most_ahead is not None:
            with self._changed:
                self._num_ahead += 1
                self._changed.wait_for(lambda: self._num_ahead <= self._most_ahead, PATIENCE_S)

    def hear(self, count: int = 1) -> None:
        """So much of it was heard of."""
        with self._changed:
            self._num_ahead -= count
            self._changed.notify_all()

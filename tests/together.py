"""Several parties of one process at once, in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
        thread.join(30)
        assert not thread.is_alive(), "a party hangs"
    return results

"""The bridge between draft and target: a window and a verdict per round, and nothing else.

Knows the two message types and the round's number. Knows nothing of what carries the bytes (see ``mailbox``), of
models, or of Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pearl_ray.cluster.mailbox import Mailbox
from pearl_ray.core.errors import ReplicaDivergedError
from pearl_ray.core.messages import VerdictMessage, Window


@dataclass
class Traffic:
    """What has gone over one end of a bridge; ``wait_s`` is the time spent in receiving, in seconds."""

    num_sent: int = 0
    num_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    wait_s: float = 0.0


@dataclass
class Bridge:
    """One process's end.

    ``windows`` goes from the draft leader to all target ranks, ``verdicts`` from the target leader to all draft ranks;
    an end that takes no part in a direction has None there. Every call raises ``TimeoutError`` at its deadline
    (``timeout_s`` seconds unless the call says otherwise), ``ConnectionError`` after :meth:`abort`, and
    ``ReplicaDivergedError`` when the message belongs to another round than the one asked for.
    """

    windows: Mailbox | None
    verdicts: Mailbox | None
    timeout_s: float = 60.0
    traffic: Traffic = field(default_factory=Traffic)

    def send_window(self, window: Window, timeout_s: float | None = None) -> None:
        """The draft leader's tokens of a round, to all target ranks."""
        self._send(self.windows, window.to_bytes(), timeout_s)

    def receive_window(self, round: int, timeout_s: float | None = None) -> Window:
        """The window that was drafted in ``round``."""
        window = Window.from_bytes(self._receive(self.windows, timeout_s))
        _check_round("window", window.round, round)
        return window

    def send_verdict(self, verdict: VerdictMessage, timeout_s: float | None = None) -> None:
        """The target leader's judgement of a round, to all draft ranks."""
        self._send(self.verdicts, verdict.to_bytes(), timeout_s)

    def receive_verdict(self, round: int, timeout_s: float | None = None) -> VerdictMessage:
        """The verdict on ``round``."""
        verdict = VerdictMessage.from_bytes(self._receive(self.verdicts, timeout_s))
        _check_round("verdict", verdict.round, round)
        return verdict

    def abort(self) -> None:
        """Make every pending and later call raise ``ConnectionError``; safe from another thread."""
        for mailbox in (self.windows, self.verdicts):
            if mailbox is not None:
                mailbox.abort()

    def close(self) -> None:
        """Give back what this end holds."""
        for mailbox in (self.windows, self.verdicts):
            if mailbox is not None:
                mailbox.close()

    def _send(self, mailbox: Mailbox | None, payload: bytes, timeout_s: float | None) -> None:
        assert mailbox is not None, "this end of the bridge has no such direction"
        mailbox.send(payload, self.timeout_s if timeout_s is None else timeout_s)
        self.traffic.num_sent += 1
        self.traffic.bytes_sent += len(payload)

    def _receive(self, mailbox: Mailbox | None, timeout_s: float | None) -> bytes:
        assert mailbox is not None, "this end of the bridge has no such direction"
        start = time.perf_counter()
        try:
            payload = mailbox.receive(self.timeout_s if timeout_s is None else timeout_s)
        finally:
            self.traffic.wait_s += time.perf_counter() - start
        self.traffic.num_received += 1
        self.traffic.bytes_received += len(payload)
        return payload


def _check_round(what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ReplicaDivergedError(f"the {what} of round {got} came where that of round {wanted} was due")

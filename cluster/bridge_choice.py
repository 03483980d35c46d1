"""Which transport the bridge takes: what a placement allows, and which of that measures fastest.

Knows devices, transports and a typical round's messages. Knows no Ray, and nothing of what a transport is made of.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pearl_ray.cluster.bridge import Bridge
from pearl_ray.cluster.devices import DeviceKey, Transport
from pearl_ray.core.errors import ConfigError
from pearl_ray.core.messages import MAX_PROPOSALS, VerdictMessage, Window

BridgeOption = Literal["auto", "nccl", "gloo", "shm"]

TRIAL_BUDGET_S = 0.03  # per transport, once it is connected
TYPICAL_WINDOW = 8  # tokens per sequence, where the window follows measured costs
MOST_TRIAL_SEQUENCES = 256
_LEAST_ROUNDS, _WARM_UP = 5, 2
_FRAME_LIMITS = (1 << 10, 1 << 16)
_ORDER: tuple[Transport, ...] = ("shm", "gloo", "nccl")  # the first of two equally fast ones is taken


def obstacles(keys: Sequence[DeviceKey], *, has_nccl: bool) -> dict[Transport, str | None]:
    """Per transport why it can't join shards at ``keys``; None: it can. gloo always can.

    Args:
        keys: of all shards, of both models.
        has_nccl: whether torch is built with NCCL.
    """
    gpus = [key.gpu for key in keys if key.gpu is not None]
    nccl = None
    if len(gpus) < len(keys):
        nccl = "NCCL needs a GPU per shard"
    elif len(set(gpus)) < len(gpus):
        nccl = "NCCL refuses two ranks on one device, and shards share one"
    elif not has_nccl:
        nccl = "this torch is built without NCCL"
    one_host = len({key.node for key in keys}) == 1
    return {"shm": None if one_host else "the shards are on several hosts", "gloo": None, "nccl": nccl}


def candidates(requested: BridgeOption, keys: Sequence[DeviceKey], *, has_nccl: bool) -> tuple[Transport, ...]:
    """The transports to open, one or several to measure.

    "auto" on the CPUs of one host is shared memory, unmeasured: there is no staging that could tip the scales, and
    gloo takes many times as long but for proposals in bulk, which both spend on copying (docs/decisions/0010).

    Raises:
        ConfigError: the requested one is impossible for this placement; says why, and what is possible.
    """
    found = obstacles(keys, has_nccl=has_nccl)
    possible = tuple(transport for transport in _ORDER if found[transport] is None)
    if requested == "auto":
        on_cpu = all(key.gpu is None for key in keys)
        return possible[:1] if on_cpu else possible
    if (reason := found[requested]) is not None:
        raise ConfigError("bridge", requested, f"{reason}; possible here: auto, {', '.join(possible)}")
    return (requested,)


def fastest(round_trips_s: dict[Transport, float]) -> Transport:
    """The transport with the shortest round trip."""
    return min(_ORDER, key=lambda transport: round_trips_s.get(transport, float("inf")))


def typical_window(num_sequences: int, window: int, *, rejection: bool, round: int = 0, last: bool = False) -> Window:
    """A round's window with every sequence drafting; ``last`` (the checksum) ends a trial."""
    num_tokens = num_sequences * window
    tokens_N = np.arange(num_tokens, dtype=np.int32)
    ids_MK = np.zeros((num_tokens if rejection else 0, MAX_PROPOSALS), np.int32)
    lengths_S = np.full(num_sequences, window, np.int32)
    return Window(round, int(last), lengths_S, tokens_N, np.ones_like(tokens_N), ids_MK, ids_MK.astype(np.float32))


def typical_verdict(num_sequences: int, *, round: int = 0, last: bool = False) -> VerdictMessage:
    """A round's verdict; ``last`` (the first count) ends a trial."""
    return VerdictMessage(round, np.full(num_sequences, int(last), np.int32), np.zeros(num_sequences, np.int32))


def frame_sizes(num_sequences: int, window: int) -> tuple[int, int]:
    """Bytes of a frame that holds a round's (window, verdict) without proposals, within limits."""
    sizes = (
        len(typical_window(num_sequences, window, rejection=False).to_bytes()),
        len(typical_verdict(num_sequences).to_bytes()),
    )
    low, high = _FRAME_LIMITS
    framed = [min(max(-(-(size + 64) // 64) * 64, low), high) for size in sizes]
    return framed[0], framed[1]


def measure_round_trip(
    bridge: Bridge,
    role: Literal["draft", "target"],
    rank: int,
    *,
    num_sequences: int,
    window: int,
    rejection: bool,
    budget_s: float = TRIAL_BUDGET_S,
    timeout_s: float = 10.0,
) -> float | None:
    """Windows and verdicts to and fro, as in a round: the median in seconds, at the draft's leader; None elsewhere.

    Called by every shard of both models at once, each with its own end. What is measured is what the rounds pay: from
    the arrays at one end to the arrays at the other, staging through the device included where the transport does so.

    Raises:
        TimeoutError, ConnectionError: a peer is gone.
    """
    if (role, rank) == ("draft", 0):
        return _lead(bridge, num_sequences, window, rejection, budget_s, timeout_s)
    number, last = 0, False
    while not last:
        if role == "draft":
            last = bool(bridge.receive_verdict(number, timeout_s).num_accepted_S[0])
        else:
            last = bool(bridge.receive_window(number, timeout_s).checksum)
            if rank == 0:
                bridge.send_verdict(typical_verdict(num_sequences, round=number, last=last), timeout_s)
        number += 1
    return None


def _lead(bridge: Bridge, num_sequences: int, window: int, rejection: bool, budget_s: float, timeout_s: float) -> float:
    seconds: list[float] = []
    started = time.perf_counter()
    last = False
    while not last:
        number = len(seconds)
        last = number >= _WARM_UP + _LEAST_ROUNDS - 1 and time.perf_counter() - started > budget_s
        message = typical_window(num_sequences, window, rejection=rejection, round=number, last=last)
        began = time.perf_counter()
        bridge.send_window(message, timeout_s)
        bridge.receive_verdict(number, timeout_s)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARM_UP:])


@dataclass
class BridgeTrial(Bridge):
    """One process's ends over several transports, until one is taken. It has no directions of its own."""

    over: dict[Transport, Bridge] = field(default_factory=dict)

    def take(self, transport: Transport) -> Bridge:
        """The bridge over ``transport``, its traffic counted from now on; the others are closed."""
        taken = self.over.pop(transport)
        self.close()
        return Bridge(taken.windows, taken.verdicts, taken.timeout_s)

    def abort(self) -> None:
        """Abort all of them."""
        for bridge in self.over.values():
            bridge.abort()

    def close(self) -> None:
        """Close all of them."""
        for bridge in self.over.values():
            bridge.close()
        self.over = {}

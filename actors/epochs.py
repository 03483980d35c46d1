"""How a shard learns which batch a round runs on: diffs from the coordinator, stamps from the target's leader.

The leader decides, before each round, which diffs are in force, and tells the others with a stamp; everybody applies
exactly those. With no work in the batch everybody waits for the next stamp of the same round. Knows no Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from pearl_ray.core.errors import EngineDeadError
from pearl_ray.core.messages import Message, PlanDiff, Stamp, Stop
from pearl_ray.core.replica import Replica
from pearl_ray.core.schedule import RoundPlan

IDLE_POLL_S = 0.5  # how often an idle shard looks whether it was aborted


class Receives(Protocol):
    """The receiving end of a channel."""

    def receive(self, timeout_s: float) -> Message | None: ...

    def drain(self) -> list[Message]: ...


class Sends(Protocol):
    """The sending end of a channel."""

    def send(self, message: Message) -> None: ...


class Epochs:
    """The common part: diffs are kept until a stamp puts them in force."""

    def __init__(self, inbox: Receives, replica: Replica) -> None:
        self._inbox = inbox
        self._replica = replica
        self._diffs: deque[PlanDiff] = deque()
        self._aborted = False

    def next_round(self, number: int) -> RoundPlan | None:
        """The plan of round ``number``, waiting for work if need be; None once the deployment stops."""
        raise NotImplementedError

    def abort(self) -> None:
        """Make a waiting :meth:`next_round` raise; safe from another thread."""
        self._aborted = True

    def _receive(self) -> Message | None:
        message = self._inbox.receive(IDLE_POLL_S)
        if self._aborted:
            raise EngineDeadError("the shard's loop was aborted")
        return message

    def _apply_through(self, epoch: int) -> None:
        while self._replica.epoch < epoch:
            self._replica.apply(self._diffs.popleft())


class LeaderEpochs(Epochs):
    """Of the target's rank 0: puts in force what has arrived, and tells ``followers``."""

    def __init__(self, inbox: Receives, replica: Replica, followers: Sequence[Sends]) -> None:
        super().__init__(inbox, replica)
        self._followers = followers

    def next_round(self, number: int) -> RoundPlan | None:
        arrived = self._inbox.drain()
        while True:
            for message in arrived:
                if isinstance(message, Stop):
                    self._tell(message)
                    return None
                assert isinstance(message, PlanDiff)
                self._diffs.append(message)
            epoch = self._diffs[-1].epoch if self._diffs else self._replica.epoch
            self._apply_through(epoch)
            plan = self._replica.plan()
            if plan.works:
                self._tell(Stamp(number, epoch))
                return plan
            message = self._receive()
            arrived = [message] if message is not None else []

    def _tell(self, message: Message) -> None:
        for follower in self._followers:
            follower.send(message)


class FollowerEpochs(Epochs):
    """Of every other shard: runs a round when the leader's stamp for it has come, on the epoch it names."""

    def __init__(self, inbox: Receives, replica: Replica) -> None:
        super().__init__(inbox, replica)
        # Diffs and stamps come from two senders: stamps of later rounds may overtake a diff.
        self._stamps: deque[Stamp] = deque()

    def next_round(self, number: int) -> RoundPlan | None:
        while not self._stamps or not self._has(self._stamps[0].epoch):
            message = self._receive()
            if isinstance(message, Stop):
                return None
            if isinstance(message, PlanDiff):
                self._diffs.append(message)
            elif isinstance(message, Stamp):
                self._stamps.append(message)
        stamp = self._stamps.popleft()
        assert stamp.round == number, f"stamp of round {stamp.round} in round {number}"
        self._apply_through(stamp.epoch)
        plan = self._replica.plan()
        assert plan.works, "the leader stamps rounds with work only"
        return plan

    def _has(self, epoch: int) -> bool:
        newest = self._diffs[-1].epoch if self._diffs else self._replica.epoch
        return newest >= epoch

"""How a shard learns which batch a round runs on: diffs from the coordinator, stamps from the target's leader.

The leader decides, before each round, which diffs are in force, and tells the others with a stamp; everybody applies
exactly those. With no work in the batch everybody waits for the next stamp of the same round. A stamp may promise that
the next round runs on the same batch: then its target pass can be queued before this round's verdict is known, and what
the coordinator decides meanwhile waits a round longer, all but cache blocks, which come in time. Knows no Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from pearl_ray.core.errors import EngineDeadError
from pearl_ray.core.messages import Extend, Message, PlanDiff, Stamp, Stop
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
    """The common part: diffs are kept until a stamp puts them in force.

    Attributes:
        ahead: whether the round after the one under way is promised to run on the same batch.
    """

    def __init__(self, inbox: Receives, replica: Replica) -> None:
        self.ahead = False
        self._inbox = inbox
        self._replica = replica
        self._diffs: deque[PlanDiff] = deque()
        self._aborted = False

    def next_round(self, number: int) -> RoundPlan | None:
        """The plan of round ``number``, waiting for work if need be; None once the deployment stops."""
        raise NotImplementedError

    def keep_promise(self, number: int) -> None:
        """Round ``number``, which was promised, has been queued; its verdict and plan come later. Doesn't wait."""
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
    """Of the target's rank 0: puts in force what has arrived, and tells ``followers``.

    ``may_run_ahead`` says of the batch, as known when a round is stamped, whether the round after it can be queued
    without a look at its verdict, whatever the rounds not yet known bring; never, if it isn't given.
    """

    def __init__(
        self,
        inbox: Receives,
        replica: Replica,
        followers: Sequence[Sends],
        may_run_ahead: Callable[[RoundPlan], bool] | None = None,
    ) -> None:
        super().__init__(inbox, replica)
        self.may_run_ahead = may_run_ahead or (lambda plan: False)
        self._followers = followers
        self._plan = RoundPlan(())
        self._kept = -1  # the round whose promise was kept
        self._is_stopping = False

    def next_round(self, number: int) -> RoundPlan | None:
        if self._kept == number:  # stamped already, with the epoch in force
            self._plan = self._replica.plan()
            return self._plan
        while True:
            self._hear(self._inbox.drain())
            if self._is_stopping:
                self._tell(Stop())
                return None
            epoch = self._diffs[-1].epoch if self._diffs else self._replica.epoch
            self._apply_through(epoch)
            self._plan = self._replica.plan()
            if self._plan.works:
                self._stamp(number, epoch)
                return self._plan
            message = self._receive()
            self._hear([message] if message is not None else [])

    def keep_promise(self, number: int) -> None:
        assert self.ahead
        self._hear(self._inbox.drain())
        # More blocks for sequences that go on change nothing of what was promised, and a verdict changes no blocks.
        while self._diffs and all(isinstance(change, Extend) for change in self._diffs[0].changes):
            self._replica.apply(self._diffs.popleft())
        self._kept = number
        self._stamp(number, self._replica.epoch)

    def _stamp(self, number: int, epoch: int) -> None:
        self.ahead = not self._diffs and not self._is_stopping and self.may_run_ahead(self._plan)
        self._tell(Stamp(number, epoch, self.ahead))

    def _hear(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Stop):
                self._is_stopping = True
            else:
                assert isinstance(message, PlanDiff)
                self._diffs.append(message)

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
        self.ahead = stamp.ahead
        self._apply_through(stamp.epoch)
        plan = self._replica.plan()
        assert plan.works, "the leader stamps rounds with work only"
        return plan

    def keep_promise(self, number: int) -> None:
        pass  # the leader's stamp says whether the promise goes on

    def _has(self, epoch: int) -> bool:
        newest = self._diffs[-1].epoch if self._diffs else self._replica.epoch
        return newest >= epoch

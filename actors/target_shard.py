"""The target shard actor: one rank of the target model in a process of its own. A Ray shell of `ShardWorker`."""

from __future__ import annotations

import ray

from pearl_ray.actors.epochs import Epochs
from pearl_ray.actors.spec import DeploymentSpec, Wiring
from pearl_ray.actors.target_loop import TargetLoop
from pearl_ray.actors.worker import ShardWorker


class TargetShardActor(ShardWorker):
    """One rank of the target; rank 0 leads the rounds."""

    def __init__(self, spec: DeploymentSpec, rank: int) -> None:
        super().__init__(spec, "target", rank)

    @ray.method(concurrency_group="control")
    def progress(self) -> tuple[int, int]:
        """Layers loaded, layers in all."""
        return self.layers

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """Give back sockets and shared memory; the loop must have ended."""
        self.release()

    def make_loop(self, wiring: Wiring, epochs: Epochs) -> TargetLoop:
        """The target's rounds."""
        assert self.runner is not None
        return TargetLoop(
            replica=self.replica,
            epochs=epochs,
            runner=self.runner,
            bridge=self.bridge,
            coordinator=self.to_coordinator(wiring),
            timeout_s=self.spec.round_timeout_s,
        )


TargetShard = ray.remote(max_restarts=0, concurrency_groups={"control": 2})(TargetShardActor)

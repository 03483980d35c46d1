"""The target shard actor: one rank of the target model in a process of its own. A Ray shell of `ShardWorker`."""

from __future__ import annotations

import ray

from pearl_ray.actors.spec import DeploymentSpec
from pearl_ray.actors.worker import ShardWorker


class TargetShardActor(ShardWorker):
    """One rank of the target; rank 0 leads the rounds."""

    def __init__(self, spec: DeploymentSpec, rank: int) -> None:
        super().__init__(spec, "target", rank)


TargetShard = ray.remote(max_restarts=0, concurrency_groups={"control": 2})(TargetShardActor)

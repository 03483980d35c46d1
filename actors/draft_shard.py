"""The draft shard actor: one rank of the draft model in a process of its own. A Ray shell of `ShardWorker`."""

from __future__ import annotations

import ray

from pearl_ray.actors.spec import DeploymentSpec
from pearl_ray.actors.worker import ShardWorker


class DraftShardActor(ShardWorker):
    """One rank of the draft; rank 0 sends the windows."""

    def __init__(self, spec: DeploymentSpec, rank: int) -> None:
        super().__init__(spec, "draft", rank)


DraftShard = ray.remote(max_restarts=0, concurrency_groups={"control": 2})(DraftShardActor)

"""What a deployment says of itself: its status for people, its counters and gauges for /metrics. Only reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pearl_ray.actors.bringup import Deployment
from pearl_ray.actors.spec import DeploymentSpec
from pearl_ray.core.blocks import PoolUsage
from pearl_ray.core.controller import Controller
from pearl_ray.core.statistics import Statistics


def status(spec: DeploymentSpec, deployment: Deployment | None, controller: Controller | None) -> dict[str, object]:
    """Models, shards with their processes, and what runs; what isn't up yet is None or empty.

    ``graphs``: what CUDA graphs have cost, per model the most of any rank; None on CPUs.
    """
    infos = deployment.infos.values() if deployment is not None else ()
    graphs = deployment.graphs if deployment is not None else {}
    return {
        "name": spec.name,
        "mode": spec.mode,
        "verification": spec.verification,
        "target_model": spec.target_model,
        "draft_model": spec.draft_model,
        "target_tensor_parallel_size": spec.target_tp,
        "draft_tensor_parallel_size": spec.draft_tp if "draft" in spec.roles else 0,
        "dtype": spec.dtype,
        "device": spec.device,
        "colocate": spec.colocate,
        "max_model_len": deployment.max_model_len if deployment else None,
        "kv_cache_blocks": deployment.num_blocks if deployment else None,
        "bridge": dataclasses.asdict(deployment.bridge) if deployment and deployment.bridge else None,
        "graphs": {role: dataclasses.asdict(figures) for role, figures in graphs.items()} or None,
        "shards": [dataclasses.asdict(info) for info in infos],
        "num_requests_running": controller.num_running if controller else 0,
        "num_requests_waiting": controller.num_waiting if controller else 0,
    }


def stats(
    spec: DeploymentSpec, deployment: Deployment | None, controller: Controller, recoveries: Mapping[str, int]
) -> dict[str, object]:
    """The counters and gauges of /metrics, without the prefix; seconds and tokens as their names say.

    ``recoveries``: how often the shards of each role were replaced after a death.
    """
    s, gauges = controller.statistics, controller.snapshot()
    pools = gauges["pools"]
    assert isinstance(pools, dict)
    usage: dict[str, PoolUsage] = pools
    costs = deployment.costs if deployment else None
    return {
        "num_requests_running": controller.num_running,
        "num_requests_waiting": controller.num_waiting,
        "kv_cache_usage_perc": {name: u.num_held / u.num_blocks for name, u in usage.items()},
        "prefix_cache_queries": {name: u.queried_tokens for name, u in usage.items()},
        "prefix_cache_hits": {name: u.hit_tokens for name, u in usage.items()},
        "prompt_tokens_total": s.prompt_tokens,
        "generation_tokens_total": s.generation_tokens,
        "request_success_total": dict(s.finished),
        "spec_decode_num_drafts_total": s.num_drafts,
        "spec_decode_num_draft_tokens_total": s.num_draft_tokens,
        "spec_decode_num_accepted_tokens_total": s.num_accepted_tokens,
        "spec_decode_num_accepted_tokens_per_pos_total": dict(s.accepted_per_position),
        "num_preemptions_total": s.preemptions,
        "num_rounds_total": s.num_rounds,
        "round_seconds": _per_side(s.work_s, s),
        "bridge_wait_seconds": _per_side(s.wait_s, s),
        "phase_sequences": gauges["phases"],
        "window_tokens": gauges["window_tokens"],
        "acceptance_rate": controller.windows.acceptance,
        "recoveries_total": dict(recoveries),
        "draft_available": int("draft" in spec.roles),
        "target_forward_seconds": dict(costs.target_s) if costs else {},
        "draft_step_seconds": dict(costs.draft_s) if costs else {},
    }


def _per_side(seconds: dict[str, float], statistics: Statistics) -> dict[str, dict[str, float]]:
    counts = {"target": statistics.num_rounds, "draft": statistics.num_draft_rounds}
    return {side: {"sum": seconds[side], "count": count} for side, count in counts.items() if count}

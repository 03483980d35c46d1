"""Starting deployments on a Ray cluster; what runs is `running`'s. Ray must have been joined (`cluster.ray_session`).

Everything that can be refused is refused before the first actor is made: models are opened, memory and bundles checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pearl_ray import env
from pearl_ray.actors.coordinator import Coordinator
from pearl_ray.actors.handles import COORDINATOR, OWN_PRIORITY, find_coordinator, namespace_of
from pearl_ray.actors.spec import DeploymentSpec
from pearl_ray.client import Client, raise_cause
from pearl_ray.cluster.placement import create_placement_group, plan_bundles, remove_placement_group
from pearl_ray.config import PearlConfig, ResolvedConfig, resolve
from pearl_ray.core.errors import ConfigError
from pearl_ray.model.loading import Models, model_path, open_models
from pearl_ray.model.sharding import ShardPlan

Progress = Callable[[str, int, int], None]
POLL_S = 0.1


def check_models(config: PearlConfig, progress: Progress | None = None) -> Models:
    """Open the pair's files (fetching the embedded one) and check them; needs no Ray and reads no weights.

    Raises:
        ModelLoadError, UnsupportedModelError, VocabularyMismatchError: which file, and what is wrong with it.
        ConfigError: a number of shards or a length that the models don't allow.
    """
    cache_dir = str(env.cache_dir())
    if config.target_model is None or (config.draft_model is None and config.uses_draft):
        if progress is not None:
            progress("fetching the embedded pair", 0, 0)
        model_path("target", None, cache_dir)
    models = open_models(config.target_model, config.draft_model, cache_dir, with_draft=config.uses_draft)
    ShardPlan.make(models.configs["target"], config.target_tensor_parallel_size)
    if config.uses_draft:
        ShardPlan.make(models.configs["draft"], config.draft_tensor_parallel_size)
    longest = models.max_model_len
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError("max_model_len", config.max_model_len, f"at most {longest}, the models' own limit")
    return models


def deploy(
    config: PearlConfig,
    name: str = "default",
    *,
    detached: bool = False,
    progress: Progress | None = None,
    models: Models | None = None,
) -> Client:
    """Place and start a deployment; returns when it takes requests.

    Args:
        name: what ``connect`` finds it by, on this cluster.
        detached: it outlives this process; otherwise Ray ends it with us.
        progress: called with (phase, done, total) while it comes up.
        models: what :func:`check_models` found, if it was called before.

    Raises:
        PearlError: its subclasses say what is wrong: models, memory, resources, a name in use.
    """
    if find_coordinator(name) is not None:
        raise ConfigError("name", name, "it is in use on this cluster; stop that deployment or choose another")
    report = progress or (lambda phase, done, total: None)
    spec = _spec(config, name, models or check_models(config, report))
    bundles = plan_bundles(
        spec.device,
        spec.draft_tp if "draft" in spec.roles else 0,
        spec.target_tp,
        cpus_per_shard=_resolved_cpus(config),
        gpu_fraction=1 / (spec.draft_tp + spec.target_tp) if spec.colocate else 1.0,
    )
    report("placing", 0, 0)
    group = create_placement_group(bundles, f"pearl-{name}", detached=detached)
    try:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        coordinator = Coordinator.options(
            name=COORDINATOR,
            namespace=namespace_of(name),
            lifetime="detached" if detached else None,
            num_cpus=bundles[0].resources.get("CPU", 0),
            scheduling_strategy=strategy,
            runtime_env=dict(OWN_PRIORITY),
            enable_task_events=False,  # Ray's control process would keep a record of every call
        ).remote(spec, bundles, group)
        _await_start(coordinator, report)
    except ray.exceptions.RayError as error:
        remove_placement_group(group)
        raise_cause(error, name)
    except BaseException:
        remove_placement_group(group)
        raise
    return Client(name, coordinator)


def _await_start(coordinator: ray.actor.ActorHandle, report: Progress) -> None:
    started = coordinator.start.remote()
    while not ray.wait([started], timeout=POLL_S)[0]:
        state = ray.get(coordinator.progress.remote())
        report(state["phase"], state["done"], state["total"])
    ray.get(started)
    report("ready", 1, 1)


def _resolved_cpus(config: PearlConfig) -> float:
    resolved = _resolve(config, "bfloat16")
    assert resolved.cpus_per_shard != "auto"
    return resolved.cpus_per_shard


def _resolve(config: PearlConfig, checkpoint_dtype: str) -> ResolvedConfig:
    resources = ray.cluster_resources()
    return resolve(
        config,
        has_cuda=resources.get("GPU", 0) > 0,
        checkpoint_dtype=checkpoint_dtype,
        has_flash_attn=importlib.util.find_spec("flash_attn") is not None,
        num_cpus=ray.available_resources().get("CPU", 0.0),
    )


def _spec(config: PearlConfig, name: str, models: Models) -> DeploymentSpec:
    """Every choice made."""
    resolved = _resolve(config, models.configs["target"].dtype)
    fixed = resolved.num_speculative_tokens
    return DeploymentSpec(
        name=name,
        target_model=resolved.target_model,
        draft_model=resolved.draft_model,
        cache_dir=str(env.cache_dir()),
        mode=resolved.mode,
        verification=resolved.verification,
        num_speculative_tokens=None if fixed == "auto" else fixed,
        dtype=resolved.dtype,
        device=resolved.device,
        attention_backend=resolved.attention_backend,
        target_tp=resolved.target_tensor_parallel_size,
        draft_tp=resolved.draft_tensor_parallel_size,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        min_decode_share=resolved.min_decode_share,
        max_waiting_requests=resolved.max_waiting_requests,
        gpu_memory_utilization=resolved.gpu_memory_utilization,
        block_size=resolved.block_size,
        kv_cache_blocks=resolved.kv_cache_blocks,
        enable_prefix_caching=resolved.enable_prefix_caching,
        enforce_eager=resolved.enforce_eager,
        seed=resolved.seed,
        round_timeout_s=resolved.round_timeout_s,
        colocate=resolved.colocate,
        bridge=resolved.bridge,
        deterministic=resolved.deterministic,
    )

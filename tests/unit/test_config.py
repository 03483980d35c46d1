"""PearlConfig refuses what can't be, resolve() decides what was left open, and the environment is read as it says."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from pearl_ray import env
from pearl_ray.config import FIELDS, PearlConfig, ResolvedConfig, resolve
from pearl_ray.core.errors import ConfigError
from pearl_ray.core.outputs import run_lengths

BAD_VALUES = [
    ("target_model", ""),
    ("draft_model", 7),
    ("target_tensor_parallel_size", 0),
    ("draft_tensor_parallel_size", True),
    ("mode", "perl"),
    ("verification", "exact"),
    ("num_speculative_tokens", 0),
    ("num_speculative_tokens", 65),
    ("num_speculative_tokens", "many"),
    ("dtype", "int8"),
    ("device", "tpu"),
    ("max_model_len", 1),
    ("max_num_seqs", 0),
    ("max_num_batched_tokens", 255),
    ("min_decode_share", -0.1),
    ("min_decode_share", 1),
    ("gpu_memory_utilization", 0.0),
    ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", float("nan")),
    ("block_size", 257),
    ("kv_cache_blocks", 0),
    ("enable_prefix_caching", "yes"),
    ("seed", 2**64),
    ("attention_backend", "xformers"),
    ("enforce_eager", 1),
    ("max_waiting_requests", 0),
    ("round_timeout_s", 0),
    ("round_timeout_s", float("inf")),
    ("cpus_per_shard", -1.0),
    ("cpus_per_shard", "all"),
    ("ray_address", ""),
    ("trace", ""),
    ("colocate", None),
    ("bridge", "tcp"),
    ("deterministic", "yes"),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES, ids=[f"{f}={v!r}" for f, v in BAD_VALUES])
def test_a_bad_value_is_refused_with_field_value_and_what_is_allowed(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        PearlConfig(**{field: value})
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert message.startswith(f"{field}={value!r} is not allowed: ") and "\n" not in message
    assert len(message) > len(f"{field}={value!r} is not allowed: ")


def test_every_field_has_a_bad_value_in_the_list_above() -> None:
    assert {field for field, _ in BAD_VALUES} == set(FIELDS)


def test_the_config_is_frozen_keyword_only_and_travels_between_processes() -> None:
    config = PearlConfig(mode="sd", seed=-5, trace="x.json")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "ar"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PearlConfig("model")  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_near_miss_of_a_choice_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pearl'"):
        PearlConfig(mode="perl")  # type: ignore[arg-type]


def test_a_path_is_as_good_as_its_text() -> None:
    assert PearlConfig(target_model=Path("/models/a")).target_model == "/models/a"  # type: ignore[arg-type]


def test_a_mapping_takes_dashes_and_short_names() -> None:
    config = PearlConfig.from_mapping({"target-tp": 7, "draft_tp": 2, "max-model-len": 512})
    assert (config.target_tensor_parallel_size, config.draft_tensor_parallel_size, config.max_model_len) == (7, 2, 512)


def test_an_unknown_key_of_a_mapping_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match="taget_model='x' is not allowed: no such setting; did you mean target_model"):
        PearlConfig.from_mapping({"taget_model": "x"})
    with pytest.raises(ConfigError, match="known: target_model, "):
        PearlConfig.from_mapping({"zzzzzz": 1})


def test_a_key_given_in_two_spellings_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        PearlConfig.from_mapping({"target_tp": 1, "target-tensor-parallel-size": 2})


def test_auto_becomes_float32_and_torch_on_a_cpu() -> None:
    resolved = resolve(PearlConfig(), has_cuda=False, checkpoint_dtype="bfloat16")
    assert isinstance(resolved, ResolvedConfig)
    assert (resolved.device, resolved.dtype, resolved.attention_backend) == ("cpu", "float32", "torch")


def test_auto_becomes_the_checkpoints_dtype_on_a_gpu() -> None:
    resolved = resolve(PearlConfig(block_size=256), has_cuda=True, checkpoint_dtype="float16", has_flash_attn=True)
    assert (resolved.device, resolved.dtype, resolved.attention_backend) == ("cuda", "float16", "flash-attn")
    without = resolve(PearlConfig(), has_cuda=True, checkpoint_dtype="bfloat16")
    assert (without.dtype, without.attention_backend) == ("bfloat16", "triton")


def test_a_cpu_may_be_asked_for_where_there_is_a_gpu_but_not_the_reverse() -> None:
    assert resolve(PearlConfig(device="cpu"), has_cuda=True).device == "cpu"
    with pytest.raises(ConfigError, match="device='cuda'"):
        resolve(PearlConfig(device="cuda"), has_cuda=False)


@pytest.mark.parametrize("backend", ["triton", "flash-attn"])
def test_a_gpu_backend_is_refused_on_a_cpu(backend: str) -> None:
    with pytest.raises(ConfigError, match="attention_backend"):
        resolve(PearlConfig(attention_backend=backend), has_cuda=False, has_flash_attn=True)  # type: ignore[arg-type]


def test_flash_attn_is_refused_where_it_is_missing_or_cannot_do_the_dtype() -> None:
    with pytest.raises(ConfigError, match="not installed"):
        resolve(PearlConfig(attention_backend="flash-attn"), has_cuda=True)
    config = PearlConfig(attention_backend="flash-attn", dtype="float32")
    with pytest.raises(ConfigError, match="float32"):
        resolve(config, has_cuda=True, has_flash_attn=True)


def test_what_the_user_chose_is_kept() -> None:
    config = PearlConfig(dtype="float64", device="cpu", cpus_per_shard=0.5, num_speculative_tokens=4, seed=3)
    resolved = resolve(config, has_cuda=True, num_cpus=1)
    assert (resolved.dtype, resolved.cpus_per_shard, resolved.num_speculative_tokens) == ("float64", 0.5, 4)
    assert resolved.seed == 3


@pytest.mark.parametrize("num_cpus", [1, 2, 4, 64])
def test_shards_and_coordinator_fit_on_the_cpus_there_are(num_cpus: int) -> None:
    config = PearlConfig(target_tensor_parallel_size=7)
    cpus = resolve(config, has_cuda=False, num_cpus=num_cpus).cpus_per_shard
    assert isinstance(cpus, float) and 0 < cpus <= 1
    assert cpus * (config.num_shards + 1) <= num_cpus


def test_ar_has_no_draft_shards() -> None:
    config = PearlConfig(mode="ar", target_tensor_parallel_size=3, draft_tensor_parallel_size=2)
    assert config.num_shards == 3 and not config.uses_draft


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEARL_CACHE_DIR", str(tmp_path))
    assert env.cache_dir() == tmp_path
    monkeypatch.delenv("PEARL_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / ".cache" / "pearl-ray"


def test_run_lengths_counts_accepted_tokens_between_rejections() -> None:
    assert run_lengths([]) == [0]
    assert run_lengths(["prefill", "residual", "pre_verify", "post_verify", "residual", "bonus", "pre_verify"]) == [
        0,
        2,
        1,
    ]

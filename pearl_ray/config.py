"""What an engine or deployment is made of. Frozen and checked when made; reads no file, device or environment.

``PearlConfig`` is what the user says, with "auto" where he leaves it to us; ``resolve`` replaces every "auto" that
depends on the machine, given the facts as arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pearl_ray.core.errors import ConfigError
from pearl_ray.core.params import Verification
from pearl_ray.core.phases import Mode

Dtype = Literal["bfloat16", "float16", "float32", "float64"]
Device = Literal["cuda", "cpu"]
AttentionBackend = Literal["flash-attn", "triton", "torch"]
Bridge = Literal["nccl", "gloo", "shm"]

MODES = ("pearl", "sd", "ar")
VERIFICATIONS = ("coupled", "rejection")
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
DEVICES = ("auto", "cuda", "cpu")
ATTENTION_BACKENDS = ("auto", "flash-attn", "triton", "torch")
BRIDGES = ("auto", "nccl", "gloo", "shm")

ALIASES = {"target_tp": "target_tensor_parallel_size", "draft_tp": "draft_tensor_parallel_size"}


@dataclass(frozen=True, kw_only=True)
class PearlConfig:
    """An engine's settings; names and defaults are vLLM's where vLLM has them.

    Attributes:
        target_model, draft_model: a directory with safetensors, a ``.gguf`` file, or a Hub name; None: the embedded.
        target_tensor_parallel_size, draft_tensor_parallel_size: shards of each model.
        mode: "pearl" (draft and target at the same time), "sd" (in turn), "ar" (the target alone, no draft).
        verification: "coupled" or "rejection", for requests that don't say.
        num_speculative_tokens: tokens the draft makes per round, or "auto": from measured step times.
        dtype: of weights and cache; "auto": the checkpoint's on GPUs, float32 on CPU.
        device: "auto": cuda where a GPU is there, else cpu.
        max_model_len: longest prompt + output, in tokens; None: what the models allow.
        max_num_seqs: sequences decoded together.
        max_num_batched_tokens: most query tokens of one target forward.
        min_decode_share: part of their speed that running requests keep while long prompts (those that one forward
            doesn't finish) are prefilled, but for one request beside many prompts; 0: prompts go as fast as they can.
        gpu_memory_utilization: fraction of each GPU's memory to use.
        block_size: tokens per cache block.
        kv_cache_blocks: blocks per model; None: as many as the memory holds.
        enable_prefix_caching: share the cache blocks of equal prefixes.
        seed: engine seed, hashed with the request's number for requests without a seed; None: system entropy.
        attention_backend: "auto": flash-attn if installed, else triton, on GPUs; torch on CPU.
        enforce_eager: no CUDA graphs.
        max_waiting_requests: bound of the waiting queue; None: unbounded.
        round_timeout_s: seconds a shard waits for a peer before the round counts as hung.
        cpus_per_shard: CPUs that each shard asks Ray for; "auto": 1, or an equal part where there are fewer.
        ray_address: None: join the Ray that runs here, or start one; "local": always start an own one.
        trace: path of a Chrome trace to write; None: none.
        colocate: put draft and target shards on the same devices.
        deterministic: fixed reduction orders and tile shapes, so that a token's bits don't depend on what else is in
            the batch; slower, prefill above all.
        bridge: what carries windows and verdicts between draft and target; "auto": what measures fastest at start.

    Raises:
        ConfigError: (a ``ValueError``) naming the field, its value and what is allowed.
    """

    target_model: str | None = None
    draft_model: str | None = None
    target_tensor_parallel_size: int = 1
    draft_tensor_parallel_size: int = 1
    mode: Mode = "pearl"
    verification: Verification = "coupled"
    num_speculative_tokens: int | Literal["auto"] = "auto"
    dtype: Dtype | Literal["auto"] = "auto"
    device: Device | Literal["auto"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    min_decode_share: float = 0.75
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    kv_cache_blocks: int | None = None
    enable_prefix_caching: bool = True
    seed: int | None = None
    attention_backend: AttentionBackend | Literal["auto"] = "auto"
    enforce_eager: bool = False
    max_waiting_requests: int | None = None
    round_timeout_s: float = 60.0
    cpus_per_shard: float | Literal["auto"] = "auto"
    ray_address: str | None = None
    trace: str | None = None
    colocate: bool = False
    deterministic: bool = False
    bridge: Bridge | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("target_model", "draft_model", "trace"):  # a pathlib.Path is as good as its text
            if hasattr(getattr(self, name), "__fspath__"):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("target_model", "draft_model", "ray_address", "trace"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(name, value, _TEXTS[name])
        _one_of("mode", self.mode, MODES)
        _one_of("verification", self.verification, VERIFICATIONS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        _one_of("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _one_of("bridge", self.bridge, BRIDGES)
        _whole("target_tensor_parallel_size", self.target_tensor_parallel_size, 1, 1024)
        _whole("draft_tensor_parallel_size", self.draft_tensor_parallel_size, 1, 1024)
        if self.num_speculative_tokens != "auto":
            _whole("num_speculative_tokens", self.num_speculative_tokens, 1, 64, also="'auto' or ")
        for name in ("max_model_len", "kv_cache_blocks", "max_waiting_requests"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 2 if name == "max_model_len" else 1, None, also="None or ")
        _whole("max_num_seqs", self.max_num_seqs, 1, None)
        _whole("max_num_batched_tokens", self.max_num_batched_tokens, 1, None)
        if self.max_num_batched_tokens < self.max_num_seqs:  # vLLM's rule: each sequence feeds a token per round
            allowed = f"at least max_num_seqs, which is {self.max_num_seqs}; raise the one or lower the other"
            raise ConfigError("max_num_batched_tokens", self.max_num_batched_tokens, allowed)
        _share("min_decode_share", self.min_decode_share)
        _number("gpu_memory_utilization", self.gpu_memory_utilization, 1.0)
        _whole("block_size", self.block_size, 1, 256)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1, also="None or ")
        _number("round_timeout_s", self.round_timeout_s, math.inf, what="a number of seconds above 0")
        if self.cpus_per_shard != "auto":
            _number("cpus_per_shard", self.cpus_per_shard, math.inf, what="'auto' or a number of CPUs above 0")
        for name in ("enable_prefix_caching", "enforce_eager", "colocate", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, getattr(self, name), "True or False")
        if self.colocate and self.device == "cpu":
            raise ConfigError("colocate", True, "False with device='cpu': colocation is about sharing GPUs")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> PearlConfig:
        """From a parsed YAML or JSON file. Keys may be written as on the command line (``target-tp``).

        Raises:
            ConfigError: for a bad value, a key given twice, or an unknown key (naming the nearest known ones).
        """
        values: dict[str, object] = {}
        for key, value in mapping.items():
            name = field_name(str(key))
            if name is None:
                raise ConfigError(str(key), value, unknown_key(str(key), FIELDS))
            if name in values:
                raise ConfigError(str(key), value, f"it is given twice; keep one spelling of {name}")
            values[name] = value
        return cls(**values)  # type: ignore[arg-type]

    @property
    def uses_draft(self) -> bool:
        """Whether there is a draft model at all."""
        return self.mode != "ar"

    @property
    def num_shards(self) -> int:
        """Shard actors of the deployment, both models together."""
        return self.target_tensor_parallel_size + (self.draft_tensor_parallel_size if self.uses_draft else 0)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(PearlConfig):
    """A ``PearlConfig`` in which device, dtype, attention backend and CPUs per shard are decided.

    ``num_speculative_tokens`` may still be "auto": it follows the step times measured at warm-up. Made by ``resolve``.
    """

    def __post_init__(self) -> None:
        PearlConfig.__post_init__(self)
        for name in ("device", "dtype", "attention_backend", "cpus_per_shard"):
            assert getattr(self, name) != "auto", name


def resolve(
    config: PearlConfig,
    *,
    has_cuda: bool,
    checkpoint_dtype: str = "bfloat16",
    has_flash_attn: bool = False,
    num_cpus: float | None = None,
) -> ResolvedConfig:
    """Decide what was left to us. Pure: the facts of the machine and the checkpoint come in as arguments.

    Args:
        has_cuda: whether a CUDA device can be used.
        checkpoint_dtype: the target checkpoint's own dtype, for ``dtype="auto"`` on GPUs.
        has_flash_attn: whether flash-attn can be imported.
        num_cpus: CPUs that the cluster offers; None: enough. "auto" shards share them with the coordinator.

    Raises:
        ConfigError: where a setting asks for what the device doesn't have.
    """
    device = config.device if config.device != "auto" else ("cuda" if has_cuda else "cpu")
    if device == "cuda" and not has_cuda:
        raise ConfigError("device", "cuda", "no CUDA device can be used here; use 'cpu' or 'auto'")
    on_gpu = device == "cuda"
    if config.colocate and not on_gpu:
        raise ConfigError("colocate", True, "False without a GPU: colocation is about sharing GPUs")
    if config.bridge == "nccl" and config.uses_draft and (config.colocate or not on_gpu):
        reason = "NCCL refuses two ranks on one device" if on_gpu else "NCCL needs a GPU per shard"
        raise ConfigError("bridge", "nccl", f"{reason}; possible here: auto, shm, gloo")
    if config.dtype != "auto":
        dtype: str = config.dtype
    else:
        known = checkpoint_dtype in DTYPES and checkpoint_dtype != "auto"
        dtype = (checkpoint_dtype if known else "bfloat16") if on_gpu else "float32"
    backend: str = config.attention_backend
    if backend == "auto":
        fast = on_gpu and dtype in ("bfloat16", "float16")
        # The pages that flash-attn's cache has; its splits depend on the batch.
        paged = has_flash_attn and config.block_size % 256 == 0 and not config.deterministic
        backend = "flash-attn" if fast and paged else "triton" if fast else "torch"
    elif backend != "torch" and not on_gpu:
        raise ConfigError("attention_backend", backend, "'torch' or 'auto' on CPU")
    elif backend == "flash-attn" and not has_flash_attn:
        raise ConfigError("attention_backend", backend, "flash-attn is not installed; pip install pearl-ray[flash]")
    elif backend == "flash-attn" and config.deterministic:
        raise ConfigError("attention_backend", backend, "'triton' or 'torch' with deterministic")
    elif backend == "flash-attn" and dtype not in ("bfloat16", "float16"):
        raise ConfigError("attention_backend", backend, f"'triton' or 'torch' with dtype {dtype}")
    cpus = config.cpus_per_shard
    if cpus == "auto":
        part = 1.0 if num_cpus is None else num_cpus / (config.num_shards + 1)
        cpus = min(1.0, max(math.floor(part * 1000) / 1000, 0.001))  # Ray counts in ten-thousandths
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(PearlConfig)}
    values |= {"device": device, "dtype": dtype, "attention_backend": backend, "cpus_per_shard": cpus}
    return ResolvedConfig(**values)


def field_name(key: str) -> str | None:
    """The field that a key of a file means: dashes for underscores, and the short names of the CLI; None: no such."""
    name = key.strip().lstrip("-").replace("-", "_")
    name = ALIASES.get(name, name)
    return name if name in FIELDS else None


def unknown_key(key: str, known: tuple[str, ...]) -> str:
    """What to say of an unknown key: the nearest known ones."""
    name = key.strip().lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=3, cutoff=0.6)
    return (
        f"no such setting; did you mean {' or '.join(near)}?" if near else f"no such setting; known: {', '.join(known)}"
    )


FIELDS = tuple(f.name for f in dataclasses.fields(PearlConfig))

_MODEL = "a directory with safetensors, a .gguf file, a Hub name, or None for the embedded model"
_TEXTS = {
    "target_model": _MODEL,
    "draft_model": _MODEL,
    "ray_address": "an address such as 'host:6379', 'auto', 'local', or None",
    "trace": "a file name, or None",
}


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(name, value, f"one of {', '.join(map(repr, allowed))}{hint}")


def _whole(name: str, value: object, low: int, high: int | None, *, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = f" to {high}" if high is not None else ""
        raise ConfigError(name, value, f"{also}a whole number from {low}{upper}")


def _share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(name, value, "a number in [0, 1)")


def _number(name: str, value: object, high: float, *, what: str = "") -> None:
    ok = not isinstance(value, bool) and isinstance(value, (int, float))
    if not ok or not 0.0 < value <= min(high, sys.float_info.max):  # type: ignore[operator]
        raise ConfigError(name, value, what or f"a number in (0, {high:g}]")

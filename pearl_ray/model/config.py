"""What a model is: sizes, rotary scaling, switches. Reads Hugging Face's ``config.json`` and never writes to it.

Knows neither files nor tensors nor devices; a loader hands in the parsed JSON, or builds a :class:`ModelConfig` itself
(GGUF).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.families import FAMILIES, Family

RopeType = Literal["default", "linear", "llama3"]
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the whole head (rotary dim = head_dim).

    Attributes:
        rope_type: 'default'; 'linear' (all frequencies divided by ``factor``); 'llama3' (low frequencies divided,
            a smooth step between the two factors' wavelengths, Llama 3.1).
        theta: base of the wavelengths.
        factor: of 'linear' and 'llama3'.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of 'llama3'.
    """

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model of one of the families in ``families.py``.

    Attributes:
        architecture: 'LlamaForCausalLM', 'Qwen2ForCausalLM' or 'Qwen3ForCausalLM'.
        qkv_bias, output_bias, mlp_bias: biases of q/k/v, of o_proj, of the three MLP matrices.
        qk_norm: RMSNorm over each query and key head before the rotation.
        dtype: the checkpoint's own, one of ``DTYPES``.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"


def from_hf_config(config: Mapping[str, object]) -> ModelConfig:
    """Reads a parsed ``config.json``, of transformers 4 (``rope_scaling``, ``rope_theta``, ``torch_dtype``) or 5.

    Raises:
        UnsupportedModelError: another architecture, or an option that isn't implemented; names the supported ones.
        ModelLoadError: a size is missing or makes no sense.
    """
    family = _family(config)
    read = _Reader({**family.defaults, **config})
    num_heads, hidden_size = read.size("num_attention_heads"), read.size("hidden_size")
    num_layers = read.size("num_hidden_layers")
    num_kv_heads = read.size("num_key_value_heads", default=num_heads)
    head_dim = read.size("head_dim", default=hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelLoadError(f"config.json: num_attention_heads={num_heads} is no multiple of {num_kv_heads=}")
    if head_dim < 2 or head_dim % 2:
        raise ModelLoadError(f"config.json: {head_dim=} must be even and at least 2")
    _refuse_unsupported(read, num_layers)
    flags = family.flags(read.config)
    max_position_embeddings = read.size("max_position_embeddings")
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=read.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
        rope=_rope(read.config, max_position_embeddings),
        tie_word_embeddings=bool(read.config.get("tie_word_embeddings", False)),
        qkv_bias=flags.qkv_bias,
        output_bias=flags.output_bias,
        mlp_bias=flags.mlp_bias,
        qk_norm=flags.qk_norm,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=read.token_ids("bos_token_id")[0] if read.token_ids("bos_token_id") else None,
        eos_token_ids=read.token_ids("eos_token_id"),
        dtype=_dtype(read.config),
    )


@dataclass(frozen=True)
class _Reader:
    """Typed reads of one config, with errors that name the key."""

    config: Mapping[str, object]

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelLoadError(f"config.json: {key}={value!r}, but a whole number from {least} is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ModelLoadError(f"config.json: {key}={value!r}, but a number above 0 is needed")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ModelLoadError(f"config.json: {key}={value!r}, but a token id or a list of them is needed")
        return ids


def _family(config: Mapping[str, object]) -> Family:
    names = config.get("architectures") or ()
    assert isinstance(names, (list, tuple))
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    if not names:
        for family in FAMILIES.values():
            if config.get("model_type") == family.model_type:
                return family
    found = ", ".join(map(str, names)) or f"model_type {config.get('model_type')!r}"
    raise UnsupportedModelError(f"{found} is not supported; supported architectures: {', '.join(FAMILIES)}")


def _refuse_unsupported(read: _Reader, num_layers: int) -> None:
    config = read.config
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act={config['hidden_act']!r} is not supported; supported: silu")
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "quantization_config is not supported in a safetensors checkpoint; supported: unquantized weights, or GGUF"
        )
    layer_types = config.get("layer_types")
    sliding = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    if isinstance(layer_types, (list, tuple)):
        sliding = any(kind != "full_attention" for kind in layer_types)
    elif sliding:
        sliding = read.size("max_window_layers", default=28, least=0) < num_layers
    if sliding:
        raise UnsupportedModelError(
            "sliding-window attention is not supported; supported: full attention in all layers"
        )


def _rope(config: Mapping[str, object], max_position_embeddings: int) -> RopeConfig:
    scaling: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            scaling.update(value)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(f"{rope_type=} is not supported; supported: default, linear, llama3")
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedModelError(f"partial_rotary_factor={partial!r} is not supported; supported: 1.0")
    read = _Reader({"rope_theta": config.get("rope_theta"), **scaling})
    theta = read.number("rope_theta", default=10000.0)
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type="linear", theta=theta, factor=read.number("factor"))
    return RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=read.number("factor"),
        low_freq_factor=read.number("low_freq_factor"),
        high_freq_factor=read.number("high_freq_factor"),
        original_max_position_embeddings=read.size("original_max_position_embeddings", max_position_embeddings),
    )


def _dtype(config: Mapping[str, object]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"dtype={value!r} is not supported; supported: {', '.join(DTYPES)}")
    return name

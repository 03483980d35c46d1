"""Model families: what sets one apart from another. Knows ``config.json``'s keys, and neither tensors nor files.

All families share one transformer (``transformer.py``): RMSNorm before attention and MLP, rotary halves, grouped
queries, gated SiLU, Hugging Face's tensor names. A family is a :class:`Family` entry below, nothing more.

To add one: if it differs in biases, the norm of query and key heads, or defaults only, add an entry to ``FAMILIES``.
If it differs in arithmetic, add a flag to :class:`Flags` and to ``ModelConfig``, honour it in ``layers.py``, and add
the family to ``tests/unit/test_model_transformer.py``, which holds every family against Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """The switches of the shared transformer that a family sets."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One ``architectures`` name of ``config.json``.

    Attributes:
        architecture, model_type: as in ``config.json``; the type serves where ``architectures`` is missing.
        flags: reads the family's switches off the config.
        defaults: what Hugging Face assumes for a key that ``config.json`` leaves out.
    """

    architecture: str
    model_type: str
    flags: Callable[[Mapping[str, object]], Flags]
    defaults: Mapping[str, object]


def _llama_flags(config: Mapping[str, object]) -> Flags:
    bias = bool(config.get("attention_bias", False))
    return Flags(qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _qwen2_flags(config: Mapping[str, object]) -> Flags:
    return Flags(qkv_bias=True)


def _qwen3_flags(config: Mapping[str, object]) -> Flags:
    bias = bool(config.get("attention_bias", False))
    return Flags(qkv_bias=bias, output_bias=bias, qk_norm=True)


_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_QWEN2_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN3_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}

_ALL = (
    Family(architecture="LlamaForCausalLM", model_type="llama", flags=_llama_flags, defaults=_LLAMA_DEFAULTS),
    Family(architecture="Qwen2ForCausalLM", model_type="qwen2", flags=_qwen2_flags, defaults=_QWEN2_DEFAULTS),
    Family(architecture="Qwen3ForCausalLM", model_type="qwen3", flags=_qwen3_flags, defaults=_QWEN3_DEFAULTS),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.architecture: family for family in _ALL})

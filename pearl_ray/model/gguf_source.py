"""Weights and config out of a GGUF file, under Hugging Face's names and in its row order. Knows no tokenizer.

Architectures llama, qwen2 and qwen3. llama.cpp stores the query and key rows of 'llama' with each head's rotary pairs
side by side; Hugging Face has the pairs' first halves before the second ones. The rows are gathered in Hugging Face's
order as they are read, so any slice of rows costs those rows alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.config import ModelConfig, RopeConfig
from pearl_ray.model.gguf_file import GGUFFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_PIECE = 1 << 20  # numbers dequantised at a time; gguf's code holds several times their float32 size meanwhile
FROM_TARGET_KEY = "pearl.from_target"  # names of the GGUF tensors that are the target's own, and so not in the file

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUFSource:
    """One GGUF file as a ``WeightSource``; see ``source.py`` for the methods.

    Attributes:
        from_target: Hugging Face names of tensors that this file leaves to its target model.

    Raises:
        ModelLoadError: the file can't be read, or its metadata lacks something.
        UnsupportedModelError: another architecture, or an option of it that isn't implemented.
    """

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile(path)
        self.path = path
        self.config = _config(self.file)
        self._stored = {_hugging_face_name(path, name): name for name in self.file.tensors if name != _ROPE_FACTORS}
        left_out = self.file.metadata.get(FROM_TARGET_KEY, [])
        assert isinstance(left_out, list)
        self.from_target = frozenset(_hugging_face_name(path, str(name)) for name in left_out)
        self._is_permuted = self.file.metadata["general.architecture"] == "llama"

    def names(self) -> Collection[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._find(name)].shape

    def stored_bytes(self, name: str) -> int:
        return self.file.tensors[self._find(name)].num_bytes

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        stored = self._find(name)
        if not self._is_permuted or not re.search(r"\.[qk]_proj\.", name):
            return self.file.read(stored, rows, cols)
        order = _stored_rows(self.shape(name)[0], self.config.head_dim)
        return self.file.read(stored, order if rows is None else order[rows], cols)

    def load_into(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None) -> None:
        shape = self.shape(name)
        wanted = range(shape[0])[rows or slice(None)]
        step = max(1, _PIECE // math.prod(shape[1:]))
        for first in range(0, len(wanted), step):
            piece = wanted[first : first + step]
            out[first : first + len(piece)] = self.load(name, slice(piece.start, piece.stop), cols)

    def _find(self, name: str) -> str:
        if name not in self._stored:
            raise ModelLoadError(f"{self.path}: there is no tensor for {name}")
        return self._stored[name]


def _stored_rows(num_rows: int, head_dim: int) -> np.ndarray:
    """For each row in Hugging Face's order its row in the file: row half·D/2 + i of a head is the file's 2·i + half."""
    return np.arange(num_rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _hugging_face_name(path: Path, name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UnsupportedModelError(f"{path}: tensor {name} is of no supported model ({', '.join(ARCHITECTURES)})")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


class _Metadata:
    """Typed reads of the architecture's keys, with errors that name file and key."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self._values = file, file.metadata
        architecture = self._values.get("general.architecture")
        if architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise UnsupportedModelError(f"{file.path}: {architecture=} is not supported; supported: {supported}")
        self.architecture = str(architecture)

    def size(self, key: str, default: int | None = None) -> int:
        value = self._values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelLoadError(f"{self._file.path}: {self.architecture}.{key}={value!r}, but a size is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ModelLoadError(f"{self._file.path}: {self.architecture}.{key}={value!r}, but a number is needed")
        return float(value)

    def get(self, key: str) -> object:
        return self._values.get(f"{self.architecture}.{key}")

    def token_id(self, key: str) -> int | None:
        value = self._values.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) else None


def _config(file: GGUFFile) -> ModelConfig:
    read = _Metadata(file)
    num_heads, hidden_size = read.size("attention.head_count"), read.size("embedding_length")
    head_dim = read.size("attention.key_length", default=hidden_size // num_heads)
    max_position_embeddings = read.size("context_length")
    _refuse_unsupported(file, read, head_dim)
    left_out = file.metadata.get(FROM_TARGET_KEY, [])
    assert isinstance(left_out, list)
    return ModelConfig(
        architecture=ARCHITECTURES[read.architecture],
        vocab_size=_vocab_size(file, read),
        hidden_size=hidden_size,
        intermediate_size=read.size("feed_forward_length"),
        num_layers=read.size("block_count"),
        num_heads=num_heads,
        num_kv_heads=read.size("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        rms_norm_eps=float(f"{read.number('attention.layer_norm_rms_epsilon'):.6g}"),  # float32 1e-5 reads 9.99…e-6
        rope=_rope(file, read, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors and "output.weight" not in left_out,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=read.token_id("bos_token_id"),
        eos_token_ids=eos_token_ids(file),
        dtype=_dtype(file),
    )


def eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """The tokens that end an answer: end of sequence, of turn, of message; in that order, each once."""
    ids = (file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def _refuse_unsupported(file: GGUFFile, read: _Metadata, head_dim: int) -> None:
    num_parts = file.metadata.get("split.count", 0)
    if isinstance(num_parts, int) and num_parts > 1:
        raise UnsupportedModelError(f"{file.path}: one of {num_parts} parts; join them with gguf-split --merge")
    if read.get("expert_count"):
        raise UnsupportedModelError(f"{file.path}: mixture of experts is not supported; supported: dense models")
    if read.get("attention.sliding_window"):
        raise UnsupportedModelError(
            f"{file.path}: sliding-window attention is not supported; supported: full attention"
        )
    value_dim, rotary_dim = read.get("attention.value_length"), read.get("rope.dimension_count")
    if value_dim not in (None, head_dim) or rotary_dim not in (None, head_dim):
        raise UnsupportedModelError(
            f"{file.path}: heads of {head_dim} with values of {value_dim} and {rotary_dim} rotated dimensions are not "
            "supported; all three must be the same"
        )


def _vocab_size(file: GGUFFile, read: _Metadata) -> int:
    if "token_embd.weight" in file.tensors:
        return file.tensors["token_embd.weight"].shape[0]
    return read.size("vocab_size")


def _dtype(file: GGUFFile) -> str:
    """What to compute in where nothing else is asked for: the matrices' type; bfloat16 where they are quantised."""
    kinds = {info.kind for info in file.tensors.values() if len(info.shape) > 1}
    return {"F32": "float32", "F16": "float16"}.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _rope(file: GGUFFile, read: _Metadata, head_dim: int) -> RopeConfig:
    theta = read.number("rope.freq_base", default=10000.0)
    if _ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    kind, linear = read.get("rope.scaling.type"), read.get("rope.scale_linear")  # the second: the key's old name
    if kind in (None, "none") and linear is None:
        return RopeConfig(theta=theta)
    if kind in (None, "linear"):
        factor = read.number("rope.scale_linear" if kind is None else "rope.scaling.factor")
        return RopeConfig(theta=theta) if factor == 1.0 else RopeConfig(rope_type="linear", theta=theta, factor=factor)
    raise UnsupportedModelError(f"{file.path}: rope scaling {kind!r} is not supported; supported: linear, llama3")


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> RopeConfig:
    """The scaling whose result the file holds as one divisor per frequency.

    Llama 3.1 to 3.3 differ in the factor alone, the divisor of the lowest frequency. What the formula doesn't give
    back (Transformers' ``rope_type`` 'llama3') is refused.
    """
    divisors = file.read(_ROPE_FACTORS).double().reshape(-1)
    if len(divisors) != head_dim // 2:
        raise ModelLoadError(f"{file.path}: {_ROPE_FACTORS} has {len(divisors)} values for heads of {head_dim}")
    factor = float(divisors[-1])
    if torch.all(divisors == 1):
        return RopeConfig(theta=theta)
    rope = RopeConfig(rope_type="llama3", theta=theta, factor=factor, **_LLAMA3_ROPE)  # type: ignore[arg-type]
    expected = torch.tensor([_llama3_divisor(rope, i, head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    if not torch.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModelError(f"{file.path}: {_ROPE_FACTORS} is not Llama 3's scaling; supported: linear, llama3")
    return rope


def _llama3_divisor(rope: RopeConfig, index: int, head_dim: int) -> float:
    turns = rope.original_max_position_embeddings / (2 * math.pi * math.pow(rope.theta, 2 * index / head_dim))
    if turns > rope.high_freq_factor:
        return 1.0
    if turns < rope.low_freq_factor:
        return rope.factor
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return 1 / ((1 - smooth) / rope.factor + smooth)

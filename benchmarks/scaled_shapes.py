"""How a small Llama model lies in a larger shape that computes the same function. Knows sizes and names, no weights.

The small weights lie in the corners of the large matrices. What the larger shape adds is filled with noise wherever it
can't reach the output, so that neither time nor power is that of zeros, and with zeros where it could:

- hidden size d in D: the embedding's other columns are 0 and stay 0, as o_proj and down_proj have no other rows; so
  the mean square is d/D of what it was: norm weights times sqrt(d/D), eps times d/D.
- head width w in W: rotary pair i turns as pair i s of the larger head, s = W // w, with theta to the power W / (s w);
  keys are 0 in the other pairs; scores are divided by sqrt(W), so queries are multiplied by sqrt(W/w).
- heads in groups: each small KV head gets as many large ones as its query heads need; o_proj's other columns are 0.
- MLP columns: down_proj's others are 0. Layers behind the last one: o_proj and down_proj are 0.
- vocabulary: rows behind the source's repeat its rows, so that none is likelier than the source's own; pearl-ray never
  chooses an id that the tokenizer doesn't have, another engine may where rounding breaks the tie.

In float32 the logits agree to about 1e-6 of their size. In bfloat16 the rescaled norm and query weights are rounded
anew, so texts part from the small model's own bfloat16 text where two tokens are about equally likely.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from pearl_ray.core.errors import UnsupportedModelError
from pearl_ray.model.config import ModelConfig

_LLAMA3_ROPE = ("theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama model; ``vocab_size`` counts only where it is asked for."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool


def _shape(d: int, i: int, layers: int, heads: int, kv: int, width: int, vocab: int, tied: bool = False) -> Shape:
    return Shape(
        hidden_size=d,
        intermediate_size=i,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=width,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


PRESETS = {
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8, 128, 151936, tied=True),
    "llama-1b": _shape(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "llama-8b": _shape(4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-32b": _shape(5120, 25600, 64, 64, 8, 128, 151936),
    "llama-70b": _shape(8192, 28672, 80, 64, 8, 128, 128256),
}


def doubled(config: ModelConfig) -> Shape:
    """Every size of a model twice over: a shape to rehearse with."""
    return _shape(
        2 * config.hidden_size,
        2 * config.intermediate_size,
        2 * config.num_layers,
        2 * config.num_heads,
        2 * config.num_kv_heads,
        2 * config.head_dim,
        config.vocab_size,
        config.tie_word_embeddings,
    )


def scaled_config(source: ModelConfig, shape: Shape, dtype: str) -> dict[str, object]:
    """The ``config.json`` of ``source`` inside ``shape``; with the source's layers where they are more.

    Raises:
        UnsupportedModelError: the source is no plain Llama, or larger than the shape; says in what.
    """
    if source.architecture != "LlamaForCausalLM" or source.qkv_bias or source.output_bias or source.mlp_bias:
        raise UnsupportedModelError(f"{source.architecture}: only Llama models without biases can be embedded")
    for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size"):
        if getattr(shape, name) < getattr(source, name):
            raise UnsupportedModelError(
                f"the source's {name}={getattr(source, name)} doesn't fit in {getattr(shape, name)}"
            )
    if shape.num_heads % shape.num_kv_heads or source.num_kv_heads * _copies(source, shape) > shape.num_kv_heads:
        raise UnsupportedModelError(
            f"{source.num_heads} query heads over {source.num_kv_heads} KV heads don't fit in {shape.num_heads} over "
            f"{shape.num_kv_heads}"
        )
    spread = shape.head_dim // source.head_dim
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{("num_hidden_layers" if k == "num_layers" else k): v for k, v in asdict(shape).items() if "heads" not in k},
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": source.rms_norm_eps * source.hidden_size / shape.hidden_size,
        "rope_theta": source.rope.theta ** (shape.head_dim / (spread * source.head_dim)),
        "max_position_embeddings": source.max_position_embeddings,
        "tie_word_embeddings": source.tie_word_embeddings and shape.tie_word_embeddings,
        "bos_token_id": source.bos_token_id,
        "eos_token_id": list(source.eos_token_ids),
        "torch_dtype": dtype,
    }
    config["num_hidden_layers"] = max(shape.num_layers, source.num_layers)
    if source.rope.rope_type != "default":
        rope = {k: v for k, v in asdict(source.rope).items() if k != "theta"}
        config["rope_scaling"] = (
            rope if source.rope.rope_type == "llama3" else {k: rope[k] for k in ("rope_type", "factor")}
        )
    return config


def _copies(source: ModelConfig, large: Shape | ModelConfig) -> int:
    """Large KV heads that each small one needs for its query heads."""
    return -(-(source.num_heads // source.num_kv_heads) // (large.num_heads // large.num_kv_heads))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a large tensor is made of.

    Attributes:
        source: the small tensor in it; None: nothing.
        rows, cols: for each large row (column) the small one, or -1.
        scale: of the small numbers.
        noisy: whether the rest is noise, else zeros; ``zero_rows``: which rows of it are zeros all the same.
    """

    source: str | None
    rows: torch.Tensor
    cols: torch.Tensor
    scale: float
    noisy: bool
    zero_rows: torch.Tensor | None = None


def plan_of(name: str, small: ModelConfig, large: ModelConfig) -> Plan:
    """What the large model's tensor of that name is made of."""
    hidden = _corner(large.hidden_size, small.hidden_size)
    one = torch.zeros(1, dtype=torch.int64)
    shrunk = math.sqrt(small.hidden_size / large.hidden_size)
    kind = name.split(".")[-2]
    if kind in ("embed_tokens", "lm_head"):
        home = "model.embed_tokens.weight" if small.tie_word_embeddings else name
        tokens = torch.arange(large.vocab_size) % small.vocab_size
        return Plan(home, tokens, hidden, 1.0, noisy=kind == "lm_head")
    if name == "model.norm.weight":
        return Plan(name, hidden, one, shrunk, noisy=True)
    home = name if int(name.split(".")[2]) < small.num_layers else None
    mlp = _corner(large.intermediate_size, small.intermediate_size)
    if kind.endswith("layernorm"):
        return Plan(home, hidden, one, shrunk, noisy=True)
    if kind == "q_proj":
        stretched = math.sqrt(large.head_dim / small.head_dim)
        return Plan(home, _query_rows(small, large, rotary=True), hidden, stretched, noisy=True)
    if kind == "k_proj":
        rows = _kv_rows(small, large, rotary=True)
        heads = (rows >= 0).view(-1, large.head_dim).any(1).repeat_interleave(large.head_dim)
        return Plan(home, rows, hidden, 1.0, noisy=True, zero_rows=heads if home is not None else None)
    if kind == "v_proj":
        return Plan(home, _kv_rows(small, large, rotary=False), hidden, 1.0, noisy=True)
    if kind == "o_proj":
        return Plan(home, hidden, _query_rows(small, large, rotary=False), 1.0, noisy=False)
    if kind == "down_proj":
        return Plan(home, hidden, mlp, 1.0, noisy=False)
    assert kind in ("gate_proj", "up_proj"), name
    return Plan(home, mlp, hidden, 1.0, noisy=True)


def _corner(large: int, small: int) -> torch.Tensor:
    index = torch.arange(large)
    return index.masked_fill_(index >= small, -1)


def _within_head(small: ModelConfig, large: ModelConfig, rotary: bool) -> torch.Tensor:
    """Where each element of a small head lies in a large one."""
    element = torch.arange(small.head_dim)
    if not rotary:
        return element
    half, pair = element // (small.head_dim // 2), element % (small.head_dim // 2)
    return half * (large.head_dim // 2) + pair * (large.head_dim // small.head_dim)


def _query_rows(small: ModelConfig, large: ModelConfig, *, rotary: bool) -> torch.Tensor:
    """For each row of all large query heads the small row, or -1."""
    group, large_group = small.num_heads // small.num_kv_heads, large.num_heads // large.num_kv_heads
    rows, within = torch.full((large.num_heads, large.head_dim), -1), _within_head(small, large, rotary)
    for head in range(small.num_heads):
        kv, at = divmod(head, group)
        home = (kv * _copies(small, large) + at // large_group) * large_group + at % large_group
        rows[home, within] = torch.arange(head * small.head_dim, (head + 1) * small.head_dim)
    return rows.view(-1)


def _kv_rows(small: ModelConfig, large: ModelConfig, *, rotary: bool) -> torch.Tensor:
    """For each row of all large KV heads the small row, or -1."""
    rows, within = torch.full((large.num_kv_heads, large.head_dim), -1), _within_head(small, large, rotary)
    copies = _copies(small, large)
    for home in range(small.num_kv_heads * copies):
        first = home // copies * small.head_dim
        rows[home, within] = torch.arange(first, first + small.head_dim)
    return rows.view(-1)

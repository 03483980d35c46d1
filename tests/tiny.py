"""The tiny models that all tests share, made by seed: no files to keep, no training, nothing from outside.

A target and a draft of 2 layers, 9 query and 3 KV heads of width 8, 64 tokens, 32k context. The draft is the target
plus noise, tuned so that along the target's greedy text the draft's first choice is the target's about 7 times in 10.
Weights are float64 and large enough that the text depends on all of the context and doesn't fall into a short loop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from pearl_ray.model.config import ModelConfig, from_hf_config
from pearl_ray.model.rope import inverse_frequencies
from pearl_ray.model.source import expected_names

VOCAB_SIZE = 64
EOS_ID, BOS_ID = 0, 1
SPECIAL = ("<|end|>", "<|start|>")
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHILMNOPRSTW0123456789 \n.,?!':"
DRAFT_NOISE = 0.05  # of each weight's standard deviation; gives the acceptance named above
# For structured outputs: all of ASCII, tokens that span JSON's parts, and bytes of a character.
JSON_PIECES = [
    *"\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~",
    *('{"', '":', '": ', '", "', '",', '"}', "}}", '"]', "[]", "{}", ", "),
    *("true", "false", "null", "12", "ab", "Ã", "©"),
]
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_LOGIT_STD = 2.0
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def hf_config(family: str = "llama", *, vocab_size: int = VOCAB_SIZE, **overrides: object) -> dict[str, object]:
    """The parsed ``config.json`` of a tiny model; ``overrides`` replace its keys."""
    config: dict[str, object] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "torch_dtype": "float64",
    }
    return config | overrides


def tiny_weights(config: ModelConfig, *, seed: int = 0, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """Float64 weights by Hugging Face's names; the same seed with ``noise`` gives a draft of the noiseless target."""
    clean, noisy = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1_000_003)
    weights = {}
    for name in sorted(expected_names(config)):
        shape, mean, std = _shape_and_scale(name, config)
        base = torch.randn(shape, generator=clean, dtype=torch.float64)
        error = torch.randn(shape, generator=noisy, dtype=torch.float64)
        weights[name] = mean + std * (base + noise * error)
    return weights


def _shape_and_scale(name: str, config: ModelConfig) -> tuple[tuple[int, ...], float, float]:
    hidden, columns = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[tuple[int, int], float]] = {
        "embed_tokens": ((config.vocab_size, hidden), 1.0),
        "lm_head": ((config.vocab_size, hidden), _LOGIT_STD / math.sqrt(hidden)),
        "q_proj": ((q_rows, hidden), 1.5 / math.sqrt(hidden)),
        "k_proj": ((kv_rows, hidden), 1.5 / math.sqrt(hidden)),
        "v_proj": ((kv_rows, hidden), 2.0 / math.sqrt(hidden)),
        "o_proj": ((hidden, q_rows), 2.0 / math.sqrt(q_rows)),
        "gate_proj": ((columns, hidden), 1.5 / math.sqrt(hidden)),
        "up_proj": ((columns, hidden), 1.5 / math.sqrt(hidden)),
        "down_proj": ((hidden, columns), 1.5 / math.sqrt(columns)),
    }
    module, kind = name.split(".")[-2:]
    if module in shapes:
        shape, std = shapes[module]
        return (shape, 0.0, std) if kind == "weight" else (shape[:1], 0.0, 0.3)
    if module in ("q_norm", "k_norm"):
        return (config.head_dim,), 1.5, 0.15
    return (hidden,), 1.0, 0.1


@dataclass
class InMemorySource:
    """A ``WeightSource`` without files."""

    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def stored_bytes(self, name: str) -> int:
        return self.tensors[name].numel() * self.tensors[name].element_size()

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        part = self.tensors[name][rows or slice(None)]
        return (part if cols is None else part[:, cols]).contiguous()


def in_memory_source(
    family: str = "llama",
    *,
    draft: bool = False,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    noise: float = DRAFT_NOISE,
    **overrides: object,
) -> InMemorySource:
    """The tiny target, or its draft; ``overrides`` replace keys of ``config.json``."""
    config = from_hf_config(hf_config(family, vocab_size=vocab_size, **overrides))
    return InMemorySource(config, tiny_weights(config, seed=seed, noise=noise if draft else 0.0))


def tiny_tokenizer(pieces: Sequence[str] = ALPHABET) -> PreTrainedTokenizerFast:
    """One token per character of ``ALPHABET``, which round-trips; other characters are dropped.

    ``pieces`` are other tokens to have instead, byte-level but for blanks and newlines; a text is encoded with those of
    one character.
    """
    assert len({*SPECIAL, *pieces}) == len(SPECIAL) + len(pieces)
    tokens = [*SPECIAL, *(piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in pieces)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[EOS_ID],
        bos_token=SPECIAL[BOS_ID],
        pad_token=SPECIAL[EOS_ID],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def tiny_pair(
    directory: Path,
    family: str = "llama",
    *,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    noise: float = DRAFT_NOISE,
    pieces: Sequence[str] = ALPHABET,
    **overrides: object,
) -> tuple[Path, Path]:
    """Writes both models as Hugging Face directories below ``directory``; returns ``(target, draft)``.

    ``pieces``: the tokenizer's, see :func:`tiny_tokenizer`.
    """
    assert vocab_size >= len(SPECIAL) + len(pieces), "the tokenizer needs all of its ids"
    target, draft = directory / "target", directory / "draft"
    for path, is_draft in ((target, False), (draft, True)):
        source = in_memory_source(family, draft=is_draft, vocab_size=vocab_size, seed=seed, noise=noise, **overrides)
        path.mkdir(parents=True, exist_ok=True)
        save_file(dict(source.tensors), path / "model.safetensors", metadata={"format": "pt"})
        config = hf_config(family, vocab_size=vocab_size, **overrides)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (path / "config.json").write_text(json.dumps(config, indent=2))
        (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
        tiny_tokenizer(pieces).save_pretrained(path)
    return target, draft


def make_reference_exact(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Makes a float64 Hugging Face model compute in float64 throughout; as it comes, norms and rotary are float32.

    The frequencies are ours, as float64 is not to be had from Hugging Face; float32 models hold them against its own.
    """
    frequencies = inverse_frequencies(config.rope, config.head_dim, torch.float64)
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = _exact_norm(module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = _exact_rotary(frequencies)
    return model


def _exact_norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))

    return forward


def _exact_rotary(frequencies: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].to(torch.float64) * frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    return forward

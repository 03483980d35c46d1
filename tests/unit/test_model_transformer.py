"""Our transformer against Hugging Face's, over families, rope types, paged caches, batch shapes and rank counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from pearl_ray.core.comm import Group, SingleGroup
from pearl_ray.kernels.backend import choose_attention
from pearl_ray.kernels.ops import TorchLayerOps
from pearl_ray.model.batching import Entry, make_batch
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.transformer import Transformer
from tests.tiny import InMemorySource, hf_config, in_memory_source, make_reference_exact

BLOCK = 4
BLOCKS = [9, 3, 4, 5, 30, 1, 2, 17]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama, llama3 rope": (
        "llama",
        {"rope_theta": 50.0, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    ),
    "llama, as many kv heads as query heads": ("llama", {"num_key_value_heads": 9}),
    "llama, odd vocabulary": ("llama", {"vocab_size": 67, "rms_norm_eps": 1e-3}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, wide heads, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


class ThreadRing:
    """What the ranks of :class:`ThreadGroup` share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)


class ThreadGroup(SingleGroup):
    """Ranks as threads; sums in rank order."""

    def __init__(self, ring: ThreadRing, rank: int) -> None:
        self.ring, self.rank, self.size = ring, rank, ring.size

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        self.ring.parts[self.rank] = x.clone()
        self.ring.barrier.wait()
        total = torch.zeros_like(x)
        for part in self.ring.parts:
            assert part is not None
            total += part
        self.ring.barrier.wait()
        return x.copy_(total)


class Model:
    """One rank with its cache."""

    def __init__(self, source: InMemorySource, dtype: torch.dtype, plan: ShardPlan, group: Group) -> None:
        config, rank = source.config, group.rank
        self.transformer = Transformer(
            config,
            plan,
            rank,
            source,
            dtype=dtype,
            device="cpu",
            group=group,
            attention=choose_attention("auto", "cpu"),
        )
        kv_heads = len(plan.shards[rank].kv_heads)
        self.cache = KVCache(64, BLOCK, config.num_layers, kv_heads, config.head_dim, dtype, "cpu")

    def logits(self, entries: Sequence[Entry]) -> torch.Tensor:
        batch = make_batch(entries, BLOCK, torch.device("cpu"))
        return self.transformer.local_logits(self.transformer.forward(batch, self.cache))


def single(source: InMemorySource, dtype: torch.dtype = torch.float64) -> Model:
    return Model(source, dtype, ShardPlan.make(source.config, 1), SingleGroup())


def run_ranks(
    source: InMemorySource, tp_size: int, work: Callable[[Model], torch.Tensor], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """``work`` on every rank at once; the ranks' results side by side."""
    plan, ring = ShardPlan.make(source.config, tp_size), ThreadRing(tp_size)
    models = [Model(source, dtype, plan, ThreadGroup(ring, rank)) for rank in range(tp_size)]
    results: dict[int, torch.Tensor] = {}

    def run(rank: int) -> None:
        results[rank] = work(models[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(tp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([results[rank] for rank in range(tp_size)], dim=-1)


def reference(source: InMemorySource, family: str, overrides: dict[str, object], dtype: torch.dtype) -> torch.nn.Module:
    classes: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    config = classes[family].from_dict({**hf_config(family), **overrides, "attn_implementation": "sdpa"})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    missing, unexpected = model.load_state_dict(dict(source.tensors), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return make_reference_exact(model, source.config) if dtype == torch.float64 else model


def tokens_of(length: int, config: ModelConfig, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_logits_equal_hugging_faces(variant: str) -> None:
    family, overrides = VARIANTS[variant]
    source = in_memory_source(family, **overrides)  # type: ignore[arg-type]
    tokens = tokens_of(29, source.config)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        expected = reference(source, family, overrides, dtype)(torch.tensor([tokens])).logits[0].detach()
        entry = Entry(tokens, 0, BLOCKS, len(tokens))
        torch.testing.assert_close(single(source, dtype).logits([entry]), expected, rtol=0, atol=tolerance)


def test_chunked_prefill_then_single_tokens_give_the_same_logits_as_one_pass() -> None:
    source = in_memory_source()
    tokens = tokens_of(29, source.config)
    whole = single(source).logits([Entry(tokens, 0, BLOCKS, len(tokens))])
    model, parts, at = single(source), [], 0
    for size in (7, 1, 12, 1, 1, 5, 2):
        parts.append(model.logits([Entry(tokens[at : at + size], at, BLOCKS, size)]))
        at += size
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)


def test_a_sequence_gets_the_same_logits_alone_and_in_a_mixed_batch() -> None:
    source = in_memory_source("qwen3")
    first, second, third = (tokens_of(n, source.config, seed=n) for n in (21, 13, 6))
    tables = ([0, 1, 2, 3, 4, 5], [10, 9, 8, 7], [20, 21])
    alone = [
        single(source).logits([Entry(tokens, 0, table, len(tokens))])
        for tokens, table in zip((first, second, third), tables, strict=True)
    ]
    model = single(source)
    model.logits([Entry(first[:20], 0, tables[0], 0), Entry(second[:4], 0, tables[1], 1)])
    mixed = model.logits(
        [Entry(first[20:], 20, tables[0], 1), Entry(second[4:], 4, tables[1], 3), Entry(third, 0, tables[2], 6)]
    )
    expected = torch.cat((alone[0][-1:], alone[1][-3:], alone[2]))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)


def test_a_rejected_window_leaves_no_trace_once_its_positions_are_written_again() -> None:
    source = in_memory_source()
    tokens = tokens_of(16, source.config)
    whole = single(source).logits([Entry(tokens, 0, BLOCKS, 4)])
    model = single(source)
    model.logits([Entry(tokens[:10] + tokens_of(6, source.config, seed=7), 0, BLOCKS, 1)])
    torch.testing.assert_close(model.logits([Entry(tokens[10:], 10, BLOCKS, 4)]), whole, rtol=0, atol=1e-12)


def test_a_pass_without_wanted_rows_returns_no_logits_but_writes_the_cache() -> None:
    source = in_memory_source()
    tokens, model = tokens_of(9, source.config), single(source)
    assert model.logits([Entry(tokens[:8], 0, BLOCKS, 0)]).shape == (0, 64)
    expected = single(source).logits([Entry(tokens, 0, BLOCKS, 1)])
    torch.testing.assert_close(model.logits([Entry(tokens[8:], 8, BLOCKS, 1)]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "variant", ["llama", "llama, biases", "llama, tied", "llama, odd vocabulary", "qwen2", "qwen3"]
)
@pytest.mark.parametrize("tp_size", [2, 3, 7, 9])
def test_every_rank_count_gives_the_logits_of_one_rank(variant: str, tp_size: int) -> None:
    family, overrides = VARIANTS[variant]
    source = in_memory_source(family, **overrides)  # type: ignore[arg-type]
    tokens, other = tokens_of(17, source.config), tokens_of(5, source.config, seed=3)

    def work(model: Model) -> torch.Tensor:
        model.logits([Entry(tokens[:11], 0, BLOCKS, 0)])
        return model.logits([Entry(tokens[11:], 11, BLOCKS, 6), Entry(other, 0, [40, 33], 2)])

    expected = work(single(source))
    torch.testing.assert_close(run_ranks(source, tp_size, work), expected, rtol=0, atol=1e-12)
    assert float(expected.std()) > 0.5, "the logits say something"


def test_float32_ranks_agree_to_rounding_with_packed_weights() -> None:
    source = in_memory_source()
    entry = Entry(tokens_of(17, source.config), 0, BLOCKS, 17)
    results = [run_ranks(source, size, lambda model: model.logits([entry]), torch.float32) for size in (1, 7)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-4)


def test_a_rank_knows_the_ids_of_its_logits_and_reads_no_more_than_its_part() -> None:
    full = in_memory_source()
    read: dict[str, int] = {}

    class Counting(InMemorySource):
        def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
            part = super().load(name, rows, cols)
            read[name] = read.get(name, 0) + part.numel()
            return part

    source, done = Counting(full.config, full.tensors), list[tuple[int, int]]()
    plan = ShardPlan.make(source.config, 7)
    model = Transformer(
        source.config,
        plan,
        3,
        source,
        dtype=torch.float64,
        device="cpu",
        group=ThreadGroup(ThreadRing(7), 3),
        attention=choose_attention("auto", "cpu"),
        on_layer_loaded=lambda at, total: done.append((at, total)),
    )
    assert model.vocab_sizes == plan.vocab_sizes
    assert model.vocab_start == sum(plan.vocab_sizes[:3])
    assert done == [(1, 2), (2, 2)]
    for name, count in read.items():
        if name.endswith("_proj.weight") or "embed" in name or "lm_head" in name:
            assert count < full.tensors[name].numel() / 2, name


def test_a_bfloat16_model_stays_close_to_float32() -> None:
    source = in_memory_source()
    entry = Entry(tokens_of(12, source.config), 0, BLOCKS, 12)
    exact, rough = single(source).logits([entry]), single(source, torch.bfloat16).logits([entry])
    assert rough.dtype == torch.bfloat16
    assert float((rough.double() - exact).abs().mean()) < 0.15


def test_the_norm_keeps_float64_and_computes_lower_precisions_in_float32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 72, dtype=torch.float64), torch.rand(72, dtype=torch.float64)
    exact = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rms_norm = TorchLayerOps().rms_norm
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), exact, rtol=1e-14, atol=0)
    low = rms_norm(300 * x.bfloat16(), weight.bfloat16(), 1e-6)  # squares beyond bfloat16's precision
    torch.testing.assert_close(low.double(), exact, rtol=3e-2, atol=1e-3)


def test_a_block_takes_the_bytes_that_the_cache_says() -> None:
    cache = KVCache(5, 16, 2, 3, 8, torch.bfloat16, "cpu")
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.k, *cache.v))
    assert held == 5 * KVCache.bytes_per_block(16, 2, 3, 8, torch.bfloat16)

"""A whole forward through the Triton kernels: against float32 in torch, from device tensors, in a CUDA graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from pearl_ray.core.batch import ForwardBatch, StaticBatch
from pearl_ray.core.comm import SingleGroup
from pearl_ray.kernels.attention_torch import TorchAttention
from pearl_ray.kernels.attention_triton import TritonAttention
from pearl_ray.kernels.linear import DOTS, PRODUCTS
from pearl_ray.kernels.ops import TorchLayerOps, choose_layer_ops
from pearl_ray.kernels.ops_triton import TritonLayerOps
from pearl_ray.model.batching import Entry, make_batch
from pearl_ray.model.kv_cache import KVCache
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.transformer import Transformer
from tests.kernel_checks import CAN_RUN, DEVICE, INTERPRETING, REASON, relative_error, sum_products_by_row
from tests.tiny import InMemorySource, in_memory_source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAN_RUN, reason=REASON)]

DTYPE = torch.float16 if INTERPRETING else torch.bfloat16
BLOCK, NUM_BLOCKS, VOCAB = 16, 24, 64
SIZES = {"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 192}
if INTERPRETING:
    SIZES |= {"hidden_size": 80, "intermediate_size": 48, "num_hidden_layers": 1}
FAMILIES = {
    "llama": {},
    "llama, biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
}


def source_of(family: str) -> InMemorySource:
    """A model of the family whose weights are exact in ``DTYPE``."""
    source = in_memory_source(family.split(",")[0], **{**SIZES, **FAMILIES[family]})
    return InMemorySource(source.config, {name: w.to(DTYPE).double() for name, w in source.tensors.items()})


class Model:
    """A model on the device with a cache full of NaN."""

    def __init__(self, source: InMemorySource, kind: str, dtype: torch.dtype, *, deterministic: bool = False) -> None:
        config, options = source.config, {"deterministic": deterministic}
        self.transformer = Transformer(
            config,
            ShardPlan.make(config, 1),
            0,
            source,
            dtype=dtype,
            device=DEVICE,
            group=SingleGroup(),
            attention=TritonAttention(**options) if kind == "triton" else TorchAttention(**options),
            ops=TritonLayerOps(**options) if kind == "triton" else TorchLayerOps(**options),
            max_positions=512,
            **options,
        )
        shape = (NUM_BLOCKS, BLOCK, config.num_layers, config.num_kv_heads, config.head_dim)
        self.cache = KVCache(*shape, dtype, DEVICE)
        for part in (*self.cache.k, *self.cache.v):
            part.fill_(math.nan)

    def run(self, batch: ForwardBatch | StaticBatch, lanes: torch.Tensor | None = None) -> torch.Tensor:
        return self.transformer.local_logits(self.transformer.forward(batch, self.cache, lanes))

    def feed(self, entries: Sequence[Entry]) -> torch.Tensor:
        return self.run(make_batch(entries, BLOCK, DEVICE))

    def stored(self) -> torch.Tensor:
        return torch.stack((*self.cache.k, *self.cache.v)).view(torch.uint8).cpu()


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG, SHORT = (5, 2) if INTERPRETING else (16, 7)
TEXTS = [tokens_of(length, seed=length) for length in (LONG + 5, SHORT + 2, 3)]
TABLES = [[9, 3], [2], [0, 20]]
PREFILL = [Entry(TEXTS[0][:LONG], 0, TABLES[0], 1), Entry(TEXTS[1][:SHORT], 0, TABLES[1], 2)]
MIXED = [
    Entry(TEXTS[0][LONG:], LONG, TABLES[0], 3),
    Entry(TEXTS[1][SHORT:], SHORT, TABLES[1], 2),
    Entry(TEXTS[2], 0, TABLES[2], 1),
]


def static_of(batch: ForwardBatch, num_rows: int, num_seqs: int) -> StaticBatch:
    """The same pass in a fixed shape: what is left over holds rubbish."""
    more_rows = num_rows - len(batch.token_ids_T)
    more_seqs = num_seqs - len(batch.context_lens)
    starts = [*batch.query_start, *[batch.query_start[-1]] * more_seqs]
    tables = torch.full((num_seqs, 8), 10**6, dtype=torch.int32, device=DEVICE)
    tables[: len(batch.context_lens), : batch.block_tables_SB.shape[1]] = batch.block_tables_SB
    rows = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    rows[: len(batch.output_rows_R)] = batch.output_rows_R

    def pad(values: torch.Tensor, rubbish: int) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, more_rows), value=rubbish).int()

    return StaticBatch(
        pad(batch.token_ids_T, 10**6),
        pad(batch.positions_T, -(10**6)),
        pad(batch.slots_T, 3),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor([*batch.context_lens, *[777] * more_seqs], dtype=torch.int32, device=DEVICE),
        tables,
        rows,
        max_query_len=16,
        max_context_len=128,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_forward_is_as_close_to_float32_as_torch_in_the_same_type(family: str) -> None:
    source, outputs = source_of(family), {}
    for kind, dtype in (("torch", torch.float32), ("torch", DTYPE), ("triton", DTYPE)):
        model = Model(source, kind, dtype)
        model.transformer.settle(4)
        outputs[kind, dtype] = torch.cat((model.feed(PREFILL), model.feed(MIXED)))
    exact = outputs["torch", torch.float32]
    assert float(exact.std()) > 0.5, "the logits say something"
    expected = relative_error(outputs["torch", DTYPE], exact)
    assert relative_error(outputs["triton", DTYPE], exact) < 1.5 * expected + 1e-3


def test_a_forward_with_silu_inside_its_maps_is_the_one_with_silu_behind_them() -> None:
    source = source_of("llama, biases, tied")
    behind, inside = (Model(source, "triton", DTYPE) for _ in range(2))
    width, columns = source.config.hidden_size, 2 * source.config.intermediate_size
    ways = {1: PRODUCTS[0], 2: PRODUCTS[1], 4: PRODUCTS[2], 8: DOTS[0], 16: DOTS[3], 32: DOTS[1]}
    for rows, way in ways.items():
        key = (columns, width, DTYPE, True, rows)
        inside.transformer._ops.choices.chosen[key] = dataclasses.replace(way, has_silu=True)
    single = [Entry(TEXTS[1][:1], 0, TABLES[1], 1)]
    for entries in (PREFILL, MIXED, single):
        batch = make_batch(entries, BLOCK, DEVICE)
        assert relative_error(inside.run(batch), behind.run(batch)) < 2e-2


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_pass_in_device_tensors_is_the_pass_of_lists(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        sum_products_by_row(monkeypatch)
    source = source_of("qwen3")
    plain, static = (Model(source, "triton", DTYPE, deterministic=deterministic) for _ in range(2))
    for entries, num_rows, num_seqs in ((PREFILL, LONG + SHORT + 2, 3), (MIXED, 12, 4)):
        batch = make_batch(entries, BLOCK, DEVICE)
        expected = plain.run(batch)
        out = static.run(static_of(batch, num_rows, num_seqs))[: len(expected)]
        assert torch.equal(out, expected) if deterministic else relative_error(out, expected) < 2e-2
    if deterministic:
        assert torch.equal(static.stored(), plain.stored())
    else:
        assert torch.equal(static.cache.k[0].isnan(), plain.cache.k[0].isnan())


@pytest.mark.parametrize("deterministic", [True, False])
def test_tables_may_be_all_lanes_and_sequences_say_which(deterministic: bool) -> None:
    source = source_of("llama, biases, tied")
    direct, by_lane = (Model(source, "triton", DTYPE, deterministic=deterministic) for _ in range(2))
    lanes = torch.tensor([5, 0, 3, 10**6], dtype=torch.int32, device=DEVICE)  # the last sequence is padding
    for entries, num_rows in ((PREFILL, LONG + SHORT + 2), (MIXED, 12)):
        static = static_of(make_batch(entries, BLOCK, DEVICE), num_rows, 4)
        count = sum(entry.num_outputs for entry in entries)
        tables = torch.full((6, 8), 10**6, dtype=torch.int32, device=DEVICE)
        tables[lanes[:3].long()] = static.block_tables_SB[:3]
        expected = direct.run(static)
        out = by_lane.run(dataclasses.replace(static, block_tables_SB=tables), lanes)
        assert torch.equal(out[:count], expected[:count])
    assert torch.equal(direct.stored(), by_lane.stored())


def test_deterministic_logits_have_the_same_bits_in_every_batch_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        sum_products_by_row(monkeypatch)
    source, length, count = source_of("qwen3"), *((6, 3) if INTERPRETING else (11, 8))
    texts = [tokens_of(length, seed) for seed in range(count)]

    def rows(chosen: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        model, parts, at = Model(source, "triton", DTYPE, deterministic=True), [], 0
        for size in sizes:
            entries = [Entry(texts[i][at : at + size], at, [2 * i + 5], size) for i in chosen]
            parts.append(model.feed(entries).view(len(chosen), size, -1))
            at += size
        return torch.cat(parts, dim=1)

    expected = rows(range(count), [length])
    assert torch.equal(rows([2, 0, 1], [1, 4, length - 5]), expected[[2, 0, 1]])
    assert torch.equal(rows([1], [4, length - 4]), expected[[1]])
    assert torch.equal(rows(range(count), [length - 2, 1, 1]), expected)


@pytest.mark.skipif(INTERPRETING, reason="chooses by what the machine has")
def test_a_gpu_gets_the_kernels_for_half_precision_and_torch_for_more() -> None:
    assert choose_layer_ops("cuda", torch.bfloat16).name == choose_layer_ops("cuda", torch.float16).name == "triton"
    assert choose_layer_ops("cuda", torch.float32).name == choose_layer_ops("cpu", torch.bfloat16).name == "torch"


@pytest.mark.skipif(INTERPRETING, reason="waits only where there is a device")
def test_a_pass_in_device_tensors_never_waits_for_the_device() -> None:
    model = Model(source_of("qwen3"), "triton", DTYPE)
    static = static_of(make_batch(PREFILL, BLOCK, DEVICE), 25, 3)
    model.run(static)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.run(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETING, reason="graphs need a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_pass_replayed_with_other_contents_is_the_eager_one(family: str, deterministic: bool) -> None:
    source = source_of(family)
    eager, captured = (Model(source, "triton", DTYPE, deterministic=deterministic) for _ in range(2))
    for model in (eager, captured):
        model.transformer.settle(16)
    captured.transformer._ops.choices.chosen.update(eager.transformer._ops.choices.chosen)  # the same ways to compute
    batches = [
        PREFILL,
        MIXED,
        [Entry([5], 21, TABLES[0], 1), Entry([7, 8, 9], 3, TABLES[2], 3)],
    ]
    fixed = static_of(make_batch(PREFILL, BLOCK, DEVICE), 25, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.run(fixed)
    torch.cuda.current_stream().wait_stream(stream)
    for part in (*captured.cache.k, *captured.cache.v):
        part.fill_(math.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.run(fixed)
    for entries in batches:
        new = static_of(make_batch(entries, BLOCK, DEVICE), 25, 4)
        for name in ("token_ids_T", "positions_T", "slots_T", "query_start_S1", "context_lens_S", "output_rows_R"):
            getattr(fixed, name).copy_(getattr(new, name))
        fixed.block_tables_SB.copy_(new.block_tables_SB)
        graph.replay()
        count = sum(entry.num_outputs for entry in entries)
        assert torch.equal(out[:count], eager.run(new)[:count])
        assert torch.equal(captured.stored(), eager.stored())

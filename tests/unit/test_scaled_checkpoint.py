"""A small checkpoint in a larger shape: the same logits and tokens, slice by slice the same numbers as when written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.scaled_checkpoint import make_directory, open_source, write_weights
from benchmarks.scaled_shapes import PRESETS, Shape, doubled, plan_of, scaled_config
from pearl_ray import env
from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.core.params import SamplingParams
from pearl_ray.model import source as sources
from pearl_ray.model.batching import Entry
from pearl_ray.model.config import ModelConfig, from_hf_config
from pearl_ray.model.embedded import TARGET_FILE, embedded_draft
from pearl_ray.model.loading import load_model
from pearl_ray.model.runner import ModelRunner
from pearl_ray.model.source import expected_names, num_parameters
from pearl_ray.model.tokenizer import load_tokenizer
from tests.local_engine import LocalEngine
from tests.thread_group import ThreadGroup, on_ranks
from tests.tiny import hf_config, tiny_pair

Dirs = tuple[Path, Path]

# 9 query heads over 3 KV heads, of width 8, go into:
ODD = Shape(  # groups of 2, so that each KV head is there twice; pairs spread by 2 in heads of no multiple of 8
    hidden_size=112,  # Hugging Face wants a multiple of the heads
    intermediate_size=131,
    num_layers=3,
    num_heads=16,
    num_kv_heads=8,
    head_dim=20,
    vocab_size=64,
    tie_word_embeddings=False,
)
WIDE = replace(ODD, num_heads=20, num_kv_heads=4, head_dim=16, num_layers=1, vocab_size=150)  # groups of 5
SHAPES = {"doubled": None, "odd": ODD, "wide": WIDE}


def shape_of(name: str, config: ModelConfig) -> Shape:
    return SHAPES[name] or doubled(config)


def own(directory: Path) -> str:
    return f"benchmarks.scaled_checkpoint:open_source:{directory}"


def logits(model: str | Path, tokens: Sequence[int], *, tp: int = 1, dtype: str = "float32") -> torch.Tensor:
    """Of every token, ``[T, V]``, by the engine's own way to load."""

    def work(group: ThreadGroup) -> torch.Tensor:
        loaded = load_model(
            target_model=str(model),
            draft_model=None,
            cache_dir="",
            role="target",
            rank=group.rank,
            group=group,
            dtype=dtype,
            device=torch.device("cpu"),
            attention_backend="torch",
            block_size=16,
            on_layer_loaded=lambda done, total: None,
        )
        blocks = range(-(-len(tokens) // 16))
        cache = loaded.make_cache(len(blocks), 16)
        runner = ModelRunner(loaded.transformer, cache, group, block_size=16, num_valid=1)
        with torch.inference_mode():
            found = runner.logits([Entry(list(tokens), 0, blocks, len(tokens))])
        assert found is not None
        return found

    return torch.cat(on_ranks(tp, work), dim=-1)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_the_small_models_own(tiny_dirs: Dirs, tmp_path: Path, shape: str, tp: int) -> None:
    tokens = [(7 * i) % 60 + 2 for i in range(40)]
    config = sources.open_source(tiny_dirs[0]).config
    for dtype, tolerance in (("float64", 1e-11), ("float32", 1e-4)):
        make_directory(tmp_path / dtype, tiny_dirs[0], shape_of(shape, config), dtype=dtype)
        expected = logits(tiny_dirs[0], tokens, dtype=dtype)
        found = logits(own(tmp_path / dtype), tokens, tp=tp, dtype=dtype)
        torch.testing.assert_close(found[:, : config.vocab_size], expected, rtol=0, atol=tolerance)
        if shape == "wide":  # ids behind the source's repeat its rows
            torch.testing.assert_close(found[:, 64:128], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rope", [{"type": "linear", "factor": 2.0}, "llama3"])
def test_rope_scaling_and_tied_embeddings_are_kept(tmp_path: Path, rope: object) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {**llama3, "original_max_position_embeddings": 32} if rope == "llama3" else rope
    target, _ = tiny_pair(tmp_path, rope_scaling=scaling, rope_theta=50.0, tie_word_embeddings=True)
    tokens = list(range(2, 42))
    for tied in (True, False):
        made = make_directory(tmp_path / "large", target, replace(ODD, tie_word_embeddings=tied), dtype="float64")
        assert made.config.tie_word_embeddings == tied
        found = logits(own(tmp_path / "large"), tokens, dtype="float64")
        torch.testing.assert_close(found, logits(target, tokens, dtype="float64"), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("target_tp", "draft_tp", "shape"), [(1, 1, "doubled"), (2, 1, "odd"), (2, 2, "doubled")])
def test_an_engine_of_scaled_models_writes_the_small_models_tokens(
    tiny_dirs: Dirs, tmp_path: Path, target_tp: int, draft_tp: int, shape: str
) -> None:
    prompts = [[5, 9, 33, 2, 60], [11, 12, 13]]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=32, ignore_eos=True) for t in (0.0, 0.8)]
    with LocalEngine(tiny_dirs) as engine:
        expected = engine.generate(prompts, params)
    large = []
    for name, small in zip(("target", "draft"), tiny_dirs, strict=True):
        config = sources.open_source(small).config
        make_directory(tmp_path / name, small, shape_of(shape, config), dtype="float64")
        large.append(own(tmp_path / name))
    with LocalEngine((large[0], large[1]), target_tp=target_tp, draft_tp=draft_tp) as engine:  # type: ignore[arg-type]
        found = engine.generate(prompts, params)
        assert engine.models.num_valid == {"target": 64, "draft": 64}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.answers[0].token_ids == theirs.answers[0].token_ids
        assert len(ours.answers[0].token_ids) == 32
        assert ours.answers[0].origins == theirs.answers[0].origins, "the same drafts were accepted"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_made_on_the_fly_is_what_is_written_slice_by_slice(tiny_dirs: Dirs, tmp_path: Path, dtype: str) -> None:
    made = make_directory(tmp_path, tiny_dirs[0], ODD, dtype=dtype)
    write_weights(made, tmp_path, torch.device("cpu"), shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    written, fresh = sources.open_source(tmp_path), open_source(tmp_path)
    assert set(written.names()) == set(fresh.names()) == set(expected_names(made.config))
    assert written.config == fresh.config
    parts = [
        (None, None),
        (slice(3, 50), None),
        (None, slice(7, 90)),
        (slice(40, 77), slice(5, 66)),
        (slice(2, 2), None),
    ]
    for name in written.names():
        assert written.shape(name) == fresh.shape(name) and written.stored_bytes(name) == fresh.stored_bytes(name)
        for rows, cols in parts:
            if len(fresh.shape(name)) == 2 or cols is None:
                ours, theirs = fresh.load(name, rows, cols), written.load(name, rows, cols)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), (name, rows, cols)
                wide = torch.empty(ours.shape, dtype=torch.float64)
                fresh.load_into(name, wide, rows, cols)
                assert torch.equal(wide, theirs.double())


def test_hugging_face_reads_what_is_written(tiny_dirs: Dirs, tmp_path: Path) -> None:
    made = make_directory(tmp_path, tiny_dirs[0], ODD, dtype="float32")
    write_weights(made, tmp_path, torch.device("cpu"))
    tokens = list(range(2, 30))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")(torch.tensor([tokens])).logits[0].detach()
    torch.testing.assert_close(theirs, logits(tiny_dirs[0], tokens), rtol=0, atol=1e-4)
    assert load_tokenizer(tmp_path).tokens == load_tokenizer(tiny_dirs[0]).tokens
    assert load_tokenizer(own(tmp_path)).has_chat_template


def test_little_is_zeros_where_it_need_not_be(tiny_dirs: Dirs, tmp_path: Path) -> None:
    """Time and power of a GPU depend on the data: only what would reach the output is zeros."""
    made = make_directory(tmp_path, tiny_dirs[0], replace(ODD, num_layers=6), dtype="float32")
    for name in made.names():
        zeros = float((made.load(name) == 0).float().mean())
        assert zeros < 0.01 or any(kind in name for kind in ("o_proj", "down_proj", "k_proj", "embed_tokens")), name
    assert float((made.load("model.layers.5.self_attn.k_proj.weight") == 0).float().mean()) < 0.01


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layers", [6, 30])
def test_the_real_pair_fits_in_every_preset(preset: str, layers: int) -> None:
    smollm = {"hidden_size": 576, "intermediate_size": 1536, "head_dim": 64, "tie_word_embeddings": True}
    small = from_hf_config(hf_config(vocab_size=49152, num_hidden_layers=layers, **smollm))
    shape = replace(PRESETS[preset], vocab_size=49152)
    large = from_hf_config(scaled_config(small, shape, "bfloat16"))
    assert (large.hidden_size, large.num_heads, large.head_dim) == (shape.hidden_size, shape.num_heads, shape.head_dim)
    assert large.num_layers == max(shape.num_layers, layers)
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"):
        part = name.replace("_proj", "_proj.weight")
        module = "self_attn" if name[0] in "qkvo" and name != "up_proj" else "mlp"
        plan = plan_of(f"model.layers.{layers - 1}.{module}.{part}", small, large)
        for index in (plan.rows, plan.cols):
            used = index[index >= 0]
            assert set(used.tolist()) == set(range(int(used.max()) + 1)), "every small row and column is there"
        assert plan_of(f"model.layers.{large.num_layers - 1}.{module}.{part}", small, large).source is None or (
            large.num_layers == layers
        )
    queries = plan_of("model.layers.0.self_attn.q_proj.weight", small, large).rows
    assert int((queries >= 0).sum()) == 9 * 64, "each query head once"


def test_the_large_presets_weigh_what_their_names_say(tiny_dirs: Dirs, tmp_path: Path) -> None:
    for preset, low, high in (
        ("qwen3-0.6b", 0.4, 0.7),
        ("llama-8b", 7.0, 8.1),
        ("qwen3-32b", 31, 33),
        ("llama-70b", 68, 71),
    ):
        made = make_directory(tmp_path, tiny_dirs[0], replace(PRESETS[preset], vocab_size=49152))
        assert low < num_parameters(made) / 1e9 < high


def test_what_does_not_fit_is_refused_saying_what(tiny_dirs: Dirs, tmp_path: Path) -> None:
    for shape, named in (
        (replace(ODD, hidden_size=64), "hidden_size=72"),
        (replace(ODD, vocab_size=63), "vocab_size=64"),
        (replace(ODD, num_kv_heads=4, num_heads=8), "9 query heads over 3 KV heads"),
    ):
        with pytest.raises(UnsupportedModelError, match=named):
            make_directory(tmp_path, tiny_dirs[0], shape)
    qwen, _ = tiny_pair(tmp_path / "qwen", "qwen3")
    with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM"):
        make_directory(tmp_path, qwen, ODD)
    with pytest.raises(ModelLoadError, match=r"scaled\.json"):
        sources.open_source(own(tiny_dirs[0]))


def test_a_source_of_ones_own_is_opened_by_its_callable_and_a_wrong_one_is_named(
    tiny_dirs: Dirs, tmp_path: Path
) -> None:
    make_directory(tmp_path, tiny_dirs[0], ODD)
    assert sources.open_source(own(tmp_path)).config.hidden_size == 112
    assert sources.local_path(own(tmp_path)) == tmp_path
    for wrong in ("no.such.module:open_source", "benchmarks.scaled_checkpoint:no_such_callable"):
        with pytest.raises(ModelLoadError, match=wrong) as caught:
            sources.open_source(f"{wrong}:{tmp_path}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelLoadError, match="no such file or directory"):
        sources.open_source("benchmarks.scaled_checkpoint:open_source:/no/such/folder")
    colons = tmp_path / "a:b:c"
    colons.mkdir()
    for file in tiny_dirs[0].iterdir():
        (colons / file.name).write_bytes(file.read_bytes())
    assert sources.open_source(colons).config.hidden_size == 72, "a path that exists is a path"


@pytest.mark.slow
@pytest.mark.skipif(not (env.cache_dir() / TARGET_FILE).is_file(), reason="the embedded target isn't in the cache")
def test_the_embedded_pair_in_a_larger_shape_writes_the_same_greedy_tokens(tmp_path: Path) -> None:
    target = env.cache_dir() / TARGET_FILE
    shape = Shape(
        hidden_size=640,
        intermediate_size=1600,
        num_layers=31,
        num_heads=12,
        num_kv_heads=6,
        head_dim=96,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    make_directory(tmp_path / "target", target, shape, dtype="float32")
    make_directory(tmp_path / "draft", embedded_draft(), replace(shape, num_layers=7), target=target, dtype="float32")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["num_hidden_layers"] == 7
    prompts = [load_tokenizer(target).encode(text) for text in ("The capital of France is", "def fibonacci(n):")]
    params = [SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)] * 2
    texts = []
    for pair in ((target, embedded_draft()), (own(tmp_path / "target"), own(tmp_path / "draft"))):
        with LocalEngine(pair, dtype="float32") as engine:  # type: ignore[arg-type]
            texts.append([request.answers[0].token_ids for request in engine.generate(prompts, params)])
    assert texts[0] == texts[1]

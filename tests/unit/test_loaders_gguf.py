"""Opening GGUF files: values, slices, the row order of queries and keys, config from metadata, broken files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.gguf_file import GGUFFile
from pearl_ray.model.gguf_source import FROM_TARGET_KEY
from pearl_ray.model.source import file_bytes, open_source

QuantType = gguf.GGMLQuantizationType
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 3, 1, 8, 64, 32, 48
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_gate.weight": (MLP, HIDDEN),
    "blk.0.ffn_up.weight": (MLP, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, MLP),
}
LAYER = "model.layers.0"


def values() -> dict[str, np.ndarray]:
    """Random float32 tensors in Hugging Face's row order, by GGUF names."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}


def metadata(architecture: str = "llama", **changes: object) -> dict[str, object]:
    """What llama.cpp's converter writes for the tensors above."""
    keys = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": 1,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
    }
    return {f"{architecture}.{key}": value for key, value in {**keys, **changes}.items()}


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    keys: Mapping[str, object],
    architecture: str = "llama",
    kinds: Mapping[str, QuantType] | None = None,
) -> Path:
    """A GGUF file; a tensor with an entry in ``kinds`` is written as that type, quantised here or bytes already."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            assert isinstance(value, int)
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, QuantType.F32)
        writer.add_tensor(name, tensor if tensor.dtype == np.uint8 else gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute, word for word but for the names."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def as_llama(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors in the row order of a llama GGUF."""
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}
    return {
        n: permute(t, heads[n.rpartition(".")[0]]) if n.rpartition(".")[0] in heads else t for n, t in tensors.items()
    }


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write(tmp_path / "llama.gguf", as_llama(values()), metadata())


def test_a_llama_file_gives_hugging_faces_names_rows_and_config(llama: Path) -> None:
    source, saved = open_source(llama), values()
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": f"{LAYER}.input_layernorm.weight",
        "blk.0.ffn_norm.weight": f"{LAYER}.post_attention_layernorm.weight",
        "blk.0.attn_q.weight": f"{LAYER}.self_attn.q_proj.weight",
        "blk.0.attn_k.weight": f"{LAYER}.self_attn.k_proj.weight",
        "blk.0.attn_v.weight": f"{LAYER}.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": f"{LAYER}.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": f"{LAYER}.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": f"{LAYER}.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": f"{LAYER}.mlp.down_proj.weight",
    }
    assert set(source.names()) == set(names.values())
    for stored, name in names.items():
        assert source.shape(name) == SHAPES[stored]
        assert torch.equal(source.load(name), torch.from_numpy(saved[stored])), name
    config = source.config
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCAB, HIDDEN, MLP)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (1, HEADS, KV_HEADS, HEAD_DIM)
    assert config.rms_norm_eps == 1e-5 and config.rope.theta == 10000.0 and config.rope.rope_type == "default"
    assert config.tie_word_embeddings and not config.qkv_bias and config.max_position_embeddings == 128
    assert config.dtype == "float32"
    assert file_bytes(source) == sum(t.nbytes for t in saved.values())


@pytest.mark.parametrize("rows", [slice(0, 8), slice(8, 24), slice(3, 13), slice(5, 6), slice(7, 7), None])
@pytest.mark.parametrize("cols", [slice(0, 32), slice(5, 40), slice(63, 64), None])
def test_slices_of_query_rows_are_the_slices_of_the_whole(llama: Path, rows: slice | None, cols: slice | None) -> None:
    name, whole = f"{LAYER}.self_attn.q_proj.weight", values()["blk.0.attn_q.weight"]
    part = open_source(llama).load(name, rows, cols)
    expected = torch.from_numpy(whole)[rows or slice(None), cols or slice(None)]
    assert torch.equal(part, expected) and part.is_contiguous()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_each_type_dequantises_as_ggufs_own_code_whole_and_in_parts(tmp_path: Path, kind: str) -> None:
    type_ = QuantType[kind]
    rng = np.random.default_rng(1)
    if kind.endswith("_K"):  # gguf can't quantise these: random blocks, with scales that are numbers
        block_bytes = gguf.GGML_QUANT_SIZES[type_][1]
        blocks = rng.integers(0, 256, (10, 2, block_bytes), dtype=np.uint8)
        scales = blocks[..., -2:] if kind == "Q6_K" else blocks[..., :4]
        scales.view(np.float16)[:] = rng.uniform(0.01, 0.1, scales.view(np.float16).shape)
        raw = blocks.reshape(10, -1)
    else:
        raw = gguf.quantize(rng.standard_normal((10, 512), dtype=np.float32), type_).view(np.uint8).reshape(10, -1)
    stored = raw.view(np.float16) if kind == "F16" else raw
    path = write(tmp_path / "t.gguf", {"t": stored}, {}, kinds={"t": type_})
    expected = torch.from_numpy(gguf.dequantize(stored, type_).astype(np.float32))
    file = GGUFFile(path)
    assert file.tensors["t"].shape == (10, 512) and file.tensors["t"].num_bytes == raw.nbytes
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert file.read("t").dtype == dtype
    for rows, cols in (
        (None, None),
        (slice(2, 7), None),
        (None, slice(40, 300)),
        (slice(9, 10), slice(256, 512)),
        (slice(4, 4), slice(0, 256)),
    ):
        part = file.read("t", rows, cols).float()
        assert torch.equal(part, expected[rows or slice(None), cols or slice(None)]), (rows, cols)


def test_only_the_wanted_rows_and_blocks_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((1000, 512), np.float32)
    path = write(tmp_path / "t.gguf", {"t": rows}, {}, kinds={"t": QuantType.Q4_1})
    seen: list[tuple[int, ...]] = []

    def spy(data: np.ndarray, kind: QuantType) -> np.ndarray:
        seen.append(data.shape)
        return gguf.dequantize(data, kind)

    monkeypatch.setattr("pearl_ray.model.gguf_file.dequantize", spy)
    file = GGUFFile(path)
    file.read("t", slice(10, 13))
    file.read("t", np.array([999, 0]), slice(33, 65))
    assert seen == [(3, 512 // 32 * 20), (2, 2 * 20)]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_are_not_permuted_and_flags_follow_the_tensors(tmp_path: Path, architecture: str) -> None:
    tensors = values()
    if architecture == "qwen2":
        tensors |= {f"blk.0.attn_{n}.bias": np.ones(SHAPES[f"blk.0.attn_{n}.weight"][0], np.float32) for n in "qkv"}
    else:
        tensors |= {f"blk.0.attn_{n}_norm.weight": np.ones(HEAD_DIM, np.float32) for n in "qk"}
    tensors["output.weight"] = np.ones((VOCAB, HIDDEN), np.float32)
    source = open_source(write(tmp_path / "q.gguf", tensors, metadata(architecture), architecture))
    assert source.config.architecture == f"Qwen{architecture[-1]}ForCausalLM"
    assert source.config.qkv_bias == (architecture == "qwen2") and source.config.qk_norm == (architecture == "qwen3")
    assert not source.config.tie_word_embeddings and "lm_head.weight" in source.names()
    q = source.load(f"{LAYER}.self_attn.q_proj.weight", slice(3, 9))
    assert torch.equal(q, torch.from_numpy(tensors["blk.0.attn_q.weight"][3:9]))


def test_query_biases_of_a_llama_file_are_put_in_order_too(tmp_path: Path) -> None:
    bias = {f"blk.0.attn_{n}.bias": np.arange(SHAPES[f"blk.0.attn_{n}.weight"][0], dtype=np.float32) for n in "qkv"}
    source = open_source(write(tmp_path / "b.gguf", as_llama(values() | bias), metadata()))
    assert source.config.qkv_bias
    assert source.load(f"{LAYER}.self_attn.q_proj.bias", slice(3, 13)).tolist() == list(range(3, 13))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_recognised_by_its_divisors(tmp_path: Path, factor: float) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=384, num_attention_heads=3, head_dim=128, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    divisors = (500000.0 ** (-torch.arange(0, 128, 2) / 128) / scaled).numpy().astype(np.float32)
    keys = metadata(
        **{"attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": 128},
        **{"rope.freq_base": 500000.0},
    )
    tensors = values() | {"rope_freqs.weight": divisors}
    num_heads = {"q": 3, "k": 1, "v": 1}
    tensors |= {f"blk.0.attn_{n}.weight": np.zeros((128 * h, HIDDEN), np.float32) for n, h in num_heads.items()}
    rope = open_source(write(tmp_path / "r.gguf", tensors, keys)).config.rope
    assert (rope.rope_type, rope.factor, rope.theta) == ("llama3", factor, 500000.0)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings) == (1.0, 4.0, 8192)
    tensors["rope_freqs.weight"][5] = 3.0
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_source(write(tmp_path / "r2.gguf", tensors, keys))


def test_linear_scaling_is_read_from_the_metadata(tmp_path: Path) -> None:
    keys = metadata(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    rope = open_source(write(tmp_path / "l.gguf", as_llama(values()), keys)).config.rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.dimension_count": 4}, "rotated dimensions"),
        ({"attention.sliding_window": 64}, "sliding-window"),
    ],
)
def test_options_that_are_not_implemented_are_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = write(tmp_path / "o.gguf", as_llama(values()), metadata(**change))
    with pytest.raises(UnsupportedModelError, match=named):
        open_source(path)


def test_other_architectures_tensors_types_and_split_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", values(), metadata("mamba"), "mamba")
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, qwen2, qwen3"):
        open_source(path)
    path = write(tmp_path / "b.gguf", values() | {"blk.0.ssm_a": np.ones(3, np.float32)}, metadata())
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ssm_a"):
        open_source(path)
    raw = np.zeros((2, gguf.GGML_QUANT_SIZES[QuantType.IQ4_XS][1]), np.uint8)
    path = write(tmp_path / "c.gguf", {"t": raw}, {}, kinds={"t": QuantType.IQ4_XS})
    with pytest.raises(UnsupportedModelError, match=r"IQ4_XS.*Q4_1"):
        GGUFFile(path)
    path = write(tmp_path / "d.gguf", values(), {**metadata(), "split.count": 3})
    with pytest.raises(UnsupportedModelError, match="one of 3 parts"):
        open_source(path)


@pytest.mark.parametrize("size", [0, 3, 10, 24, 100, 400, 900, 5000, -40])
def test_a_truncated_file_is_an_error_that_names_it(llama: Path, size: int) -> None:
    llama.write_bytes(llama.read_bytes()[:size])
    with pytest.raises(ModelLoadError) as caught:
        open_source(llama)
    assert str(llama) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [8, 16, 24, 33, 60])
def test_a_corrupt_header_is_an_error_that_names_the_file(llama: Path, position: int) -> None:
    data = bytearray(llama.read_bytes())
    data[position : position + 8] = b"\xff" * 8
    llama.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"llama\.gguf"):
        open_source(llama)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = {n: t for n, t in as_llama(values()).items() if "ffn_up" not in n}
    with pytest.raises(ModelLoadError, match=r"lacks tensors model\.layers\.0\.mlp\.up_proj\.weight"):
        open_source(write(tmp_path / "m.gguf", tensors, metadata()))


def test_a_draft_takes_what_it_leaves_out_from_its_target(tmp_path: Path, llama: Path) -> None:
    own = {n: t for n, t in as_llama(values()).items() if n != "token_embd.weight"}
    keys = {**metadata(vocab_size=VOCAB), FROM_TARGET_KEY: ["token_embd.weight"]}
    draft = write(tmp_path / "draft.gguf", own, keys)
    with pytest.raises(ModelLoadError, match=r"takes model\.embed_tokens\.weight from its target"):
        open_source(draft)
    target = open_source(llama)
    source = open_source(draft, fallback=target)
    assert set(source.names()) == set(target.names()) and source.config.tie_word_embeddings
    name = "model.embed_tokens.weight"
    assert torch.equal(source.load(name, slice(2, 5)), target.load(name, slice(2, 5)))
    assert source.shape(name) == (VOCAB, HIDDEN)
    other = write(tmp_path / "other.gguf", own, {**keys, "llama.vocab_size": VOCAB + 1})
    with pytest.raises(ModelLoadError, match="use the target it was made for"):
        open_source(other, fallback=target)

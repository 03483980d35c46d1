"""Opening Hugging Face directories: only the slice is read, and every broken file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.source import expected_names, file_bytes, num_parameters, open_source

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
Q = "model.layers.1.self_attn.q_proj.weight"


def tensors() -> dict[str, torch.Tensor]:
    """A 2-layer Llama, numbered so that each value is its own."""
    shapes = {"model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
        shapes |= {f"{prefix}.self_attn.{name}.weight": (num, 8) for name, num in rows.items()}
        shapes |= {f"{prefix}.mlp.{n}.weight": (12, 8) for n in ("gate_proj", "up_proj")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (8, 12)}
        shapes |= {f"{prefix}.{n}.weight": (8,) for n in ("input_layernorm", "post_attention_layernorm")}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    everything = tensors()
    names = sorted(everything)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: everything[n] for n in part}, tmp_path / f"part-{i}.safetensors")
        weight_map |= {n: f"part-{i}.safetensors" for n in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("layout", ["model", "sharded"])
def test_every_tensor_and_every_slice_is_the_one_saved(layout: str, request: pytest.FixtureRequest) -> None:
    source = open_source(request.getfixturevalue(layout))
    everything = tensors()
    assert set(source.names()) == set(everything) == set(expected_names(source.config))
    for name, tensor in everything.items():
        assert source.shape(name) == tuple(tensor.shape)
        loaded = source.load(name)
        assert loaded.dtype == torch.bfloat16 and torch.equal(loaded, tensor)
    part = source.load(Q, slice(2, 7), slice(3, 5))
    assert torch.equal(part, everything[Q][2:7, 3:5]) and part.is_contiguous()
    assert torch.equal(source.load(Q, cols=slice(0, 3)), everything[Q][:, :3])
    assert torch.equal(source.load("model.norm.weight", slice(1, 4)), everything["model.norm.weight"][1:4])
    assert source.load(Q, slice(3, 3)).shape == (0, 8)
    assert num_parameters(source) == sum(t.numel() for t in everything.values())
    assert file_bytes(source) == 2 * num_parameters(source)


def test_the_generation_configs_eos_tokens_count(model: Path) -> None:
    assert open_source(model).config.eos_token_ids == (2,)
    (model / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert open_source(model).config.eos_token_ids == (5, 2)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def overwrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def lose_a_tensor(folder: Path) -> None:
    save_file({n: t for n, t in tensors().items() if n != Q}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove("config.json"), "config.json"),
        (overwrite("config.json", "{"), "config.json"),
        (overwrite("config.json", "[]"), "config.json"),
        (remove("model.safetensors"), "model.safetensors"),
        (truncate("model.safetensors", 4), "model.safetensors"),
        (truncate("model.safetensors", 500), "model.safetensors"),
        (truncate("model.safetensors", 3000), "model.safetensors"),
        (overwrite("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "model.safetensors"),
        (lose_a_tensor, Q),
    ],
)
def test_a_broken_directory_is_an_error_of_one_line_that_names_the_file(
    model: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(model)
    with pytest.raises(ModelLoadError) as caught:
        open_source(model)
    assert named in str(caught.value) and str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_shards_are_named(sharded: Path) -> None:
    (sharded / "part-1.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"part-1\.safetensors"):
        open_source(sharded)


def test_a_shard_without_the_tensor_of_the_index_is_named(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = "part-0.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"part-0\.safetensors: lacks tensor model\.extra\.weight"):
        open_source(sharded)


def test_asking_for_an_unknown_tensor_names_it(model: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.layers\.9\.mlp"):
        open_source(model).load("model.layers.9.mlp.up_proj.weight")


def test_an_unknown_architecture_is_refused(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        open_source(model)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "missing.gguf", "a/b/c", "plain"])
def test_a_path_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such file or directory") as caught:
        open_source(name)
    assert name in str(caught.value)


def test_a_hub_name_that_is_not_cached_says_so_when_offline() -> None:
    with pytest.raises(ModelLoadError, match="offline") as caught:
        open_source("nobody-of-that-name/no-model", offline=True)
    assert "nobody-of-that-name/no-model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"0")
    with pytest.raises(ModelLoadError, match=r"neither a directory nor a \.gguf file"):
        open_source(tmp_path / "weights.bin")

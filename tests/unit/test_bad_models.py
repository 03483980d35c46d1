"""What is wrong with a model is said in one line that names it, with exit code 2, before any Ray is started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pearl_ray.actors.bringup import _check_memory, _num_blocks
from pearl_ray.actors.spec import ShardInfo
from pearl_ray.cli import cli
from pearl_ray.cluster.devices import DeviceKey
from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import OutOfMemoryError
from pearl_ray.deployment import _spec, check_models
from pearl_ray.model.memory import Measured, ShardUsage

Dirs = tuple[Path, Path]


@pytest.fixture
def pair(tiny_dirs: Dirs, tmp_path: Path) -> Dirs:
    """A copy of the tiny pair, to be broken."""
    return tuple(Path(shutil.copytree(source, tmp_path / source.name)) for source in tiny_dirs)  # type: ignore


def complaint(pair: Dirs, *options: str) -> str:
    """The one line of `generate` with this pair."""
    models = ["--target-model", str(pair[0]), "--draft-model", str(pair[1])]
    result = CliRunner().invoke(cli, ["generate", "hello", *models, *options])
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 2 and len(lines) == 1, (result.exit_code, result.output, result.stderr)
    return lines[0]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_model_is_named(pair):
    assert "/nowhere/model" in complaint((Path("/nowhere/model"), pair[1]))


def test_an_unsupported_architecture_is_refused_naming_the_supported_ones(pair):
    edit(pair[0] / "config.json", architectures=["MambaForCausalLM"], model_type="mamba")
    said = complaint(pair)
    assert "Mamba" in said and "LlamaForCausalLM" in said and "Qwen3ForCausalLM" in said


def test_a_missing_and_a_truncated_weight_file_are_named(pair):
    weights = pair[0] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "model.safetensors" in complaint(pair)
    weights.unlink()
    assert "safetensors" in complaint(pair)


def test_a_corrupt_gguf_file_is_named(pair, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    assert "broken.gguf" in complaint((broken, pair[1]))


def test_different_vocabularies_are_refused_saying_where(pair):
    tokenizer = pair[1] / "tokenizer.json"
    parsed = json.loads(tokenizer.read_text())
    vocab = parsed["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizer.write_text(json.dumps(parsed))
    assert "token 10" in complaint(pair)


def test_shards_and_lengths_that_the_model_cannot_have_are_refused(pair):
    assert "10" in complaint(pair, "--target-tp", "10")
    assert "32768" in complaint(pair, "--max-model-len", "40000")


def test_nothing_of_this_started_ray(pair):
    complaint((Path("/nowhere/model"), pair[1]))
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()


def shard(role: str, free_bytes: int) -> ShardInfo:
    return ShardInfo(
        role=role, rank=0, key=DeviceKey("n", None), ip="10.0.0.1", pid=1, device="cpu", free_bytes=free_bytes
    )


def test_too_little_memory_says_how_much_is_needed_and_free(pair, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2.0})
    config = PearlConfig(target_model=str(pair[0]), draft_model=str(pair[1]), dtype="float64")
    models = check_models(config)
    spec = _spec(config, "x", models)
    infos = {(role, 0): shard(role, 100_000) for role in ("draft", "target")}
    with pytest.raises(OutOfMemoryError, match=r"the weights need .* GiB as float64 and .* has .* GiB free"):
        _check_memory(spec, models, infos)
    usage = ShardUsage(temporary_bytes=0, graph_bytes=0, bytes_per_block=1 << 20)
    found = {key: Measured(total_bytes=1 << 30, used_bytes=0, shard=usage) for key in infos}
    with pytest.raises(OutOfMemoryError, match=r"=8192 needs 1024 MiB on the cpu .* 256 MiB .* to 2048 or"):
        _num_blocks(spec, infos, found, 8192)

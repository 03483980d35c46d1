"""What loading costs beside the model itself: bytes read from files, and host memory held at the worst moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pearl_ray.kernels.backend import choose_attention
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.safetensors_source import SafetensorsSource
from pearl_ray.model.sharding import Shard, ShardPlan
from pearl_ray.model.source import expected_names, open_source
from pearl_ray.model.transformer import Transformer
from tests.thread_group import ThreadGroup, on_ranks
from tests.tiny import hf_config, in_memory_source
from tests.unit.test_loaders_gguf import metadata, write

MIB = 1 << 20
BIG = {  # 88 MB in bfloat16, in which no tensor is larger than 8 MB
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "torch_dtype": "bfloat16",
}
NUM_FILES = 4

# Loads a model and prints by how many bytes the process's peak grew, and what the weights take.
CHILD = """
import sys, torch
from pathlib import Path
from pearl_ray.core.comm import SingleGroup
from pearl_ray.kernels.backend import choose_attention
from pearl_ray.model.sharding import ShardPlan
from pearl_ray.model.source import num_parameters, open_source
from pearl_ray.model.transformer import Transformer

def load(path, dtype):
    source = open_source(path)
    return source, Transformer(
        source.config, ShardPlan.make(source.config, 1), 0, source, dtype=dtype, device="cpu",
        group=SingleGroup(), attention=choose_attention("torch", "cpu"),
    )

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

dtype = getattr(torch, sys.argv[2])
load(sys.argv[3], dtype)  # what importing and first calls take is no part of it
before = peak()
source, model = load(sys.argv[1], dtype)
print(peak() - before, num_parameters(source) * dtype.itemsize)
"""


def write_checkpoint(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor], num_files: int) -> Path:
    folder.mkdir()
    names, weight_map = sorted(weights), {}
    for index in range(num_files):
        mine = names[index::num_files]
        save_file({name: weights[name] for name in mine}, folder / f"part-{index}.safetensors")
        weight_map |= dict.fromkeys(mine, f"part-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tiny(folder: Path, num_files: int) -> Path:
    weights = {name: value.bfloat16() for name, value in in_memory_source().tensors.items()}
    return write_checkpoint(folder, hf_config(torch_dtype="bfloat16"), weights, num_files)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 88 MB in four files, and a tiny one."""
    folder, config = tmp_path_factory.mktemp("checkpoints"), hf_config(**BIG)  # type: ignore[arg-type]
    with torch.device("meta"):
        shapes = {name: like.shape for name, like in LlamaForCausalLM(LlamaConfig(**config)).state_dict().items()}
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return write_checkpoint(folder / "big", config, zeros, NUM_FILES), write_tiny(folder / "tiny", 2)


def growth(path: Path, dtype: str, tiny: Path) -> tuple[int, int]:
    """Bytes by which a fresh process grew at the most, and bytes of the weights in it."""
    command = [sys.executable, "-c", CHILD, str(path), dtype, str(tiny)]
    # From 1 MiB on, allocations are given back to the system when freed, as those of real models' tensors are. And one
    # thread: the memory of each core's own would count too, of which machines have from 2 to hundreds.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    grown, weights = map(int, done.stdout.split())
    return grown, weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_beside_the_model_the_host_holds_less_than_the_largest_file(checkpoints: tuple[Path, Path], dtype: str) -> None:
    big, tiny = checkpoints
    largest = max(path.stat().st_size for path in big.glob("*.safetensors"))
    grown, weights = growth(big, dtype, tiny)
    print(f"{dtype}: grew by {grown / MIB:.1f} MiB, weights {weights / MIB:.1f}, largest file {largest / MIB:.1f}")
    assert 20 * MIB < largest < 32 * MIB and weights > 80 * MIB
    assert grown <= weights + 1.2 * largest


def test_a_gguf_file_is_dequantised_piece_by_piece(tmp_path: Path) -> None:
    paths = []
    for name, (hidden, columns, vocab, layers) in {"tiny": (64, 64, 64, 1), "big": (512, 2048, 8192, 6)}.items():
        shapes = {
            "token_embd.weight": (vocab, hidden),
            "output.weight": (vocab, hidden),
            "output_norm.weight": (hidden,),
        }
        for i in range(layers):
            shapes |= {f"blk.{i}.{n}.weight": (hidden,) for n in ("attn_norm", "ffn_norm")}
            shapes |= {f"blk.{i}.attn_{n}.weight": (hidden, hidden) for n in ("q", "k", "v", "output")}
            shapes |= {f"blk.{i}.ffn_{n}.weight": (columns, hidden) for n in ("gate", "up")}
            shapes |= {f"blk.{i}.ffn_down.weight": (hidden, columns)}
        kind = gguf.GGMLQuantizationType.Q8_0
        values = {n: np.ones(s, np.float32) for n, s in shapes.items()}
        heads = {"attention.head_count": hidden // 64, "attention.head_count_kv": hidden // 64}
        widths = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), 64)
        sizes = {"embedding_length": hidden, "feed_forward_length": columns, "block_count": layers}
        keys = metadata(**sizes, **heads, **widths)
        kinds = {n: kind for n, s in shapes.items() if len(s) == 2}
        paths.append(write(tmp_path / f"{name}.gguf", values, keys, kinds=kinds))
    grown, weights = growth(paths[1], "bfloat16", paths[0])
    largest = paths[1].stat().st_size
    print(f"gguf: grew by {grown / MIB:.1f} MiB, weights {weights / MIB:.1f}, file {largest / MIB:.1f}")
    assert weights > 50 * MIB and grown <= weights + 1.2 * largest


def rank_elements(config: ModelConfig, shard: Shard) -> int:
    """Numbers in one rank's part of the weights."""
    d, width = config.hidden_size, config.head_dim
    layer = d * width * (2 * len(shard.q_heads) + 2 * len(shard.kv_heads)) + 3 * d * len(shard.intermediate) + 2 * d
    return 2 * len(shard.vocab) * d + config.num_layers * layer + d


def bytes_read_by_the_thread() -> int:
    """By this one: those of other tests may still read from their sockets."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


@pytest.mark.parametrize("tp", [1, 2, 7])
def test_a_rank_reads_its_own_part_of_the_files_and_nothing_else(checkpoints: tuple[Path, Path], tp: int) -> None:
    source = SafetensorsSource(checkpoints[1])
    plan = ShardPlan.make(source.config, tp)

    def work(group: ThreadGroup) -> int:
        own = SafetensorsSource(checkpoints[1])
        Transformer(
            own.config,
            plan,
            group.rank,
            own,
            dtype=torch.float32,
            device="cpu",
            group=group,
            attention=choose_attention("torch", "cpu"),
        )
        return own.bytes_read

    expected = [2 * rank_elements(source.config, shard) for shard in plan.shards]
    assert on_ranks(tp, work) == expected
    if tp == 1:
        assert sum(expected) == sum(source.stored_bytes(name) for name in source.names())


def test_the_count_of_bytes_read_is_the_systems(checkpoints: tuple[Path, Path]) -> None:
    SafetensorsSource(checkpoints[1]).load("lm_head.weight", slice(0, 9), slice(0, 9))  # what it imports is read now
    source = SafetensorsSource(checkpoints[0])
    before = bytes_read_by_the_thread()
    for name in source.names():
        if "proj" in name:
            source.load(name, slice(0, 100), slice(10, 50))
    counted = bytes_read_by_the_thread() - before
    assert source.bytes_read == 9 * 7 * 100 * 40 * 2
    assert 0 <= counted - source.bytes_read < 4096, "nothing but the slices was read"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "cols"), [(None, None), (slice(5, 61), None), (slice(3, 9), slice(7, 50))])
def test_filling_a_destination_gives_the_slice_in_its_dtype(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: slice, cols: slice
) -> None:
    monkeypatch.setattr("pearl_ray.model.weight_file.STAGING_BYTES", 1000)  # several pieces, also of a tiny tensor
    source = SafetensorsSource(checkpoints[1])
    expected = {n: t.bfloat16() for n, t in in_memory_source().tensors.items()}
    for name in expected_names(source.config):
        if cols is None or expected[name].dim() == 2:
            part = expected[name][rows or slice(None)]
            part = part if cols is None else part[:, cols]
            padded = torch.full((part.shape[0] + 2, *part.shape[1:]), 7.0, dtype=dtype)
            source.load_into(name, padded[1:-1], rows, cols)
            assert torch.equal(padded[1:-1], part.to(dtype)), name
            assert bool((padded[[0, -1]] == 7.0).all()), "and nothing beside it is written"


def test_a_file_that_breaks_off_while_it_is_read_is_named(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", 1)
    source = open_source(folder)
    path = folder / "part-0.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(Exception, match=r"part-0\.safetensors: breaks off in tensor") as caught:
        for name in source.names():
            source.load(name)
    assert type(caught.value).__name__ == "ModelLoadError"

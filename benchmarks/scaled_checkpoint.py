"""A small Llama checkpoint in a larger Llama shape that computes the same function: real tokens, a large model's cost.

    python -m benchmarks.scaled_checkpoint --source embedded-target --preset qwen3-32b --output DIR [--write]
    pearl-ray serve --target-model benchmarks.scaled_checkpoint:open_source:DIR

Without ``--write``, DIR holds config, tokenizer and ``scaled.json``, and the weights are made on the device as the
engine asks for them: nothing of their size passes a disk. With it, DIR is a safetensors checkpoint for any engine.
How the one lies in the other: ``scaled_shapes.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.scaled_shapes import PRESETS, Shape, doubled, plan_of, scaled_config
from pearl_ray import env
from pearl_ray.core.errors import ModelLoadError
from pearl_ray.model import source as sources
from pearl_ray.model.config import ModelConfig, from_hf_config
from pearl_ray.model.embedded import embedded_draft, embedded_target
from pearl_ray.model.loading import DTYPES
from pearl_ray.model.safetensors_source import generation_eos, read_json
from pearl_ray.model.source import WeightSource, expected_names, num_parameters, part_shape
from pearl_ray.model.tokenizer import load_tokenizer, takes_vocabulary_from_target

SIDECAR = "scaled.json"
SHARD_BYTES = 2 << 30
NOISE_STD = 0.02
_TABLE = 1 << 22  # noise numbers; every row is a stretch of them
_NOISE_PIECE = 8 << 20  # numbers made at a time


class ScaledSource:
    """A ``WeightSource`` (see ``pearl_ray/model/source.py``) that makes its tensors when asked, where asked.

    Every number depends on its tensor's name and its place alone: slices are slices of the whole, on any device.
    """

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        self.config = config
        self._source = source
        self._dtype = DTYPES[config.dtype]
        self._names = tuple(expected_names(config))
        self._tables: dict[torch.device, torch.Tensor] = {}

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        plan = plan_of(name, self._source.config, self.config)
        return (len(plan.rows),) if name.endswith("norm.weight") else (len(plan.rows), len(plan.cols))

    def stored_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self._dtype.itemsize

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        out = torch.empty(part_shape(self.shape(name), rows, cols), dtype=self._dtype)
        self.load_into(name, out, rows, cols)
        return out

    def load_into(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None) -> None:
        plan = plan_of(name, self._source.config, self.config)
        out_RC = out if out.dim() == 2 else out[:, None]
        rows, cols = rows or slice(None), cols or slice(None)
        if plan.noisy:
            self._fill_with_noise(
                out_RC, name, len(plan.cols), range(len(plan.rows))[rows], range(len(plan.cols))[cols]
            )
        else:
            out_RC.zero_()
        if plan.zero_rows is not None:
            out_RC.masked_fill_(plan.zero_rows[rows].to(out.device)[:, None], 0)
        if plan.source is None:
            return
        from_R, from_C = plan.rows[rows], plan.cols[cols]
        to_R, to_C = (from_R >= 0).nonzero()[:, 0], (from_C >= 0).nonzero()[:, 0]
        if len(to_R) and len(to_C):
            small = self._source.load(plan.source).to(out.device)
            small = small if small.dim() == 2 else small[:, None]
            part = small[from_R[to_R].to(out.device)][:, from_C[to_C].to(out.device)]
            values = (part.double() * plan.scale).to(self._dtype).to(out.dtype)
            out_RC[to_R.to(out.device)[:, None], to_C.to(out.device)[None, :]] = values

    def _fill_with_noise(self, out_RC: torch.Tensor, name: str, width: int, rows: range, cols: range) -> None:
        device = out_RC.device
        if device not in self._tables:
            table = torch.randn(_TABLE, generator=torch.Generator().manual_seed(0)) * NOISE_STD
            self._tables[device] = table.to(device, self._dtype)
        column_C = torch.arange(cols.start, cols.stop, device=device)
        step = max(1, _NOISE_PIECE // max(len(cols), 1))
        for first in range(0, len(rows), step):
            row_P = torch.arange(rows.start + first, min(rows.start + first + step, rows.stop), device=device)
            start_P = (row_P * 2654435761 + zlib.crc32(name.encode())) % (_TABLE - width)
            out_RC[first : first + step] = self._tables[device][start_P[:, None] + column_C[None, :]]


def open_source(directory: Path, *, fallback: WeightSource | None = None) -> ScaledSource:
    """What pearl-ray opens ``benchmarks.scaled_checkpoint:open_source:DIR`` with.

    ``fallback`` is not used: a draft in a larger shape takes its embedding from the small target, named beside it.

    Raises:
        ModelLoadError: the directory isn't one of ours, or its source can't be opened.
    """
    if not (directory / SIDECAR).is_file():
        raise ModelLoadError(f"{directory}: there is no {SIDECAR}; see python -m benchmarks.scaled_checkpoint --help")
    said = read_json(directory / SIDECAR)
    config = from_hf_config(read_json(directory / "config.json"))
    config = replace(config, eos_token_ids=generation_eos(directory) or config.eos_token_ids)
    return ScaledSource(_small(str(said["source"]), said.get("target")), config)


def _small(source: str, target: object) -> WeightSource:
    return sources.open_source(source, fallback=None if target is None else sources.open_source(str(target)))


def make_directory(
    output: Path,
    source: str | Path,
    shape: Shape,
    *,
    target: str | Path | None = None,
    dtype: str = "bfloat16",
    context: int | None = None,
) -> ScaledSource:
    """Write config, tokenizer and ``scaled.json``; returns the source that they describe.

    Args:
        source: the small checkpoint; ``target``: whose embedding and tokenizer it takes, for a draft without.
        context: longest sequence in tokens; beyond the source's own the text means less, the cost is the same.
    """
    small = _small(str(source), target)
    output.mkdir(parents=True, exist_ok=True)
    config = scaled_config(small.config, shape, dtype)
    if context is not None:
        config["max_position_embeddings"] = context
    (output / "config.json").write_text(json.dumps(config, indent=2))
    from_target = takes_vocabulary_from_target(source)
    assert target is not None or not from_target
    tokenizer = load_tokenizer(str(target) if from_target else source)
    tokenizer.hugging_face.save_pretrained(output)
    ids = {"bos_token_id": small.config.bos_token_id, "eos_token_id": list(small.config.eos_token_ids)}
    (output / "generation_config.json").write_text(json.dumps(ids, indent=2))
    said = {"source": str(Path(source).resolve()), "target": None if target is None else str(Path(target).resolve())}
    (output / SIDECAR).write_text(json.dumps(said, indent=2))
    return open_source(output)


def write_weights(source: ScaledSource, output: Path, device: torch.device, shard_bytes: int = SHARD_BYTES) -> None:
    """The tensors as safetensors files of at most ``shard_bytes`` (one tensor at least) and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    total = held = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], output / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name in source.names():
        if shards[-1] and held + source.stored_bytes(name) > shard_bytes:
            flush()
            shards.append({})
            held = 0
        tensor = torch.empty(source.shape(name), dtype=DTYPES[source.config.dtype], device=device)
        source.load_into(name, tensor)
        shards[-1][name] = tensor.cpu()
        held += source.stored_bytes(name)
        total += source.stored_bytes(name)
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed a small Llama checkpoint in a larger Llama shape.")
    parser.add_argument("--source", default="embedded-target", help="directory, .gguf, embedded-target, embedded-draft")
    parser.add_argument("--target", help="for a draft that takes its embedding from its target: the small target")
    parser.add_argument("--preset", choices=[*PRESETS, "doubled"], required=True)
    parser.add_argument(
        "--vocab", choices=["source", "preset"], default="source", help="preset: the source's rows repeated"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--context", type=int, help="longest sequence, in tokens  [default: the source's]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write the weights too, as safetensors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where they are made")
    options = parser.parse_args()
    source, target = options.source, options.target
    if source.startswith("embedded-"):
        base = embedded_target(env.cache_dir())
        source, target = (base, None) if source == "embedded-target" else (embedded_draft(), base)
    config = _small(str(source), target).config
    shape = doubled(config) if options.preset == "doubled" else PRESETS[options.preset]
    if options.vocab == "source":
        shape = replace(shape, vocab_size=config.vocab_size)
    began = time.monotonic()
    made = make_directory(options.output, source, shape, target=target, dtype=options.dtype, context=options.context)
    if options.write:
        write_weights(made, options.output, torch.device(options.device))
    numbers = num_parameters(made)
    print(f"{made.config.num_layers} layers, {numbers / 1e9:.2f} G parameters,", end=" ")
    print(f"{numbers * DTYPES[options.dtype].itemsize / 1e9:.1f} GB, {time.monotonic() - began:.1f} s")
    print(options.output if options.write else f"benchmarks.scaled_checkpoint:open_source:{options.output}")


if __name__ == "__main__":
    main()

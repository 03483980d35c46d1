"""Weights out of a Hugging Face directory: ``config.json`` and one safetensors file, or an index of several.

Reads slices with plain file reads, a bounded piece at a time (``weight_file.py``), so that neither a memory map's pages
nor whole tensors count against the host. Knows neither GGUF nor the Hub nor tokenizers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.config import ModelConfig, from_hf_config
from pearl_ray.model.weight_file import ReadBuffer, StoredTensor, WeightFile

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsSource:
    """One directory as a ``WeightSource``; see ``source.py`` for the methods.

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt, or a shard lacks a tensor of the index; names it.
        UnsupportedModelError: the architecture, or an option of it, isn't implemented.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.config = _config(directory)
        self._files = [WeightFile(path) for path in _weight_files(directory)]
        self._homes = {name: file for file in self._files for name in file.tensors}
        self._staging = ReadBuffer()
        for name, shard in _index(directory).items():
            if name not in self._homes:
                raise ModelLoadError(f"{directory / shard}: lacks tensor {name}, which {_INDEX} places there")

    @property
    def bytes_read(self) -> int:
        """Of tensor data, from all files together, since they were opened."""
        return sum(file.bytes_read for file in self._files)

    def names(self) -> Collection[str]:
        return self._homes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def stored_bytes(self, name: str) -> int:
        self._dtype(name)
        return self._entry(name).num_bytes

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        return self._home(name).read(name, self._dtype(name), rows, cols)

    def load_into(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None) -> None:
        self._home(name).read_into(name, self._dtype(name), out, self._staging, rows, cols)

    def _entry(self, name: str) -> StoredTensor:
        return self._home(name).tensors[name]

    def _dtype(self, name: str) -> torch.dtype:
        kind = self._entry(name).kind
        if kind not in _DTYPES:
            supported = ", ".join(_DTYPES)
            raise UnsupportedModelError(f"{self._homes[name].path}: {name} has type {kind}; supported: {supported}")
        return _DTYPES[kind]

    def _home(self, name: str) -> WeightFile:
        if name not in self._homes:
            raise ModelLoadError(f"{self.path}: there is no tensor {name} in its safetensors files")
        return self._homes[name]


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _INDEX).is_file():
        paths = [directory / shard for shard in sorted(set(_index(directory).values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelLoadError(f"{directory}: {', '.join(missing)} of {_INDEX} missing; fetch the model again")
        return paths
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ModelLoadError(f"{directory}: there is no {_SINGLE}; only safetensors weights (or a .gguf file) are read")
    return paths


def _index(directory: Path) -> Mapping[str, str]:
    if not (directory / _INDEX).is_file():
        return {}
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelLoadError(f"{directory / _INDEX}: corrupt: there is no weight_map in it")
    return weight_map


def _config(directory: Path) -> ModelConfig:
    if not (directory / "config.json").is_file():
        raise ModelLoadError(f"{directory}: there is no config.json; a Hugging Face model directory is needed")
    config = from_hf_config(read_json(directory / "config.json"))
    eos = generation_eos(directory)
    return dataclasses.replace(config, eos_token_ids=eos) if eos else config


def generation_eos(directory: Path) -> tuple[int, ...]:
    """The ids of ``generation_config.json``, which Hugging Face's generate prefers to the config's; often more."""
    path = directory / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else ()


def read_json(path: Path) -> dict[str, object]:
    """One JSON object of a file; a ModelLoadError that names the file where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: holds no JSON object")
    return value

"""Weights out of a Hugging Face directory: ``config.json`` and one safetensors file, or an index of several.

Reads slices through safetensors' memory map. Knows neither GGUF nor the Hub nor tokenizers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError
from pearl_ray.model.config import ModelConfig, from_hf_config

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsSource:
    """One directory as a ``WeightSource``; see ``source.py`` for the methods.

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt, or a shard lacks a tensor of the index; names it.
        UnsupportedModelError: the architecture, or an option of it, isn't implemented.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self.config = _config(directory)
        self._files = {path: _opened(path) for path in _weight_files(directory)}
        self._homes = {
            name: path
            for path, file in self._files.items()
            for name in file.keys()  # type: ignore[no-untyped-call]  # noqa: SIM118 - it is no mapping
        }
        for name, shard in _index(directory).items():
            if name not in self._homes:
                raise ModelLoadError(f"{directory / shard}: lacks tensor {name}, which {_INDEX} places there")

    def names(self) -> Collection[str]:
        return self._homes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def stored_bytes(self, name: str) -> int:
        kind = self._slice(name).get_dtype()
        if kind not in _DTYPES:
            supported = ", ".join(_DTYPES)
            raise UnsupportedModelError(f"{self._homes[name]}: {name} has type {kind}; supported: {supported}")
        return math.prod(self.shape(name)) * _DTYPES[kind]

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        part = self._slice(name)
        try:
            values: torch.Tensor = part[:] if cols is None and rows is None else part[_index_of(rows, cols)]
        except SafetensorError as error:
            raise ModelLoadError(f"{self._homes[name]}: cannot read tensor {name} ({error})") from error
        return values.contiguous()

    def _slice(self, name: str):  # type: ignore[no-untyped-def]  # safetensors has no public type for it
        if name not in self._homes:
            raise ModelLoadError(f"{self.path}: there is no tensor {name} in its safetensors files")
        return self._files[self._homes[name]].get_slice(name)  # type: ignore[no-untyped-call]


def _index_of(rows: slice | None, cols: slice | None) -> slice | tuple[slice, slice]:
    rows = slice(None) if rows is None else rows
    return rows if cols is None else (rows, cols)


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


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again") from error


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

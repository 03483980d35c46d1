"""A GGUF file: its metadata, and rows of its tensors. Knows the container and no model, tokenizer or device.

The header is parsed here rather than by ``gguf.GGUFReader``, which makes an object per token and merge (3 s for a
49k vocabulary, where this takes 0.2 s) and reports a short file as an index error. Dequantisation is that package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pearl_ray.core.errors import ModelLoadError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}  # NumPy has no bfloat16: its bits
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

Value = int | float | bool | str | list[str] | np.ndarray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as stored.

    Attributes:
        shape: rows first, as in torch (GGUF stores the reverse).
        kind: the GGML type's name, such as 'Q4_1'.
        offset, num_bytes: its place in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int


class GGUFFile:
    """An opened file; tensor data is mapped into memory, read when asked for, and its pages are given back then.

    Attributes:
        metadata: key to value; arrays of numbers are NumPy arrays, arrays of strings lists.
        tensors: name to its :class:`TensorInfo`, in the file's order.

    Raises:
        ModelLoadError: missing, truncated, corrupt, or no GGUF file of version 2 or 3; names the file.
        UnsupportedModelError: a tensor's type isn't among the supported ones; names both.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = np.frombuffer(self._map, np.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
            raise ModelLoadError(f"{path}: cannot be read ({error})") from error
        try:
            reader = _Header(memoryview(self._data))  # type: ignore[arg-type]
            self.metadata: Mapping[str, Value] = reader.metadata
            self.tensors: Mapping[str, TensorInfo] = reader.tensors
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{path}: {error}") from error
        except (struct.error, ValueError, OverflowError) as error:
            raise ModelLoadError(f"{path}: not a GGUF file, truncated or corrupt ({error})") from error
        for info in self.tensors.values():
            if info.offset + info.num_bytes > len(self._data):
                span = f"ends at byte {info.offset + info.num_bytes} of {len(self._data)}"
                raise ModelLoadError(f"{path}: truncated: tensor {info.name} {span}; fetch the file again")

    def read(self, name: str, rows: slice | np.ndarray | None = None, cols: slice | None = None) -> torch.Tensor:
        """A tensor, or part of it: F32, F16 and BF16 as stored, quantised types as float32. Always a copy.

        Args:
            rows: of the first dimension; a slice, or the indices in the order wanted. Only these rows are read.
            cols: a slice of the second dimension. Only the quantisation blocks that hold it are read.
        """
        info = self.tensors[name]
        try:
            return self._read(info, rows, cols)
        finally:
            self._give_back(info)

    def _give_back(self, info: TensorInfo) -> None:
        """Pages of a map that were read count as this process's own memory until they are given back."""
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.num_bytes - start)

    def _read(self, info: TensorInfo, rows: slice | np.ndarray | None, cols: slice | None) -> torch.Tensor:
        raw = self._data[info.offset : info.offset + info.num_bytes]
        if len(info.shape) == 1:
            assert cols is None, f"{info.name} has one dimension"
            values = _values(raw, info.kind)
            return values if rows is None else values[rows].clone()
        raw = raw.reshape(*info.shape[:-1], -1)
        if rows is not None:
            raw = raw[rows]
        if cols is None:
            return _values(raw, info.kind)
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[info.kind]]
        start, stop, step = cols.indices(info.shape[1])
        assert step == 1, f"column slices have no step: {cols}"
        first, last = start // block, -(-stop // block)
        values = _values(raw[:, first * block_bytes : last * block_bytes], info.kind)
        return values[:, start - first * block : stop - first * block].contiguous()


def _values(raw: np.ndarray, kind: str) -> torch.Tensor:
    """Stored bytes, last dimension contiguous, as numbers."""
    if kind in _PLAIN:
        plain = torch.from_numpy(np.array(raw, order="C").view(_PLAIN[kind]))  # a copy: the map is read-only
        return plain.view(torch.bfloat16) if kind == "BF16" else plain
    if raw.size == 0:  # which gguf's code can't reshape
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        return torch.empty(*raw.shape[:-1], raw.shape[-1] // block_bytes * block)
    values = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[kind])
    return torch.from_numpy(values if values.flags.writeable else values.copy())


class _Header:
    """Parses a file's header into ``metadata`` and ``tensors``; raises ValueError or struct.error where it can't."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 4
        if bytes(data[:4]) != _MAGIC:
            raise ValueError(f"it starts with {bytes(data[:4])!r}, not {_MAGIC!r}")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version}; supported: little-endian, versions 2 and 3")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Value] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        raw = [self._tensor() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: _tensor_info(name, shape, kind, start + offset) for name, shape, kind, offset in raw}

    def _scalar(self, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._data) - self._at:
            raise ValueError(f"{num_bytes} bytes wanted at byte {self._at} of {len(self._data)}")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def _string(self) -> str:
        return str(self._take(self._scalar("Q")), "utf-8")

    def _value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"value type {kind} at byte {self._at}")
        element, count = self._scalar("I"), self._scalar("Q")
        if element in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[element])
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if count > len(self._data):
            raise ValueError(f"an array of {count} elements at byte {self._at}")
        if element != _STRING:
            raise ValueError(f"an array of type {element} at byte {self._at}; supported: numbers and strings")
        return [self._string() for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), self._scalar("I")
        if num_dims > 8:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        dims = [self._scalar("Q") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self._scalar("I"), self._scalar("Q")


def _tensor_info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
    known = {t.value: t.name for t in GGMLQuantizationType}
    type_name = known.get(kind, f"number {kind}")
    if type_name not in _PLAIN and type_name not in _QUANTISED:
        supported = ", ".join((*_PLAIN, *_QUANTISED))
        raise UnsupportedModelError(f"tensor {name} has unsupported type {type_name}; supported: {supported}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"tensor {name} of type {type_name} has shape {shape}; rows are multiples of {block}")
    return TensorInfo(name, shape, type_name, offset, math.prod(shape) // block * block_bytes)

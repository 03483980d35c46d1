"""One safetensors file: its header, and parts of its tensors through plain reads. Knows no model and no directory.

A memory map would count every page read as this process's own, the whole file in the end, and fault it in piece by
piece on network file systems. Here a part is read straight into its destination where that is on the CPU in the stored
dtype, and through a staging buffer of ``STAGING_BYTES`` (pinned for a GPU) where it isn't.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pearl_ray.core.errors import ModelLoadError

STAGING_BYTES = 16 << 20
_LENGTH_BYTES = 8  # the header's length, little-endian, is what a file starts with


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place: ``kind`` is safetensors' name of the dtype, ``offset`` counts from the file's start."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    num_bytes: int


class ReadBuffer:
    """The buffer that parts pass through on their way; made when first used, kept for the next."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """``num_bytes`` of it, uint8, pinned if ``device`` is a GPU; valid until the next call."""
        pinned = device.type == "cuda"
        if len(self._buffer) < num_bytes or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(max(num_bytes, STAGING_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer[:num_bytes]


class WeightFile:
    """An opened file.

    Attributes:
        tensors: what is in it.
        bytes_read: of tensor data so far.

    Raises:
        ModelLoadError: missing, truncated or corrupt; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            with safe_open(path, framework="pt", device="cpu"):  # checks header and size
                pass
            self._file = path.open("rb", buffering=0)
            length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
            header = json.loads(self._file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again") from error
        start = _LENGTH_BYTES + length
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(
                tuple(entry["shape"]),
                entry["dtype"],
                start + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def read(self, name: str, dtype: torch.dtype, rows: slice | None, cols: slice | None) -> torch.Tensor:
        """A part as stored, on the CPU."""
        part = _Part(self.tensors[name], rows, cols)
        out = torch.empty(part.shape, dtype=dtype)
        self._read_rows(name, part, 0, part.num_rows, out)
        return out

    def read_into(
        self,
        name: str,
        dtype: torch.dtype,
        out: torch.Tensor,
        staging: ReadBuffer,
        rows: slice | None = None,
        cols: slice | None = None,
    ) -> None:
        """A part into ``out``, of any device and dtype; ``dtype`` is the stored one."""
        part = _Part(self.tensors[name], rows, cols)
        assert tuple(out.shape) == part.shape, f"{name}: {tuple(out.shape)} for {part.shape}"
        if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous():
            self._read_rows(name, part, 0, part.num_rows, out)
            return
        step = max(1, STAGING_BYTES // max(part.row_bytes, 1))
        for first in range(0, part.num_rows, step):
            last = min(first + step, part.num_rows)
            piece = staging.take((last - first) * part.row_bytes, out.device).view(dtype)
            self._read_rows(name, part, first, last, piece)
            out[first:last].copy_(piece.view(out[first:last].shape))

    def _read_rows(self, name: str, part: _Part, first: int, last: int, out: torch.Tensor) -> None:
        """Rows ``first`` to ``last`` of the part into contiguous CPU memory."""
        if out.numel() == 0:
            return
        target = out.view(-1).view(torch.uint8).numpy().data
        at = 0
        for offset, num_bytes in part.spans(first, last):
            self._read_span(name, offset, target[at : at + num_bytes])
            at += num_bytes
        assert at == len(target)

    def _read_span(self, name: str, offset: int, target: memoryview) -> None:
        done = 0
        while done < len(target):  # Linux reads at most 2 GiB at a time
            try:
                count = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            except OSError as error:
                raise ModelLoadError(f"{self.path}: cannot read tensor {name} ({error})") from error
            if count == 0:
                raise ModelLoadError(f"{self.path}: breaks off in tensor {name}; fetch it again")
            done += count
        self.bytes_read += done


class _Part:
    """Which bytes of a file some rows and columns of a tensor are."""

    def __init__(self, stored: StoredTensor, rows: slice | None, cols: slice | None) -> None:
        height, *inner = stored.shape or (1,)
        item = stored.num_bytes // max(math.prod(stored.shape), 1)
        self._rows = range(height)[rows or slice(None)]
        assert self._rows.step == 1, f"row slices have no step: {rows}"
        self._stride = math.prod(inner) * item
        self._start, self.row_bytes = stored.offset, self._stride
        if cols is not None:
            columns = range(inner[0])[cols]
            assert columns.step == 1 and len(inner) == 1, f"column slices have no step: {cols}"
            self._start += columns.start * item
            self.row_bytes = len(columns) * item
            inner = [len(columns)]
        self.num_rows = len(self._rows)
        self.shape = (self.num_rows, *inner) if stored.shape else ()

    def spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """``(offset, bytes)`` of each contiguous piece, in order."""
        begin = self._start + (self._rows.start + first) * self._stride
        if self.row_bytes == self._stride:
            yield begin, (last - first) * self._stride
            return
        for row in range(last - first):
            yield begin + row * self._stride, self.row_bytes

"""Numbers that a round sends to its device: typed arrays in one buffer, moved in one copy. Knows no rounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_ALIGN = 16


class Staging:
    """Named arrays that exist on the host (pinned where the device is a GPU) and on the device.

    The host writes ``host[name]``, :meth:`upload` moves everything, ``device[name]`` is what kernels read: addresses
    never change, so a CUDA graph may hold them. The host's side may be written again once the device has done the
    copy; whoever waits for a result that came after the copy knows that.

    Attributes:
        host: numpy arrays. device: tensors over the device's copy.
    """

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], type[np.generic]]], device: torch.device) -> None:
        offsets, size = {}, 0
        for name, (shape, kind) in layout.items():
            offsets[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(kind).itemsize // _ALIGN) * _ALIGN
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, torch.Tensor] = {}
        flat = self._host.numpy()
        for name, (shape, kind) in layout.items():
            nbytes = int(np.prod(shape)) * np.dtype(kind).itemsize
            part = slice(offsets[name], offsets[name] + nbytes)
            self.host[name] = flat[part].view(kind).reshape(shape)
            self.device[name] = self._device[part].view(torch.from_numpy(np.zeros(0, kind)).dtype).view(shape)

    def upload(self) -> None:
        """Queue the copy of all arrays on the current stream."""
        self._device.copy_(self._host, non_blocking=True)

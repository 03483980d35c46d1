"""One CUDA graph of what a function launches. Knows neither what it launches nor when it is replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def captured(function: Callable[[], object], pool: object = None) -> torch.cuda.CUDAGraph:
    """Capture on the current stream, which mustn't be the default one; ``pool``: memory shared with other graphs.

    The function must have run before: a capture may neither compile kernels nor make scratch memory.
    """
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # a tensor that is freed during a capture would be part of it
    try:
        # Other threads (health checks) may use the device meanwhile: only this thread's calls are captured.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    return graph

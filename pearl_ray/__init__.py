"""pearl-ray: parallel speculative decoding (PEARL) on Ray actors. Names load when first used, so importing is cheap.

Importing this package, or ``pearl_ray.core``, brings neither Ray nor Triton; ``pearl_ray.PearlEngine`` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pearl_ray.client import connect
    from pearl_ray.config import PearlConfig
    from pearl_ray.core.errors import (
        ConfigError,
        DeploymentNotFoundError,
        EngineDeadError,
        ModelLoadError,
        OutOfMemoryError,
        PearlError,
        PlacementError,
        QueueFullError,
        ReplicaDivergedError,
        RequestRefusedError,
        UnsupportedModelError,
        VocabularyMismatchError,
    )
    from pearl_ray.core.outputs import CompletionOutput, RequestMetrics, RequestOutput, StreamChunk
    from pearl_ray.core.params import SamplingParams, StructuredOutputsParams
    from pearl_ray.engine import PearlEngine

__version__ = "0.1.0"

__all__ = [
    "CompletionOutput",
    "ConfigError",
    "DeploymentNotFoundError",
    "EngineDeadError",
    "ModelLoadError",
    "OutOfMemoryError",
    "PearlConfig",
    "PearlEngine",
    "PearlError",
    "PlacementError",
    "QueueFullError",
    "ReplicaDivergedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestRefusedError",
    "SamplingParams",
    "StreamChunk",
    "StructuredOutputsParams",
    "UnsupportedModelError",
    "VocabularyMismatchError",
    "__version__",
    "connect",
]

_HOMES = {
    "CompletionOutput": "pearl_ray.core.outputs",
    "PearlConfig": "pearl_ray.config",
    "PearlEngine": "pearl_ray.engine",
    "RequestMetrics": "pearl_ray.core.outputs",
    "RequestOutput": "pearl_ray.core.outputs",
    "SamplingParams": "pearl_ray.core.params",
    "StreamChunk": "pearl_ray.core.outputs",
    "StructuredOutputsParams": "pearl_ray.core.params",
    "connect": "pearl_ray.client",
}


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'pearl_ray' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES.get(name, "pearl_ray.core.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

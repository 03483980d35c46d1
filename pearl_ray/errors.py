"""The errors a user can meet, by their public name. They are defined in ``pearl_ray.core.errors``."""

from __future__ import annotations

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

__all__ = [
    "ConfigError",
    "DeploymentNotFoundError",
    "EngineDeadError",
    "ModelLoadError",
    "OutOfMemoryError",
    "PearlError",
    "PlacementError",
    "QueueFullError",
    "ReplicaDivergedError",
    "RequestRefusedError",
    "UnsupportedModelError",
    "VocabularyMismatchError",
]

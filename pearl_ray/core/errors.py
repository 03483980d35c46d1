"""Errors a user can meet. Each message is one line that names what was wrong and what to do about it."""

from __future__ import annotations

_QUOTED_CHARS = 200


def quoted(value: object) -> str:
    """The value as a message shows it: on one line, and only its start where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        text = f"({type(value).__name__} too long to be written)"
    return text if len(text) <= _QUOTED_CHARS else f"{text[: _QUOTED_CHARS - 1]}…"


class PearlError(Exception):
    """Base of all errors that pearl-ray raises on purpose; the CLI prints it as one line and exits with 2."""


class ConfigError(PearlError, ValueError):
    """A bad value of a configuration or request field: names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={quoted(value)} is not allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.allowed)


class UnsupportedModelError(PearlError, ValueError):
    """The checkpoint's architecture, or an option of it, is not implemented; names the supported ones."""


class ModelLoadError(PearlError, ValueError):
    """A model file is missing, truncated or corrupt; names the file."""


class VocabularyMismatchError(PearlError, ValueError):
    """Draft and target don't share a vocabulary; says at which token they first differ."""


class OutOfMemoryError(PearlError, RuntimeError):
    """Weights or the KV cache don't fit; says how many bytes are needed and how many are free."""


class PlacementError(PearlError, RuntimeError):
    """The cluster lacks the resources for a bundle; lists the bundles that can't be placed."""


class RequestRefusedError(PearlError, ValueError):
    """A request can never be served (too long, too large); says the numbers."""


class QueueFullError(PearlError, RuntimeError):
    """The waiting queue is at its bound; try again later."""


class DeploymentNotFoundError(PearlError, LookupError):
    """No deployment of that name runs on the cluster."""


class EngineDeadError(PearlError, RuntimeError):
    """A shard died or broke; running requests failed with it and the deployment is ending."""


class ReplicaDivergedError(PearlError, RuntimeError):
    """Two replicas of the batch state disagree; the round is stopped rather than a wrong token committed."""

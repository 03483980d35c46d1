"""The environment, read here and nowhere else. Imports nothing of ours; each function says which variable it reads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where fetched and converted models are kept: ``PEARL_CACHE_DIR``, else ``~/.cache/pearl-ray``."""
    chosen = os.environ.get("PEARL_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "pearl-ray"


def ray_address() -> str | None:
    """The Ray cluster that ``RAY_ADDRESS`` names, as Ray itself reads it; None where it names none."""
    return os.environ.get("RAY_ADDRESS") or None


def ray_auth_mode() -> str | None:
    """``RAY_AUTH_MODE`` ("token" or "disabled"); None where the user left it to Ray."""
    return os.environ.get("RAY_AUTH_MODE") or None


def ray_auth_token_path() -> Path:
    """Where Ray's client looks for its token: ``RAY_AUTH_TOKEN_PATH``, else ``~/.ray/auth_token``."""
    chosen = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(chosen).expanduser() if chosen else Path.home() / ".ray" / "auth_token"


def has_ray_auth_token() -> bool:
    """Whether ``RAY_AUTH_TOKEN`` is set or the token's file exists; the token itself is never read here."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or ray_auth_token_path().is_file()


def hub_is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` (or ``TRANSFORMERS_OFFLINE``) forbids fetching models from the Hugging Face Hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def cuda_visible_devices() -> str | None:
    """``CUDA_VISIBLE_DEVICES`` as set; None where it isn't."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")

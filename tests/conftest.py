"""Fixtures that tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import tiny_pair

# Shared machines stall now and then: how long an example takes says nothing here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny pair as Hugging Face directories, ``(target, draft)``, written once per session."""
    return tiny_pair(tmp_path_factory.mktemp("tiny"))

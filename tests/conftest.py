"""Fixtures that tests of several folders share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.tiny import tiny_pair

# Shared machines stall now and then: how long an example takes says nothing here. What `make test` tries is the same
# each time, so that a change is judged by what it changes; `make test-slow` tries something else each time.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")
torch.set_num_threads(1)  # the models are tiny, and tests run side by side

WITH_RAY = ("tests/ray/", "tests/e2e/test_openai_client.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """What one worker runs whole: a file, for what its tests share; all files with Ray, one Ray at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.startswith(WITH_RAY) else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny pair as Hugging Face directories, ``(target, draft)``, written once per session."""
    return tiny_pair(tmp_path_factory.mktemp("tiny"))

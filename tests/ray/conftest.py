"""One local Ray for all engines of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pearl_ray.cluster.ray_session import RaySession, open_session
from tests.ray.machine import machine

__all__ = ["machine"]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[RaySession]:
    """A Ray of our own, with room for all arrangements that are tested."""
    session = open_session("local", num_cpus=4)
    yield session
    session.close()

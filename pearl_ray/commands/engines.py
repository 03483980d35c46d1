"""How a command gets something to ask: a running deployment (``--name``) or an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from pearl_ray.commands.console import loading_bars, progress_console
from pearl_ray.commands.options import refuse_engine_options, take_config

if TYPE_CHECKING:
    from pearl_ray.client import Client
    from pearl_ray.config import PearlConfig
    from pearl_ray.engine import PearlEngine


@contextmanager
def own_engine(config: PearlConfig) -> Iterator[PearlEngine]:
    """An engine of the command's own, with bars while it loads; closed at the end."""
    from pearl_ray.engine import PearlEngine

    with loading_bars(progress_console()) as progress:
        engine = PearlEngine(config, progress=progress)
    with engine:
        yield engine


@contextmanager
def engine_or_deployment(name: str | None, values: dict[str, Any]) -> Iterator[PearlEngine | Client]:
    """The deployment of that name, or an own engine made of the command's ``values``."""
    config = take_config(values)
    if name is None:
        with own_engine(config) as engine:
            yield engine
        return
    refuse_engine_options(click.get_current_context(), f"belongs to an own engine; with --name {name} leave it out.")
    from pearl_ray.client import connect

    with connect(name, address=config.ray_address) as client:
        yield client

"""Where a detached deployment's HTTP server is found, and how it is drained. Needs none of the server's packages."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.actor import ActorHandle

from pearl_ray.actors.handles import namespace_of

HTTP_SERVER = "pearl-http"
LAST_WORDS_S = 10.0  # beyond the drain: for error events, and for the call itself


def find_http_actor(name: str) -> ActorHandle[Any] | None:
    """The HTTP server of a detached deployment, or None."""
    try:
        return ray.get_actor(HTTP_SERVER, namespace=namespace_of(name))
    except ValueError:
        return None


def drain_http_actor(actor: ActorHandle[Any], drain_s: float) -> None:
    """Let its requests end for so many seconds; what is left then ends with an error event. The server ends too.

    Says nothing of one that is gone or hung: it ends with its coordinator.
    """
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actor.stop.remote(drain_s), timeout=drain_s + LAST_WORDS_S)

"""The options of ``serve`` that are about HTTP, and what is made of them. Imports the server only when asked to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pearl_ray.commands.options import option
from pearl_ray.config import PearlConfig

if TYPE_CHECKING:
    import socket

    from pearl_ray.client import Client
    from pearl_ray.serving.backend import Tokenizer
    from pearl_ray.serving.server import HttpServer
    from pearl_ray.serving.settings import ServerSettings

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
LOOPBACK = ("127.0.0.1", "::1", "localhost")

HTTP_OPTIONS: list[Callable[[Any], Any]] = [
    option("--host", default="127.0.0.1", help="Address to bind; 0.0.0.0: all of this machine's."),
    option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to bind; 0: a free one."),
    option(
        "--served-model-name",
        "served_model_name",
        multiple=True,
        help="What clients call the model; may be given several times.  [default: --target-model]",
    ),
    option(
        "--api-key",
        multiple=True,
        help="A key that clients must show; may be given several times (in the environment: separated by spaces)."
        " On the command line other users of the machine can see it.",
    ),
    option(
        "--api-key-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with one key per line.",
    ),
    option(
        "--cors-origin",
        multiple=True,
        help="Origin (https://host) whose pages may call the API; may be given several times.  [default: none]",
    ),
    option(
        "--max-concurrent-requests",
        type=click.IntRange(1),
        default=1024,
        help="HTTP requests that generate at one time; more are answered 429.",
    ),
    option(
        "--tool-call-parser",
        type=click.Choice(["auto", "hermes", "llama3_json"]),
        default="auto",
        help="Form in which the model calls tools; auto: by its chat template.",
    ),
    option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        help="Of the log on stderr: one line per request, without its text.",
    ),
]


def take_settings(values: dict[str, Any], config: PearlConfig) -> ServerSettings:
    """Move the HTTP options but host and port out of a command's values.

    Raises:
        ConfigError: a key that can't be one, or a file without keys.
    """
    from pearl_ray import __version__
    from pearl_ray.serving.settings import KeyRing, ServerSettings, keys_in_file

    file = values.pop("api_key_file")
    keys = [*values.pop("api_key"), *(keys_in_file(file) if file is not None else [])]
    root = config.target_model or EMBEDDED_NAME
    return ServerSettings(
        served_model_names=tuple(values.pop("served_model_name")) or (root,),
        model_root=root,
        version=__version__,
        keys=KeyRing.of(keys),
        cors_origins=tuple(values.pop("cors_origin")),
        max_concurrent_requests=values.pop("max_concurrent_requests"),
        log_format=values.pop("log_format"),
        tool_call_parser=values.pop("tool_call_parser"),
    )


def require_packages() -> None:
    """Raise ``UsageError`` where the server's packages aren't installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client", "sse_starlette") if not find_spec(name)]
    if missing:
        raise click.UsageError(f"the server needs {', '.join(missing)}; run: pip install 'pearl-ray[serve]'")


def bind_or_refuse(host: str, port: int) -> socket.socket:
    """A listening socket, had before anything is loaded; raises ``BadParameter`` if it can't be."""
    from pearl_ray.serving.server import bind

    try:
        return bind(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise click.UsageError(f"--host {host} --port {port}: {reason}; choose another, or --port 0") from None


def target_tokenizer(config: PearlConfig) -> Tokenizer:
    """The target's tokenizer, which the server tokenises prompts with."""
    from pearl_ray import env
    from pearl_ray.model.loading import model_path
    from pearl_ray.model.tokenizer import load_tokenizer

    return load_tokenizer(model_path("target", config.target_model, str(env.cache_dir())))


def attach(server: HttpServer, client: Client, config: PearlConfig) -> None:
    """Let the server answer for a deployment that is up."""
    from pearl_ray.serving.backend import Model, RayEngine

    max_model_len = client.status()["max_model_len"]
    assert isinstance(max_model_len, int)
    server.attach(RayEngine(client.coordinator), Model(target_tokenizer(config), max_model_len))


def warnings_of(settings: ServerSettings, host: str) -> Sequence[str]:
    """What the user should know before others find out."""
    if host not in LOOPBACK and not settings.keys:
        return [f"anybody who reaches {host} can use the server: set PEARL_API_KEY or --api-key-file"]
    return []

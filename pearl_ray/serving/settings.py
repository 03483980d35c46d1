"""What the HTTP server is told once, at its start. Plain frozen data; holds digests of API keys, never a key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pearl_ray.core.errors import ConfigError

LogFormat = Literal["text", "json"]
ToolCallParser = Literal["auto", "hermes", "llama3_json"]
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class KeyRing:
    """SHA-256 digests of the accepted API keys; empty: everybody may ask."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @staticmethod
    def of(keys: Iterable[str]) -> KeyRing:
        """From the keys themselves, which are not kept.

        Raises:
            ConfigError: an empty key, or one with characters that a header can't hold; the message has no key in it.
        """
        digests = []
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("api_key", "(not shown)", "printable ASCII without spaces, at least one character")
            digests.append(_digest(key))
        return KeyRing(tuple(dict.fromkeys(digests)))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def accepts(self, candidate: str) -> bool:
        """Whether it is one of the keys; takes the same time whichever it is, and if it is none."""
        digest, found = _digest(candidate), False
        for known in self.digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def keys_in_file(path: Path) -> list[str]:
    """One key per line; empty lines and lines that begin with # are passed over.

    Raises:
        ConfigError: the file has none (a server without keys must be meant).
        OSError, UnicodeDecodeError: it can't be read.
    """
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError("api_key_file", str(path), "a file with at least one key, one per line")
    return keys


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """How the server presents and protects itself.

    Attributes:
        served_model_names: what ``model`` may be in a request; the first is the one that answers carry.
        model_root: the target as the deployment was given it, for ``/v1/models``.
        version: of this package, for ``/version``.
        keys: with any set, only ``/health`` and ``/ready`` are open.
        max_body_bytes: larger request bodies are refused with 413.
        body_timeout_s: a request body that takes longer to arrive is refused with 408.
        max_concurrent_requests: generating requests at one time; more are refused with 429.
        max_choices: prompts times ``n`` of one request.
        cors_origins: origins whose pages may call the API; empty: none.
        log_format: of the log lines, one per request among them; no prompt or answer is ever in one.
        tool_call_parser: the form in which the model calls tools; "auto": by its chat template.
    """

    served_model_names: tuple[str, ...] = ("default",)
    model_root: str = "default"
    version: str = "unknown"
    keys: KeyRing = KeyRing()
    max_body_bytes: int = 2 * MIB
    body_timeout_s: float = 30.0
    max_concurrent_requests: int = 1024
    max_choices: int = 256
    cors_origins: tuple[str, ...] = ()
    log_format: LogFormat = "text"
    tool_call_parser: ToolCallParser = "auto"

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_name", self.served_model_names, "at least one, none of them empty")
        for name in ("max_body_bytes", "max_concurrent_requests", "max_choices"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "a whole number from 1")

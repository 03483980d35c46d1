"""Log lines: one per HTTP request, as text or JSON. No prompt, answer, key or query string is ever in one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import MutableMapping

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pearl_ray.serving.settings import LogFormat

access = logging.getLogger("pearl_ray.access")
_SCOPE_KEY = "pearl_ray.log"


def log_fields(request: Request, **fields: object) -> MutableMapping[str, object]:
    """What the request's line will say besides method, path, status and time; more may be put in until it ends."""
    found: MutableMapping[str, object] = request.scope.setdefault(_SCOPE_KEY, {})
    found.update((name, value) for name, value in fields.items() if value is not None)
    return found


class AccessLog:
    """Middleware that writes a line when an answer, streamed ones too, has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not access.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        status, began = 0, time.monotonic()
        fields: dict[str, object] = {}
        scope[_SCOPE_KEY] = fields

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            client = scope.get("client")
            line = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "duration_s": round(time.monotonic() - began, 6),
                "client": client[0] if client else None,
                **fields,
            }
            access.info("%s %s %s", line["method"], line["path"], status, extra={"fields": line})


class TextFormatter(logging.Formatter):
    """A readable line; fields behind the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = getattr(record, "fields", None)
        if not fields:
            return line
        rest = {name: value for name, value in fields.items() if name not in ("method", "path", "status")}
        return f"{line} " + " ".join(f"{name}={_plain(value)}" for name, value in rest.items())


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (seconds since 1970), level, logger, message, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: object) -> str:
    """A value that can't fake a line or a terminal's colours."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def configure_logging(form: LogFormat) -> None:
    """Our loggers' lines to stderr in this form, from INFO on; other libraries' warnings too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    ours = logging.getLogger("pearl_ray")
    if ours.getEffectiveLevel() > logging.INFO:
        ours.setLevel(logging.INFO)

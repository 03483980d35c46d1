"""What keeps the server from being overrun: a gate for generating requests, and a bound on bodies. Knows no engine."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pearl_ray.serving.errors import ApiError, too_many, unavailable


class Gate:
    """Counts the requests that generate, and lets in no more than the limit, and none while the server drains."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.is_draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """Let a request in; to be followed by :meth:`leave`.

        Raises:
            ApiError: 503 while draining, 429 when full.
        """
        if self.is_draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if self.count >= self.limit:
            raise too_many(f"{self.count} requests are running, the most at one time", "too_many_requests")
        self.count += 1
        self._empty.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.count -= 1
        if not self.count:
            self._empty.set()

    async def drained(self, timeout_s: float) -> bool:
        """Let nobody in, and wait for those inside; False if some still are after ``timeout_s``."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class BodyLimit:
    """Middleware that reads a request's body before anything else does: bounded in bytes and seconds."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(408, f"the request body took longer than {self._timeout_s:g} s", code="timeout")
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went away. Raises ``ApiError`` (413)."""
        too_large = ApiError(413, f"the request body is larger than {self._max_bytes} bytes", code="body_too_large")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise too_large
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                raise too_large
            more = message.get("more_body", False)
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body again, then what really comes (which is the client's going)."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

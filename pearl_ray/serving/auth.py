"""Who may ask: API keys as Bearer tokens, and for what a browser opens also as a Basic password. Knows no route table.

A middleware in front of everything, so that no route, known or not, in any method, can be forgotten.
"""

from __future__ import annotations

import base64
import binascii

from starlette.types import ASGIApp, Receive, Scope, Send

from pearl_ray.serving.errors import ApiError
from pearl_ray.serving.settings import KeyRing

OPEN = frozenset({"/health", "/ready"})
# What a browser can open by itself. The API isn't among them: a browser sends Basic along unasked, from any page.
BROWSER = frozenset({"/", "/metrics", "/docs", "/openapi.json"})
REALM = 'realm="pearl-ray"'


class Auth:
    """Middleware; with an empty ring everything is open."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._keys or scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN):
            await self._app(scope, receive, send)
            return
        takes_basic = scope["type"] == "http" and scope["path"] in BROWSER
        candidate = _candidate(scope, takes_basic)
        if candidate is not None and self._keys.accepts(candidate):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refusal(candidate is not None, takes_basic).response()(scope, receive, send)


def _candidate(scope: Scope, takes_basic: bool) -> str | None:
    """The key that the request shows; None if it shows none, or several."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, rest = values[0].decode("latin-1").strip().partition(" ")
    if scheme.lower() == "bearer":
        return str(rest.strip())
    if scheme.lower() == "basic" and takes_basic:
        try:
            _user, colon, password = base64.b64decode(rest.strip(), validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
        return password if colon else None
    return None


def _refusal(was_given: bool, takes_basic: bool) -> ApiError:
    what = "the API key is not valid" if was_given else "an API key is needed: Authorization: Bearer <key>"
    scheme = "Basic" if takes_basic else "Bearer"
    return ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": f"{scheme} {REALM}"})

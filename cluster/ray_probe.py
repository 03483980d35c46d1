"""A program: asks a Ray cluster, as a stranger, how it authenticates, and prints the answer as one line of JSON.

Run in a process of its own, since Ray's client ends the process where a token is demanded and none is found, and writes
to stderr on each refusal. Imports Ray and nothing of ours.

    python -P ray_probe.py HOST:PORT  ->  {"mode": "disabled" | "token"}  or  {"problem": …, "detail": …}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

MODE = "RAY_AUTH_MODE"


def probe(address: str) -> dict[str, str]:
    """Try without a token, then with the one that this process's environment or home has."""
    os.environ[MODE] = "disabled"
    _raylet: Any = importlib.import_module("ray._raylet")
    errors: Any = importlib.import_module("ray.exceptions")
    refusal: type[Exception] | None = getattr(errors, "AuthenticationError", None)
    if refusal is None:  # before Ray 2.52 there was no authentication
        return {"mode": "disabled"}
    try:
        _raylet.GcsClient(address=address)
        return {"mode": "disabled"}
    except refusal:
        pass
    except (errors.RayError, RuntimeError, ConnectionError, TimeoutError) as error:
        return {"problem": "unreachable", "detail": str(error)}
    loader = _raylet.AuthenticationTokenLoader.instance()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            return {"problem": "no_token", "detail": ""}
    except refusal as error:
        return {"problem": "bad_token_file", "detail": getattr(error, "message", str(error))}
    os.environ[MODE] = "token"
    _raylet.Config.initialize("")
    loader.reset_cache()
    try:
        _raylet.GcsClient(address=address)
        return {"mode": "token"}
    except refusal as error:
        return {"problem": "wrong_token", "detail": getattr(error, "message", str(error))}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))

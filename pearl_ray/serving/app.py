"""The FastAPI app: routes, error forms, and the middlewares in their order. Starts nothing; see `server`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from pearl_ray.serving.auth import Auth
from pearl_ray.serving.backend import Backend
from pearl_ray.serving.errors import install_error_handlers
from pearl_ray.serving.generation import Services
from pearl_ray.serving.limits import BodyLimit, Gate
from pearl_ray.serving.logs import AccessLog
from pearl_ray.serving.routes import api_routes, page_route, state_routes
from pearl_ray.serving.settings import ServerSettings

_ABOUT = "OpenAI's API, with vLLM's extensions. A field that isn't honoured is refused with 400."


def create_app(backend: Backend, settings: ServerSettings) -> FastAPI:
    """An app over a backend, which may be attached to its engine later.

    ``app.state.services.gate`` is what a server drains before it ends.
    """
    services = Services(settings, backend, Gate(settings.max_concurrent_requests))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        backend.close()

    app = FastAPI(
        title="pearl-ray",
        description=_ABOUT,
        version=settings.version,
        lifespan=lifespan,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    for router in (api_routes(services), state_routes(services), page_route()):
        app.include_router(router)
    install_error_handlers(app)
    # The last one added sees a request first.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Auth, keys=settings.keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(AccessLog)
    _document(app, settings)
    return app


def _document(app: FastAPI, settings: ServerSettings) -> None:
    """The OpenAPI document as the server behaves: bad bodies are 400, and keys are Bearer tokens."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    if settings.keys and path not in ("/health", "/ready"):
                        operation["security"] = [{"key": []}]
            if settings.keys:
                schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
                schemes["key"] = {"type": "http", "scheme": "bearer"}
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

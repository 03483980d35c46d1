"""The routes, one function each. What they do stands in the modules that they call."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from pearl_ray.serving import metrics
from pearl_ray.serving.chat import chat_text, create_chat_completion
from pearl_ray.serving.completions import create_completion
from pearl_ray.serving.errors import ApiError
from pearl_ray.serving.generation import Services
from pearl_ray.serving.prompts import check_ids, encode
from pearl_ray.serving.responses import (
    ChatCompletion,
    Completion,
    Detokenized,
    ErrorBody,
    ModelCard,
    ModelList,
    State,
    Tokenized,
    Version,
)
from pearl_ray.serving.schema import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

PAGE = Path(__file__).parent / "static" / "index.html"

_WHAT = {
    400: "A field is unknown, not supported, or has a bad value.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    429: "Too many requests; see Retry-After.",
    500: "A fault of the server.",
    503: "Loading, shutting down, or the engine failed.",
}


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _WHAT[status]} for status in statuses}


_GENERATING = _documented(*_WHAT)


def _with_stream(what: str) -> dict[int | str, dict[str, Any]]:
    stream = {
        "schema": {"type": "string"},
        "example": f'data: {{"object": "{what}", "choices": []}}\n\ndata: [DONE]\n\n',
    }
    return {200: {"content": {"text/event-stream": stream}}, **_GENERATING}


def api_routes(services: Services) -> APIRouter:
    """What programs call."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        response_model=Completion,
        response_model_exclude_none=True,
        responses=_with_stream("text_completion"),
        tags=["generate"],
    )
    async def completions(request: Request, body: CompletionRequest) -> Any:  # noqa: ANN401 - see response_model
        """Continue a prompt, or several."""
        return await create_completion(services, request, body)

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        response_model_exclude_none=True,
        responses=_with_stream("chat.completion.chunk"),
        tags=["generate"],
    )
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Any:  # noqa: ANN401
        """Continue a conversation."""
        return await create_chat_completion(services, request, body)

    def card(name: str) -> ModelCard:
        settings = services.settings
        length = services.model().max_model_len
        return ModelCard(id=name, created=services.created, root=settings.model_root, max_model_len=length)

    @router.get("/v1/models", response_model=ModelList, responses=_documented(401, 503), tags=["models"])
    async def models() -> ModelList:
        """The names under which the model is served."""
        return ModelList(data=[card(name) for name in services.settings.served_model_names])

    @router.get(
        "/v1/models/{model:path}", response_model=ModelCard, responses=_documented(400, 401, 404, 503), tags=["models"]
    )
    async def model(model: str) -> ModelCard:
        """One of them."""
        return card(services.name_of(model))

    @router.post(
        "/tokenize",
        response_model=Tokenized,
        response_model_exclude_none=True,
        responses=_documented(400, 401, 404, 408, 413, 500, 503),
        tags=["tokens"],
    )
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """Token ids of a text, or of a conversation."""
        services.name_of(body.model)
        model = services.model()
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "send either prompt or messages", param="prompt", code="invalid_value")
        special = body.add_special_tokens
        if body.prompt is not None:
            if body.chat_template_kwargs is not None:
                name = "chat_template_kwargs"
                raise ApiError(400, f"{name} goes with messages only", param=name, code="invalid_value")
            ids = await encode(model.tokenizer, body.prompt, True if special is None else special)
        else:
            assert body.messages is not None
            text = await chat_text(services, body.messages, None, body.add_generation_prompt, body.chat_template_kwargs)
            ids = await encode(model.tokenizer, text, bool(special))
        texts = [model.tokenizer.decode([token], False) for token in ids] if body.return_token_strs else None
        return Tokenized(count=len(ids), max_model_len=model.max_model_len, tokens=ids, token_strs=texts)

    @router.post(
        "/detokenize",
        response_model=Detokenized,
        responses=_documented(400, 401, 404, 408, 413, 500, 503),
        tags=["tokens"],
    )
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids, special tokens included."""
        services.name_of(body.model)
        tokenizer = services.model().tokenizer
        check_ids("tokens", body.tokens, tokenizer.vocab_size)
        return Detokenized(prompt=tokenizer.decode(body.tokens, False))

    @router.get("/version", response_model=Version, responses=_documented(401), tags=["state"])
    async def version() -> Version:
        """Of pearl-ray."""
        return Version(version=services.settings.version)

    return router


def state_routes(services: Services) -> APIRouter:
    """What probes and scrapers call."""
    router = APIRouter(tags=["state"])
    down: dict[int | str, dict[str, Any]] = {503: {"model": State, "description": "No; `reason` says why."}}

    @router.get("/health", response_model=State, response_model_exclude_none=True, responses=down)
    async def health() -> Any:  # noqa: ANN401 - a model, or a response with another status
        """Whether the process lives and may come to answer: 503 once its engine has ended for good."""
        if services.backend.failure is not None:
            return _state(503, "failed", str(services.backend.failure))
        return State(status="ok")

    @router.get("/ready", response_model=State, response_model_exclude_none=True, responses=down)
    async def ready() -> Any:  # noqa: ANN401
        """Whether requests are answered now: 503 while loading, recovering or draining."""
        if services.gate.is_draining:
            return _state(503, "not ready", "shutting down")
        reason = await services.backend.why_not_ready()
        return State(status="ready") if reason is None else _state(503, "not ready", reason)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_documented(401)},
    )
    async def scrape() -> Response:
        """Figures in Prometheus' text format."""
        stats = await services.backend.stats()
        return Response(services.metrics.text(stats), media_type=metrics.CONTENT_TYPE)

    return router


def _state(status: int, what: str, reason: str) -> JSONResponse:
    return JSONResponse(State(status=what, reason=reason).model_dump(), status)


def page_route() -> APIRouter:
    """The web page: one file, which may run its own script and style and nothing else."""
    router = APIRouter()
    content = PAGE.read_bytes()
    scripts = " ".join(_hashes(content, "script"))
    styles = " ".join(_hashes(content, "style"))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; "
        "connect-src 'self' http: https:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Chat in the browser."""
        return HTMLResponse(content, headers=headers)

    return router


def _hashes(page: bytes, element: str) -> list[str]:
    """The page's inline scripts or styles as a content security policy names them."""
    found = re.findall(rf"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in found]

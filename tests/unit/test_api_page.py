"""docs/api.md is what the generator makes of the app's schema, and names what the app has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pearl_ray.serving.app import create_app
from pearl_ray.serving.backend import Backend
from pearl_ray.serving.schema import ChatCompletionRequest, CompletionRequest
from pearl_ray.serving.settings import ServerSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "api.md").read_text("utf-8")


def test_the_page_is_what_the_generator_writes(generator: ModuleType, page: str) -> None:
    assert page == generator.page(), "run: python docs/generate_api.py"


def test_every_route_field_and_status_is_on_the_page(page: str) -> None:
    document = create_app(Backend(), ServerSettings()).openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            section = page.split(f"## `{method.upper()} {path}`", 1)[1].split("\n## ", 1)[0]
            assert all(f"| {status} |" in section for status in operation["responses"]), path
    for body, path in ((CompletionRequest, "/v1/completions"), (ChatCompletionRequest, "/v1/chat/completions")):
        section = page.split(f"## `POST {path}`", 1)[1].split("\n## ", 1)[0]
        assert all(f"`{field.alias or name}`" in section for name, field in body.model_fields.items())
    assert "| `top_p` | number (> 0, ≤ 1)" in page and "< 2^64" in page
    assert "`GET /`" in page and "`GET /openapi.json`" in page


def test_every_link_of_the_page_leads_to_one_of_its_headings(page: str) -> None:
    headings = {line.lstrip("# ").lower() for line in page.splitlines() if line.startswith("### ")}
    links = {part.split(")", 1)[0] for part in page.split("](#")[1:]}
    assert links and links <= headings

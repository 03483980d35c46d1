"""Writes docs/api.md from the app's own OpenAPI document: python docs/generate_api.py [--check]

Every route, the fields of its body with types, defaults and bounds, and its statuses; what a request may name without
being honoured comes from ``serving.unsupported``. With --check nothing is written: exit status 1 if the page is old.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.routing import Route

from pearl_ray.serving.app import create_app
from pearl_ray.serving.backend import Backend
from pearl_ray.serving.settings import ServerSettings
from pearl_ray.serving.unsupported import NOT_HONOURED

PAGE = Path(__file__).with_name("api.md")
NEWLINE = "\n"
HEAD = """# API

Written by `python docs/generate_api.py` from the server's own OpenAPI document (`GET /openapi.json`); a test holds the
two together. What the routes are for, keys, limits and metrics: [serving.md](serving.md).

A field that isn't listed is refused with 400, and values are not converted (`"3"` is no number). `null` stands for
the default where it is allowed. Errors are `{"error": {"message", "type", "param", "code"}}`. With keys set every route
but `/health` and `/ready` also answers 401.
"""
# body's schema -> key of NOT_HONOURED
_REFUSED = {"ChatCompletionRequest": "chat", "CompletionRequest": "completion", "Message": "message"}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length ≥ {}",
    "maxLength": "length ≤ {}",
    "minItems": "entries ≥ {}",
    "maxItems": "entries ≤ {}",
    "maxProperties": "entries ≤ {}",
}

Schema = Mapping[str, Any]


def page() -> str:
    """The whole page."""
    app = create_app(Backend(), ServerSettings())
    document = app.openapi()
    schemas = document["components"]["schemas"]
    parts = [HEAD]
    bodies: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## `{method.upper()} {path}`\n\n{operation.get('description', '').strip()}\n")
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                name = _name(content["application/json"]["schema"])
                bodies.append(name)
                parts.append(_fields("Body", schemas[name], _REFUSED.get(name)))
            parts.append(_parameters(operation))
            parts.append(_statuses(operation))
    parts.append(_beside(app.routes, document["paths"]))
    shared = list(_reached(schemas, bodies))
    if shared:
        parts.append("## What bodies contain\n")
        parts += [_fields(f"### {name}", schemas[name], _REFUSED.get(name)) for name in shared]
    answers = list(_reached(schemas, _answers(document)))
    parts.append("## What answers contain\n")
    parts += [_fields(f"### {name}", schemas[name], None, is_answer=True) for name in (*_answers(document), *answers)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _name(schema: Schema) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]


def _refs(schema: object) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield _name(schema)
        for value in schema.values():
            yield from _refs(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _refs(value)


def _reached(schemas: Mapping[str, Schema], roots: list[str]) -> Iterator[str]:
    """Names of the schemas that these use, nearest first, each once."""
    seen, queue = set(roots), list(roots)
    while queue:
        for name in _refs(schemas[queue.pop(0)]):
            if name not in seen:
                seen.add(name)
                queue.append(name)
                yield name


def _answers(document: Mapping[str, Any]) -> list[str]:
    """Schemas of what is answered, in the order of the routes."""
    operations = [op for methods in document["paths"].values() for op in methods.values()]
    return list(dict.fromkeys(name for op in operations for name in _refs(op["responses"])))


def _type(schema: Schema) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{_json(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    bounds = [text.format(_number(schema[key])) for key, text in _BOUNDS.items() if key in schema]
    kind = schema.get("type", "anything")
    if kind == "array":
        kind = f"array of {_grouped(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        kind = f"object of {_grouped(schema['additionalProperties'])}"
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


def _grouped(schema: Schema) -> str:
    """As part of a longer type: alternatives in brackets."""
    text = _type(schema)
    return f"({text})" if "anyOf" in schema or "enum" in schema else text


def _number(value: float) -> str:
    """As short as it is exact: powers of two from 2^31 on by their exponent."""
    whole = int(value)
    if whole != value:
        return str(value)
    exponent = abs(whole).bit_length() - 1
    if exponent < 31 or abs(whole) != 1 << exponent:
        return str(whole)
    return f"{'-' if whole < 0 else ''}2^{exponent}"


def _json(value: object) -> str:
    return json.dumps(value)


def _fields(title: str, schema: Schema, refused: str | None, *, is_answer: bool = False) -> str:
    """A table of an object's fields; those that are known but not honoured in a line below."""
    properties: Mapping[str, Schema] = schema.get("properties", {})
    required = schema.get("required", ())
    unhonoured = NOT_HONOURED.get(refused, {}) if refused else {}
    lines = [f"{title}\n" if title.startswith("#") else f"{title}:\n"]
    if title.startswith("#") and schema.get("description"):
        lines.append(f"{' '.join(schema['description'].split())}\n")
    lines.append(
        "| field | type | |\n|---|---|---|" if is_answer else "| field | type | default | |\n|---|---|---|---|"
    )
    for name, field in properties.items():
        if name in unhonoured:
            continue
        note = field.get("description", "")
        default = "required" if name in required else f"`{_json(field.get('default'))}`"
        cells = [f"`{name}`", _type(field), note] if is_answer else [f"`{name}`", _type(field), default, note]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace(NEWLINE, " ") for cell in cells) + " |")
    if unhonoured:
        told = [
            f"`{name}`" + (f" ({' or '.join(f'`{_json(v)}`' for v in neutral)})" if neutral else "")
            for name, neutral in unhonoured.items()
        ]
        lines.append(f"\nNot honoured, and refused unless `null` or the value given here: {', '.join(told)}.")
    return "\n".join(lines) + "\n"


def _parameters(operation: Schema) -> str:
    told = [f"`{p['name']}` (in the {p['in']}): {_type(p['schema'])}" for p in operation.get("parameters", ())]
    return f"Parameters: {', '.join(told)}.\n" if told else ""


def _statuses(operation: Schema) -> str:
    """What it answers, by status."""
    lines = ["| status | answer | |\n|---|---|---|"]
    for status, response in sorted(operation["responses"].items()):
        kinds = []
        for media, content in response.get("content", {}).items():
            schema = content.get("schema", {})
            kinds.append(_type(schema) if "$ref" in schema else f"`{media}`")
        what = response.get("description", "")
        lines.append(f"| {status} | {', '.join(kinds)} | {'' if what == 'Successful Response' else what} |")
    return "\n".join(lines) + "\n"


def _beside(routes: list[Any], documented: Mapping[str, Any]) -> str:
    """Routes that the document leaves out: the page and the document itself."""
    lines = ["## Beside the API\n\n| route | |\n|---|---|"]
    known = {"/": "The web page.", "/openapi.json": "The OpenAPI document.", "/docs": "Its viewer."}
    for route in _flat(routes):
        if re.sub(r":\w+}", "}", route.path) not in documented:
            what = known.get(route.path) or (route.endpoint.__doc__ or "").strip()
            lines.append(f"| `GET {route.path}` | {what} |")
    return "\n".join(lines) + "\n"


def _flat(routes: list[Any]) -> Iterator[Route]:
    """Routes of the app, those of routers that it includes lazily too."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        else:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", ())
            yield from _flat(list(inner or ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    made = page()
    if not parser.parse_args().check:
        PAGE.write_text(made, "utf-8")
    elif PAGE.read_text("utf-8") != made:
        sys.exit(f"{PAGE.name} is old: run python docs/generate_api.py")


if __name__ == "__main__":
    main()

"""Writes docs/api.md from the service's OpenAPI document and docs/errors.md from its kinds of problems.

Run it after a change to either: `python docs/generate.py`. A test compares both pages with what it would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.api.error_page import where
from service.jobs.problem_kinds import KINDS
from service.main import create_app
from service.settings import Settings

HERE = Path(__file__).parent
WRITTEN = "<!-- Written by docs/generate.py; do not edit. -->"
SCHEMAS = "#/components/schemas/"

Document = dict[str, Any]


def errors_page() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        WRITTEN,
        "",
        "Every error is an `application/problem+json` document (RFC 9457) with a stable `code`, a `detail` that says "
        "what was wrong, with the value where one was, and a `remedy`. Its `type` leads to the code's section of this "
        "page, which every service has at `/errors`. A job that fails has the same document as its `error`. New codes "
        "may come; a client should fall back on the HTTP status for one it does not know.",
    ]
    for code, kind in KINDS.items():
        lines += ["", f"## {code}", "", f"*{where(kind)}*", "", kind.cause, "", f"**What to do.** {kind.remedy}"]
    return "\n".join(lines) + "\n"


def api_page(document: Document) -> str:
    """docs/api.md, of an OpenAPI document."""
    lines = [
        "# HTTP API",
        "",
        WRITTEN,
        "",
        f"{document['info']['description']} This page says what `/openapi.json` (OpenAPI {document['openapi']}) says; "
        "`/docs` shows it in a browser. Errors are explained in [errors.md](errors.md).",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += ["", f"## {method.upper()} {path}", "", *_operation(operation)]
    lines += ["", "# Documents"]
    for name, schema in document["components"]["schemas"].items():
        lines += ["", f"## {name}", "", *_schema(schema)]
    return "\n".join(lines).rstrip() + "\n"


def _operation(operation: Document) -> Iterator[str]:
    yield operation.get("description", operation["summary"])
    parameters = operation.get("parameters", [])
    if parameters:
        yield from ("", "| parameter | in | type | |", "|---|---|---|---|")
        for parameter in parameters:
            name = f"`{parameter['name']}`" + ("" if parameter["required"] else " (optional)")
            about = parameter.get("description", parameter["schema"].get("description", ""))
            yield f"| {name} | {parameter['in']} | {_type(parameter['schema'])} | {_cell(about)} |"
    body = operation.get("requestBody")
    if body:
        if "description" in body:
            yield from ("", body["description"])
        for media_type, content in body["content"].items():
            yield from ("", f"Body `{media_type}`: {_type(content['schema'])}")
            if "properties" in content["schema"]:
                yield from ("", *_fields(content["schema"]))
            for example in content.get("examples", {}).values():
                yield from ("", f"{example['summary']}:", "", *_json(example["value"]))
    yield from ("", "| status | | body | headers |", "|---|---|---|---|")
    for status, response in operation["responses"].items():
        content = response.get("content", {})
        kinds = ", ".join(f"`{kind}`{_of(entry.get('schema', {}))}" for kind, entry in content.items())
        headers = ", ".join(f"`{name}`" for name in response.get("headers", {}))
        yield f"| {status} | {_cell(_linked(status, response['description']))} | {kinds} | {headers} |"
    described = {
        name: header["description"]
        for response in operation["responses"].values()
        for name, header in response.get("headers", {}).items()
    }
    if described:
        yield ""
        yield from (f"- `{name}`: {text}" for name, text in described.items())
    for response in operation["responses"].values():
        for kind, entry in response.get("content", {}).items():
            if "example" in entry:
                yield from ("", f"Example of `{kind}`:", "", "```", *entry["example"].rstrip().splitlines(), "```")


def _linked(status: str, description: str) -> str:
    """Codes of problems lead to their explanation."""
    if status < "400":
        return description
    return ", ".join(f"[`{code}`](errors.md#{code})" for code in description.replace("`", "").split(", "))


def _schema(schema: Document) -> Iterator[str]:
    if "description" in schema:
        yield from (" ".join(schema["description"].split()), "")
    needed = [_words(entry["required"]) for entry in schema.get("anyOf", []) if "required" in entry]
    if needed:
        yield from (f"Needs {'; or '.join(needed)}.", "")
    if "enum" in schema:
        yield f"One of {_words(schema['enum'])}."
    elif "properties" in schema:
        yield from _fields(schema)
    for example in schema.get("examples", []):
        yield from ("", *_json(example))


def _fields(schema: Document) -> Iterator[str]:
    yield from ("| field | type | |", "|---|---|---|")
    for name, field in schema["properties"].items():
        optional = "" if name in schema.get("required", []) else " (optional)"
        about = field.get("description", "")
        default = field.get("default")
        if default not in (None, {}, []) and "$ref" not in field:
            about = f"{about} Default: `{json.dumps(default)}`.".strip()
        yield f"| `{name}`{optional} | {_type(field)} | {_cell(about)} |"


def _type(schema: Document) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(SCHEMAS)
        return f"[{name}](#{name.lower()})"
    for alternatives in ("anyOf", "oneOf", "allOf"):
        if alternatives in schema:
            return " or ".join(map(_type, schema[alternatives]))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return _words(schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    bounds = [f"{sign} {schema[key]}" for key, sign in (("minimum", ">="), ("maximum", "<=")) if key in schema]
    form = schema.get("format") or schema.get("pattern")
    return " ".join(filter(None, (kind, ", ".join(bounds), f"`{_cell(form)}`" if form else "")))


def _of(schema: Document) -> str:
    return f" ({_type(schema)})" if "$ref" in schema else ""


def _words(values: list[Any]) -> str:
    return ", ".join(f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in values)


def _json(value: Any) -> list[str]:
    return ["```json", *json.dumps(value, indent=2).splitlines(), "```"]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def pages() -> dict[str, str]:
    """What is to be in each of the pages."""
    application = create_app(Settings(broker_url="redis://127.0.0.1/0"))
    return {"api.md": api_page(application.openapi()), "errors.md": errors_page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text)

"""Write docs/api-reference.md from the routes, schemas and errors of the server.

Run it after a change of those: ``python scripts/api_reference.py``. A test fails while the page and
the code differ. It also rewrites the table of settings in docs/operations.md, between its markers.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from server.app import create_app
from server.auth import PUBLIC_PATHS, SCOPES
from server.errors import PROBLEMS
from server.settings import Settings

__all__ = ["main", "pages", "reference", "settings_table", "with_settings"]

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE, OPERATIONS = DOCS / "api-reference.md", DOCS / "operations.md"
BEGIN = "<!-- settings: written by scripts/api_reference.py, do not edit -->"
END = "<!-- end of settings -->"
_METHODS = ("get", "post", "put", "patch", "delete")
_HEAD = """# API reference

Written by `python scripts/api_reference.py` from the code; a test keeps it true. This page lists,
[api.md](api.md) explains. Every error is `application/problem+json` of the schema
[Problem](#problem); under `/v2` it is JSON of the schema [OipProblem](#oipproblem).

"""

Schema = dict[str, Any]


def main() -> int:
    """Rewrite the pages in place and say which changed."""
    for path, new in pages():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if new != old:
            path.write_text(new, encoding="utf-8")
        sys.stdout.write(f"{path.name}: {'rewritten' if new != old else 'up to date'}\n")
    return 0


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page and what it must hold."""
    yield REFERENCE, reference()
    yield OPERATIONS, with_settings(OPERATIONS.read_text(encoding="utf-8"))


def reference() -> str:
    """Return the whole reference as Markdown."""
    document = create_app(_no_engine, Settings.model_construct(feedback_url=None)).openapi()
    schemas: dict[str, Schema] = document["components"]["schemas"]
    parts = [_HEAD, "## Routes\n\n", *_overview(document), "\n"]
    parts += [part for path, item in document["paths"].items() for part in _route(path, item)]
    parts += ["## Errors\n\n", *_errors(), "\n## Schemas\n\n"]
    parts += [part for name in sorted(schemas) for part in _schema(name, schemas[name])]
    return "".join(parts).rstrip("\n") + "\n"


def with_settings(page: str) -> str:
    """Return the page with the text between the markers replaced by the table of settings.

    Raises:
        ValueError: The markers are not there exactly once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page must hold {BEGIN!r} and then {END!r}, each once")
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{after}"


def settings_table() -> str:
    """Return every setting with its default and its meaning."""
    rows = [
        f"| `{name}` | {_default(field.default)} | {field.description} |\n"
        for name, field in Settings.model_fields.items()
    ]
    return "| Setting | Default | Meaning |\n|---|---|---|\n" + "".join(rows)


def _default(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "", "True": "true", "False": "false"}.get(str(value), str(value))


def _no_engine() -> NoReturn:
    raise AssertionError  # the app is only asked for its document


def _overview(document: Schema) -> Iterator[str]:
    yield "| Route | Key | What |\n|---|---|---|\n"
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                yield (
                    f"| [`{method.upper()} {path}`](#{_anchor(item[method])}) | {_key(path)} | "
                    f"{item[method]['summary']} |\n"
                )


def _key(path: str) -> str:
    return "none" if path in PUBLIC_PATHS else f"`{SCOPES[path]}`"


def _anchor(operation: Schema) -> str:
    return str(operation["operationId"])


def _route(path: str, item: Schema) -> Iterator[str]:
    for method in _METHODS:
        if method not in item:
            continue
        operation = item[method]
        yield f"### {_anchor(operation)}\n\n`{method.upper()} {path}`\n\n"
        yield f"{operation['description']}\n\n"
        for parameter in operation.get("parameters", ()):
            text = parameter.get("description", "")
            kind = _type(parameter["schema"])
            needed = ", required" if parameter.get("required") else ""
            yield f"* {parameter['in']} `{parameter['name']}` ({kind}{needed}){_after(text)}\n"
        body = operation.get("requestBody")
        if body:
            yield f"* body: {_type(body['content']['application/json']['schema'])}\n"
        for status, answer in operation["responses"].items():
            yield f"* {status}: {_answer(answer)}\n"
        yield "\n"


def _after(text: str) -> str:
    return f": {_line(text)}" if text else ""


def _answer(answer: Schema) -> str:
    content: Schema = answer.get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    return _type(schema) if schema else _line(answer["description"])


def _errors() -> Iterator[str]:
    yield "| Status | Code | Title |\n|---|---|---|\n"
    for code, (status, title) in sorted(PROBLEMS.items(), key=lambda one: (one[1][0], one[0])):
        if status:
            yield f"| {status} | `{code}` | {title} |\n"


def _schema(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}\n\n{_line(schema.get('description', ''))}\n\n"
    if "properties" not in schema:
        yield f"{_type(schema)}\n\n"
        return
    yield "| Field | Type | Meaning |\n|---|---|---|\n"
    needed = schema.get("required", ())
    for field, value in schema["properties"].items():
        default = f", default `{value['default']}`" if "default" in value else ""
        optional = "" if field in needed else ", optional"
        cell = f"{_type(value)}{default or optional}"
        yield f"| `{field}` | {_cell(cell)} | {_cell(_line(value.get('description', '')))} |\n"
    yield "\n"


def _type(schema: Schema) -> str:
    """Return a JSON schema in a few words, with links to the named ones."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(option) for option in schema[union]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return f"{kind}{_bounds(schema)}"


def _bounds(schema: Schema) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "minLength": "at least",
        "maxLength": "at most",
    }
    units = {"minLength": " characters", "maxLength": " characters"}
    said = [
        f"{text} {schema[key]}{units.get(key, '')}" for key, text in words.items() if key in schema
    ]
    if "pattern" in schema:
        said.append(f"matching `{schema['pattern']}`")
    return f" ({', '.join(said)})" if said else ""


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())

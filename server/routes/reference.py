"""``GET /docs``: the API on one static page, made from the OpenAPI document.

No script and nothing from elsewhere: it works without a network, and its security policy forbids
everything but its own style. Swagger UI would need a content delivery network or seven megabytes of
somebody else's script, on a page that people open with a key at hand.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response

__all__ = ["render_reference", "router"]

router = APIRouter()

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1a1a1a;background:#fff}"
    "code,pre{font:14px/1.45 ui-monospace,monospace}"
    "pre{background:#f4f4f4;padding:.75rem;overflow:auto}"
    "summary{cursor:pointer;padding:.35rem 0}summary b{display:inline-block;min-width:4.5rem}"
    "details{border-top:1px solid #ddd}table{border-collapse:collapse}"
    "td{padding:.15rem 1rem .15rem 0;vertical-align:top}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)


@router.get("/docs", include_in_schema=False)
async def reference(request: Request) -> Response:
    """Return the page; it is made once."""
    state = request.app.state
    if not hasattr(state, "reference_page"):
        state.reference_page = render_reference(request.app.openapi())
    headers = {"Content-Security-Policy": _POLICY}
    return Response(state.reference_page, media_type="text/html", headers=headers)


def render_reference(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI document as one HTML page.

    Args:
        document: OpenAPI 3.1.
    """
    info = document["info"]
    operations = "".join(
        _operation(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f'<details id="{escape(name)}"><summary>{escape(name)}</summary>'
        f"<pre>{_json(schema)}</pre></details>"
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{escape(info.get('description', ''))}</p>"
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>. A server with API keys wants '
        "<code>Authorization: Bearer KEY</code> with every route that is not public.</p>"
        f"<h2>Operations</h2>{operations}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = "".join(
        (
            f"<p>{escape(operation.get('description', ''))}</p>",
            *_parameters(operation.get("parameters", ())),
            *_body(path, method, operation.get("requestBody")),
            *_responses(operation.get("responses", {})),
        )
    )
    summary = escape(operation.get("summary", ""))
    return (
        f"<details><summary><b>{escape(method.upper())}</b> <code>{escape(path)}</code> {summary}"
        f"</summary>{parts}</details>"
    )


def _parameters(parameters: Any) -> Iterator[str]:
    if parameters:
        rows = "".join(
            f"<tr><td><code>{escape(one['name'])}</code></td><td>{escape(one['in'])}</td>"
            f"<td>{escape(one.get('description', ''))}</td></tr>"
            for one in parameters
        )
        yield f"<h4>Parameters</h4><table>{rows}</table>"


def _body(path: str, method: str, body: Mapping[str, Any] | None) -> Iterator[str]:
    for media_type, content in (body or {}).get("content", {}).items():
        yield f"<h4>Body: {escape(media_type)}</h4>{_schema(content.get('schema', {}))}"
        for name, example in content.get("examples", {}).items():
            command = (
                f"curl -X {method.upper()} http://127.0.0.1:8000{path} "
                f"-H 'content-type: {media_type}' -d @-"
            )
            yield f"<p>{escape(example.get('summary', name))}</p><pre>{escape(command)}\n"
            yield f"{_json(example.get('value'))}</pre>"


def _responses(responses: Mapping[str, Any]) -> Iterator[str]:
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(response.get('description', ''))}</td><td>"
        + "".join(_schema(one.get("schema", {})) for one in response.get("content", {}).values())
        + "</td></tr>"
        for status, response in responses.items()
    )
    yield f"<h4>Answers</h4><table>{rows}</table>"


def _schema(schema: Mapping[str, Any]) -> str:
    """Return a schema: a link to a named one, else the schema itself."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    return f"<code>{_json(schema, indent=None)}</code>" if schema else ""


def _json(value: Any, indent: int | None = 1) -> str:
    return escape(json.dumps(value, indent=indent, ensure_ascii=False), quote=False)

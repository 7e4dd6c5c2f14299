"""How errors appear in the OpenAPI document."""

from http import HTTPStatus
from typing import Any, Literal

from server.auth import PUBLIC_PATHS, SCOPES
from server.errors import PROBLEMS

__all__ = ["add_door_errors", "error_documents", "json_body"]


def error_documents(
    *statuses: int, schema: Literal["Problem", "OipProblem"] = "Problem"
) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of some error statuses, naming their codes."""
    return {
        status: {
            "description": f"{HTTPStatus(status).phrase}: {_codes(status)}",
            "content": {
                "application/problem+json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}
            },
        }
        for status in statuses
    }


def add_door_errors(document: dict[str, Any]) -> None:
    """Add to every operation what the doors and the envelope answer, and the scope it needs.

    The key is optional in the document: a server without a file of keys asks for none.

    Args:
        document: An OpenAPI document; changed.
    """
    document["components"]["securitySchemes"] = {
        "apiKey": {
            "type": "http",
            "scheme": "bearer",
            "description": "A key made by `dalorra keys create`; needed when the server has keys.",
        }
    }
    for path, item in document["paths"].items():
        schema: Literal["Problem", "OipProblem"] = (
            "OipProblem" if path.startswith("/v2") else "Problem"
        )
        statuses = (500,) if path in PUBLIC_PATHS else (401, 403, 421, 429, 500)
        for operation in item.values():
            if path in SCOPES:
                operation["security"] = [{"apiKey": [SCOPES[path]]}, {}]
            for status, answer in error_documents(*statuses, schema=schema).items():
                operation["responses"].setdefault(str(status), answer)


def json_body(schema: str) -> dict[str, Any]:
    """Return the OpenAPI request body of a route that reads its JSON by hand.

    Args:
        schema: Name of a schema in the document.
    """
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _codes(status: int) -> str:
    return ", ".join(f"`{code}`" for code, (known, _) in PROBLEMS.items() if known == status)

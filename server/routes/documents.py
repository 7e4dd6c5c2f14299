"""How errors appear in the OpenAPI document."""

from http import HTTPStatus
from typing import Any

from server.errors import PROBLEMS

__all__ = ["error_documents"]


def error_documents(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses of some error statuses, naming their codes."""
    return {
        status: {
            "description": f"{HTTPStatus(status).phrase}: {_codes(status)}",
            "content": {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            },
        }
        for status in statuses
    }


def _codes(status: int) -> str:
    return ", ".join(f"`{code}`" for code, (known, _) in PROBLEMS.items() if known == status)

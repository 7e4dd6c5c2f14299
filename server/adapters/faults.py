"""From what an engine says about an adapter to what administrators and clients are told."""

from server.errors import PROBLEMS, ApiError, ProblemCode
from server.ports import (
    AdapterBaseMismatchError,
    AdapterLoadError,
    AdapterSelfTestError,
    AdapterUntrustedError,
)

__all__ = ["load_problem", "not_back"]

RETRY_S = 5

_CODES: dict[type[AdapterLoadError], ProblemCode] = {
    AdapterBaseMismatchError: "base_mismatch",
    AdapterUntrustedError: "adapter_untrusted",
    AdapterSelfTestError: "self_test_failed",
}


def load_problem(error: AdapterLoadError) -> ApiError:
    """Return the answer to an administrator whose adapter could not be loaded."""
    fault: dict[str, object] = {"pointer": "#/source"}
    if isinstance(error, AdapterBaseMismatchError):
        fault |= {"expected": error.expected, "found": error.found}
    return ApiError(_CODES.get(type(error), "adapter_invalid"), str(error), errors=(fault,))


def not_back(adapter: str, error: ApiError) -> ApiError:
    """Return the answer to a client whose adapter was put out of memory and cannot come back.

    Its request is sound, so it may come again; what is wrong is the administrator's business.

    Args:
        adapter: ``name:revision``.
        error: Why it could not be loaded.
    """
    if error.code in ("model_not_found", "engine_unavailable"):
        return error
    _, reason = PROBLEMS[error.code]
    return ApiError(
        "engine_unavailable",
        f"adapter {adapter} was put out of memory and cannot be loaded again now: {reason.lower()}",
        headers={"Retry-After": str(RETRY_S)},
    )

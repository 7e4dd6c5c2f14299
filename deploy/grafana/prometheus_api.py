"""Two questions to a Prometheus: the value of an expression now, and its course."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode
from urllib.request import urlopen

__all__ = ["Series", "query", "query_range"]

TIMEOUT_S = 30


@dataclass(frozen=True)
class Series:
    """Labels, and points of seconds since 1970 and value; those that are no number are left out."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


def query(url: str, expr: str, at_s: float) -> list[Series]:
    """Return the value of an expression at one time, one point per series.

    Args:
        url: Of Prometheus, without a slash at the end.
        expr: PromQL.
        at_s: Seconds since 1970.

    Raises:
        OSError: It cannot be reached, or refuses the expression.
    """
    result = _get(url, "query", {"query": expr, "time": f"{at_s:.3f}"})
    return [_series(item, [item["value"]]) for item in result]


def query_range(url: str, expr: str, span_s: tuple[float, float], step_s: float) -> list[Series]:
    """Return the course of an expression.

    Args:
        url: Of Prometheus, without a slash at the end.
        expr: PromQL.
        span_s: First and last time, seconds since 1970.
        step_s: Seconds between points.

    Raises:
        OSError: It cannot be reached, or refuses the expression.
    """
    start_s, end_s = span_s
    values = {"query": expr, "start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s}"}
    result = _get(url, "query_range", values)
    return [_series(item, item["values"]) for item in result]


def _get(url: str, path: str, values: Mapping[str, str]) -> list[dict]:
    address = f"{url}/api/v1/{path}?{urlencode(values)}"
    with urlopen(address, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the operator's own server
        return json.load(answer)["data"]["result"]


def _series(item: dict, values: list[list]) -> Series:
    points = ((float(at_s), float(value)) for at_s, value in values)
    finite = tuple((at_s, value) for at_s, value in points if math.isfinite(value))
    return Series({k: v for k, v in item["metric"].items() if k != "__name__"}, finite)

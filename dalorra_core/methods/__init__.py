"""The methods: how uncertainty enters the adapter. One method, one file of plain functions."""

from dalorra_core.methods import dalorra, mle
from dalorra_core.methods.method import Method

__all__ = ["METHODS", "Method"]

METHODS: dict[str, Method] = {
    "dalorra": dalorra.METHOD,
    "mle": mle.METHOD,
}

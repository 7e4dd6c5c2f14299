"""The words in a picture: names of series, values in their unit, and the room they take."""

import math
import re
from collections.abc import Sequence

from deploy.grafana.board import Panel
from deploy.grafana.prometheus_api import Series

__all__ = [
    "MAX_LEGEND",
    "axis_inches",
    "by_number",
    "has_slanted_names",
    "legend_columns",
    "legend_inches",
    "number_text",
    "series_name",
    "short_text",
]

MAX_LEGEND = 8
LINE_INCHES = 0.14  # of a legend
CHARACTERS_PER_COLUMN = 11  # in one of the 24 columns of the grid

Results = Sequence[Sequence[Series]]


def axis_inches(panel: Panel, results: Results) -> float:
    """Return the height of what is written along the horizontal axis."""
    return 0.62 if has_slanted_names(panel, results) else 0.26


def has_slanted_names(panel: Panel, results: Results) -> bool:
    """Return whether the names below bars are too long to stand side by side."""
    names = {short_text(one.labels.get(panel.by, "")) for found in results for one in found}
    needed = sum(len(name) + 3 for name in names)
    return panel.kind == "barchart" and needed > panel.place[2] * CHARACTERS_PER_COLUMN


def legend_inches(panel: Panel, results: Results) -> float:
    """Return the height that the legend of a panel takes."""
    names = _legend_names(panel, results)
    return LINE_INCHES * math.ceil(len(names) / legend_columns(panel, names)) + 0.08


def _legend_names(panel: Panel, results: Results) -> list[str]:
    pairs = zip(panel.targets, results, strict=True)
    if panel.kind == "barchart":
        return [target.name for target, _ in pairs]
    return [series_name(target.name, one) for target, found in pairs for one in found][:MAX_LEGEND]


def legend_columns(panel: Panel, names: Sequence[str]) -> int:
    """Return how many names stand side by side, by the panel's width."""
    room = panel.place[2] * CHARACTERS_PER_COLUMN
    longest = max(map(len, names), default=0) + 5  # the line before a name, and a gap after it
    return max(1, min(len(names), int(room / longest)))


def series_name(pattern: str, series: Series) -> str:
    """Return the name of a series: ``{{label}}`` in the pattern is the label's value."""
    name = re.sub(r"\{\{(\w+)\}\}", lambda match: series.labels.get(match[1], ""), pattern)
    return name.strip() or "value"


def by_number(key: str) -> tuple[int, float, str]:
    """Return what to sort by: numbers by their value, words after them."""
    try:
        return (0, float(key), key)
    except ValueError:
        return (1, 0.0, key)


def short_text(key: str) -> str:
    """Return a label's value, a number without needless digits."""
    return f"{float(key):g}" if by_number(key)[0] == 0 else key


def number_text(value: float, panel: Panel) -> str:
    """Return a value as Grafana would write it in the panel's unit."""
    if panel.unit == "percentunit":
        digits = ".3g" if panel.decimals is None else f".{panel.decimals}f"
        return f"{value * 100:{digits}} %" if value else "0 %"
    if panel.unit == "s":
        return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    if panel.decimals is not None:
        return f"{value:.{panel.decimals}f}"
    size = math.floor(math.log10(abs(value))) if value else 0
    if size >= 4:  # noqa: PLR2004 - from ten thousand on
        return f"{value / 1000:.3g} k"
    return f"{value:.3g}" if size < 3 else f"{value:.0f}"  # noqa: PLR2004 - digits

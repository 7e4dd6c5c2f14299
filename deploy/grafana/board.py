"""A dashboard's JSON -> what it shows and where: for the tests and for the pictures.

Reads what Grafana reads, so that both see the committed files and not the code that wrote them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EXPECTED", "LIMIT", "Board", "Panel", "Target", "filled", "read_board"]

# What the name of a series says: this is what should be; this must not be passed.
EXPECTED = "^(reference|expected|target).*"
LIMIT = "^limit.*"


@dataclass(frozen=True)
class Target:
    """One query of a panel.

    Attributes:
        expr: PromQL, with variables such as ``$adapter``.
        name: Of its series; ``{{label}}`` stands for a label's value.
        instant: Only the present values are shown.
    """

    expr: str
    name: str
    instant: bool


@dataclass(frozen=True)
class Panel:
    """One panel, or the heading of a section when ``kind`` is ``row``.

    Attributes:
        kind: ``row``, ``timeseries``, ``stat``, ``barchart`` or ``table``.
        title: Above it.
        unit: Grafana's name of the unit.
        place: Left, top, width and height on a grid of 24 columns.
        targets: Its queries.
        limits: Values with a colour of their own, ascending; the first has no lower end.
        stacked: Its series add up.
        by: Label along the horizontal axis of a bar chart.
        columns: Of a table.
        words: Shown in place of numbers.
        decimals: Digits after the point; None: as many as it takes.
    """

    kind: str
    title: str
    unit: str
    place: tuple[int, int, int, int]
    targets: tuple[Target, ...]
    limits: tuple[tuple[float | None, str], ...]
    stacked: bool
    by: str
    columns: tuple[str, ...]
    words: Mapping[str, str]
    decimals: int | None


@dataclass(frozen=True)
class Board:
    """A dashboard; ``variables`` maps the names of its variables to the queries behind them."""

    title: str
    panels: tuple[Panel, ...]
    variables: Mapping[str, str]


def read_board(path: Path) -> Board:
    """Return what a dashboard's JSON file shows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Board(
        title=content["title"],
        panels=tuple(_panel(panel) for panel in content["panels"]),
        variables={
            variable["name"]: str(variable.get("query", ""))
            for variable in content["templating"]["list"]
        },
    )


def filled(expr: str, values: Mapping[str, str]) -> str:
    """Return an expression with its variables replaced.

    Args:
        expr: PromQL with ``$name`` in it.
        values: By name, without the dollar.

    Raises:
        KeyError: A variable has no value.
    """
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expr)


def _panel(panel: Mapping[str, Any]) -> Panel:
    grid = panel["gridPos"]
    defaults = panel.get("fieldConfig", {}).get("defaults", {})
    targets = panel.get("targets", [])
    return Panel(
        kind=panel["type"],
        title=panel["title"],
        unit=defaults.get("unit", "none"),
        place=(grid["x"], grid["y"], grid["w"], grid["h"]),
        targets=tuple(
            Target(one["expr"], one.get("legendFormat", ""), bool(one.get("instant")))
            for one in targets
        ),
        limits=tuple(
            (step["value"], step["color"])
            for step in defaults.get("thresholds", {}).get("steps", [])
        ),
        stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
        by=panel.get("options", {}).get("xField", ""),
        columns=_columns(panel),
        words=_words(defaults),
        decimals=defaults.get("decimals"),
    )


def _columns(panel: Mapping[str, Any]) -> tuple[str, ...]:
    for transformation in panel.get("transformations", []):
        if transformation["id"] == "filterFieldsByName":
            names = transformation["options"]["include"]["names"]
            return tuple(name for name in names if name != "Value")
    return ()


def _words(defaults: Mapping[str, Any]) -> dict[str, str]:
    return {
        value: shown["text"]
        for mapping in defaults.get("mappings", [])
        for value, shown in mapping["options"].items()
    }

"""Panels and their data -> one picture, laid out as Grafana would."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import BoxStyle, FancyBboxPatch

from deploy.grafana.board import Panel
from deploy.grafana.legends import axis_inches, legend_inches
from deploy.grafana.panel_drawing import INK, PAPER, draw_panel
from deploy.grafana.prometheus_api import Series

__all__ = ["DOTS_PER_INCH", "TITLE_INCHES", "Drawn", "draw_board", "panel_box"]

COLUMN_INCHES = 0.72
UNIT_INCHES = 0.36  # one of Grafana's units of height
HEAD_INCHES = 0.55
GAP_INCHES = 0.07
TITLE_INCHES = 0.32
DOTS_PER_INCH = 100
BACKGROUND = "#eef0f3"


@dataclass(frozen=True)
class Drawn:
    """A panel, and the series of each of its queries."""

    panel: Panel
    results: tuple[tuple[Series, ...], ...]


def draw_board(
    title: str, drawn: Sequence[Drawn], span_s: tuple[float, float], target: Path
) -> None:
    """Write a picture of a dashboard.

    Args:
        title: Of the dashboard.
        drawn: Panels with their data.
        span_s: First and last time, seconds since 1970.
        target: PNG file.
    """
    bottom = max(one.panel.place[1] + one.panel.place[3] for one in drawn)
    width, height = 24 * COLUMN_INCHES, bottom * UNIT_INCHES + HEAD_INCHES
    with mpl.rc_context({"font.size": 8, "font.family": "sans-serif", "path.simplify": True}):
        figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
        first, last = (datetime.fromtimestamp(at_s, UTC) for at_s in span_s)
        figure.text(
            GAP_INCHES * 2 / width,
            1 - HEAD_INCHES / 2 / height,
            title,
            size=15,
            weight="bold",
            va="center",
            color=INK,
        )
        figure.text(
            1 - GAP_INCHES * 2 / width,
            1 - HEAD_INCHES / 2 / height,
            f"{first:%Y-%m-%d %H:%M:%S} to {last:%H:%M:%S} UTC",
            va="center",
            ha="right",
            color=INK,
        )
        for one in drawn:
            _place(figure, one, span_s)
        # the picture's date would make every run differ
        figure.savefig(target, dpi=DOTS_PER_INCH, metadata={"Software": None})


def panel_box(panel: Panel, height: float) -> tuple[float, float, float, float]:
    """Return left, bottom, width and height of a panel in inches; a picture's origin is below.

    Args:
        panel: Where it stands on the grid.
        height: Of the whole picture.
    """
    x, y, w, h = panel.place
    return (
        x * COLUMN_INCHES + GAP_INCHES,
        height - HEAD_INCHES - (y + h) * UNIT_INCHES + GAP_INCHES,
        w * COLUMN_INCHES - 2 * GAP_INCHES,
        h * UNIT_INCHES - 2 * GAP_INCHES,
    )


def _place(figure: Figure, one: Drawn, span_s: tuple[float, float]) -> None:
    """Draw one panel where the grid has it."""
    width, height = figure.get_size_inches()
    left, bottom, wide, tall = panel_box(one.panel, height)
    if one.panel.kind == "row":
        middle = (bottom + tall / 2) / height
        figure.text(
            2 * GAP_INCHES / width, middle, one.panel.title, size=11, va="center", color=INK
        )
        return
    frame = FancyBboxPatch(
        (left / width, bottom / height),
        wide / width,
        tall / height,
        boxstyle=BoxStyle("square", pad=0),
        facecolor=PAPER,
        edgecolor="#d5d8dd",
        zorder=-1,
    )
    figure.add_artist(frame)
    figure.text(
        (left + 0.1) / width,
        (bottom + tall - TITLE_INCHES / 2) / height,
        one.panel.title,
        weight="bold",
        va="center",
        color=INK,
    )
    draw_panel(_axes(figure, one), one.panel, one.results, span_s)


def _axes(figure: Figure, one: Drawn) -> Axes:
    """Return axes inside a panel's box, with room for its title, numbers and legend."""
    width, height = figure.get_size_inches()
    left, bottom, wide, tall = panel_box(one.panel, height)
    plain = one.panel.kind in ("stat", "table")
    before, after = (0.1, 0.1) if plain else (0.55, 0.12)
    below = 0.1
    if not plain:
        below = axis_inches(one.panel, one.results) + legend_inches(one.panel, one.results)
    return figure.add_axes(
        (
            (left + before) / width,
            (bottom + below) / height,
            (wide - before - after) / width,
            (tall - below - TITLE_INCHES) / height,
        )
    )

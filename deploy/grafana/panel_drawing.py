"""One panel of each kind, drawn with matplotlib; knows nothing of where the panel stands."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.grafana.board import EXPECTED, LIMIT, Panel
from deploy.grafana.legends import (
    MAX_LEGEND,
    axis_inches,
    by_number,
    has_slanted_names,
    legend_columns,
    number_text,
    series_name,
    short_text,
)
from deploy.grafana.prometheus_api import Series

__all__ = ["INK", "PAPER", "draw_panel"]

INK = "#24292f"
PAPER = "#ffffff"
QUIET = "#6e7781"
COLORS = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#c4a200", "#19a5b5", "#d8567e", "#8a6d3b")
NAMED = {"green": "#2f9e44", "orange": "#e8740c", "red": "#d1242f", "blue": "#3274d9"}
# The same meaning has the same colour in every panel.
MEANINGS = {"accept": "#2f9e44", "review": "#e8a30c", "abstain": "#3274d9"}

Results = Sequence[Sequence[Series]]
Span = tuple[float, float]


def draw_panel(axes: Axes, panel: Panel, results: Results, span_s: Span) -> None:
    """Draw a panel's data.

    Args:
        axes: Empty; changed in place.
        panel: What to draw.
        results: Series of each query, in their order.
        span_s: First and last time, seconds since 1970.
    """
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9ced6")
    axes.tick_params(colors=QUIET, length=2)
    if not any(results):
        axes.set_axis_off()
        axes.text(
            0.5, 0.5, "no data", ha="center", va="center", color=QUIET, transform=axes.transAxes
        )
    elif panel.kind == "stat":
        _draw_number(axes, panel, results, span_s)
    elif panel.kind == "barchart":
        _draw_bars(axes, panel, results)
    elif panel.kind == "table":
        _draw_table(axes, panel, results)
    else:
        _draw_lines(axes, panel, results, span_s)


def _draw_number(axes: Axes, panel: Panel, results: Results, span_s: Span) -> None:
    axes.set_axis_off()
    series = [one for found in results for one in found]
    value = series[0].points[-1][1]
    color = _color_of(panel, value)
    course = axes.inset_axes((0, 0, 1, 0.42))
    course.set_axis_off()
    times, values = zip(*series[0].points, strict=True)
    course.fill_between(times, values, color=color, alpha=0.18, linewidth=0)
    course.plot(times, values, color=color, linewidth=1, alpha=0.7)
    course.set_xlim(*span_s)
    course.set_ylim(bottom=min(0, *values))
    shown = " / ".join(
        panel.words.get(f"{one.points[-1][1]:g}", number_text(one.points[-1][1], panel))
        for one in series[:2]
    )
    axes.text(
        0.5,
        0.62,
        shown,
        size=19,
        weight="bold",
        color=color,
        ha="center",
        va="center",
        transform=axes.transAxes,
    )


def _draw_lines(axes: Axes, panel: Panel, results: Results, span_s: Span) -> None:
    series = [
        (series_name(target.name, one), one)
        for target, found in zip(panel.targets, results, strict=True)
        for one in found
    ]
    highest = max(value for _, one in series for _, value in one.points)
    if panel.stacked:
        highest = _stack(axes, series)
    else:
        for count, (name, one) in enumerate(series):
            times, values = zip(*one.points, strict=True)
            color, style = _look(name, count)
            axes.plot(times, values, style, color=color, linewidth=1.5, label=name)
    for limit, color in panel.limits:
        # far above the data it would press them flat
        if limit is not None and color == "red" and limit < 4 * max(highest, limit / 10):
            axes.axhline(limit, color=NAMED["red"], linewidth=1, linestyle="--")
            highest = max(highest, limit)
    axes.set_xlim(*span_s)
    axes.set_ylim(0, highest * 1.08 or 1)
    axes.grid(axis="y", color="#eaecef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    long = span_s[1] - span_s[0] > 3600  # noqa: PLR2004 - an hour
    axes.xaxis.set_major_formatter(
        FuncFormatter(
            lambda at_s, _: f"{datetime.fromtimestamp(at_s, UTC):{'%H:%M' if long else '%H:%M:%S'}}"
        )
    )
    _finish(axes, panel, results)


def _stack(axes: Axes, series: Sequence[tuple[str, Series]]) -> float:
    """Draw areas on top of each other and return the largest sum."""
    times = sorted({at_s for _, one in series for at_s, _ in one.points})
    heights = [[dict(one.points).get(at_s, 0.0) for at_s in times] for _, one in series]
    colors = [_look(name, count)[0] for count, (name, _) in enumerate(series)]
    names = [name for name, _ in series]
    axes.stackplot(times, heights, labels=names, colors=colors, alpha=0.65)
    return max(sum(column) for column in zip(*heights, strict=True))


def _draw_bars(axes: Axes, panel: Panel, results: Results) -> None:
    values = [
        {one.labels.get(panel.by, ""): one.points[-1][1] for one in found} for found in results
    ]
    places = sorted({key for found in values for key in found}, key=by_number)
    wide = 0.8 / len(values)
    for count, (target, found) in enumerate(zip(panel.targets, values, strict=True)):
        color = "#b6bdc6" if re.match(EXPECTED, target.name) else COLORS[count]
        left = [place + (count - (len(values) - 1) / 2) * wide for place in range(len(places))]
        heights = [found.get(key, 0.0) for key in places]
        axes.bar(left, heights, width=wide * 0.94, color=color, label=target.name)
    axes.set_xticks(range(len(places)), [short_text(key) for key in places])
    if has_slanted_names(panel, results):
        axes.tick_params(axis="x", labelrotation=18)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    axes.grid(axis="y", color="#eaecef", linewidth=0.8)
    axes.set_axisbelow(True)
    _finish(axes, panel, results)


def _draw_table(axes: Axes, panel: Panel, results: Results) -> None:
    axes.set_axis_off()
    header = [*panel.columns, panel.targets[0].name]
    rows = sorted(
        [
            *(one.labels.get(column, "") for column in panel.columns),
            number_text(one.points[-1][1], panel),
        ]
        for one in results[0]
    )
    shown: list[list[str]] = [header, *rows[:10]]
    widths = [max(len(row[place]) for row in shown) + 3 for place in range(len(header))]
    starts = [sum(widths[:place]) / sum(widths) for place in range(len(header))]
    for line, row in enumerate(shown):
        for start, text in zip(starts, row, strict=True):
            axes.text(
                start,
                0.95 - line * min(0.11, 0.95 / len(shown)),
                text,
                va="top",
                color=INK if line else QUIET,
                weight="normal" if line else "bold",
                transform=axes.transAxes,
            )


def _finish(axes: Axes, panel: Panel, results: Results) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=panel.decimals == 0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value, panel)))
    handles, names = axes.get_legend_handles_labels()
    box = axes.get_position()
    tall = box.height * axes.figure.get_figure(root=True).get_size_inches()[1]
    axes.legend(
        handles[:MAX_LEGEND],
        names[:MAX_LEGEND],
        loc="upper center",
        bbox_to_anchor=(0.5, -axis_inches(panel, results) / tall),
        ncols=legend_columns(panel, names[:MAX_LEGEND]),
        borderaxespad=0,
        frameon=False,
        fontsize=7,
        handlelength=1.4,
        columnspacing=1.2,
        labelcolor=INK,
    )


def _look(name: str, count: int) -> tuple[str, str]:
    if re.match(EXPECTED, name):
        return QUIET, "--"
    if re.match(LIMIT, name):
        return NAMED["red"], "--"
    return MEANINGS.get(name, COLORS[count % len(COLORS)]), "-"


def _color_of(panel: Panel, value: float) -> str:
    found = "blue"
    for limit, color in panel.limits:
        if limit is None or value >= limit:
            found = color
    return NAMED.get(found, NAMED["blue"])

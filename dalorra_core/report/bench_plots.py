"""Figures of a bench, from numbers; nothing is measured here.

Each function returns a matplotlib figure; ``save_figures`` writes them, and the reliability
diagrams of several methods are ``dalorra_core.report.plots.reliability_diagram``. They show what
the figures of the DALorRA paper show: 2 (``sweep`` with references), 3 and 6 (``sweep``), 4 and 7
(``posterior_heat_maps``), 5 (``grouped``).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dalorra_core.metrics.selective import RiskCoverageCurve
from dalorra_core.report.plots import new_axes, new_figure

__all__ = [
    "CostPoint",
    "Curve",
    "GroupPanel",
    "PosteriorMap",
    "Score",
    "SweepPanel",
    "grouped",
    "posterior_heat_maps",
    "posterior_maps",
    "risk_coverage_by_method",
    "score_against_cost",
    "sweep",
]

# Okabe and Ito's colours without the yellow, which is lost on white; then again with other marks.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKS = "osD^vPX*<>"
_LINES = ("-", "--", ":", "-.")
_GREY = "#8a8f98"
_LAYER = re.compile(r"\.(\d+)\.")
_LEGEND_COLUMNS = 5
_CURVE_POINTS = 400
_WIDE = 10.0  # the ratio of largest to smallest from which an axis is logarithmic
_PANELS_A_LINE = 3
_MOST_BANDS = 4  # of more curves the bands hide each other


@dataclass(frozen=True, eq=False)
class PosteriorMap:
    """Keep probabilities of one kind of module, layer by layer.

    Attributes:
        name: Of the kind, such as ``q_proj``.
        layers: Numbers of the layers, L of them, rising; empty for a module outside of them.
        keep_prob: Shape (L, r), in [0, 1]; (1, r) outside of the layers.
        kinds: Of each row, where the rows are kinds of modules and not layers.
    """

    name: str
    layers: tuple[int, ...]
    keep_prob: Float[Tensor, "L r"]
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """A mean over seeds and its sample standard deviation, in the unit of the axis."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Curve:
    """A score over a setting.

    Attributes:
        name: In the legend; equal names have equal colours in all panels.
        x: Values of the setting, rising.
        scores: One for each of them.
        reference: A score that does not depend on the setting, drawn dashed across the panel.
    """

    name: str
    x: tuple[float, ...]
    scores: tuple[Score, ...]
    reference: Score | None = None


@dataclass(frozen=True)
class SweepPanel:
    """Curves of one metric; ``label`` names it with its unit."""

    label: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class GroupPanel:
    """Scores of methods on a few sets by one metric; ``label`` names it with its unit.

    Attributes:
        label: Of the axis.
        groups: The sets.
        scores: Method to one score for each set, None where there is none.
    """

    label: str
    groups: tuple[str, ...]
    scores: Mapping[str, tuple[Score | None, ...]]


@dataclass(frozen=True)
class CostPoint:
    """One method: what it costs (> 0) and how it does."""

    name: str
    cost: float
    score: Score


def posterior_maps(keep_prob: Mapping[str, Sequence[float]]) -> tuple[PosteriorMap, ...]:
    """Return the maps of one adapter, one for each kind of module.

    An adapter that stands on one layer only has one map, a row for each module.

    Args:
        keep_prob: Module name to its r keep probabilities, as ``dalorra inspect --json`` prints
            them under ``posterior``; the first number in a name is its layer.
    """
    kinds: dict[str, list[tuple[int | None, Sequence[float]]]] = {}
    for module, values in keep_prob.items():
        layer = _LAYER.search(module)
        place = None if layer is None else int(layer[1])
        kinds.setdefault(module.rpartition(".")[2], []).append((place, values))
    if len(kinds) > 1 and all(len(rows) == 1 for rows in kinds.values()):
        values = torch.tensor([list(rows[0][1]) for rows in kinds.values()], dtype=torch.float64)
        return (PosteriorMap("", (), values, tuple(kinds)),)
    maps: list[PosteriorMap] = []
    for kind, rows in kinds.items():
        ordered = sorted(rows, key=lambda row: -1 if row[0] is None else row[0])
        layers = tuple(place for place, _ in ordered if place is not None)
        values = torch.tensor([list(row) for _, row in ordered], dtype=torch.float64)
        maps.append(PosteriorMap(kind, layers, values))
    return tuple(maps)


def posterior_heat_maps(
    adapters: Mapping[str, Sequence[PosteriorMap]], *, prior_prob: float, title: str
) -> Any:
    """Return the posterior keep probabilities by layer and rank, all on one scale.

    White is the prior; the scale reaches equally far to both sides of it, as far as any gate went.

    Args:
        adapters: Name (a data set, say) to its maps; at least one map in all.
        prior_prob: p0.
        title: Above the panels.
    """
    panels = [(name, one) for name, maps in adapters.items() for one in maps]
    reach = max(float((one.keep_prob - prior_prob).abs().max()) for _, one in panels)
    reach = max(reach, 1e-3)  # a scale has two ends, even where no gate has moved
    deepest = max(len(one.keep_prob) for _, one in panels)
    names = max(max((len(kind) for kind in one.kinds), default=0) for _, one in panels)
    width = sum(0.9 + 0.07 * names + 0.16 * one.keep_prob.shape[1] for _, one in panels)
    figure = new_figure(width + 1.4, 1.5 + 0.17 * deepest)
    figure.set_layout_engine("compressed")  # cells are square, so panels leave gaps otherwise
    every: list[Any] = []
    image: Any = None
    for k, (name, one) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), k)
        every.append(axes)
        rows, rank = one.keep_prob.shape
        # Panels of one height keep their cells in line: what is short is filled with nothing.
        blank = one.keep_prob.new_full((deepest - rows, rank), math.nan)
        image = axes.imshow(
            torch.cat([one.keep_prob, blank]).tolist(),
            cmap="RdBu_r",
            vmin=prior_prob - reach,
            vmax=prior_prob + reach,
            interpolation="nearest",
        )
        axes.spines[:].set_visible(False)
        axes.set_title(_plain(f"{name}\n{one.name}".strip()), fontsize=9)
        axes.set_xticks(range(rank), [str(j + 1) if j % 2 == 0 else "" for j in range(rank)])
        axes.set_yticks(
            range(len(one.layers)),
            [str(layer) if i % 5 == 0 else "" for i, layer in enumerate(one.layers)],
        )
        axes.tick_params(labelsize=8, length=2)
        if one.kinds:
            axes.set_yticks(range(len(one.kinds)), [_plain(kind) for kind in one.kinds])
            axes.set_xlabel("rank", fontsize=8)
        elif one.layers:
            axes.set_xlabel("rank", fontsize=8)
            axes.set_ylabel("layer", fontsize=8)
        else:
            axes.set_xticks([])
    bar = figure.colorbar(image, ax=every, shrink=0.7, pad=0.02)
    bar.set_label(f"keep probability (white: prior {prior_prob:g})", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(_plain(title), fontsize=10, x=0.02, ha="left")
    return figure


def sweep(
    panels: Sequence[SweepPanel], *, x_label: str, title: str, reference_name: str = "reference"
) -> Any:
    """Return scores over a setting, a panel for each metric; bars are sd over seeds.

    Args:
        panels: At least one.
        x_label: Names the setting.
        title: Above the panels.
        reference_name: What the dashed lines are.
    """
    figure, places = _grid(len(panels), title)
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    looks = _looks(names)
    dashed = False
    for panel, place in zip(panels, places, strict=True):
        axes = new_axes(figure, place)
        for curve in panel.curves:
            color, mark = looks[curve.name]
            means, bars = _columns(curve.scores)
            axes.errorbar(
                curve.x, means, yerr=bars, color=color, marker=mark, ms=4, lw=1.4, capsize=2
            )
            if curve.reference is not None:
                dashed = True
                axes.axhline(curve.reference.mean, color=color, ls="--", lw=1.2)
                spread = curve.reference.std or 0.0
                low, high = curve.reference.mean - spread, curve.reference.mean + spread
                axes.axhspan(low, high, color=color, alpha=0.1, lw=0)
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(xlabel=_plain(x_label), ylabel=_plain(panel.label))
    lines = [_handle(name, look, "-") for name, look in looks.items()]
    if dashed:
        lines.append(_handle(f"dashed: {reference_name}", (_GREY, ""), "--"))
    _legend(figure, lines)
    return figure


def grouped(panels: Sequence[GroupPanel], *, title: str) -> Any:
    """Return scores of methods side by side on each set, a panel for each metric.

    Args:
        panels: At least one; bars are sd over seeds.
        title: Above the panels.
    """
    figure, places = _grid(len(panels), title)
    names = list(dict.fromkeys(name for panel in panels for name in panel.scores))
    looks = _looks(names)
    step = 0.7 / max(1, len(names))
    for panel, place in zip(panels, places, strict=True):
        axes = new_axes(figure, place)
        for k, name in enumerate(names):
            color, mark = looks[name]
            shift = (k - (len(names) - 1) / 2) * step
            there = [(g, s) for g, s in enumerate(panel.scores.get(name, ())) if s is not None]
            means, bars = _columns([score for _, score in there])
            axes.errorbar(
                [g + shift for g, _ in there],
                means,
                yerr=bars,
                color=color,
                marker=mark,
                ms=5,
                ls="",
                capsize=2,
                lw=1.2,
            )
        axes.set_xticks(range(len(panel.groups)), [_plain(group) for group in panel.groups])
        axes.set_xlim(-0.5, len(panel.groups) - 0.5)
        for edge in range(1, len(panel.groups)):
            axes.axvline(edge - 0.5, color="#c9ccd2", lw=0.8)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(_plain(panel.label))
    _legend(figure, [_handle(name, look, "") for name, look in looks.items()])
    return figure


def risk_coverage_by_method(
    curves: Mapping[str, Sequence[RiskCoverageCurve]], *, title: str
) -> Any:
    """Return risk-coverage curves: the mean over seeds, and a band from lowest to highest.

    More than four methods are drawn without bands.

    Args:
        curves: Method to the curves of its seeds, all of equally many rows.
        title: Above the axes.
    """
    figure = new_figure(7.4, 4.8)
    axes = new_axes(figure)
    highest = 0.0
    lines: list[Any] = []
    for k, (name, of_seeds) in enumerate(curves.items()):
        rows = len(of_seeds[0].coverage)
        shown = torch.linspace(0, rows - 1, min(rows, _CURVE_POINTS)).round().long()
        risk = 100 * torch.stack([one.selective_risk[shown] for one in of_seeds])  # (S, points)
        coverage = (100 * of_seeds[0].coverage[shown]).tolist()
        color, style = _COLORS[k % len(_COLORS)], _LINES[k // len(_COLORS) % len(_LINES)]
        mean = risk.mean(dim=0)
        axes.plot(coverage, mean.tolist(), color=color, ls=style, lw=1.5, zorder=3)
        if len(of_seeds) > 1 and len(curves) <= _MOST_BANDS:
            low, high = risk.amin(dim=0).tolist(), risk.amax(dim=0).tolist()
            axes.fill_between(coverage, low, high, color=color, alpha=0.12, lw=0)
        area = sum(float(one.selective_risk.mean()) for one in of_seeds) / len(of_seeds)
        lines.append(_handle(f"{name} (AURC {100 * area:.2f} %)", (color, ""), style))
        # The first few answers are all right or all wrong by chance: they do not set the scale.
        settled = mean[_coverage_from(coverage, 10.0) :]
        highest = max(highest, float(settled.max()))
    axes.set(
        xlabel="answered share of the rows, surest first (%)",
        ylabel="errors among the answered (%)",
        xlim=(0, 100),
        ylim=(0, 1.15 * highest + 0.5),
    )
    axes.set_title(_plain(title), fontsize=10, loc="left")
    _legend(figure, lines, columns=3)
    return figure


def score_against_cost(
    points: Sequence[CostPoint], *, x_label: str, y_label: str, title: str
) -> Any:
    """Return how methods do against what they cost; bars are sd over seeds.

    Args:
        points: At least one; the cost axis is logarithmic where they span a factor of ten.
        x_label: Names the cost with its unit.
        y_label: Names the score with its unit.
        title: Above the axes.
    """
    figure = new_figure(6.6, 4.8)
    axes = new_axes(figure)
    looks = _looks([point.name for point in points])
    for point in points:
        color, mark = looks[point.name]
        means, bars = _columns([point.score])
        axes.errorbar(
            [point.cost], means, yerr=bars, color=color, marker=mark, ms=7, ls="", capsize=2
        )
    costs = [point.cost for point in points]
    if max(costs) > _WIDE * min(costs):
        axes.set_xscale("log")
    axes.set(xlabel=_plain(x_label), ylabel=_plain(y_label))
    axes.set_title(_plain(title), fontsize=10, loc="left")
    _legend(figure, [_handle(name, look, "") for name, look in looks.items()])
    return figure


def _coverage_from(coverage: Sequence[float], percent: float) -> int:
    """Return the index of the first point at or above a coverage in percent; the last if none."""
    return next((i for i, share in enumerate(coverage) if share >= percent), len(coverage) - 1)


def _grid(panels: int, title: str) -> tuple[Any, list[tuple[int, int, int]]]:
    columns = min(_PANELS_A_LINE, panels)
    lines = -(-panels // columns)
    figure = new_figure(3.6 * columns + 0.4, 3.3 * lines + 0.9)
    figure.suptitle(_plain(title), fontsize=10, x=0.02, ha="left")
    return figure, [(lines, columns, k) for k in range(1, panels + 1)]


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return colour and mark of each name: no two of the first seventy share both."""
    return {
        name: (_COLORS[k % len(_COLORS)], _MARKS[k % len(_MARKS)]) for k, name in enumerate(names)
    }


def _columns(scores: Sequence[Score]) -> tuple[list[float], list[float]]:
    """Return means and bars; NaN draws no bar."""
    return [s.mean for s in scores], [math.nan if s.std is None else s.std for s in scores]


def _handle(name: str, look: tuple[str, str], line: str) -> Any:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - an optional extra

    color, mark = look
    return Line2D([], [], color=color, marker=mark, ls=line, ms=5, label=_plain(name))


def _legend(figure: Any, lines: Sequence[Any], columns: int = _LEGEND_COLUMNS) -> None:
    figure.legend(
        handles=list(lines),
        loc="outside lower center",
        ncols=min(columns, len(lines)),
        frameon=False,
        fontsize=8,
    )


def _plain(text: str) -> str:
    """Return a label as it is: no formula between dollars."""
    return text.replace("$", r"\$")

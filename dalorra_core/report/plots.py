"""Draw figures from numbers; nothing is measured here.

Figures are made without pyplot, so that no global state of matplotlib is touched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dalorra_core.calibration.what_if import CurvePoint
from dalorra_core.errors import ConfigError
from dalorra_core.report.reliability import Reliability

__all__ = [
    "CertifiedPoint",
    "check_plotting",
    "histograms",
    "new_axes",
    "new_figure",
    "reliability_diagram",
    "risk_coverage",
    "save_figures",
]

_BLUE, _ORANGE, _GREEN, _GREY = "#1f5fa8", "#d1661b", "#2b8a3e", "#8a8f98"
_BINS = 40
_FORMATS = ("png", "svg")
_DIAGRAMS_A_LINE = 3


@dataclass(frozen=True)
class CertifiedPoint:
    """A certified policy on the risk-coverage plane."""

    name: str
    coverage: float
    selective_risk: float
    target_risk: float


def check_plotting() -> None:
    """Raise ConfigError where figures cannot be drawn, before anything else is done."""
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'dalorra[calibrate]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def new_axes(figure: Any, place: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """Return axes in the house look, at (lines, columns, number from 1)."""
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def save_figures(directory: Path, figures: Mapping[str, Any]) -> list[Path]:
    """Write figures as PNG and SVG.

    Args:
        directory: Made if it is not there.
        figures: File name without ending to figure.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, figure in figures.items():
        for kind in _FORMATS:
            path = directory / f"{name}.{kind}"
            figure.savefig(path, dpi=150)
            paths.append(path)
    return paths


def risk_coverage(
    curves: Mapping[str, Sequence[CurvePoint]], certified: Sequence[CertifiedPoint], title: str
) -> Any:
    """Return the risk-coverage figure.

    Args:
        curves: Name to points; the first one is drawn with its bounds.
        certified: Policies to mark.
        title: Above the axes.
    """
    figure = new_figure(7.2, 4.6)
    axes = new_axes(figure)
    for (name, points), color in zip(curves.items(), (_BLUE, _GREY), strict=False):
        x = [100 * p.coverage for p in points]
        axes.plot(x, [100 * p.selective_risk for p in points], color=color, label=name, zorder=3)
        if color == _BLUE:
            low = [100 * p.risk_lower_bound for p in points]
            high = [100 * p.risk_upper_bound for p in points]
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0, label="pointwise bounds")
    for point in certified:
        x, y = 100 * point.coverage, 100 * point.selective_risk
        axes.plot([x, x], [y, 100 * point.target_risk], color=_GREEN, lw=1.2, zorder=4)
        axes.plot(x, 100 * point.target_risk, "_", color=_GREEN, ms=12, mew=2, zorder=4)
        axes.plot(x, y, "o", color=_GREEN, ms=5, zorder=5)
        axes.annotate(
            point.name,
            (x, 100 * point.target_risk),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
            color=_GREEN,
            fontsize=8,
        )
    if certified:
        axes.plot([], [], "-o", color=_GREEN, ms=5, label="certified: risk here, bar at target")
    top = max(p.selective_risk for points in curves.values() for p in points)
    highest = max([top, *(p.target_risk for p in certified)])
    axes.set(
        xlabel="accepted share of all questions (%)",
        ylabel="errors among accepted (%)",
        xlim=(0, 100),
        ylim=(0, 100 * min(1.0, 1.25 * highest + 0.02)),
    )
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def reliability_diagram(diagrams: Mapping[str, Reliability], title: str) -> Any:
    """Return reliability diagrams, three a line, each with the band of a perfect model."""
    columns = max(1, min(_DIAGRAMS_A_LINE, len(diagrams)))
    lines = -(-len(diagrams) // columns)
    figure = new_figure(4.2 * columns + 0.4, 4.4 * lines + 0.3)
    for k, (name, found) in enumerate(diagrams.items(), start=1):
        axes = new_axes(figure, (lines, columns, k))
        x = found.confidence.tolist()
        axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls="--")
        heights = (found.high - found.low).tolist()
        axes.bar(
            x,
            heights,
            width=0.035,
            bottom=found.low.tolist(),
            color=_GREY,
            alpha=0.45,
            label="95 % of perfectly calibrated models",
        )
        largest = float(found.count.max())
        sizes = [12 + 90 * float(n) / largest for n in found.count]
        y = found.accuracy.tolist()
        axes.scatter(x, y, s=sizes, color=_BLUE, zorder=3, label="measured (area: rows)")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
        axes.set_title(
            f"{name}\nECE {found.ece:.4f}, by chance alone {found.ece_by_chance:.4f}",
            fontsize=9,
            loc="left",
        )
        axes.legend(loc="upper left", fontsize=8, framealpha=0.85, edgecolor="none")
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    return figure


def histograms(
    scores: Mapping[str, Tensor], outside: Tensor, limits: Mapping[str, Mapping[str, float]]
) -> Any:
    """Return histograms of each score, in scope and out.

    Args:
        scores: Name to (n,) values.
        outside: (n,) bool.
        limits: Score name to named thresholds, drawn as lines.
    """
    columns = 2 if len(scores) > 1 else 1
    lines = -(-len(scores) // columns)
    figure = new_figure(4.4 * columns, 2.9 * lines + 0.3)
    parts = [("in scope", ~outside, _BLUE)]
    parts += [("out of scope", outside, _ORANGE)] if bool(outside.any()) else []
    for k, (name, values) in enumerate(scores.items(), start=1):
        axes = new_axes(figure, (lines, columns, k))
        span = (float(values.min()), float(values.max()))
        for part, chosen, color in parts:
            shown = values[chosen].tolist()
            weights = [100 / len(shown)] * len(shown)
            axes.hist(
                shown, bins=_BINS, range=span, weights=weights, color=color, alpha=0.55, label=part
            )
        lines_here = limits.get(name, {}).items()
        for style, (limit, threshold) in zip(("-", ":"), lines_here, strict=False):
            axes.axvline(threshold, color="black", lw=1, ls=style, label=limit)
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel("rows (%)")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, fontsize=8)
    return figure

"""Find the settings that a grid varies alone, and draw scores over them."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from dalorra_core.bench.store import Result
from dalorra_core.report.bench_plots import Curve, Score, SweepPanel, sweep

__all__ = ["sweep_figures"]

_SWEPT = (
    "adapter.r",
    "method.prior_prob",
    "method.tau",
    "method.kl_weight",
    "method.drop_prob",
    "optim.lr",
    "data.train_rows",
    "data.per_class",
    "predictive.num_samples",
)
_LEAST_POINTS = 3

_Values = Sequence[tuple[Result, float | None]]


def sweep_figures(values: Mapping[str, _Values], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return a figure for each setting of which a method has three values on a task.

    Runs belong to one curve when they differ in nothing but that setting and the seed.

    Args:
        values: Metric to its value for each result.
        labels: Metric to the text at its axis; fractions are shown in percent.
    """
    figures = {}
    for key in _SWEPT:
        panels = [
            SweepPanel(labels[metric], curves)
            for metric, found in values.items()
            if (curves := _curves(found, key, percent="%" in labels[metric]))
        ]
        if panels:
            name = key.replace(".", "-").replace("_", "-")
            figures[f"sweep-{name}"] = sweep(panels, x_label=key, title=f"{key} varied alone")
    return figures


def _curves(found: _Values, key: str, *, percent: bool) -> tuple[Curve, ...]:
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    names: dict[str, str] = {}
    for result, value in found:
        x, rest = _apart(result, key)
        if value is not None and x is not None:
            points[rest][x].append(100 * value if percent else value)
            names.setdefault(rest, f"{result.label} / {result.task}")
    return tuple(
        Curve(names[rest], tuple(xs), tuple(_score(of_x[x]) for x in xs))
        for rest, of_x in points.items()
        if len(xs := sorted(of_x)) >= _LEAST_POINTS
    )


def _apart(result: Result, key: str) -> tuple[float | None, str]:
    """Return a setting's value, None where there is no number, and the text of all others."""
    settings: Any = json.loads(json.dumps(result.settings))
    settings["name"], settings["run"]["seed"] = result.task, None
    group, name = key.split(".")
    value = settings[group].pop(name, None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    tempered = any(one.tempered for one in result.evaluations)
    return (float(value) if is_number else None), json.dumps([settings, tempered], sort_keys=True)


def _score(values: Sequence[float]) -> Score:
    return Score(fmean(values), stdev(values) if len(values) > 1 else None)

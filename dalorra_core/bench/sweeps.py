"""Find the settings that a grid varies alone, and draw scores over them."""

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dalorra_core.bench.store import Result
from dalorra_core.data.tasks import TASK_PREFIX, find_task
from dalorra_core.report.bench_plots import Curve, Score, SweepPanel, sweep

__all__ = ["SWEPT", "sweep_figures"]

SWEPT = (
    "adapter.r",
    "method.prior_prob",
    "method.tau",
    "method.kl_weight",
    "method.drop_prob",
    "method.num_dropped",
    "optim.lr",
    "data.train_rows",
    "data.per_class",
    "predictive.num_samples",
)
"""Settings that a figure is made of where a grid varies them."""

_LEAST_POINTS = 3

_Values = Sequence[tuple[Result, float | None]]


def sweep_figures(values: Mapping[str, _Values], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return a figure for each setting of which a method has three values on a task.

    Runs belong to one curve when they differ in nothing but that setting and the seed. Over the
    rank there are two kinds of curves: ``lora_alpha`` the same, and ``lora_alpha / r`` the same.
    Beside random masking (``method.num_dropped``) stands learned masking: the first ``dalorra`` of
    the grid with the same adapter, data and base.

    Args:
        values: Metric to its value for each result; cells that share a run count once.
        labels: Metric to the text at its axis; fractions are shown in percent.
    """
    figures = {}
    for key in SWEPT:
        learned = _Learned() if key == "method.num_dropped" else None
        panels = [
            SweepPanel(labels[metric], curves)
            for metric, found in values.items()
            if (curves := _curves(_once(found, 100 if "%" in labels[metric] else 1), key, learned))
        ]
        if panels:
            name = key.replace(".", "-").replace("_", "-")
            title, dashed = f"{key} varied alone", "reference"
            if learned is not None and learned.labels:
                title = "learned against random masking"
                dashed = f"learned ({', '.join(learned.labels)})"
            figures[f"sweep-{name}"] = sweep(
                panels, x_label=key, title=title, reference_name=dashed
            )
    return figures


@dataclass(frozen=True)
class _Run:
    """One run, tempered or not, with its value in the unit of the axis."""

    result: Result
    value: float

    @property
    def settings(self) -> dict[str, Any]:
        """All settings without name and seed; a copy."""
        found: Any = copy.deepcopy(self.result.settings)
        found["name"] = found["run"]["seed"] = None
        return found | {"tempered": _tempered(self.result)}


def _once(found: _Values, scale: float) -> list[_Run]:
    """Return the runs that have a value, each once whatever number of labels it has."""
    runs: dict[tuple[str, bool], _Run] = {}
    for result, value in found:
        if value is not None:
            place = (result.key, _tempered(result))
            runs.setdefault(place, _Run(result, scale * value))
    return list(runs.values())


def _tempered(result: Result) -> bool:
    return any(one.tempered for one in result.evaluations)


class _Learned:
    """Finds the runs that a curve of random masking is held against."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def beside(self, runs: Sequence[_Run], one: _Run) -> Score | None:
        """Return the score of the first method ``dalorra`` that has a run's circumstances."""
        alike = [
            run
            for run in runs
            if run.settings["method"]["name"] == "dalorra" and _around(run) == _around(one)
        ]
        if not alike:
            return None
        label = alike[0].result.label
        if label not in self.labels:
            self.labels.append(label)
        return _score([run.value for run in alike if run.result.label == label])


def _around(run: _Run) -> list[Any]:
    return [run.settings[name] for name in ("base", "adapter", "data", "tempered")]


def _curves(runs: Sequence[_Run], key: str, learned: _Learned | None) -> tuple[Curve, ...]:
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    members: dict[str, list[_Run]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for run in runs:
        x = _place(run, key)
        if x is None:
            continue
        for rest, kind in _apart(run, key):
            points[rest][x].append(run.value)
            members[rest].append(run)
            kinds[rest] = kind
    curves: list[Curve] = []
    for rest, of_x in points.items():
        xs = sorted(of_x)
        if len(xs) >= _LEAST_POINTS:
            name = _name(members[rest], key) + kinds[rest]
            reference = None if learned is None else learned.beside(runs, members[rest][0])
            curves.append(Curve(name, tuple(xs), tuple(_score(of_x[x]) for x in xs), reference))
    return tuple(curves)


def _place(run: _Run, key: str) -> float | None:
    """Return a run's value of a setting, None where there is no number."""
    group, name = key.split(".")
    value: object = run.settings[group].get(name)
    if key == "data.train_rows" and _takes_all_there_are(run.settings["data"]):
        value = run.result.sizes.get("train")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _takes_all_there_are(data: Mapping[str, Any]) -> bool:
    """Return whether the number of training rows is not said, but no subset by class either."""
    source = str(data["source"])
    if data["train_rows"] == "all":
        return True
    if data["train_rows"] is not None or data["per_class"] is not None:
        return False
    is_task = source.startswith(TASK_PREFIX)
    return is_task and find_task(source.removeprefix(TASK_PREFIX)).per_class is None


def _apart(run: _Run, key: str) -> list[tuple[str, str]]:
    """Return the text of all other settings and what it adds to a curve's name."""
    settings = run.settings
    group, name = key.split(".")
    value = settings[group].pop(name)
    if key != "adapter.r":
        return [(_text(settings), "")]
    alpha = settings["adapter"].pop("lora_alpha")
    return [
        (_text([settings, kind, size]), f", {kind} {size:g}")
        for kind, size in (("alpha", alpha), ("alpha/r", alpha / value))
    ]


def _name(runs: Sequence[_Run], key: str) -> str:
    """Return the name of a curve of these runs: method and task.

    Each value may have an entry of its own in the grid. Then the method is called what it is called
    everywhere, and a task whose rows vary what its source is.
    """
    first = runs[0]
    alike = len({run.result.label for run in runs}) == 1
    method = first.result.label if alike else first.settings["method"]["name"]
    if not key.startswith("data."):
        return f"{method} / {first.result.task}"
    return f"{method} / {first.settings['data']['source'].removeprefix(TASK_PREFIX)}"


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def _score(values: Sequence[float]) -> Score:
    return Score(fmean(values), stdev(values) if len(values) > 1 else None)

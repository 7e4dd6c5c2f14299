"""Markdown tables of a bench: methods by columns, one table a metric, marked where it is supported.

A column is a test set: a task's own rows, or the rows of another task under the same runs.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from torch import Tensor

from dalorra_core.metrics.paired import (
    MIN_SEEDS,
    PairedDifference,
    SeedScores,
    holm,
    paired_difference,
    standing,
)
from dalorra_core.metrics.scored import METRICS, ScoredRows, metric_scores, with_outside

__all__ = [
    "TABLE_METRICS",
    "Cell",
    "MetricTable",
    "RunResult",
    "column_scores",
    "difference_markdown",
    "metric_table",
    "results_markdown",
    "table_markdown",
]

_FIRST = ("accuracy", "ece", "adaptive_ece", "classwise_ece", "nll")
TABLE_METRICS = (*_FIRST, *(name for name in METRICS if name not in _FIRST))
"""What ``results_markdown`` shows unless told otherwise; a table without any number is left out."""

_SIGNIFICANCE = 0.05
_NAMES = {
    "accuracy": "Accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "adaptive_ece": "Adaptive ECE",
    "classwise_ece": "Class-wise ECE",
    "brier": "Brier score",
    "aurc": "AURC",
    "augrc": "AUGRC",
    "auroc_error_": "AUROC of finding errors by",
    "auroc_oos_": "AUROC of finding rows out of distribution by",
}
_NATURAL = {"nll": "nats", "brier": "0 to 2"}  # the others are fractions, shown in percent
_MISSING = "-"


@dataclass(frozen=True, eq=False)
class RunResult:
    """One run of one method, scored on one column.

    Attributes:
        method: Row of the tables.
        column: Column of the tables.
        seed: Of the training run.
        metrics: Name to value, in the unit of ``dalorra_core.metrics``; None where undefined.
        noise_floors: Metric to what it would be of a calibrated model with these probabilities; see
            ``dalorra_core.metrics.noise_floors``.
        rows: The answers behind the numbers; None: no paired test, and no mark.
        in_rows: For a column of another task's rows: the same run's answers to its own task, which
            those rows are told from in ``auroc_oos_*``.
    """

    method: str
    column: str
    seed: int
    metrics: Mapping[str, float | None]
    noise_floors: Mapping[str, float]
    rows: ScoredRows | None
    in_rows: ScoredRows | None = None


@dataclass(frozen=True)
class Cell:
    """What a table says of one method on one column, in the metric's own unit.

    Attributes:
        mean: Over seeds.
        std: Sample standard deviation over seeds; None for one seed.
        num_seeds: Runs with a defined value.
        noise_floor: Mean of what calibrated models would show; None where none is known.
        mark: ``best`` or ``second`` where the paired test supports it, else None; equal methods
            share one.
    """

    mean: float
    std: float | None
    num_seeds: int
    noise_floor: float | None = None
    mark: str | None = None


@dataclass(frozen=True)
class MetricTable:
    """One metric for all methods and columns.

    Attributes:
        metric: Key of ``METRICS``.
        methods: Rows, in order.
        columns: Columns, in order.
        cells: By (method, column); those without a number are not there.
        other_rows: The (method, column) that were scored on other rows than most of the column's
            methods: shown, but in no test.
    """

    metric: str
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    other_rows: tuple[tuple[str, str], ...] = ()


def column_scores(
    results: Sequence[RunResult], metric: str, *, num_resamples: int = 2000
) -> dict[str, dict[str, SeedScores]]:
    """Return what the paired tests of one metric need: column to method to scores.

    Args:
        results: In any order; those without rows or without a value of the metric are left out, and
            so are methods that answered other rows than most of the runs of a column.
        metric: Key of ``METRICS``.
        num_resamples: Of the rows, the same ones for all methods of a column.
    """
    runs: dict[str, dict[str, dict[int, ScoredRows]]] = defaultdict(lambda: defaultdict(dict))
    groups: dict[str, Tensor | None] = {}
    found, strangers = _answered(results, metric)
    for result, rows in found:
        if (result.method, result.column) not in strangers:
            together = groups.setdefault(result.column, rows.groups)
            alike = replace(rows, groups=together)  # one draw of the rows for all methods
            runs[result.column][result.method][result.seed] = alike
    return {
        column: {
            method: metric_scores(metric, by_seed, num_resamples=num_resamples)
            for method, by_seed in methods.items()
        }
        for column, methods in runs.items()
    }


def metric_table(
    results: Sequence[RunResult], metric: str, scores: Mapping[str, Mapping[str, SeedScores]]
) -> MetricTable:
    """Return the table of one metric; rows and columns in the order of their first result.

    Args:
        results: All results.
        metric: Key of ``METRICS``.
        scores: Of ``column_scores``; a column that is not there gets no marks.
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    floors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        place, value = (result.method, result.column), _value(result, metric)
        if value is not None:
            values[place].append(value)
            if metric in result.noise_floors:
                floors[place].append(result.noise_floors[metric])
    marks: dict[tuple[str, str], str] = {}
    for column, methods in scores.items():
        found = standing(methods, higher_is_better=METRICS[metric].higher_is_better)
        marks |= dict.fromkeys(((method, column) for method in found.best), "best")
        marks |= dict.fromkeys(((method, column) for method in found.second), "second")
    cells = {
        place: Cell(
            mean=fmean(of_seeds),
            std=stdev(of_seeds) if len(of_seeds) > 1 else None,
            num_seeds=len(of_seeds),
            noise_floor=fmean(floors[place]) if place in floors else None,
            mark=marks.get(place),
        )
        for place, of_seeds in values.items()
    }
    return MetricTable(
        metric,
        tuple(m for m in _in_order(results, "method") if any(m == place[0] for place in cells)),
        tuple(c for c in _in_order(results, "column") if any(c == place[1] for place in cells)),
        cells,
        _answered(results, metric)[1] if scores else (),
    )


def table_markdown(table: MetricTable) -> str:
    """Return a table in Markdown with its heading and what the marks mean."""
    most = max((cell.num_seeds for cell in table.cells.values()), default=0)
    lines = [f"### {_heading(table.metric)}", "", *_head(table.columns)]
    for method in table.methods:
        shown = [
            _cell(table.metric, table.cells.get((method, column)), most) for column in table.columns
        ]
        lines.append(_line([_escaped(method), *shown]))
    return "\n".join([*lines, "", _caption(table, most), ""])


def difference_markdown(
    metric: str, scores: Mapping[str, Mapping[str, SeedScores]], reference: str
) -> str:
    """Return a table of each method's paired difference to one of them.

    Args:
        metric: Key of ``METRICS``.
        scores: Of ``column_scores``.
        reference: The method that the others are compared with.

    Returns:
        Markdown: value with 95 % interval and p-value, Holm-adjusted over the methods of a column.
        Empty where there is nothing to compare.
    """
    shown: dict[tuple[str, str], str] = {}
    for column, methods in scores.items():
        found = _differences(methods, reference)
        adjusted = holm([difference.p_value for difference in found.values()])
        for (method, difference), p_value in zip(found.items(), adjusted, strict=True):
            shown[method, column] = _difference(metric, difference, p_value)
    if not shown:
        return ""
    columns = [column for column in scores if any(column == place[1] for place in shown)]
    methods = dict.fromkeys(method for of in scores.values() for method in of)
    lines = [f"### {_heading(metric)}: difference to {_escaped(reference)}", "", *_head(columns)]
    lines += [
        _line([_escaped(method), *(shown.get((method, c), _MISSING) for c in columns)])
        for method in methods
        if any(method == place[0] for place in shown)
    ]
    caption = (
        "Mean difference over the seeds that both have, 95 % interval over rows and seeds, p-value "
        "with Holm's correction over the methods of a column; bold: below 0.05."
    )
    if metric.endswith("ece"):
        caption += (
            " Noise raises an ECE; the interval takes a part of that out, so the value need not be "
            "in its middle, and small differences between small ECEs say little."
        )
    if any("†" in text for text in shown.values()):
        caption += (
            f" † fewer than {MIN_SEEDS} common seeds: with one the interval leaves out training "
            "noise and is too narrow, with two it rests on an assumption that two cannot check."
        )
    return "\n".join([*lines, "", caption, ""])


def results_markdown(
    results: Sequence[RunResult],
    *,
    metrics: Sequence[str] = TABLE_METRICS,
    reference: str | None = None,
    num_resamples: int = 2000,
) -> str:
    """Return all tables of a bench.

    Args:
        results: Every run on every column.
        metrics: Keys of ``METRICS``; one that no result has is left out.
        reference: Method for tables of differences; None leaves them out.
        num_resamples: Of the rows.
    """
    parts: list[str] = []
    for metric in metrics:
        scores = column_scores(results, metric, num_resamples=num_resamples)
        table = metric_table(results, metric, scores)
        if table.cells:
            parts.append(table_markdown(table))
        if reference is not None:
            parts.append(difference_markdown(metric, scores, reference))
    return "\n".join(part for part in parts if part)


def _value(result: RunResult, metric: str) -> float | None:
    value = result.metrics.get(metric)
    return None if value is None or math.isnan(value) else value


def _rows(result: RunResult, metric: str) -> ScoredRows | None:
    """Return the rows that a metric is about."""
    if result.rows is None or result.in_rows is None or not METRICS[metric].detects_outside:
        return result.rows
    return with_outside(result.in_rows, result.rows)


def _answered(
    results: Sequence[RunResult], metric: str
) -> tuple[list[tuple[RunResult, ScoredRows]], tuple[tuple[str, str], ...]]:
    """Return the results with rows of a metric, and (method, column) of those on other rows."""
    found: list[tuple[RunResult, ScoredRows]] = []
    for result in results:
        rows = _rows(result, metric)
        if rows is not None and _value(result, metric) is not None:
            found.append((result, rows))
    counts: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for result, rows in found:
        counts[result.column][rows.ids] += 1
    usual = {column: of.most_common(1)[0][0] for column, of in counts.items()}
    strangers = dict.fromkeys(
        (result.method, result.column) for result, rows in found if rows.ids != usual[result.column]
    )
    return found, tuple(strangers)


def _in_order(results: Sequence[RunResult], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(result, field) for result in results))


def _differences(methods: Mapping[str, SeedScores], reference: str) -> dict[str, PairedDifference]:
    """Return the differences that are defined, of methods that share a seed with the reference."""
    if reference not in methods:
        return {}
    base = methods[reference]
    return {
        name: paired_difference(scores, base)
        for name, scores in methods.items()
        if name != reference and set(scores.seeds) & set(base.seeds)
    }


def _heading(metric: str) -> str:
    name = _NAMES.get(metric)
    if name is None:
        kind = next(start for start in _NAMES if metric.startswith(start))
        name = f"{_NAMES[kind]} {metric.removeprefix(kind).replace('_', ' ')}"
    better = "higher" if METRICS[metric].higher_is_better else "lower"
    return f"{name} ({_NATURAL.get(metric, '%')}, {better} is better)"


def _number(metric: str, value: float, *, sign: bool = False) -> str:
    """Return a value in the unit that its table shows."""
    text = f"{value:+.3f}" if metric in _NATURAL else f"{100 * value:+.2f}"
    return text if sign else text.removeprefix("+")


def _cell(metric: str, cell: Cell | None, most: int) -> str:
    if cell is None:
        return _MISSING
    text = _number(metric, cell.mean)
    if cell.std is not None:
        text += f" ± {_number(metric, cell.std)}"
    if cell.mark is not None:
        text = f"**{text}**" if cell.mark == "best" else f"<ins>{text}</ins>"
    if cell.noise_floor is not None:
        text += f" ({_number(metric, cell.noise_floor)})"
    if cell.num_seeds < most:
        text += f" [{_seeds(cell.num_seeds)}]"
    return text


def _difference(metric: str, found: PairedDifference, p_value: float) -> str:
    value = _number(metric, found.value, sign=True)
    if math.isnan(found.p_value):
        return f"{value} [undefined]"
    low, high = (_number(metric, end, sign=True) for end in (found.low, found.high))
    text = f"{value} [{low}, {high}], p {p_value:.3f}"
    if not found.trusted:
        return f"{text} †"
    return f"**{text}**" if p_value < _SIGNIFICANCE else text


def _caption(table: MetricTable, most: int) -> str:
    spread = ", ± sample standard deviation" if most > 1 else ""
    parts = [f"Mean over {_seeds(most)}{spread}."]
    if any(cell.noise_floor is not None for cell in table.cells.values()):
        parts.append(
            "In brackets: what perfectly calibrated models with these probabilities would show on "
            "as many rows; values near it cannot be told from it."
        )
    if table.other_rows:
        named = ", ".join(f"{_escaped(method)} on {_escaped(c)}" for method, c in table.other_rows)
        parts.append(f"In no test, since scored on other rows than most: {named}.")
    marks = [(place[1], cell.mark) for place, cell in table.cells.items() if cell.mark is not None]
    if marks:
        parts.append(
            "Bold: the best mean, and better than every other method; underlined: the second best "
            "mean, and better than every method after it. Only where paired tests over the same "
            "rows and seeds say so (p < 0.05, with Holm's correction)."
        )
        if len(set(marks)) < len(marks):
            parts.append("Methods that score the same on every resample of the rows share a mark.")
    elif most < MIN_SEEDS:
        parts.append(
            f"Nothing is marked: with fewer than {MIN_SEEDS} seeds a better method cannot be told "
            "from a lucky run."
        )
    else:
        parts.append("Nothing is marked: no paired test supports a best method.")
    return " ".join(parts)


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _head(columns: Sequence[str]) -> list[str]:
    return [
        _line(["", *(_escaped(column) for column in columns)]),
        _line(["---", *("---:" for _ in columns)]),
    ]


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _escaped(text: str) -> str:
    """Return a label from a grid file as plain text: no markup, no new cell or line."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>|#~" else c for c in flat)

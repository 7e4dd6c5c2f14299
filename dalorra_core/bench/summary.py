"""Results of a bench -> tables and figures; reads files, measures nothing and loads no model."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from dalorra_core.artifact.placing import place_file
from dalorra_core.artifact.store import load_artifact
from dalorra_core.bench.grid import Grid
from dalorra_core.bench.keys import IN
from dalorra_core.bench.store import (
    GRID_FILE,
    Evaluation,
    Result,
    read_results,
    read_scores,
    run_directory,
)
from dalorra_core.bench.sweeps import sweep_figures
from dalorra_core.errors import ArtifactError, DataError
from dalorra_core.methods import METHODS
from dalorra_core.metrics.scored import ScoredRows, noise_floors
from dalorra_core.metrics.selective import risk_coverage_curve
from dalorra_core.predictive.matching import state_of
from dalorra_core.report.bench_plots import (
    CostPoint,
    GroupPanel,
    Score,
    grouped,
    posterior_heat_maps,
    posterior_maps,
    risk_coverage_by_method,
    score_against_cost,
)
from dalorra_core.report.plots import check_plotting, reliability_diagram, save_figures
from dalorra_core.report.reliability import reliability
from dalorra_core.report.tables import RunResult, results_markdown

__all__ = ["write_report"]

_RUN_COLUMNS = (
    "method",
    "task",
    "seeds",
    "trained parameters",
    "stored besides LoRA",
    "training, s",
    "training NLL",
    "temperature",
)
_RUN_CAPTION = (
    "Means over seeds. Training time is wall time with a fit that follows; a run that was "
    "interrupted has none. Training NLL is of training rows under the default predictive, nats a "
    "row."
)
_PANELS = {"accuracy": "accuracy (%)", "ece": "ECE (%)", "nll": "NLL (nats)"}


@dataclass(frozen=True, eq=False)
class _Scored:
    """One evaluation with its rows."""

    result: Result
    evaluation: Evaluation
    rows: ScoredRows


def write_report(out: Path) -> list[Path]:
    """Write ``<out>/report``: tables.md and figures; return the files.

    Raises:
        ConfigError: There are no results, or no matplotlib.
        DataError: Grid, results or scores are not what was written, or nothing was scored.
    """
    check_plotting()
    results, grid = read_results(out), _grid(out)
    scored = [
        _Scored(result, one, _rows(out / one.scores, one.scores_sha256))
        for result in results
        if result.status == "done"
        for one in result.evaluations
    ]
    if not scored:
        raise DataError(f"{out}: no run is done, there is nothing to report")
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    tables = folder / "tables.md"
    place_file(tables, _tables(grid, results, scored).encode())
    return [tables, *save_figures(folder, _figures(out, results, scored))]


def _grid(out: Path) -> Grid:
    path = out / GRID_FILE
    try:
        return Grid.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read; `dalorra bench run` writes it again: {error}"
        ) from error


def _rows(path: Path, sha256: str) -> ScoredRows:
    found = read_scores(path, sha256)
    return ScoredRows(
        found.labels, found.log_mean_probs, found.scores, found.ids, groups=found.groups
    )


# --- tables -----------------------------------------------------------------------------------


def _tables(grid: Grid, results: Sequence[Result], scored: Sequence[_Scored]) -> str:
    parts = ["# Results\n", _machine(results)]
    reference = next(iter(grid.methods))
    if missing := _missing(grid, results):
        parts += ["## Missing cells\n", missing]
    for predictive in dict.fromkeys(one.evaluation.predictive for one in scored):
        chosen = _run_results([one for one in scored if one.evaluation.predictive == predictive])
        parts += [f"## {predictive}\n", results_markdown(chosen, reference=reference)]
    parts += ["## Runs\n", _runs(results)]
    if failures := _failures(results):
        parts += ["## Failed runs\n", failures]
    return "\n".join(parts)


def _run_results(scored: Sequence[_Scored]) -> list[RunResult]:
    """Return the cells of the tables; sets out of distribution have columns of their own."""
    inside = {_run(one): one for one in scored if one.evaluation.set == IN}
    return [_run_result(one, inside.get(_run(one))) for one in scored]


def _run(one: _Scored) -> tuple[str, str, int]:
    return one.result.label, one.result.task, one.result.seed


def _run_result(one: _Scored, inside: _Scored | None) -> RunResult:
    """Return one evaluation as a cell; ``inside`` is the run's own set, which detection needs."""
    recorded = one.evaluation.ece_noise_floor
    floors = {} if recorded is None else noise_floors(one.rows) | {"ece": recorded[0]}
    return RunResult(
        method=one.result.label,
        column=_column(one),
        seed=one.result.seed,
        metrics={name: interval.value for name, interval in one.evaluation.metrics.items()},
        noise_floors=floors,
        rows=one.rows,
        in_rows=None if inside is None or one.evaluation.set == IN else inside.rows,
    )


def _column(one: _Scored) -> str:
    task, name = one.result.task, one.evaluation.set
    return task if name == IN else f"{task} on {name}"


def _machine(results: Sequence[Result]) -> str:
    known = [result.provenance for result in results if result.provenance]
    lines = [
        f"- {name}: {', '.join(sorted({str(one[name]) for one in known if name in one}))}"
        for name in ("hardware", "device", "dtype", "threads", "dalorra", "torch", "python")
    ]
    return "\n".join([*lines, ""])


def _runs(results: Sequence[Result]) -> str:
    """Return what training cost and reached, a line for each method and task."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.status == "done":
            groups[result.label, result.task].append(result)
    lines = [f"| {' | '.join(_RUN_COLUMNS)} |", f"|---|---|{'---:|' * (len(_RUN_COLUMNS) - 2)}"]
    for (label, task), group in groups.items():
        temperatures = [e.temperature for r in group for e in r.evaluations[:1] if e.tempered]
        cells = [
            label,
            task,
            str(len(group)),
            _mean((r.trained_parameters for r in group), ",.0f"),
            _mean((r.extra_parameters for r in group), ",.0f"),
            _mean((r.train_seconds for r in group), ",.1f"),
            _mean((r.train_nll for r in group), ".4f"),
            _mean(temperatures, ".3f"),
        ]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, "", _RUN_CAPTION, ""])


def _missing(grid: Grid, results: Sequence[Result]) -> str:
    """Return the cells of the grid that the tables are without; differences need the first one."""
    status = {(r.label, r.task, r.seed): r.status for r in results}
    lines = [
        f"- {_cell(label)}, {entry.name}, seed {seed}: {found}"
        for label in grid.methods
        for entry in grid.tasks
        for seed in grid.seeds
        if (found := status.get((label, entry.name, seed), "not run")) != "done"
    ]
    if not lines:
        return ""
    reference = _cell(next(iter(grid.methods)))
    note = f"Means are over the seeds that are there; differences are to {reference}."
    return "\n".join([*lines, "", note, ""])


def _failures(results: Sequence[Result]) -> str:
    return "\n".join(
        f"- {_cell(r.label)}, {r.task}, seed {r.seed}: {_cell(' '.join((r.error or '').split()))}"
        for r in results
        if r.status == "failed"
    )


def _mean(values: Iterable[float | None], form: str) -> str:
    there = [value for value in values if value is not None]
    return format(fmean(there), form) if there else "-"


def _cell(text: str) -> str:
    """Return text as it is in a table of Markdown."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>|#~" else c for c in text)


# --- figures ----------------------------------------------------------------------------------


def _figures(out: Path, results: Sequence[Result], scored: Sequence[_Scored]) -> dict[str, Any]:
    """Return the figures of the first predictive, by file name."""
    first = scored[0].evaluation.predictive
    shown = [one for one in scored if one.evaluation.predictive == first]
    inside = [one for one in shown if one.evaluation.set == IN]
    figures = {"overview": _overview(shown)}
    for task in dict.fromkeys(one.result.task for one in inside):
        own = [one for one in inside if one.result.task == task]
        figures[f"reliability-{task}"] = _reliability(own, task)
        figures[f"risk-coverage-{task}"] = _risk_coverage(own, task)
        figures |= _costs(own, task)
    values = {
        name: [(one.result, one.evaluation.metrics[name].value) for one in inside]
        for name in _PANELS
    }
    return figures | _posteriors(out, results) | sweep_figures(values, _PANELS)


def _overview(scored: Sequence[_Scored]) -> Any:
    known = [one for one in scored if "accuracy" in one.evaluation.metrics]
    columns = list(dict.fromkeys(_column(one) for one in known))
    panels = []
    for metric, label in _PANELS.items():
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        for one in known:
            value = one.evaluation.metrics[metric].value
            if value is not None:
                values[one.result.label, _column(one)].append(_shown(metric, value))
        methods = dict.fromkeys(one.result.label for one in known)
        scores = {m: tuple(_score(values.get((m, c), [])) for c in columns) for m in methods}
        panels.append(GroupPanel(label, tuple(columns), scores))
    return grouped(panels, title="All methods")


def _reliability(scored: Sequence[_Scored], task: str) -> Any:
    seed = scored[0].result.seed
    diagrams = {
        one.result.label: reliability(
            one.rows.log_mean_probs.double().exp().amax(1),
            _right(one),
            torch.Generator().manual_seed(0),
        )
        for one in scored
        if one.result.seed == seed
    }
    return reliability_diagram(diagrams, f"{task}, seed {seed}")


def _risk_coverage(scored: Sequence[_Scored], task: str) -> Any:
    curves = defaultdict(list)
    for one in scored:
        confidence = one.rows.log_mean_probs.double().exp().amax(1)
        curves[one.result.label].append(risk_coverage_curve(confidence, _right(one)))
    return risk_coverage_by_method(curves, title=task)


def _right(one: _Scored) -> torch.Tensor:
    return one.rows.log_mean_probs.argmax(1) == one.rows.labels


def _costs(scored: Sequence[_Scored], task: str) -> dict[str, Any]:
    """Return accuracy against time in training and in prediction."""
    costs: dict[str, dict[str, list[float]]] = {"training": {}, "prediction": {}}
    accuracy: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        value, label = one.evaluation.metrics["accuracy"].value, one.result.label
        accuracy[label].append(100 * (value or 0.0))
        per_row = 1000 * one.evaluation.seconds / one.evaluation.rows
        for name, cost in (("training", one.result.train_seconds), ("prediction", per_row)):
            if cost:
                costs[name].setdefault(label, []).append(cost)
    labels = {"training": "training time (s)", "prediction": "prediction time (ms a row)"}
    figures = {}
    for name, of_methods in costs.items():
        points = [
            CostPoint(label, fmean(times), Score(fmean(accuracy[label]), _spread(accuracy[label])))
            for label, times in of_methods.items()
        ]
        if points:
            figures[f"cost-{name}-{task}"] = score_against_cost(
                points, x_label=labels[name], y_label="accuracy (%)", title=task
            )
    return figures


def _posteriors(out: Path, results: Sequence[Result]) -> dict[str, Any]:
    """Return heat maps of a method's gates, of its first run on every task."""
    maps: dict[str, dict[str, Any]] = defaultdict(dict)
    priors: dict[str, float] = {}
    seen: set[str] = set()
    for result in results:
        if result.status != "done" or result.task in maps[result.label] or result.key in seen:
            continue
        seen.add(result.key)  # tempered answers are of the same adapter
        try:
            artifact = load_artifact(run_directory(out, result.key) / "artifact")
        except ArtifactError:  # results may be looked at without the adapters
            continue
        config = artifact.manifest.method
        keep = METHODS[config.name].summary(state_of(artifact), config).get("keep_prob")
        prior = getattr(config, "prior_prob", None)
        if keep and prior is not None:
            maps[result.label][result.task] = posterior_maps(keep)
            priors[result.label] = prior
    return {
        f"posterior-{_slug(label)}": posterior_heat_maps(
            of_tasks, prior_prob=priors[label], title=f"{label}: posterior of the gates"
        )
        for label, of_tasks in maps.items()
        if of_tasks
    }


def _score(values: Sequence[float]) -> Score | None:
    return Score(fmean(values), _spread(values)) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _shown(metric: str, value: float) -> float:
    return value if metric == "nll" else 100 * value


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "method"

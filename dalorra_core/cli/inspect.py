"""``dalorra inspect``."""

import json
from collections import defaultdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.artifact.calibration_record import Calibration
from dalorra_core.artifact.store import MANIFEST_FILE, Artifact, load_artifact
from dalorra_core.cli.calibration_plan import plan_text
from dalorra_core.cli.calibration_summary import policy_text
from dalorra_core.cli.console import errors_as_exit
from dalorra_core.cli.options import AdapterArgument
from dalorra_core.config import PredictiveConfig
from dalorra_core.methods import METHODS
from dalorra_core.predictive.matching import state_of

__all__ = ["inspect_command"]


def inspect_command(
    adapter: AdapterArgument,
    as_json: Annotated[  # noqa: FBT002  a command-line flag
        bool, typer.Option("--json", help="Everything as one JSON object.")
    ] = False,
) -> None:
    """Verify an artifact and show what is in it; the base model is not needed.

    Every byte is checked against its sha256 first. Shown are the method and its settings, the
    base model's fingerprint, the labels and their tokens, the adapted modules, the
    keep-probabilities and the expected rank per layer, the policies, where the adapter comes from
    (data, steps, versions) and the sizes.

    **Example**

    `dalorra inspect adapters/clinc150`

    Exit status: 0 sound; 1 a file is missing, changed, unsafe, of a newer format, or inconsistent.
    """
    with errors_as_exit():
        artifact = load_artifact(adapter)
        settings = artifact.manifest.method
        summary = METHODS[settings.name].summary(state_of(artifact), settings)
        if as_json:
            values = artifact.manifest.model_dump(mode="json")
            values |= {
                "sha256": artifact.sha256,
                "posterior": summary,
                "sizes_bytes": _sizes(artifact),
            }
            typer.echo(json.dumps(values, indent=1, ensure_ascii=False))
            return
        _show(artifact, summary)


def _sizes(artifact: Artifact) -> dict[str, int]:
    names = (MANIFEST_FILE, *sorted(artifact.manifest.files))
    return {name: (artifact.directory / name).stat().st_size for name in names}


def _show(artifact: Artifact, summary: dict[str, Any]) -> None:
    m, console = artifact.manifest, Console(soft_wrap=True, highlight=False, markup=False)
    settings = ", ".join(f"{k} {v}" for k, v in m.method.model_dump().items() if k != "name")
    parameters = sum(t.numel() for t in artifact.tensors.values())
    lines = {
        "name": f"{m.name} (revision {artifact.revision}, format version {m.format_version})",
        "method": m.method.name + (f": {settings}" if settings else ""),
        "predictive": _predictive_text(m.predictive),
        "base": f"{m.base.id}, {m.base.fingerprint}",
        "labels": f"{len(m.labels.labels)}: {', '.join(m.labels.labels[:6])}"
        + (" ..." if len(m.labels.labels) > 6 else ""),  # noqa: PLR2004  a line's worth
        "prompt": f"{m.prompt.kind} {m.prompt.name}: {m.prompt.template!r}, at most "
        f"{m.prompt.max_tokens} tokens",
        "adapter": f"{len(m.modules)} modules, r {m.r}, lora_alpha {m.lora_alpha:g}, "
        f"{parameters} parameters",
        "sizes": ", ".join(f"{n} {s / 1e6:.2f} MB" for n, s in _sizes(artifact).items()),
        "golden": f"{len(m.golden)} stored probes",
    }
    for name, text in lines.items():
        console.print(f"{name:<11}{text}")
    for policy in m.policies:
        console.print(f"{'policy':<11}{policy_text(policy)}")
    if m.calibration is not None:
        if m.calibration.plan is not None:
            console.print(f"{'plan':<11}{plan_text(m.calibration.plan)}")
        console.print(f"{'calibrated':<11}{_calibration_text(m.calibration)}")
    for name in (
        "created_at",
        "from_adapter",
        "dalorra",
        "torch",
        "device",
        "steps",
        "seconds",
        "data",
        "validation",
    ):
        if name in m.provenance:
            console.print(f"{name:<11}{_compact(m.provenance[name])}")
    scalars = {k: v for k, v in summary.items() if isinstance(v, float | int | str)}
    if scalars:
        console.print(f"{'posterior':<11}{_compact(scalars)}")
    if "keep_prob" in summary:
        quantiles = "  ".join(f"{q}: {p:.3f}" for q, p in summary["keep_prob_quantiles"].items())
        console.print(f"{'keep prob':<11}quantiles  {quantiles}")
        table = _keep_table(artifact, summary)
        Console(width=12 + 16 * len(table.columns)).print(table)


def _predictive_text(predictive: PredictiveConfig) -> str:
    samples = f"M = {predictive.num_samples}, seed {predictive.seed}, {predictive.design}"
    return samples if predictive.estimator == "monte_carlo" else f"linearised (samples: {samples})"


def _calibration_text(c: Calibration) -> str:
    sets = ", ".join(f"{s.kind} {1 - s.alpha:g}" for s in c.prediction_sets)
    without = ", ".join(f"{u.target_risk:g}" for u in c.uncertified if u.label is None)
    return (
        f"{c.date} on {c.rows.n} rows of {c.rows.source} ({c.rows.n_out_of_scope} out of scope), "
        f"temperature {c.temperature.value:.4f}, prediction sets: {sets}"
        + (f"; not certified: {without}" if without else "")
    )


def _compact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_compact(v)}" for k, v in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _keep_table(artifact: Artifact, summary: dict[str, Any]) -> Table:
    """Return mean keep probability and expected rank, one row a layer, one column a projection."""
    cells: dict[int | None, dict[str, str]] = defaultdict(dict)
    for module in artifact.manifest.modules:
        kind = LM_HEAD if module.layer is None else module.name.rpartition(".")[2]
        keep = summary["keep_prob"][module.name]
        rank = summary["expected_rank"][module.name]
        cells[module.layer][kind] = f"{sum(keep) / len(keep):.2f} / {rank:.1f}"
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    table = Table(title="mean keep probability / expected rank", title_justify="left")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for layer, row in cells.items():
        table.add_row("-" if layer is None else str(layer), *(row.get(k, "") for k in kinds))
    return table

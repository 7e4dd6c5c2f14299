"""What certified policies do on test rows, beside plain thresholds at the same measured risk.

    python benchmarks/selective_coverage.py ADAPTER SCORES [--out FILE]

SCORES is what ``dalorra evaluate ADAPTER --scores`` wrote, after ADAPTER was calibrated, for rows
that took no part in training or calibration. For every policy with a certificate: its coverage and
measured risk on these rows, and the coverage that a threshold on the maximum probability alone
(and on predictive entropy alone) would have had at exactly that measured risk. Those thresholds are
chosen on the test rows themselves, which no application could do: they are the best such a
threshold could have been.

``one_threshold`` is the published rule for CLINC150 (Larson et al. 2019): one threshold, chosen
here on all rows that calibrated the adapter, that maximises the accuracy over labels and "out of
scope". A rejected in-scope row counts as wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dalorra_core.artifact.calibration_record import (
    Calibration,
    MeasuredWith,
    Policy,
    ScoreName,
)
from dalorra_core.artifact.store import load_artifact
from dalorra_core.calibration.combined import combined_score
from dalorra_core.calibration.decisions import decide
from dalorra_core.calibration.scores import ScoreTable, surer
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.calibration.validity import void_reason

_STORED: tuple[ScoreName, ...] = (
    "confidence",
    "predictive_entropy",
    "mutual_information",
    "label_mass",
)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    artifact = load_artifact(options.adapter)
    manifest = artifact.manifest
    if manifest.calibration is None:
        parser.error(f"{options.adapter} is not calibrated: run dalorra calibrate first")
    void = scores_void(options.scores, manifest.calibration)
    if void is not None:
        parser.error(f"certificates of {options.adapter} say nothing about these scores: {void}")
    tensors = load_file(options.scores)
    scores: dict[ScoreName, torch.Tensor] = {
        name: tensors[name].double() for name in _STORED if name in tensors
    }
    if manifest.calibration.combined is not None:
        scores["combined"] = combined_score(manifest.calibration.combined, scores)
    table = ScoreTable(tensors["labels"].long(), tensors["predicted"].long(), scores)
    report = {
        "adapter": manifest.name,
        "n": len(table),
        "out_of_scope_share": float(table.outside.double().mean()),
        "policies": [
            measured(policy, table, manifest.labels.labels)
            for policy in manifest.policies
            if policy.guarantee
        ],
    }
    if artifact.calibration_scores is not None and bool(table.outside.any()):
        stored = StoredRows.from_tensors(artifact.calibration_scores).table
        report["one_threshold"] = {
            name: _one_threshold(name, stored, table)
            for name in ("predictive_entropy", "combined")
            if name in stored.scores
        }
    text = json.dumps(report, indent=1)
    print(text)  # noqa: T201
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


def scores_void(path: Path, calibration: Calibration) -> str | None:
    """Return why scores are about another predictive than the one that was calibrated, or None.

    Files from before scores said what made them are taken on trust, with a word on stderr.
    """
    with safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get("measured_with")
    if found is None:
        sys.stderr.write(f"{path} does not say what made it; is it of the calibrated adapter?\n")
        return None
    here = MeasuredWith.model_validate_json(found)
    return void_reason(calibration.measured_with, here, point_method=False)


def measured(policy: Policy, table: ScoreTable, labels: Sequence[str]) -> dict[str, Any]:
    """Return what a certified policy does on these rows; None where nothing was accepted."""
    assert policy.accept is not None  # noqa: S101 - a certificate is about an accept limit
    assert policy.guarantee is not None  # noqa: S101 - chosen so by the caller
    accept = decide(policy, table, labels).accept
    inside = ~table.outside
    accepted = int(accept.sum())
    risk = int((accept & ~table.correct).sum()) / accepted if accepted else None
    return {
        "policy": policy.name,
        "target_risk": policy.guarantee.target_risk,
        "certified_at_out_of_scope_share": policy.guarantee.out_of_scope_share,
        "score": policy.accept.score,
        "coverage": float(accept.double().mean()),
        "in_scope_coverage": float(accept[inside].double().mean()),
        "out_of_scope_accepted": (
            None if bool(inside.all()) else float(accept[~inside].double().mean())
        ),
        "measured_risk": risk,
        "coverage_at_this_risk": None
        if risk is None
        else {
            name: _coverage_at_risk(name, table, risk)
            for name in ("confidence", "predictive_entropy")
        },
    }


def _coverage_at_risk(name: ScoreName, table: ScoreTable, risk: float) -> float:
    """Return the largest accepted share of a threshold on one score with at most this risk."""
    values, order = surer(name, table.score(name)).sort(descending=True)
    wrong = (~table.correct[order]).double().cumsum(0).numpy()
    accepted = np.arange(1, len(order) + 1)
    last = np.append(np.diff(values.numpy()) != 0, True)  # a threshold takes all that tie with it
    return float(np.where(last & (wrong / accepted <= risk), accepted, 0).max() / len(order))


def _one_threshold(name: ScoreName, chosen_on: ScoreTable, table: ScoreTable) -> dict[str, float]:
    values = surer(name, chosen_on.score(name))

    def gain(threshold: float) -> int:
        answered = values >= threshold
        return int((chosen_on.correct & answered).sum() + (chosen_on.outside & ~answered).sum())

    answered = surer(name, table.score(name)) >= max(values.unique().tolist(), key=gain)
    return {
        "in_scope_accuracy": float((table.correct & answered)[~table.outside].double().mean()),
        "out_of_scope_recall": float((~answered)[table.outside].double().mean()),
    }


if __name__ == "__main__":
    main()

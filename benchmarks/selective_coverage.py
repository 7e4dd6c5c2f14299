"""What certified policies do on test rows, beside plain thresholds at the same measured risk.

    python benchmarks/selective_coverage.py ADAPTER SCORES [--out FILE]

SCORES is what ``dalorra evaluate ADAPTER --scores`` wrote for rows that took no part in training or
calibration. For every policy with a certificate: its coverage and measured risk on these rows, and
the coverage that a threshold on the maximum probability alone (and on predictive entropy alone)
would have had at exactly that measured risk. Those thresholds are chosen on the test rows
themselves, which no application could do: they are the best such a threshold could have been.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dalorra_core.artifact.calibration_record import Policy, ScoreName
from dalorra_core.artifact.store import load_artifact
from dalorra_core.calibration.combined import combined_score
from dalorra_core.calibration.scores import ScoreTable, passes, surer

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
    manifest = load_artifact(options.adapter).manifest
    if manifest.calibration is None:
        parser.error(f"{options.adapter} is not calibrated: run dalorra calibrate first")
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
        "policies": [_policy(policy, table) for policy in manifest.policies if policy.guarantee],
    }
    text = json.dumps(report, indent=1)
    print(text)  # noqa: T201
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


def _policy(policy: Policy, table: ScoreTable) -> dict[str, Any]:
    assert policy.accept is not None  # noqa: S101 - a certificate is about an accept limit
    assert policy.guarantee is not None  # noqa: S101 - chosen so by the caller
    accept = passes(policy.accept, table)
    inside = ~table.outside
    errors = int((accept & ~table.correct).sum())
    risk = errors / int(accept.sum())
    return {
        "policy": policy.name,
        "target_risk": policy.guarantee.target_risk,
        "certified_at_out_of_scope_share": policy.guarantee.out_of_scope_share,
        "score": policy.accept.score,
        "coverage": float(accept.double().mean()),
        "in_scope_coverage": float(accept[inside].double().mean()),
        "out_of_scope_accepted": float(accept[~inside].double().mean()),
        "measured_risk": risk,
        "coverage_at_this_risk": {
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


if __name__ == "__main__":
    main()

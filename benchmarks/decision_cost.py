"""Cost per answered row of what comes after the model: decide, count, observe drift, sign the id.

Made-up answers over 150 labels under a certified policy with a threshold for each label, through
the server's own code. Each repetition times one step over all rows; the steps take turns. Reported
are the median and the quartiles over repetitions, in microseconds per row.

    python benchmarks/decision_cost.py
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hardware import describe_hardware

from server.decision import Verdict
from server.feedback import PredictionSigner
from server.ports import (
    AdapterCard,
    CalibrationCard,
    EncodedRow,
    Guarantee,
    Limit,
    Policy,
    ReferenceProfile,
    RowScores,
    Sampling,
    ScoreReference,
)
from server.ruling import Ruling, rule
from server.schemas.policies import ThresholdPolicy
from server.service import sign
from server.telemetry import DRIFT_EDGES, Telemetry

LABELS = tuple(f"label_{k}" for k in range(150))
GUARANTEE = Guarantee(
    kind="ltt",
    procedure="fixed_sequence",
    target_risk=0.05,
    delta=0.1,
    out_of_scope_share=0.2,
    n=1500,
    n_out_of_scope=100,
    risk_upper_bound=0.049,
    in_scope_coverage=0.8,
    per_label=True,
    calibrated_at="2026-11-01T00:00:00Z",
)
CALIBRATION = CalibrationCard(
    date="2026-11-01T00:00:00Z",
    n=3000,
    n_out_of_scope=200,
    temperature=1.3,
    prediction_sets=(),
    uncertified=(),
    reference=ReferenceProfile(
        n=3000,
        scores={
            name: ScoreReference(edges, tuple((k + 1) / len(edges) for k in range(len(edges))))
            for name, edges in DRIFT_EDGES.items()
        },
        confidence_bin_edges=(0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99),
        confidence_bin_shares=(0.1,) * 10,
        labels=dict.fromkeys(LABELS, 1 / 150),
        decisions={"accept": 0.7, "review": 0.2, "abstain": 0.1},
    ),
)
POLICY = Policy(
    name="default",
    accept=(Limit("confidence", 0.6),),
    abstain=(Limit("predictive_entropy", 3.0),),
    accept_by_label={label: 0.5 + 0.003 * k for k, label in enumerate(LABELS)},
    guarantee=GUARANTEE,
)
CARD = AdapterCard(
    name="clinc150",
    revision="3f9a00112233",
    kind="text",
    labels=LABELS,
    method="dalorra",
    point_method=False,
    base="base",
    base_fingerprint="sha256:0",
    max_tokens=256,
    defaults=Sampling(),
    policies=(POLICY,),
    calibration=CALIBRATION,
)
ROW = EncodedRow(num_tokens=13, truncated=False, payload=None)


def main() -> None:
    """Parse the arguments, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    steps = make_steps(make_rows(options.rows))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 10):
        for name, step in steps.items():
            began_s = time.perf_counter()
            step()
            if repeat >= 10:  # noqa: PLR2004 - the first ones warm up
                times[name].append((time.perf_counter() - began_s) / options.rows * 1e6)
    parts = {name: statistics.median(values) for name, values in times.items()}
    plain = ("decide", "count", "drift", "sign")
    result = {
        "hardware": describe_hardware(),
        "labels": len(LABELS),
        "rows": options.rows,
        "repeats": options.repeats,
        "us_per_row": {name: quartiles(values) for name, values in times.items()},
        "total_us_per_row": round(sum(parts[name] for name in plain), 2),
    }
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def make_rows(count: int) -> list[RowScores]:
    """Return answers from sure to unsure."""
    draw = random.Random(0)  # noqa: S311 - no secret
    return [one_row(draw) for _ in range(count)]


def one_row(draw: random.Random) -> RowScores:
    """Return one made-up answer of ten samples."""
    weights = [draw.random() ** 8 for _ in LABELS]
    weights[draw.randrange(len(LABELS))] += draw.random() * 100
    probs = tuple(weight / sum(weights) for weight in weights)
    entropy = draw.random() * 4
    return RowScores(
        labels=LABELS,
        probs=probs,
        confidence=max(probs),
        label_mass=0.9,
        predictive_entropy=entropy,
        normalized_entropy=entropy / 5.01,
        variation_ratio=0.1,
        expected_entropy=entropy * 0.9,
        mutual_information=entropy * 0.1,
        confidence_std=0.02,
        samples=(probs,) * 10,
        combined=draw.random(),
    )


def make_steps(rows: list[RowScores]) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; each runs over all rows."""
    telemetry = Telemetry()
    telemetry.adapters_loaded((CARD,), 1.0)
    signer = PredictionSigner(["0123456789abcdef" * 4])
    alone = rule(CARD, None, CARD.defaults, None)
    locked = rule(CARD, ThresholdPolicy(min_confidence=0.5), CARD.defaults, "default")
    verdicts = decide_all(alone, rows)
    answered = list(zip(rows, verdicts, strict=True))
    return {
        "decide": lambda: decide_all(alone, rows),
        "decide_under_a_lock": lambda: decide_all(locked, rows),
        "count": lambda: [telemetry.prediction(CARD, ROW, s, v) for s, v in answered],
        "drift": lambda: [telemetry.drift(CARD, scores) for scores in rows],
        "sign": lambda: sign(signer, CARD, alone, CARD.defaults, tuple(rows), verdicts),
    }


def decide_all(ruling: Ruling, rows: list[RowScores]) -> tuple[Verdict, ...]:
    """Return the decision on every row."""
    return tuple(ruling.decide(scores, truncated=False) for scores in rows)


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"q25": round(low, 2), "median": round(middle, 2), "q75": round(high, 2)}


if __name__ == "__main__":
    main()

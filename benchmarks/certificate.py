"""Does a certificate hold? Draw calibration sets from a known population, certify, look.

    python benchmarks/certificate.py SCORES [--draws 2000] [--n 2750] [--pi 0.2] [--out FILE]

SCORES is a file of ``dalorra evaluate --scores``: its rows are taken for the whole population, so
that the true risk and coverage of every threshold are known. Each draw takes n rows with
replacement, splits them 25/25/50, fits the combined score, chooses a score and certifies, with the
code of ``dalorra calibrate``; the temperature stays the one that SCORES were made with. A
certificate is broken when its threshold's true risk, at the population's own out-of-scope share or
at a given smaller one, exceeds the target.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import describe_hardware
from safetensors.torch import load_file

from dalorra_core.artifact.calibration_record import ScoreName
from dalorra_core.calibration.bounds import selective_risk_at
from dalorra_core.calibration.certificate import Certificate, certify
from dalorra_core.calibration.combined import combined_score, fit_combined
from dalorra_core.calibration.scores import ScoreTable, surer
from dalorra_core.calibration.threshold_plan import CertifyRequest, choose_score, counts_at

_SCORES: tuple[ScoreName, ...] = (
    "confidence",
    "predictive_entropy",
    "mutual_information",
    "label_mass",
)


def main() -> None:
    """Run all targets and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scores", type=Path)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--n", type=int, default=2750)
    parser.add_argument(
        "--pi", type=float, default=0.2, help="declared out-of-scope share; 0 without such rows"
    )
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.02, 0.05, 0.10])
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[], help="further true out-of-scope shares"
    )
    parser.add_argument("--score", default="auto")
    parser.add_argument("--procedure", default="fixed_sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    population = _population(options.scores)
    if not bool(population.outside.any()):
        options.pi = 0.0  # nothing to declare, and the report must not claim a share
    results = [_experiment(population, target, options) for target in options.targets]
    report = {
        "scores": options.scores.name,
        "population": len(population),
        "population_out_of_scope": int(population.outside.sum()),
        **{
            k: getattr(options, k)
            for k in ("draws", "n", "pi", "delta", "score", "procedure", "seed")
        },
        "hardware": describe_hardware(),
        "results": results,
    }
    text = json.dumps(report, indent=1)
    print(text)  # noqa: T201
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


def _population(path: Path) -> ScoreTable:
    tensors = load_file(path)
    return ScoreTable(
        tensors["labels"].long(),
        tensors["predicted"].long(),
        {name: tensors[name].double() for name in _SCORES if name in tensors},
    )


def _experiment(
    population: ScoreTable, target: float, options: argparse.Namespace
) -> dict[str, Any]:
    generator = np.random.default_rng(options.seed)
    own = float(population.outside.double().mean())
    request = CertifyRequest(target, options.delta, options.pi, options.procedure)
    shares = [own, *options.shares]
    broken = {f"{share:.4f}": 0 for share in shares}
    coverage, of_oracle, of_best, chosen = [], [], [], {}
    best = max(_oracle(population, name, target, own) for name in population.scores)
    for _ in range(options.draws):
        rows = torch.from_numpy(generator.integers(len(population), size=options.n))
        fit, select, held = rows.split(
            [options.n // 4, options.n // 4, options.n - 2 * (options.n // 4)]
        )
        everyone = _with_combined(population, fit, options.pi)
        name = (
            choose_score(everyone.rows(select), everyone.rows(held), request)
            if options.score == "auto"
            else options.score
        )
        outcome = certify(everyone.rows(select), everyone.rows(held), name, request)
        if not isinstance(outcome, Certificate):
            coverage.append(0.0)
            of_oracle.append(0.0)
            of_best.append(0.0)
            continue
        chosen[name] = chosen.get(name, 0) + 1
        at = surer(name, torch.tensor([outcome.limit.threshold], dtype=torch.float64)).numpy()
        counts = counts_at(everyone, name, at)
        for share in shares:
            if float(selective_risk_at(counts, share)[0]) > target:
                broken[f"{share:.4f}"] += 1
        covered = float(counts.accepted[0] + counts.accepted_outside[0]) / len(population)
        coverage.append(covered)
        of_oracle.append(covered / _oracle(everyone, name, target, own))
        of_best.append(covered / best)
    error = float(np.sqrt(options.delta * (1 - options.delta) / options.draws))
    return {
        "target_risk": target,
        "certified_share_of_draws": float(np.mean(np.array(coverage) > 0)),
        "broken_share_at_out_of_scope_share": {k: v / options.draws for k, v in broken.items()},
        "allowed": options.delta + 3 * error,
        "median_coverage": float(np.median(coverage)),
        "coverage_10_90": [float(q) for q in np.quantile(coverage, [0.1, 0.9])],
        "median_share_of_oracle_on_same_score": float(np.median(of_oracle)),
        "median_share_of_best_single_score_oracle": float(np.median(of_best)),
        "best_single_score_oracle_coverage": best,
        "chosen_scores": chosen,
    }


def _with_combined(population: ScoreTable, fit: torch.Tensor, pi: float) -> ScoreTable:
    part = population.rows(fit)
    combined = fit_combined(part.scores, part.correct, part.outside, pi)
    scores: dict[ScoreName, torch.Tensor] = dict(population.scores)
    scores["combined"] = combined_score(combined, population.scores)
    return ScoreTable(population.labels, population.predicted, scores)


def _oracle(table: ScoreTable, name: Any, target: float, share: float) -> float:
    """Return the accepted share at the loosest threshold whose true risk is within the target."""
    thresholds = np.unique(surer(name, table.score(name)).numpy())[::-1]
    counts = counts_at(table, name, thresholds)
    allowed = selective_risk_at(counts, share) <= target
    accepted = (counts.accepted + counts.accepted_outside) / len(table)
    return float(np.where(allowed, accepted, 0.0).max())


if __name__ == "__main__":
    main()

"""The figures of one calibration: which numbers go into which."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalorra_core.calibration.answered_rows import AnsweredRows
from dalorra_core.calibration.calibrate import CalibrationOutcome
from dalorra_core.calibration.scores import ScoreTable, score_table, surer
from dalorra_core.calibration.split import PARTS
from dalorra_core.calibration.what_if import CurvePoint, risk_coverage_points
from dalorra_core.metrics.selective import augrc, aurc
from dalorra_core.predictive.tempering import tempered
from dalorra_core.report.plots import (
    CertifiedPoint,
    check_plotting,
    histograms,
    reliability_diagram,
    risk_coverage,
    save_figures,
)
from dalorra_core.report.reliability import Reliability, reliability

__all__ = ["check_plotting", "write_report"]


def write_report(
    directory: Path, outcome: CalibrationOutcome, answered: AnsweredRows, delta: float
) -> list[Path]:
    """Draw risk-coverage curve, reliability diagrams and score histograms.

    Args:
        directory: Made if it is not there.
        outcome: What calibration found.
        answered: The answers it was found on, without temperature.
        delta: Of the bounds around the curve.

    Returns:
        The files, as PNG and SVG.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    figures = {
        "risk-coverage": _risk_coverage(outcome, delta),
        "reliability": _reliability(outcome, answered),
        "scores": _histograms(outcome),
    }
    return save_figures(directory, figures)


def _risk_coverage(outcome: CalibrationOutcome, delta: float) -> Any:
    held, share = outcome.rows.of_part("certify"), outcome.out_of_scope_share
    accept = outcome.policies[0].accept
    main = "confidence" if accept is None else accept.score
    curves: dict[str, tuple[CurvePoint, ...]] = {
        f"by {_words(name)}": risk_coverage_points(held, name, share, delta)
        for name in dict.fromkeys((main, "confidence"))
    }
    certified = [
        CertifiedPoint(
            p.name, p.chosen_on.coverage, p.chosen_on.selective_risk or 0.0, p.guarantee.target_risk
        )
        for p in outcome.policies[1:]
        if p.guarantee is not None
    ]
    sure = surer(main, held.score(main))
    title = (
        f"{len(held)} certify rows reweighted to {share:.0%} out of scope, bounds at delta "
        f"{delta:g}\nby {_words(main)}, rows as they are: AURC {aurc(sure, held.correct):.4f}, "
        f"AUGRC {augrc(sure, held.correct):.4f}"
    )
    return risk_coverage(curves, certified, title)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _reliability(outcome: CalibrationOutcome, answered: AnsweredRows) -> Any:
    t = outcome.calibration.temperature
    certify = outcome.rows.part == PARTS.index("certify")
    fitted = f"T = {t.fitted:.3f} ({'kept' if t.kept else 'not kept'})"
    diagrams = {
        name: _diagram(
            score_table(tempered(answered.prediction, value), answered.labels).rows(certify)
        )
        for name, value in (("T = 1", 1.0), (fitted, t.fitted))
    }
    n = int((certify & (answered.labels >= 0)).sum())
    return reliability_diagram(
        diagrams,
        f"{n} in-scope certify rows; NLL of {t.n_held_out} select rows "
        f"{t.nll_before:.4f} at T = 1, {t.nll_after:.4f} at T = {t.fitted:.3f}",
    )


def _diagram(table: ScoreTable) -> Reliability:
    inside = table.rows(~table.outside)
    generator = torch.Generator().manual_seed(0)
    return reliability(inside.score("confidence"), inside.correct, generator)


def _histograms(outcome: CalibrationOutcome) -> Any:
    policy, table = outcome.policies[0], outcome.rows.table
    limits: dict[str, Mapping[str, float]] = {}
    for kind, limit in (("accept", policy.accept), ("abstain", policy.abstain)):
        if limit is not None:
            limits[limit.score] = {**limits.get(limit.score, {}), kind: limit.threshold}
    scores: dict[str, Tensor] = {**table.scores}
    return histograms(scores, table.outside, limits)

"""Labelled answers -> everything that calibration writes into an artifact. Values in, values out.

The order matters: the temperature and the combined score see the fit part, their use is judged and
thresholds are planned on the select part, and the certify part is looked at by certificates and
conformal quantiles alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dalorra_core import __version__
from dalorra_core.artifact.calibration_record import (
    Calibration,
    CalibrationRows,
    CombinedScore,
    Limit,
    MeasuredWith,
    Policy,
    PredictionSets,
    Uncertified,
)
from dalorra_core.artifact.store import calibration_file_name
from dalorra_core.calibration.answered_rows import AnsweredRows, check_answers, check_sizes
from dalorra_core.calibration.certified_policies import PolicyMaker, ScoreChoice
from dalorra_core.calibration.combined import fit_combined
from dalorra_core.calibration.decisions import decide
from dalorra_core.calibration.policy import choose_thresholds
from dalorra_core.calibration.prediction_sets import fewest_rows, fit_prediction_sets
from dalorra_core.calibration.reference_profile import reference_profile
from dalorra_core.calibration.scores import ScoreTable, score_table
from dalorra_core.calibration.split import PARTS, parts
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.calibration.temperature import fit_temperature
from dalorra_core.calibration.threshold_plan import CertifyRequest, Procedure
from dalorra_core.errors import ConfigError, DataError
from dalorra_core.metrics.uncertainty import mean_probs, summarise
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.predictive.tempering import tempered

__all__ = [
    "DEFAULT_TARGET",
    "CalibrationOutcome",
    "CalibrationRequest",
    "calibrate",
]

DEFAULT_TARGET = 0.05
"""The policy ``default`` is the one of this target where it can be certified."""

_DEFAULT_SHARE = 0.2


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate for.

    Attributes:
        target_risks: Each becomes a policy ``risk-<target>`` if it can be certified.
        delta: Chance that a certificate is wrong, for each by itself.
        out_of_scope_share: pi; None: 0.2 when there are out-of-scope rows, else 0.
        score: Score of the limits; ``auto`` takes the most promising one for each target.
        procedure: ``fixed_sequence`` or ``bonferroni``.
        per_label: Target risks to certify for each predicted label by itself.
        max_abstained: Largest share of in-scope questions that a policy may abstain from.
        alphas: Prediction sets hold the right label with 1 - alpha, for each of these.
    """

    target_risks: tuple[float, ...] = (0.01, 0.02, 0.05, 0.10)
    delta: float = 0.1
    out_of_scope_share: float | None = None
    score: ScoreChoice = "auto"
    procedure: Procedure = "fixed_sequence"
    per_label: tuple[float, ...] = ()
    max_abstained: float = 0.05
    alphas: tuple[float, ...] = (0.1,)

    def __post_init__(self) -> None:
        """Refuse what can be refused before a row is scored."""
        if not 0.0 < self.max_abstained < 1.0:
            raise ConfigError(
                f"max_abstained must lie strictly between 0 and 1, got {self.max_abstained}"
            )
        for alpha in self.alphas:
            fewest_rows(alpha)
        for target in (*self.target_risks, *self.per_label):
            CertifyRequest(target, self.delta, self.out_of_scope_share or 0.0, self.procedure)


@dataclass(frozen=True, eq=False)
class CalibrationOutcome:
    """What to write, and what to show.

    Attributes:
        calibration: For the manifest.
        policies: For the manifest; ``default`` is first.
        rows: Stored beside the manifest.
        content: ``rows`` as bytes.
        out_of_scope_share: pi, as asked for or by default.
        notes: Sentences for the user about what could not be done.
    """

    calibration: Calibration
    policies: tuple[Policy, ...]
    rows: StoredRows
    content: bytes
    out_of_scope_share: float
    notes: tuple[str, ...]


def calibrate(
    answered: AnsweredRows,
    labels: Sequence[str],
    measured_with: MeasuredWith,
    request: CalibrationRequest,
    date: str,
) -> CalibrationOutcome:
    """Return temperature, policies, prediction sets and reference profile.

    Args:
        answered: Rows and answers.
        labels: Label names in label order.
        measured_with: The predictive that answered; its temperature is filled in here.
        request: Targets.
        date: ISO 8601, for the receipts.

    Raises:
        ConfigError: A setting is outside its domain, or needs what is not there.
        DataError: Too few rows, which says how many are needed, or an answer that is no number.
    """
    part = parts(answered.ids)
    masks = {name: part == k for k, name in enumerate(PARTS)}
    check_answers(answered)
    check_sizes(answered.labels, masks, request.alphas)
    share = _share(request, answered.labels)
    y = answered.labels
    temperature = fit_temperature(answered.prediction.log_probs, y, masks["fit"], masks["select"])
    prediction = tempered(answered.prediction, temperature.value)
    combined, notes = _combined(score_table(prediction, y).rows(masks["fit"]), share, request)
    table = score_table(prediction, y, combined)
    measured_with = measured_with.model_copy(update={"temperature": temperature.value})
    maker = PolicyMaker(
        table.rows(masks["select"]),
        table.rows(masks["certify"]),
        labels,
        request.score,
        request.max_abstained,
        measured_with,
        answered.source,
        date,
    )
    certified, uncertified = _certified(maker, request, share)
    default = _default(certified, maker, prediction, answered)
    policies = (default, *certified)
    rows = StoredRows(answered.digests, part, table)
    content = rows.to_bytes()
    calibration = Calibration(
        date=date,
        dalorra=__version__,
        rows=_record(answered, masks),
        measured_with=measured_with,
        temperature=temperature,
        combined=combined,
        prediction_sets=_prediction_sets(prediction, y, masks, request.alphas),
        uncertified=uncertified,
        reference=reference_profile(
            table, decide(default, table, labels), labels, answered.num_choices
        ),
        scores_file=calibration_file_name(content),
    )
    return CalibrationOutcome(calibration, policies, rows, content, share, notes)


def _share(request: CalibrationRequest, labels: Tensor) -> float:
    if request.out_of_scope_share is not None:
        return request.out_of_scope_share
    return _DEFAULT_SHARE if bool((labels < 0).any()) else 0.0


def _combined(
    fit: ScoreTable, share: float, request: CalibrationRequest
) -> tuple[CombinedScore | None, tuple[str, ...]]:
    """Return the fitted score; without enough right and wrong answers there is none."""
    if request.score not in ("auto", "combined"):
        return None, ()
    try:
        return fit_combined(fit.scores, fit.correct, fit.outside, share), ()
    except DataError as error:
        if request.score == "combined":
            raise
        return None, (f"no combined score: {error}",)


def _certified(
    maker: PolicyMaker, request: CalibrationRequest, share: float
) -> tuple[list[Policy], tuple[Uncertified, ...]]:
    policies: list[Policy] = []
    missing: list[Uncertified] = []
    for target in sorted(set(request.target_risks)):
        found = maker.for_target(CertifyRequest(target, request.delta, share, request.procedure))
        if isinstance(found, Policy):
            policies.append(found)
        else:
            missing.append(found)
    for target in sorted(set(request.per_label)):
        asked = CertifyRequest(target, request.delta, share, request.procedure)
        policy, without = maker.for_each_label(asked)
        policies += [policy] if policy is not None else []
        missing += without
    return policies, tuple(missing)


def _default(
    certified: Sequence[Policy], maker: PolicyMaker, prediction: Prediction, answered: AnsweredRows
) -> Policy:
    """Return the policy of requests that name none.

    The certified one for 0.05, else the first certified one, else an empirical one without a
    guarantee, chosen on all the rows.
    """
    overall = [p for p in certified if p.guarantee is not None and not p.guarantee.per_label]
    wanted = [p for p in overall if p.target_selective_risk == DEFAULT_TARGET] or overall
    if wanted:
        return wanted[0].model_copy(update={"name": "default"})
    chosen = choose_thresholds(summarise(prediction.log_probs), answered.labels, DEFAULT_TARGET)
    accept = chosen.min_confidence
    on = maker.chosen_on(chosen.selective_risk, chosen.coverage)
    outside = int((answered.labels < 0).sum())
    return Policy(
        name="default",
        accept=None if accept is None else Limit(score="confidence", threshold=accept),
        abstain=Limit(score="predictive_entropy", threshold=chosen.abstain_threshold),
        target_selective_risk=DEFAULT_TARGET,
        chosen_on=on.model_copy(update={"n": len(answered.labels), "n_out_of_scope": outside}),
    )


def _prediction_sets(
    prediction: Prediction, labels: Tensor, masks: dict[str, Tensor], alphas: Sequence[float]
) -> tuple[PredictionSets, ...]:
    """Return aps, whose sets are never empty, before lac, for each alpha."""
    probs = mean_probs(prediction.log_probs)
    certify, select = (masks[name] & (labels >= 0) for name in ("certify", "select"))
    return tuple(
        fit_prediction_sets(
            kind, alpha, (probs[certify], labels[certify]), (probs[select], labels[select])
        )
        for alpha in dict.fromkeys(alphas)
        for kind in ("aps", "lac")
    )


def _record(answered: AnsweredRows, masks: dict[str, Tensor]) -> CalibrationRows:
    sizes = {name: int(mask.sum()) for name, mask in masks.items()}
    return CalibrationRows(
        source=answered.source,
        digest=answered.digest,
        n=len(answered.labels),
        n_out_of_scope=int((answered.labels < 0).sum()),
        n_fit=sizes["fit"],
        n_select=sizes["select"],
        n_certify=sizes["certify"],
    )

"""From a manifest to what the server shows and obeys; promises that do not hold here are taken out.

A certificate is about one set of weights, sampling, temperature, precision and engine. Where this
server has another, the policy's limits stay and its promises go, with a text that names both sides.
"""

from pathlib import PurePath

import torch

from dalorra_core.artifact.calibration_record import Calibration, MeasuredWith, PlanEvidence
from dalorra_core.artifact.calibration_record import Limit as StoredLimit
from dalorra_core.artifact.calibration_record import Policy as StoredPolicy
from dalorra_core.calibration.validity import measured_with, void_reason
from dalorra_core.predictive.predictor import Predictor
from server.ports import (
    AbstainGuarantee,
    AdapterCard,
    CalibrationCard,
    Guarantee,
    Limit,
    PlanCard,
    Policy,
    PredictionSetRule,
    ReferenceProfile,
    Sampling,
    ScoreReference,
    UncertifiedTarget,
)

__all__ = ["adapter_card", "calibration_card", "policy_of"]


def adapter_card(predictor: Predictor, selftest_error: float) -> AdapterCard:
    """Return what the server and its clients may know about a loaded adapter.

    Args:
        predictor: The adapter.
        selftest_error: What its self-test found.
    """
    manifest, plan, point = predictor.manifest, predictor.default_plan, predictor.point_method
    here, calibration = measured_with(predictor, plan), manifest.calibration
    return AdapterCard(
        name=manifest.name,
        revision=predictor.revision,
        kind=predictor.kind,
        labels=predictor.labels,
        method=manifest.method.name,
        point_method=point,
        base=_public_name(manifest.base.id),
        base_fingerprint=manifest.base.fingerprint,
        max_tokens=predictor.max_tokens,
        defaults=Sampling(
            num_samples=predictor.num_functions(plan),
            seed=plan.seed,
            estimator=plan.estimator,
            design=plan.design,
        ),
        policies=tuple(
            policy_of(policy, calibration, here, point_method=point) for policy in manifest.policies
        ),
        prompt=manifest.prompt.name,
        prompt_sha256=manifest.prompt.sha256,
        mask_set=None if point else predictor.mask_set(plan),
        selftest_max_abs_error=selftest_error if manifest.golden else None,
        out_of_scope_label=manifest.labels.out_of_scope_label,
        dtype=here.dtype,
        rank=manifest.r,
        memory_bytes=predictor.memory_bytes,
        manifest_sha256=predictor.artifact.manifest_sha256,
        deterministic=predictor.deterministic,
        threads=torch.get_num_threads() if predictor.device.type == "cpu" else 0,
        fixed_functions=None if point else predictor.fixed_functions,
        max_num_samples=predictor.max_num_samples,
        designs=predictor.designs,
        calibration=None
        if calibration is None
        else calibration_card(calibration, here, point_method=point),
    )


def policy_of(
    stored: StoredPolicy, calibration: Calibration | None, here: MeasuredWith, *, point_method: bool
) -> Policy:
    """Return a stored policy; its promises only where they hold.

    Args:
        stored: The manifest's.
        calibration: The calibration that certified it; None when there was none.
        here: What this server has.
        point_method: Whether nothing is sampled.
    """
    measured = [stored.guarantee.measured_with] if stored.guarantee else []
    if calibration is not None and stored.abstain_guarantee is not None:
        measured.append(calibration.measured_with)
    reasons = [void_reason(one, here, point_method=point_method) for one in measured]
    void = next((reason for reason in reasons if reason is not None), None)
    return Policy(
        name=stored.name,
        accept=None if stored.accept is None else _limits(stored.accept),
        abstain=() if stored.abstain is None else _limits(stored.abstain),
        accept_by_label=stored.accept_by_label,
        target_selective_risk=stored.target_selective_risk,
        chosen_on=stored.chosen_on.model_dump(mode="json"),
        guarantee=None if void else _guarantee(stored),
        abstain_guarantee=None if void else _abstain_guarantee(stored),
        void=void,
    )


def calibration_card(
    calibration: Calibration, here: MeasuredWith, *, point_method: bool
) -> CalibrationCard:
    """Return what calibration found out, and whether it is about this server."""
    return CalibrationCard(
        date=calibration.date,
        n=calibration.rows.n,
        n_out_of_scope=calibration.rows.n_out_of_scope,
        temperature=calibration.temperature.value,
        prediction_sets=tuple(
            PredictionSetRule(**rule.model_dump(exclude={"quantile"}))
            for rule in calibration.prediction_sets
        ),
        uncertified=tuple(UncertifiedTarget(**one.model_dump()) for one in calibration.uncertified),
        reference=_reference(calibration),
        has_combined=calibration.combined is not None,
        void=void_reason(calibration.measured_with, here, point_method=point_method),
        plan=None if calibration.plan is None else _plan(calibration.plan),
    )


def _plan(found: PlanEvidence) -> PlanCard:
    chosen, peer = found.chosen, found.peer
    return PlanCard(
        date=found.date,
        num_samples=found.num_samples,
        design=found.design,
        peer_num_samples=peer.num_samples,
        mean_error=chosen.mean_error,
        peer_mean_error=peer.mean_error,
        information_error=chosen.information_error,
        peer_information_error=peer.information_error,
        n=found.n,
        reference=found.reference,
    )


def _limits(stored: StoredLimit) -> tuple[Limit, ...]:
    return (Limit(stored.score, stored.threshold),)


def _guarantee(stored: StoredPolicy) -> Guarantee | None:
    if stored.guarantee is None:
        return None
    kept = {"measured_with", "n_accepted", "n_out_of_scope_accepted"}
    return Guarantee(**stored.guarantee.model_dump(exclude=kept))


def _abstain_guarantee(stored: StoredPolicy) -> AbstainGuarantee | None:
    if stored.abstain_guarantee is None:
        return None
    return AbstainGuarantee(**stored.abstain_guarantee.model_dump())


def _reference(calibration: Calibration) -> ReferenceProfile:
    stored = calibration.reference
    return ReferenceProfile(
        n=stored.n,
        scores={name: ScoreReference(one.edges, one.cdf) for name, one in stored.scores.items()},
        confidence_bin_edges=stored.confidence_bin_edges,
        confidence_bin_shares=stored.confidence_bin_shares,
        labels=stored.labels,
        decisions=stored.decisions,
    )


def _public_name(base: str) -> str:
    """Return a base model's name without the directories of the host it was trained on."""
    return PurePath(base).name if base.startswith(("/", "~", ".")) else base

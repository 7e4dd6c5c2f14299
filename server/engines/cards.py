"""From a manifest to what the server shows and obeys; promises that do not hold here are taken out.

A certificate is about one set of weights, sampling, temperature, precision and engine. Where this
server has another, the policy's limits stay and its promises go, with a text that names both sides.
"""

from dataclasses import dataclass
from pathlib import PurePath

import torch

from dalorra_core.artifact.calibration_record import Calibration, MeasuredWith, PlanEvidence
from dalorra_core.artifact.calibration_record import Limit as StoredLimit
from dalorra_core.artifact.calibration_record import Policy as StoredPolicy
from dalorra_core.artifact.store import Artifact
from dalorra_core.calibration.validity import measured_with, void_reason
from dalorra_core.predictive.plan import LINEARISED_DRAWS, SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from server.ports import (
    AbstainGuarantee,
    AdapterCard,
    CalibrationCard,
    Design,
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

__all__ = [
    "Answering",
    "adapter_card",
    "answering_of",
    "calibration_card",
    "policy_of",
    "public_name",
]


@dataclass(frozen=True)
class Answering:
    """How an adapter is answered here; the rest of its card is in its artifact.

    Attributes:
        sampling: Of a request that does not say otherwise.
        here: All that a certificate would depend on.
        point_method: See ``AdapterCard``, as all that follows.
        mask_set: None for point methods.
        memory_bytes: Without calibration rows.
        designs: At least one.
        deterministic: Whether rows are run alone.
        threads: 0 where that means nothing.
        fixed_functions: None where any number may be sampled, and for point methods.
        max_num_samples: None without a limit.
        linearised_draws: None where the network cannot be linearised.
        sampled: See ``AdapterCard``.
        fixed_sampling: None where a request may ask for another.
        shared_depth: 0 where nothing is known to be shared.
        unpadded: See ``AdapterCard``.
    """

    sampling: Sampling
    here: MeasuredWith
    point_method: bool
    mask_set: str | None
    memory_bytes: int
    designs: tuple[Design, ...]
    deterministic: bool = False
    threads: int = 0
    fixed_functions: int | None = None
    max_num_samples: int | None = None
    linearised_draws: int | None = None
    sampled: Sampling | None = None
    fixed_sampling: str | None = None
    shared_depth: float = 0.0
    unpadded: bool = False


def answering_of(predictor: Predictor) -> Answering:
    """Return how a predictor in this process answers."""
    plan, point = predictor.default_plan, predictor.point_method
    return Answering(
        sampling=_sampling(predictor, plan),
        here=measured_with(predictor, plan),
        point_method=point,
        mask_set=None if point else predictor.mask_set(plan),
        memory_bytes=predictor.memory_bytes,
        designs=predictor.designs,
        deterministic=predictor.deterministic,
        threads=torch.get_num_threads() if predictor.device.type == "cpu" else 0,
        fixed_functions=None if point else predictor.fixed_functions,
        max_num_samples=predictor.max_num_samples,
        linearised_draws=LINEARISED_DRAWS if "linearised" in predictor.estimators else None,
        sampled=None
        if plan.estimator == "monte_carlo"
        else _sampling(predictor, predictor.sampled_plan),
        shared_depth=predictor.shared_depth,
        unpadded=predictor.unpadded,
    )


def _sampling(predictor: Predictor, plan: SamplingPlan) -> Sampling:
    return Sampling(predictor.num_functions(plan), plan.seed, plan.estimator, plan.design)


def adapter_card(artifact: Artifact, how: Answering, selftest_error: float) -> AdapterCard:
    """Return what the server and its clients may know about a loaded adapter.

    Args:
        artifact: The adapter.
        how: How it is answered here.
        selftest_error: What its self-test found.
    """
    manifest, point, here = artifact.manifest, how.point_method, how.here
    calibration = manifest.calibration
    return AdapterCard(
        name=manifest.name,
        revision=artifact.revision,
        kind=manifest.prompt.kind,
        labels=manifest.labels.labels,
        method=manifest.method.name,
        point_method=point,
        base=public_name(manifest.base.id),
        base_fingerprint=manifest.base.fingerprint,
        max_tokens=manifest.prompt.max_tokens,
        defaults=how.sampling,
        policies=tuple(
            policy_of(policy, calibration, here, point_method=point) for policy in manifest.policies
        ),
        prompt=manifest.prompt.name,
        prompt_sha256=manifest.prompt.sha256,
        mask_set=how.mask_set,
        selftest_max_abs_error=selftest_error if manifest.golden else None,
        out_of_scope_label=manifest.labels.out_of_scope_label,
        dtype=here.dtype,
        rank=manifest.r,
        memory_bytes=how.memory_bytes,
        manifest_sha256=artifact.manifest_sha256,
        deterministic=how.deterministic,
        threads=how.threads,
        fixed_functions=how.fixed_functions,
        max_num_samples=how.max_num_samples,
        designs=how.designs,
        linearised_draws=how.linearised_draws,
        sampled=how.sampled,
        fixed_sampling=how.fixed_sampling,
        shared_depth=how.shared_depth,
        unpadded=how.unpadded,
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
        estimator=found.estimator,
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


def public_name(base: str) -> str:
    """Return a base model's name without the directories of the host it was trained on."""
    return PurePath(base).name if base.startswith(("/", "~", ".")) else base

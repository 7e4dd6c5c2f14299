"""From the server's values to the bodies of answers: no decisions, no HTTP."""

from server.ports import AdapterCard, RowScores, Sampling
from server.routes.receipts import calibration_section, stored_policy_card
from server.schemas import ClassifyRequest, ModelCard
from server.schemas.responses import Limits, Row, SamplingCard, TopLabel, Uncertainty
from server.service import Outcome
from server.settings import Settings

__all__ = ["model_card", "present_rows", "sampling_card"]


def present_rows(request: ClassifyRequest, outcome: Outcome) -> list[Row]:
    """Return the answered rows, in the order of the input."""
    answered = zip(
        *(outcome.answer.rows, outcome.rows, outcome.verdicts, outcome.prediction_ids),
        request.ids(),
        strict=True,
    )
    default = outcome.ruling.default_sampling  # another sampling has no calibrated sets
    return [
        Row(
            index=index,
            id=row_id,
            prediction_id=prediction_id,
            label=scores.label,
            labels=list(scores.labels),
            probs=list(scores.probs),
            num_classes=len(scores.labels),
            confidence=scores.confidence,
            label_mass=scores.label_mass,
            combined_score=scores.combined,
            uncertainty=_uncertainty(scores),
            prediction_set=_set(scores) if default else None,
            decision=verdict.decision,
            reasons=list(verdict.reasons),
            calibrated=outcome.ruling.calibrated,
            truncated=row.truncated,
            top=_top(scores, request.top_k),
            samples=[list(sample) for sample in scores.samples]
            if "samples" in request.include
            else None,
        )
        for index, (scores, row, verdict, prediction_id, row_id) in enumerate(answered)
    ]


def sampling_card(sampling: Sampling, card: AdapterCard, mask_set: str | None) -> SamplingCard:
    """Return what was sampled; functions that are not drawn have no seed."""
    drawn = not card.point_method and card.fixed_functions is None
    return SamplingCard(
        num_samples=sampling.num_functions,
        seed=sampling.seed if drawn and sampling.estimator != "mean_mask" else None,
        mask_set=mask_set,
        estimator=sampling.estimator,
        design=sampling.design,
    )


def model_card(card: AdapterCard, settings: Settings, *, model_id: str, created: int) -> ModelCard:
    """Return an adapter as clients see it: nothing about the host it runs on."""
    return ModelCard(
        id=model_id,
        created=created,
        parent=card.base,
        parent_fingerprint=card.base_fingerprint,
        revision=card.revision,
        kind=card.kind,
        method=card.method,
        labels=list(card.labels),
        num_classes=len(card.labels),
        prompt=card.prompt,
        prompt_sha256=card.prompt_sha256,
        sampling=sampling_card(card.defaults, card, card.mask_set),
        dtype=card.dtype,
        out_of_scope_label=card.out_of_scope_label,
        policies=[stored_policy_card(policy) for policy in card.policies],
        locked_policy=settings.locked_policy,
        calibration=calibration_section(card.calibration) if card.calibration else None,
        limits=Limits(
            max_rows=settings.max_rows,
            max_text_chars=settings.max_text_chars,
            max_tokens=card.max_tokens,
            max_num_samples=_max_num_samples(card, settings),
            max_body_bytes=settings.max_body_bytes,
        ),
        selftest_max_abs_error=card.selftest_max_abs_error,
    )


def _max_num_samples(card: AdapterCard, settings: Settings) -> int:
    if card.point_method:
        return 1
    limits = (settings.max_num_samples, card.max_num_samples)
    return card.fixed_functions or min(limit for limit in limits if limit is not None)


def _uncertainty(scores: RowScores) -> Uncertainty:
    return Uncertainty(
        predictive_entropy=scores.predictive_entropy,
        expected_entropy=scores.expected_entropy,
        mutual_information=scores.mutual_information,
        normalized_entropy=scores.normalized_entropy,
        variation_ratio=scores.variation_ratio,
        confidence_std=scores.confidence_std,
    )


def _set(scores: RowScores) -> list[str] | None:
    return None if scores.prediction_set is None else list(scores.prediction_set)


def _top(scores: RowScores, top_k: int | None) -> list[TopLabel] | None:
    if top_k is None:
        return None
    # a stable sort: equal probabilities keep the order of the labels
    ranked = sorted(zip(scores.labels, scores.probs, strict=True), key=lambda pair: -pair[1])
    return [TopLabel(label=label, prob=prob) for label, prob in ranked[:top_k]]

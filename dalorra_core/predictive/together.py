"""Questions to several adapters on one base model, answered in shared forward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dalorra_core.data.encode import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.plan import SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.scoring import Prediction, RowsToScore, score_together
from dalorra_core.predictive.tempering import tempered

__all__ = ["Share", "predict_together"]


@dataclass(frozen=True)
class Share:
    """The rows of one adapter under one plan.

    Attributes:
        predictor: The adapter.
        plan: Which predictive.
        rows: At least one encoded row.
    """

    predictor: Predictor
    plan: SamplingPlan
    rows: Sequence[EncodedExample]


def predict_together(
    shares: Sequence[Share],
    *,
    label_mass: bool = True,
    wanted: Callable[[int], bool] | None = None,
) -> list[Prediction]:
    """Return the calibrated answers of several adapters, which share forward passes.

    Args:
        shares: At least one; on one base model and with equal numbers of functions. A deterministic
            predictor, which answers every row alone, has no company.
        label_mass: Also compute the share of the label tokens in the full vocabulary.
        wanted: Asked before every forward pass for the rows in it, by their place among all rows
            of all shares in order.

    Returns:
        One for each share; equal to what ``Predictor.predict`` gives, beyond rounding.

    Raises:
        ConfigError: The shares cannot be answered together.
    """
    if any(share.predictor.deterministic for share in shares):
        if len(shares) > 1:
            raise ConfigError(f"a deterministic predictor answers alone, got {len(shares)} shares")
        (only,) = shares
        rows, plan = only.rows, only.plan
        return [only.predictor.predict(rows, plan, label_mass=label_mass, wanted=wanted)]
    found = score_together(
        [
            RowsToScore(share.predictor.model, share.predictor.pack(share.plan), share.rows)
            for share in shares
        ],
        max_padded_tokens=min(share.predictor.max_padded_tokens for share in shares),
        label_mass=label_mass,
        wanted=wanted,
    )
    return [
        tempered(prediction, share.predictor.temperature)
        for prediction, share in zip(found, shares, strict=True)
    ]

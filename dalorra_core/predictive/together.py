"""Questions to several adapters on one base model, answered in shared forward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from dalorra_core.data.encode import EncodedExample
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
        shares: At least one; on one base model and with equal numbers of functions. Shares whose
            predictor answers alone get forward passes of their own.
        label_mass: Also compute the share of the label tokens in the full vocabulary.
        wanted: Asked before every forward pass for the rows in it, by their place among all rows
            of all shares in order.

    Returns:
        One for each share; equal to what ``Predictor.predict`` gives, beyond rounding.

    Raises:
        ConfigError: The shares cannot be answered together.
    """
    starts = [0, *accumulate(len(share.rows) for share in shares)]
    found: dict[int, Prediction] = {}
    for i, share in enumerate(shares):
        if share.predictor.answers_alone(share.plan) or len(shares) == 1:
            own = _asking(wanted, starts[i])
            found[i] = share.predictor.predict(
                share.rows, share.plan, label_mass=label_mass, wanted=own
            )
    rest = [i for i in range(len(shares)) if i not in found]
    if rest:
        places = [starts[i] + n for i in rest for n in range(len(shares[i].rows))]
        together = _shared(
            [shares[i] for i in rest],
            None if wanted is None else lambda n: wanted(places[n]),
            label_mass=label_mass,
        )
        found.update(zip(rest, together, strict=True))
    return [found[i] for i in range(len(shares))]


def _asking(wanted: Callable[[int], bool] | None, start: int) -> Callable[[int], bool] | None:
    """Return ``wanted`` for rows that are counted from ``start`` on."""
    return None if wanted is None else lambda place: wanted(start + place)


def _shared(
    shares: Sequence[Share], wanted: Callable[[int], bool] | None, *, label_mass: bool
) -> list[Prediction]:
    """Return the answers of shares whose rows go through the same forward passes."""
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

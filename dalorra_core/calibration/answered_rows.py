"""Labelled rows with an adapter's answers, and which of them cannot calibrate anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dalorra_core.calibration.prediction_sets import fewest_rows
from dalorra_core.calibration.split import PARTS
from dalorra_core.errors import DataError
from dalorra_core.predictive.scoring import Prediction

__all__ = ["FEWEST_ROWS", "AnsweredRows", "check_answers", "check_sizes"]

FEWEST_ROWS = 10
"""In-scope rows that each part needs; fewer fit, plan and certify nothing."""

_PART_SHARE = {"fit": 0.25, "select": 0.25, "certify": 0.5}


@dataclass(frozen=True, eq=False)
class AnsweredRows:
    """n labelled rows and the adapter's answers to them.

    Attributes:
        source: Name of the data, for the receipt.
        digest: Over ids, questions and labels.
        ids: Decide the part of each row.
        digests: (n, 16) uint8; a row is known again by it.
        labels: (n,) right labels, -1 out of scope.
        num_choices: (n,) labels that each row may have.
        prediction: Answers of the default predictive without temperature.
    """

    source: str
    digest: str
    ids: Sequence[str]
    digests: Tensor
    labels: Tensor
    num_choices: Tensor
    prediction: Prediction


def check_answers(answered: AnsweredRows) -> None:
    """Refuse answers that are no numbers: no threshold can be put on them.

    Raises:
        DataError: Naming the first such row.
    """
    found = answered.prediction
    broken = found.log_probs.isnan().any(0).any(-1)
    if found.label_mass is not None:
        broken |= ~found.label_mass.isfinite()
    if bool(broken.any()):
        first = answered.ids[int(broken.nonzero()[0])]
        raise DataError(
            f"the model's answer to row {first!r} is not a number ({int(broken.sum())} such rows)"
        )


def check_sizes(labels: Tensor, masks: Mapping[str, Tensor], alphas: Sequence[float]) -> None:
    """Refuse too few in-scope rows.

    Args:
        labels: (n,), -1 for out of scope.
        masks: Rows of each part.
        alphas: Of the prediction sets.

    Raises:
        DataError: Says how many are needed.
    """
    least = dict.fromkeys(PARTS, FEWEST_ROWS)
    least["certify"] = max([FEWEST_ROWS, *(fewest_rows(alpha) for alpha in alphas)])
    for name, needed in least.items():
        found = int((masks[name] & (labels >= 0)).sum())
        if found < needed:
            total = round(needed / _PART_SHARE[name] * 1.5)  # parts are drawn by hash: some slack
            raise DataError(
                f"calibration needs at least {needed} in-scope rows in the {name} part, got "
                f"{found} of {int((labels >= 0).sum())} rows; about {total} in-scope rows are "
                "enough for this"
            )

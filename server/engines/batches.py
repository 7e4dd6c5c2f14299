"""One batch: which rows share forward passes, and their scores in the order of the batch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dalorra_core.predictive.scoring import Prediction
from dalorra_core.predictive.shared_base import SharedBase
from dalorra_core.predictive.together import Share, predict_together
from server.engines.answers import score_batch
from server.engines.loaded import Loaded, Row, plan_of
from server.ports import BatchKey, BatchRow, BatchScores, RowScores, Wanted

__all__ = ["answer_batch"]


@dataclass(frozen=True)
class _Group:
    """The rows of a batch that have one key.

    Attributes:
        key: It.
        adapter: Who answers.
        places: Where they are in the batch.
        rows: What was encoded.
    """

    key: BatchKey
    adapter: Loaded
    places: list[int]
    rows: list[Row]

    @property
    def num_functions(self) -> int:
        return self.adapter.predictor.num_functions(plan_of(self.key.sampling))


def answer_batch(rows: Sequence[BatchRow], wanted: Wanted, base: SharedBase | None) -> BatchScores:
    """Answer the rows of any adapters of one engine; see ``server.ports.Engine``.

    Args:
        rows: At least one.
        wanted: Whether somebody still waits for the row at a place.
        base: The engine's base model. A row on another one comes from an engine that was given
            up, whose model a thread may hold for ever.

    Raises:
        FloatingPointError: A probability is not finite.
        TypeError: A row was encoded by another engine, or for another adapter than its key says.
    """
    began_s = time.perf_counter()
    scores: list[RowScores | None] = [None] * len(rows)
    uq_s = 0.0
    for groups in _that_share(_by_key(rows, base)):
        found = _predictions(groups, wanted)
        forward_ended_s = time.perf_counter()
        for group, prediction in zip(groups, found, strict=True):
            _write(scores, group, prediction)
        uq_s += time.perf_counter() - forward_ended_s
    return BatchScores(tuple(scores), time.perf_counter() - began_s - uq_s, uq_s)


def _by_key(rows: Sequence[BatchRow], base: SharedBase | None) -> list[_Group]:
    groups: dict[BatchKey, _Group] = {}
    for place, row in enumerate(rows):
        payload = row.row.payload
        if not isinstance(payload, Row) or payload.adapter.base is not base:
            raise TypeError("the row was encoded by another engine")
        if payload.adapter.card.key != row.key.adapter:
            raise TypeError("the row was encoded for another adapter than its key says")
        group = groups.setdefault(row.key, _Group(row.key, payload.adapter, [], []))
        group.places.append(place)
        group.rows.append(payload)
    return list(groups.values())


def _that_share(groups: list[_Group]) -> list[list[_Group]]:
    """Return the groups that may share forward passes: with equal M, none deterministic."""
    shared: dict[int, list[_Group]] = {}
    alone: list[list[_Group]] = []
    for group in groups:
        if group.adapter.predictor.deterministic:
            alone.append([group])
        else:
            shared.setdefault(group.num_functions, []).append(group)
    return [*shared.values(), *alone]


def _predictions(groups: list[_Group], wanted: Wanted) -> list[Prediction]:
    places = [place for group in groups for place in group.places]
    shares = [
        Share(
            group.adapter.predictor,
            plan_of(group.key.sampling),
            [row.example for row in group.rows],
        )
        for group in groups
    ]
    return predict_together(shares, wanted=lambda n: wanted(places[n]))


def _write(scores: list[RowScores | None], group: _Group, prediction: Prediction) -> None:
    """Write one group's scores to their places; a row that was left out stays None."""
    answered = prediction.answered_rows
    if not answered:
        return
    parts = [(prediction.of_answered(), answered)]
    if group.adapter.predictor.deterministic:
        # How a sum over M is rounded depends on the shape of the whole tensor, so rows that must
        # be equal bit for bit are scored alone as well.
        parts = [(_row_of(prediction, i), [i]) for i in answered]
    for part, places in parts:
        found = score_batch(
            part,
            [group.rows[i] for i in places],
            group.adapter.calibrated,
            single=group.adapter.is_single(group.key.sampling),
        )
        for i, row_scores in zip(places, found, strict=True):
            scores[group.places[i]] = row_scores


def _row_of(prediction: Prediction, place: int) -> Prediction:
    mass = None if prediction.label_mass is None else prediction.label_mass[place : place + 1]
    return Prediction(prediction.log_probs[:, place : place + 1].contiguous(), mass)

"""What a threshold or a policy would do on the calibration rows that an artifact stores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dalorra_core.artifact.calibration_record import HIGHER_IS_SURER
from dalorra_core.artifact.calibration_record import Limit as StoredLimit
from dalorra_core.artifact.store import Artifact
from dalorra_core.calibration.scores import ScoreTable, passes, surer
from dalorra_core.calibration.stored_rows import StoredRows
from dalorra_core.calibration.what_if import evaluate_rule, risk_coverage_points
from dalorra_core.errors import ConfigError
from server.ports import (
    Limit,
    NotCalibratedError,
    Policy,
    PolicyEvaluation,
    RiskCoveragePoint,
    ScoreName,
)

__all__ = ["CertifyRows", "required_rows"]


@dataclass(frozen=True, eq=False)
class CertifyRows:
    """The certify rows of one adapter: the thresholds of its certificates were tested on them."""

    held: ScoreTable
    labels: tuple[str, ...]

    @classmethod
    def of(cls, artifact: Artifact) -> Self | None:
        """Return the rows of an artifact; None before calibration."""
        if artifact.calibration_scores is None:
            return None
        stored = StoredRows.from_tensors(artifact.calibration_scores)
        return cls(stored.of_part("certify"), artifact.manifest.labels.labels)

    @property
    def num_bytes(self) -> int:
        """What these rows take in memory, in bytes."""
        scores = self.held.scores.values()
        return sum(t.nbytes for t in (self.held.labels, self.held.predicted, *scores))

    def curve(
        self, score: ScoreName, out_of_scope_share: float, delta: float
    ) -> tuple[RiskCoveragePoint, ...]:
        """Return the risk-coverage curve of a score; see ``server.ports.Engine``."""
        self._require({score})
        try:
            points = risk_coverage_points(self.held, score, out_of_scope_share, delta)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return tuple(
            RiskCoveragePoint(
                threshold=point.threshold,
                coverage=point.coverage,
                in_scope_coverage=point.in_scope_coverage,
                selective_risk=point.selective_risk,
                risk_upper_bound=point.risk_upper_bound,
                n_accepted=point.n_accepted,
            )
            for point in points
        )

    def evaluate(self, policy: Policy, out_of_scope_share: float, delta: float) -> PolicyEvaluation:
        """Return what a policy would do; see ``server.ports.Engine``."""
        self._require({limit.score for limit in (*(policy.accept or ()), *policy.abstain)})
        abstain = ~self._all_pass(policy.abstain)
        accept = self._accepted(policy) & ~abstain
        try:
            found = evaluate_rule(self.held, accept, abstain, out_of_scope_share, delta)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return PolicyEvaluation(
            n=found.n,
            n_out_of_scope=found.n_out_of_scope,
            accept=found.accept,
            review=found.review,
            abstain=found.abstain,
            in_scope_coverage=found.in_scope_coverage,
            out_of_scope_accepted=found.out_of_scope_accepted,
            selective_risk=found.selective_risk,
            risk_upper_bound=found.risk_upper_bound,
        )

    def _require(self, names: set[ScoreName]) -> None:
        missing = sorted(names - self.held.scores.keys())
        if missing:
            raise NotCalibratedError(
                f"the stored calibration rows have no {missing[0]}; they have: "
                f"{', '.join(sorted(self.held.scores))}"
            )

    def _all_pass(self, limits: tuple[Limit, ...]) -> Tensor:
        """Return which rows pass every limit, (n,) bool."""
        passed = torch.ones(len(self.held), dtype=torch.bool)
        for limit in limits:
            stored = StoredLimit(score=limit.score, threshold=limit.threshold)
            passed &= passes(stored, self.held)
        return passed

    def _accepted(self, policy: Policy) -> Tensor:
        """Return which rows the accept limits let through, (n,) bool."""
        if policy.accept is None:
            return torch.zeros(len(self.held), dtype=torch.bool)
        if not policy.accept_by_label:
            return self._all_pass(policy.accept)
        first, *others = policy.accept
        return self._passes_by_label(first, policy.accept_by_label) & self._all_pass(tuple(others))

    def _passes_by_label(self, limit: Limit, by_label: Mapping[str, float | None]) -> Tensor:
        """Return which rows reach the threshold of their predicted label, (n,) bool."""
        never = math.inf if HIGHER_IS_SURER[limit.score] else -math.inf
        own = [by_label.get(label, limit.threshold) for label in self.labels]
        thresholds = torch.tensor(
            [never if threshold is None else threshold for threshold in own], dtype=torch.float64
        )
        least = surer(limit.score, thresholds[self.held.predicted])
        return surer(limit.score, self.held.score(limit.score)) >= least


def required_rows(rows: CertifyRows | None, adapter: str) -> CertifyRows:
    """Return the rows of an adapter.

    Raises:
        NotCalibratedError: It stores none.
    """
    if rows is None:
        raise NotCalibratedError(
            f"adapter {adapter} stores no calibration rows; dalorra calibrate adds them"
        )
    return rows

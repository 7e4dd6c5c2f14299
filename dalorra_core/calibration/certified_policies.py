"""Targets -> policies with receipts, or the reason why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from dalorra_core.artifact.calibration_record import (
    AbstainGuarantee,
    ChosenOn,
    Guarantee,
    Limit,
    MeasuredWith,
    Policy,
    ScoreName,
    Uncertified,
)
from dalorra_core.calibration.abstaining import certify_abstain
from dalorra_core.calibration.certificate import Certificate, NoCertificate, certify
from dalorra_core.calibration.decisions import decide
from dalorra_core.calibration.scores import ScoreTable, surer
from dalorra_core.calibration.threshold_plan import CertifyRequest, choose_score
from dalorra_core.calibration.what_if import evaluate_rule

__all__ = ["PolicyMaker", "ScoreChoice"]


class _Abstaining(TypedDict):
    abstain: Limit | None
    abstain_guarantee: AbstainGuarantee | None


ScoreChoice = ScoreName | Literal["auto"]


@dataclass(frozen=True, eq=False)
class PolicyMaker:
    """What is the same for every target.

    Attributes:
        select: Rows that choose score and thresholds to test.
        held: Certify rows.
        labels: Label names in label order.
        score: Score of the limits, or ``auto`` for the most promising one.
        max_abstained: Largest share of in-scope questions to abstain from.
        measured_with: What the certificate holds for.
        source: Name of the rows, for the receipt.
        date: ISO 8601.
    """

    select: ScoreTable
    held: ScoreTable
    labels: Sequence[str]
    score: ScoreChoice
    max_abstained: float
    measured_with: MeasuredWith
    source: str
    date: str

    def for_target(self, request: CertifyRequest) -> Policy | Uncertified:
        """Return the policy ``risk-<target>``, or why it cannot be certified."""
        score = self._score(request)
        found = certify(self.select, self.held, score, request)
        if isinstance(found, NoCertificate):
            return _uncertified(request, found, None)
        policy = Policy(
            name=f"risk-{request.target_risk:g}",
            accept=found.limit,
            **self._abstaining(score, request.delta, found.limit.threshold),
            target_selective_risk=request.target_risk,
            chosen_on=self.chosen_on(None, 0.0),
            guarantee=self._guarantee([found], request),
        )
        return self._measured(policy, request)

    def for_each_label(self, request: CertifyRequest) -> tuple[Policy | None, list[Uncertified]]:
        """Return the policy ``per-label-<target>`` and the labels without a certificate.

        Each label is certified by itself at the whole delta; a label without a certificate is
        never accepted. None when that is all of them.
        """
        score = self._score(request)
        certified: dict[str, Certificate] = {}
        missing: list[Uncertified] = []
        for k, label in enumerate(self.labels):
            of_label = CertifyRequest(
                request.target_risk,
                request.delta,
                request.out_of_scope_share,
                request.procedure,
                label=k,
            )
            found = certify(self.select, self.held, score, of_label)
            if isinstance(found, NoCertificate):
                missing.append(_uncertified(request, found, label))
            else:
                certified[label] = found
        if not certified:
            return None, missing
        thresholds = {label: found.limit.threshold for label, found in certified.items()}
        loosest = self._looser(score, *thresholds.values())
        policy = Policy(
            name=f"per-label-{request.target_risk:g}",
            accept=Limit(score=score, threshold=loosest),
            accept_by_label={label: thresholds.get(label) for label in self.labels},
            **self._abstaining(score, request.delta, loosest),
            target_selective_risk=request.target_risk,
            chosen_on=self.chosen_on(None, 0.0),
            guarantee=self._guarantee(list(certified.values()), request, per_label=True),
        )
        return self._measured(policy, request), missing

    def chosen_on(self, selective_risk: float | None, coverage: float) -> ChosenOn:
        """Return the receipt of the certify rows."""
        w = self.measured_with
        return ChosenOn(
            split=self.source,
            n=len(self.held),
            n_out_of_scope=int(self.held.outside.sum()),
            num_samples=w.num_samples,
            seed=w.seed,
            estimator=w.estimator,
            dtype=w.dtype,
            date=self.date,
            selective_risk=selective_risk,
            coverage=coverage,
        )

    def _score(self, request: CertifyRequest) -> ScoreName:
        if self.score == "auto":
            return choose_score(self.select, self.held, request)
        return self.score

    def _measured(self, policy: Policy, request: CertifyRequest) -> Policy:
        decisions = decide(policy, self.held, self.labels)
        found = evaluate_rule(
            self.held,
            decisions.accept,
            decisions.abstain,
            request.out_of_scope_share,
            request.delta,
        )
        chosen = self.chosen_on(found.selective_risk, found.accept)
        return policy.model_copy(update={"chosen_on": chosen})

    def _abstaining(self, score: ScoreName, delta: float, accept: float) -> _Abstaining:
        """Return the abstain limit and its guarantee, on the accept limit's own score.

        A limit on another score, or one stricter than the accept limit, would take answers away
        from those that were certified, and the right ones as well as the wrong: the share of
        errors among the rest might rise above the target.
        """
        limit = certify_abstain(self.select, self.held, score, self.max_abstained, delta)
        if limit is None:
            return {"abstain": None, "abstain_guarantee": None}
        threshold = self._looser(score, limit.threshold, accept)
        return {
            "abstain": Limit(score=score, threshold=threshold),
            "abstain_guarantee": AbstainGuarantee(
                max_in_scope_share=self.max_abstained,
                delta=delta,
                n=int((~self.held.outside).sum()),
            ),
        }

    @staticmethod
    def _looser(score: ScoreName, *thresholds: float) -> float:
        values = torch.tensor(thresholds, dtype=torch.float64)
        return float(values[surer(score, values).argmin()])

    def _guarantee(
        self, found: Sequence[Certificate], request: CertifyRequest, *, per_label: bool = False
    ) -> Guarantee:
        first = found[0]
        return Guarantee(
            procedure=first.procedure,
            target_risk=request.target_risk,
            delta=request.delta,
            out_of_scope_share=request.out_of_scope_share,
            n=first.n,
            n_out_of_scope=first.n_out_of_scope,
            n_accepted=sum(c.n_accepted for c in found),
            n_out_of_scope_accepted=sum(c.n_out_of_scope_accepted for c in found),
            risk_upper_bound=max(c.risk_upper_bound for c in found),
            in_scope_coverage=sum(c.in_scope_coverage for c in found),
            per_label=per_label,
            calibrated_at=self.date,
            measured_with=self.measured_with,
        )


def _uncertified(request: CertifyRequest, found: NoCertificate, label: str | None) -> Uncertified:
    return Uncertified(
        target_risk=request.target_risk,
        label=label,
        reason=found.reason,
        more_labels=found.more_labels,
    )

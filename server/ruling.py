"""Which policy decides on a request, and what its receipt may promise.

A request asks for a policy by name, by target risk, or with limits of its own. A locked policy of
the server decides as well, and the stricter decision holds. A stored certificate is only passed on
for exactly what it was made for: its own policy alone, with the adapter's own sampling.
"""

from dataclasses import dataclass, replace

from server.decision import Verdict, decide, missing_score, strictest
from server.errors import ApiError
from server.lookup import find_policy, quoted
from server.ports import AdapterCard, Policy, RowScores, Sampling, UncertifiedTarget
from server.schemas.policies import NamedPolicy, PolicyForm, RiskPolicy, ThresholdPolicy

__all__ = ["INLINE", "Ruling", "check_applicable", "choose_policy", "rule"]

INLINE = "inline"
"""Name of a policy that was written in a request."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What decides on the rows of one request.

    Attributes:
        policy: The asked policy, with no more promises than hold here; None when the adapter has
            none.
        combined_with: The locked policy where another one was asked for; the stricter holds.
        combined: Whether the locked rule is applied as well; it may be that an adapter without any
            policy sends everything to review.
        calibrated: Whether a policy of the adapter decides alone with its own sampling.
        default_sampling: Whether the adapter's own sampling is asked for.
    """

    policy: Policy | None
    combined_with: Policy | None
    combined: bool
    calibrated: bool
    default_sampling: bool

    @property
    def target_risk(self) -> float | None:
        """The target of the certificate that holds for these answers; None when none does."""
        guarantee = self.policy.guarantee if self.policy else None
        return guarantee.target_risk if guarantee else None

    def decide(self, scores: RowScores, *, truncated: bool) -> Verdict:
        """Return the decision on one row."""
        verdict = decide(self.policy, scores, truncated=truncated)
        if not self.combined:
            return verdict
        return strictest(decide(self.combined_with, scores, truncated=truncated), verdict)


def rule(
    card: AdapterCard, asked: PolicyForm | None, sampling: Sampling, locked: str | None
) -> Ruling:
    """Return what decides on a request.

    Args:
        card: The adapter.
        asked: The request's policy; None for the locked one, else the adapter's first.
        sampling: How the answers will be sampled.
        locked: Name of the policy that no request can loosen; None when the server locks none.

    Raises:
        ApiError: 422 when the policy is unknown, not certified, needs scores that these answers do
            not have, or when the sampling of a locked policy would be changed.
    """
    lock = find_policy(card, locked) if locked is not None and card.policies else None
    default = sampling == card.defaults
    if locked is not None and not default:
        raise _locked_sampling(locked, sampling, card)
    policy = choose_policy(card, asked) if asked else (lock or _first(card))
    if isinstance(asked, RiskPolicy) and not default:
        raise _risk_of_another_sampling(asked, card)
    combined = locked is not None and policy is not lock
    for used in (policy, lock):
        check_applicable(used, sampling, card)
    return Ruling(
        policy=policy and _with_promises(policy, lock if combined else None, sampling, card),
        combined_with=lock if combined else None,
        combined=combined,
        calibrated=default and not combined and _holds(policy, card),
        default_sampling=default,
    )


def choose_policy(card: AdapterCard, asked: PolicyForm) -> Policy:
    """Return the policy that a request asks for.

    Raises:
        ApiError: 422 when the adapter has no such policy, or none certified for the asked risk.
    """
    if isinstance(asked, NamedPolicy):
        return find_policy(card, asked.name)
    if isinstance(asked, RiskPolicy):
        return _certified(card, asked.max_risk)
    return _inline(asked)


def check_applicable(policy: Policy | None, sampling: Sampling, card: AdapterCard) -> None:
    """Refuse a policy whose scores this sampling cannot give.

    Raises:
        ApiError: 422 with the reason.
    """
    missing = missing_score(policy, sampling, card) if policy else None
    if policy is not None and missing is not None:
        raise ApiError(
            "policy_not_applicable",
            f"policy {quoted(policy.name)} {missing}",
            errors=({"pointer": "#/policy"},),
        )


def _first(card: AdapterCard) -> Policy | None:
    return card.policies[0] if card.policies else None


def _holds(policy: Policy | None, card: AdapterCard) -> bool:
    """Whether a policy is one of the adapter's and nothing made its promises void."""
    return policy is not None and policy in card.policies and policy.void is None


def _inline(asked: ThresholdPolicy) -> Policy:
    return Policy(
        name=INLINE,
        accept=asked.limits(),
        abstain=asked.abstain.limits() if asked.abstain else (),
    )


def _certified(card: AdapterCard, max_risk: float) -> Policy:
    """Return the certified policy with the largest target risk that is at most ``max_risk``."""
    certified = {
        policy.guarantee.target_risk: policy
        for policy in reversed(card.policies)  # of equal targets, the first stays
        if policy.guarantee is not None and not policy.guarantee.per_label
    }
    allowed = [target for target in certified if target <= max_risk]
    if allowed:
        return certified[max(allowed)]
    targets = sorted(certified)
    raise ApiError(
        "not_certified",
        _why_not_certified(card, max_risk, targets),
        errors=(
            {"pointer": "#/policy/max_risk", "actual": max_risk, "certified_targets": targets},
        ),
    )


def _why_not_certified(card: AdapterCard, max_risk: float, targets: list[float]) -> str:
    known = ", ".join(f"{target:g}" for target in targets)
    parts = [
        f"adapter {card.name} has no policy certified for a risk of at most {max_risk:g}",
        f"certified targets: {known}" if known else "it has no certified policy",
    ]
    if card.calibration is None:
        parts.append("dalorra calibrate makes them")
    missed = [t for t in _uncertified(card) if t.label is None and t.target_risk <= max_risk]
    if missed:
        # the loosest of the targets that would do is the one that is easiest to reach
        parts.append(_describe(max(missed, key=lambda target: target.target_risk)))
    void = next((policy.void for policy in card.policies if policy.void), None)
    if void:
        parts.append(f"stored certificates do not hold here: {void}")
    return "; ".join(parts)


def _uncertified(card: AdapterCard) -> tuple[UncertifiedTarget, ...]:
    return card.calibration.uncertified if card.calibration else ()


def _describe(target: UncertifiedTarget) -> str:
    """The reason says as well how many more labels would do."""
    return f"target {target.target_risk:g} was not certified: {target.reason}"


def _with_promises(
    policy: Policy, lock: Policy | None, sampling: Sampling, card: AdapterCard
) -> Policy:
    """Return a policy without the promises that do not hold for this request, and say why not."""
    if sampling == card.defaults and lock is None:
        return policy
    if policy.guarantee is None and policy.abstain_guarantee is None:
        return policy
    why = (
        f"the locked policy {lock.name} was applied as well"
        if lock is not None
        else f"the request changes the sampling: {_changes(sampling, card.defaults)}"
    )
    return replace(policy, guarantee=None, abstain_guarantee=None, void=why)


def _locked_sampling(locked: str, sampling: Sampling, card: AdapterCard) -> ApiError:
    changes = _changes(sampling, card.defaults)
    return ApiError(
        "policy_locked",
        f"policy {locked} is locked on this server, so the sampling cannot be changed: {changes}",
        errors=tuple({"pointer": f"#/{name}"} for name in _changed(sampling, card.defaults)),
    )


def _risk_of_another_sampling(asked: RiskPolicy, card: AdapterCard) -> ApiError:
    return ApiError(
        "not_certified",
        f"no risk is certified for another sampling than adapter {card.name}'s own; leave out "
        "num_samples, seed, estimator and design, or name a policy without a promise",
        errors=({"pointer": "#/policy/max_risk", "actual": asked.max_risk},),
    )


def _changed(sampling: Sampling, defaults: Sampling) -> list[str]:
    if sampling.estimator != defaults.estimator:
        return ["estimator"]  # the others follow from it
    names = ("num_samples", "seed", "design")
    return [name for name in names if getattr(sampling, name) != getattr(defaults, name)]


def _changes(sampling: Sampling, defaults: Sampling) -> str:
    return ", ".join(
        f"{name} {getattr(sampling, name)} instead of {getattr(defaults, name)}"
        for name in _changed(sampling, defaults)
    )

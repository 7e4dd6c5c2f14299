"""As many samples as a row needs: stop where neither its label nor its decision may change.

The M samples of a plan are fixed. They are run a few at a time, and a row drops out once the mean
probabilities of all M are known well enough. What is bounded is therefore the mean of all M
samples, not that of infinitely many: the rest of a finite set, of which the first samples are a
random part, as the samples of an ``iid`` or ``stratified`` set are exchangeable.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import stdtrit
from torch import Tensor

from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.uncertainty import mean_probs, mutual_information
from dalorra_core.predictive.plan import SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.predictive.stem import stem_states
from dalorra_core.predictive.tempering import temper

__all__ = [
    "BOUNDS",
    "AdaptiveAnswers",
    "Bound",
    "StoppingRule",
    "answer_adaptively",
    "settled",
    "stopped_at",
]

Bound = Literal["certain", "serfling", "student"]
"""How the mean of all M samples is bounded from the first m.

``certain``: a probability lies in [0, 1], so the rest can move the mean only so far; never wrong.
``serfling``: Hoeffding's bound for samples without replacement; wrong with probability ``delta`` at
most, whatever the samples look like. ``student``: Student's t, which takes samples as normal; a
heuristic, whose error rate has to be measured. Each of the last two stops where ``certain`` does,
too.
"""

BOUNDS: tuple[Bound, ...] = ("certain", "serfling", "student")


@dataclass(frozen=True)
class StoppingRule:
    """When a row has enough samples.

    Attributes:
        bound: See ``Bound``.
        delta: Chance, for each row, of a label or a decision other than that of all M samples; in
            (0, 1), without effect for ``certain``.
        step: Samples run at a time, at least 1.
        thresholds: Confidences in [0, 1] that decisions depend on: a decision is which of them the
            confidence reaches.
    """

    bound: Bound = "certain"
    delta: float = 0.05
    step: int = 2
    thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.bound not in BOUNDS:
            raise ConfigError(f"bound must be one of {', '.join(BOUNDS)}, got {self.bound!r}")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta must lie strictly between 0 and 1, got {self.delta}")
        if self.step < 1:
            raise ConfigError(f"step must be at least 1, got {self.step}")


def settled(
    log_probs: Float[Tensor, "m B C"], num_samples: int, rule: StoppingRule
) -> Bool[Tensor, " B"]:
    """Return the rows whose label and decision the other samples are not expected to change.

    Args:
        log_probs: Of the first m samples, natural log.
        num_samples: M.
        rule: The rule.

    Source:
        docs/method.md, eq. (J12) and (J13).
    """
    probs = log_probs.double().exp()
    m, rows, labels = probs.shape
    if m >= num_samples:
        return torch.ones(rows, dtype=torch.bool)
    share = _share_of_delta(rule, num_samples, labels)
    best = probs.mean(0).argmax(-1)  # (B,)
    own = probs.gather(-1, best.expand(m, -1).unsqueeze(-1))  # (m, B, 1)
    leads = _lower(own - probs, (-1.0, 1.0), num_samples, rule.bound, share)  # (B, C)
    leads.scatter_(-1, best.unsqueeze(-1), math.inf)  # it is no rival of itself
    lowest = _lower(own, (0.0, 1.0), num_samples, rule.bound, share)[:, 0]
    highest = -_lower(-own, (-1.0, 0.0), num_samples, rule.bound, share)[:, 0]
    done = (leads > 0).all(-1)
    for threshold in rule.thresholds:
        done &= (lowest >= threshold) | (highest < threshold)
    return done


def _share_of_delta(rule: StoppingRule, num_samples: int, labels: int) -> float:
    """Return delta for one bound at one look.

    A wrong stop breaks one of these bounds at one look: the lead of the stopped label over the
    label of all M, which is any of the other C - 1, or one of the two on that label's confidence.
    ``student``, which proves nothing, is corrected for the looks only: the bounds that may break
    are those of the nearest rival.
    """
    looks = math.ceil(num_samples / rule.step) - 1  # with all M there is nothing left to bound
    bounds = labels - 1 + 2 * bool(rule.thresholds)
    return rule.delta / (looks if rule.bound == "student" else looks * bounds)


def _lower(
    values: Float[Tensor, "m B k"],
    span: tuple[float, float],
    num_samples: int,
    bound: Bound,
    delta: float,
) -> Float[Tensor, "B k"]:
    """Return lower bounds on the means over all M samples of values that lie in ``span``."""
    m = len(values)
    mean, left = values.mean(0), 1 - m / num_samples
    surely = mean * (1 - left) + span[0] * left
    if bound == "certain" or (bound == "student" and m == 1):  # one sample shows no spread
        return surely
    if bound == "serfling":
        rho = min(1 - (m - 1) / num_samples, left * (1 + 1 / m))
        half = (span[1] - span[0]) * math.sqrt(rho * math.log(1 / delta) / (2 * m))
        return torch.maximum(surely, mean - half)
    half_widths = float(stdtrit(m - 1, 1 - delta)) * values.std(0) * math.sqrt(left / m)
    return torch.maximum(surely, mean - half_widths)


def stopped_at(log_probs: Float[Tensor, "M B C"], rule: StoppingRule) -> Int[Tensor, " B"]:
    """Return how many samples each row would have been given, had they been run by this rule.

    Args:
        log_probs: Of all M samples.
        rule: The rule.
    """
    total = len(log_probs)
    used = torch.full((log_probs.shape[1],), total)
    for m in reversed(range(rule.step, total, rule.step)):
        used[settled(log_probs[:m], total, rule)] = m
    return used


@dataclass(frozen=True, eq=False)
class AdaptiveAnswers:
    """Answers of as many samples as each row was given.

    Attributes:
        log_probs: (M, B, C) float32; NaN where a sample was not run.
        num_samples: (B,) how many were run for the row: the first ones of the plan.
    """

    log_probs: Tensor
    num_samples: Tensor

    @property
    def mean_probs(self) -> Tensor:
        """(B, C) float64."""
        return self._of_each(mean_probs)

    @property
    def mutual_information(self) -> Tensor:
        """(B,) in nats; of as many samples as the row has, so rows differ in its bias too."""
        return self._of_each(mutual_information)

    def _of_each(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        counts = self.num_samples.tolist()
        return torch.cat([measure(self.log_probs[:m, b : b + 1]) for b, m in enumerate(counts)])


def answer_adaptively(
    predictor: Predictor,
    rows: Sequence[EncodedExample],
    plan: SamplingPlan,
    rule: StoppingRule,
    *,
    calibrated: bool = True,
) -> AdaptiveAnswers:
    """Return answers of at most the plan's M samples, and of fewer where fewer settle a row.

    A row that needs all of them gets the answer that ``Predictor.predict`` gives. Rows share
    forward passes.

    Args:
        predictor: The adapter.
        rows: At least one encoded row.
        plan: M, seed and design.
        rule: When to stop.
        calibrated: Apply the temperature that the artifact stores.

    Raises:
        ConfigError: The method's samples are not passes, or the first samples of the design are
            not a random part of all of them.
    """
    if predictor.point_method or predictor.method.logit_covariance is not None:
        raise ConfigError(
            f"method {predictor.method.name} has no samples that cost a pass: nothing to stop"
        )
    if plan.design == "antithetic" and rule.bound != "certain":
        raise ConfigError(
            f"bound {rule.bound} takes samples as exchangeable, those of design antithetic are not"
        )
    pack, model = predictor.pack(plan), predictor.model
    total = pack.num_samples
    stems = stem_states(model, rows)
    temperature = predictor.temperature if calibrated else 1.0
    log_probs = torch.full((total, len(rows), model.num_labels), math.nan)
    used = torch.full((len(rows),), total)
    active = torch.arange(len(rows))
    for start in range(0, total, rule.step):
        stop = min(start + rule.step, total)
        found = score_rows(
            model,
            pack.narrow(start, stop),
            [rows[i] for i in active.tolist()],
            num_labels=model.num_labels,
            max_padded_tokens=predictor.max_padded_tokens,
            stems=None if stems is None else stems.pick(active.tolist()),
        )
        log_probs[start:stop, active] = temper(found.log_probs, temperature)
        done = settled(log_probs[:stop, active], total, rule)
        used[active[done]] = stop
        active = active[~done]
        if len(active) == 0:
            break
    return AdaptiveAnswers(log_probs, used)

"""Estimators that do more with the same samples, or with none; errors on equal samples.

* ``exact_head``: the label head's gates summed out for each sample of the others.
* ``blend``: half the mean of the samples, half the deterministic pass.
* ``linearised``: the network linearised in the gates, one forward and C backward passes.
* ``control_variate``: the samples, corrected by the linearised network under the same gates.
* ``adaptive``: samples until neither label nor decision may change.

All are judged on the same packs of independent samples, so that what an estimator gains is not
hidden by the luck of its samples: every error is given as a share of that of the whole packs.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from benchmarks.estimator_answers import DRAWS, Answers, keep_probs
from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.calibration.estimator_errors import (
    ReferenceAnswers,
    SquaredErrors,
    estimate,
    reference_answers,
    squared_errors,
    squared_errors_of,
    squared_mean_errors,
)
from dalorra_core.config import Design
from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.methods.method import Draw
from dalorra_core.metrics.uncertainty import mean_probs
from dalorra_core.predictive.adaptive import (
    BOUNDS,
    AdaptiveAnswers,
    StoppingRule,
    answer_adaptively,
    stopped_at,
)
from dalorra_core.predictive.exact_head import MOST_HEAD_GATES, HeadAnswers
from dalorra_core.predictive.linearised import controlled, flat_gates
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

__all__ = ["FURTHER", "Request", "applicable", "further_errors", "further_ways"]

CHEAP_LABELS = 16
"""Labels up to which C backward passes are not too dear to be tried unasked."""

_IN_ONE_PACK = 64


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        names: Of ``FURTHER``.
        reference: K independent samples that stand for infinitely many.
        packs: R packs of as many samples as the largest size.
        sizes: M to show, ascending; the first M samples of a pack.
        thresholds: Of decisions on the confidence.
        designs: Ways to draw samples together that are tried beside independent ones, in R packs of
            each size for themselves.
    """

    names: tuple[str, ...]
    reference: int
    packs: int
    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    designs: tuple[Design, ...] = ()


def applicable(predictor: Predictor) -> tuple[str, ...]:
    """Return the estimators that this adapter allows at a bearable cost."""
    left_out: set[str] = set()
    try:
        keep = keep_probs(predictor)
    except ConfigError:
        left_out = {"exact_head", "linearised", "control_variate"}
    else:
        if LM_HEAD not in keep or len(keep[LM_HEAD]) > MOST_HEAD_GATES:
            left_out |= {"exact_head"}
        if len(predictor.labels) > CHEAP_LABELS:
            left_out |= {"linearised", "control_variate"}
    return tuple(name for name in FURTHER if name not in left_out)


class _Estimate(Protocol):
    @property
    def mean_probs(self) -> Tensor: ...

    @property
    def mutual_information(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class _Packs:
    """R packs of independent samples, and what judges them."""

    answers: Answers
    request: Request
    reference: ReferenceAnswers
    plans: Sequence[SamplingPlan]
    heads: Sequence[HeadAnswers]  # none where the exact head was not asked for
    log_probs: Tensor  # (R, M, B, C)

    @classmethod
    def drawn(cls, answers: Answers, request: Request) -> Self:
        starts = range(0, request.reference, _IN_ONE_PACK)
        sizes = [min(_IN_ONE_PACK, request.reference - start) for start in starts]
        reference = reference_answers(
            torch.cat([answers.of(SamplingPlan(m, 1_000_000 + i)) for i, m in enumerate(sizes)])
        )
        plans = [SamplingPlan(request.sizes[-1], 2_000_000 + r) for r in range(request.packs)]
        heads = [answers.exact_head(p) for p in plans] if "exact_head" in request.names else []
        log_probs = torch.stack([h.log_probs for h in heads] or [answers.of(p) for p in plans])
        return cls(answers, request, reference, plans, heads, log_probs)

    def errors(self, estimates: Sequence[_Estimate]) -> SquaredErrors:
        """Return the errors of one estimate for each pack."""
        means = torch.stack([found.mean_probs for found in estimates])
        information = torch.stack([found.mutual_information for found in estimates])
        return squared_errors_of(self.reference, means, information)

    @cached_property
    def stops(self) -> dict[str, Tensor]:
        """Samples used (R, B) under every stopping rule, for the labels and for decisions too."""
        found = {}
        for bound in BOUNDS:
            for thresholds in dict.fromkeys([(), self.request.thresholds]):
                rule = StoppingRule(bound, thresholds=thresholds)
                name = f"adaptive, {bound}" + (", decisions" if thresholds else "")
                found[name] = torch.stack([stopped_at(pack, rule) for pack in self.log_probs])
        return found


Errors = SquaredErrors | Tensor
"""Of mean and mutual information, or (R, B) of the mean alone."""


def _exact_head(packs: _Packs) -> dict[str, Errors]:
    sizes = packs.request.sizes
    return {f"exact_head {m}": packs.errors([h.first(m) for h in packs.heads]) for m in sizes}


def _designed(packs: _Packs) -> dict[str, Errors]:
    """Return the errors of the packs of other designs, and with the head's gates summed out."""
    answers, reference, found = packs.answers, packs.reference, dict[str, Errors]()
    for design, m in itertools.product(packs.request.designs, packs.request.sizes):
        plans = [SamplingPlan(m, 3_000_000 + r, design=design) for r in range(packs.request.packs)]
        if packs.heads:
            heads = [answers.exact_head(plan) for plan in plans]
            found[f"exact_head, {design} {m}"] = packs.errors(heads)
            own = torch.stack([head.log_probs for head in heads])
        else:
            own = torch.stack([answers.of(plan) for plan in plans])
        found[f"{design} {m}"] = squared_errors(reference, own)
    return found


def _blend(packs: _Packs) -> dict[str, Errors]:
    found: dict[str, Errors] = {}
    for m in packs.request.sizes:
        means = torch.stack([mean_probs(pack[:m]) for pack in packs.log_probs])
        half = (means + packs.answers.mean_mask) / 2
        found[f"blend {m}"] = squared_mean_errors(packs.reference, half)
    return found


def _linearised(packs: _Packs) -> dict[str, Errors]:
    network, reference = packs.answers.linearised, packs.reference
    drawn = network.gaussian(Draw(("linearised",), DRAWS))
    probit = network.probit().double().exp()
    return {
        "linearised": squared_errors(reference, drawn[None]),
        "linearised, probit": squared_mean_errors(reference, probit[None]),
    }


def _control_variate(packs: _Packs) -> dict[str, Errors]:
    answers = packs.answers
    theirs = [answers.linearised.log_probs(flat_gates(answers.pack(p))) for p in packs.plans]
    both = list(zip(packs.log_probs, theirs, strict=True))
    return {
        f"control_variate {m}": packs.errors(
            [controlled(p[:m], q[:m], answers.expected) for p, q in both]
        )
        for m in packs.request.sizes
    }


def _adaptive(packs: _Packs) -> dict[str, Errors]:
    return {
        name: packs.errors(
            [AdaptiveAnswers(p, n) for p, n in zip(packs.log_probs, used, strict=True)]
        )
        for name, used in packs.stops.items()
    }


_ERRORS_OF: dict[str, Callable[[_Packs], dict[str, Errors]]] = {
    "exact_head": _exact_head,
    "blend": _blend,
    "linearised": _linearised,
    "control_variate": _control_variate,
    "adaptive": _adaptive,
}

FURTHER = tuple(_ERRORS_OF)


def further_errors(
    predictor: Predictor, rows: Sequence[EncodedExample], request: Request
) -> dict[str, Any]:
    """Return the errors of every estimator as shares of those of whole packs, and adaptive M."""
    packs = _Packs.drawn(Answers(predictor, rows), request)
    plain = {m: squared_errors(packs.reference, packs.log_probs[:, :m]) for m in request.sizes}
    peer = plain[request.sizes[-1]]
    found: dict[str, Errors] = {f"iid {m}": errors for m, errors in plain.items()}
    found["mean_mask"] = squared_mean_errors(packs.reference, packs.answers.mean_mask[None])
    for name in request.names:
        found |= _ERRORS_OF[name](packs)
    found |= _designed(packs)
    stops = packs.stops if "adaptive" in request.names else {}
    return {
        "rows": len(rows),
        "reference": request.reference,
        "packs": request.packs,
        "peer": f"iid {request.sizes[-1]}",
        "peer_errors": {
            "mean": estimate(peer.mean).value,
            "information": estimate(peer.information).value,
        },
        "shares": {name: _shares(errors, peer) for name, errors in found.items()},
        "adaptive": {
            name: _flips(packs.log_probs, used, request.thresholds) for name, used in stops.items()
        },
    }


def _shares(errors: Errors, peer: SquaredErrors) -> dict[str, float]:
    """Return mean and mutual information's errors as shares of the peer's, with standard errors."""
    if isinstance(errors, Tensor):
        return _share("mean", errors, peer.mean)
    return _share("mean", errors.mean, peer.mean) | _share(
        "information", errors.information, peer.information
    )


def _share(name: str, errors: Tensor, peer: Tensor) -> dict[str, float]:
    """Return a ratio of means and its standard error, by the delta method."""
    ratio = float(errors.mean() / peer.mean())
    residual = estimate(errors - ratio * peer).standard_error
    return {name: ratio, f"{name}_se": residual / float(peer.mean().abs())}


def _flips(packs: Tensor, used: Tensor, thresholds: Sequence[float]) -> dict[str, float]:
    """Return the samples used, and how often label and decision are not those of all samples."""
    marks = torch.tensor(thresholds, dtype=torch.float64)
    labels, decisions = [], []
    for pack, counts in zip(packs, used, strict=True):
        full, found = mean_probs(pack), AdaptiveAnswers(pack, counts).mean_probs
        labels.append(full.argmax(-1) != found.argmax(-1))
        decisions.append(
            ((full.amax(-1, keepdim=True) >= marks) != (found.amax(-1, keepdim=True) >= marks)).any(
                -1
            )
        )
    flipped = torch.stack(labels)
    return {
        "mean_samples": float(used.double().mean()),
        "label_flips": float(flipped.double().mean()),
        "decision_flips": float((flipped | torch.stack(decisions)).double().mean()),
    }


def further_ways(
    predictor: Predictor, rows: Sequence[EncodedExample], request: Request
) -> dict[str, Callable[[], object]]:
    """Return what is timed of the estimators that cost something of their own."""
    answers, m = Answers(predictor, rows), max(request.sizes)
    plan, rule = SamplingPlan(m), StoppingRule("student", thresholds=request.thresholds)
    ways: dict[str, Callable[[], object]] = {
        "exact_head": lambda: answers.exact_head(plan),
        "linearised": lambda: answers.linearise().gaussian(Draw(("linearised",), DRAWS)),
        "adaptive": lambda: answer_adaptively(predictor, rows, plan, rule),
    }
    return {
        (name if name == "linearised" else f"{name} {m}"): way
        for name, way in ways.items()
        if name in request.names
    }

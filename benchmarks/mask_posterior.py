"""How near are the learned gate posteriors to the exact one? Enumerate all masks of a tiny model.

    python -m benchmarks.mask_posterior [--seeds 2] [--output FILE]

A tiny random Llama is adapted on a few rows of a made-up task, a quarter of whose labels are
wrong, so that the data do not settle every gate. Each method trains A, B and its posterior q as
always. Then A and B are held fixed and the exact posterior over the 2^10 masks is worked out,
``p(z | D) = p0(z) prod_i p(y_i | x_i, z) / p(D)``, from one forward pass for each mask and row.

Reported for each run: KL(q || p(z | D)), which is what the evidence lower bound at hard gates
falls short of the evidence; the distance in total variation; how far the keep probabilities are
off; the strongest correlation of two gates; and the held-out answers under p(z | D), q, the prior
and the mean mask. ``best_in_family`` is the least divergence found for each family at the same A
and B, by descent on the enumerated divergence: what is left there is the family's doing, the rest
is the training's (relaxed gates, one sample a step, A and B moving along).
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.hardware import describe_hardware
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, module_packs
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.examples import TextExample
from dalorra_core.methods import METHODS, mask_markov, mask_mixture
from dalorra_core.methods.dalorra import PHI
from dalorra_core.predictive.matching import state_of
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import TrainConfig
from tests.support.tiny_models import save_tiny_base, write_jsonl

VARIANTS: dict[str, dict[str, Any]] = {
    "dalorra": {"name": "dalorra"},
    "dalorra, tau 0.3": {"name": "dalorra", "tau": 0.3},
    "dalorra, straight-through": {"name": "dalorra", "train_masks": "straight_through"},
    "dalorra, 8 samples a step": {"name": "dalorra", "num_train_samples": 8},
    "mask_mixture": {"name": "mask_mixture", "diversity": 1.0},
    "mask_mixture, 8 samples a step": {"name": "mask_mixture", "diversity": 1.0}
    | {"num_train_samples": 8},
    "mask_markov": {"name": "mask_markov"},
    "mask_markov, 8 samples a step": {"name": "mask_markov", "num_train_samples": 8},
}

_WORDS = {"money": "transfer", "travel": "flight", "time": "alarm", "food": "order"}
_FILLERS = ("the", "what", "is", "you", "how", "to")
_TRAIN_ROWS, _HELD_OUT_ROWS, _WRONG_SHARE = 40, 60, 0.25
_STEPS, _R, _PRIOR = 300, 2, 0.5
_DESCENT_STEPS, _DESCENT_LR = 200, 0.1
_MOST = 0.9

LogProb = Callable[[AdapterState, Tensor], Tensor]


def product_log_prob(state: AdapterState, z: Tensor) -> Tensor:
    """Return DALorRA's log-probability of hard masks z (n, L, r), in nats."""
    phi = state.params[PHI]
    return (z * F.logsigmoid(phi) + (1 - z) * F.logsigmoid(-phi)).sum((-2, -1))


FAMILIES: dict[str, LogProb] = {
    "dalorra": product_log_prob,
    "mask_mixture": mask_mixture.log_prob,
    "mask_markov": mask_markov.log_prob,
}


@dataclass(frozen=True)
class ExactPosterior:
    """The masks of a trained adapter and what the data say of them.

    Attributes:
        masks: (2^G, L, r), all of them, float64.
        log_prior: (2^G,), nats.
        log_likelihood: (2^G,) ln p(all labels | mask).
    """

    masks: Tensor
    log_prior: Tensor
    log_likelihood: Tensor

    @property
    def log_evidence(self) -> float:
        """Return ln p(D), nats."""
        return float((self.log_prior + self.log_likelihood).logsumexp(0))

    @property
    def log_probs(self) -> Tensor:
        """Return ln p(z | D), (2^G,)."""
        return (self.log_prior + self.log_likelihood).log_softmax(0)


def every_mask(num_modules: int, r: int) -> Tensor:
    """Return all masks, (2^(L r), L, r), float64."""
    rows = list(product((0.0, 1.0), repeat=num_modules * r))
    return torch.tensor(rows, dtype=torch.float64).view(-1, num_modules, r)


def prior_log_probs(masks: Tensor, prior_prob: float) -> Tensor:
    """Return the logarithm of the prior of every mask, (2^G,)."""
    kept = masks.sum((-2, -1))
    size = masks[0].numel()
    return kept * math.log(prior_prob) + (size - kept) * math.log1p(-prior_prob)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q || p) in nats, both as log-probabilities of all masks."""
    return (log_q.exp() * (log_q - log_p)).sum()


def best_in_family(name: str, state: AdapterState, exact: ExactPosterior) -> float:
    """Return the least KL(q || p(z | D)) found for a family at a trained adapter's A and B.

    Adam on the enumerated divergence, from the exact keep probabilities and from the prior.

    Args:
        name: One of `FAMILIES`.
        state: The adapter; its modules and rank matter.
        exact: Its exact posterior.
    """
    probs = exact.log_probs.exp()
    keep = (probs[:, None, None] * exact.masks).sum(0).clamp(1e-3, 1 - 1e-3)  # (L, r)
    prior = torch.full_like(keep, math.log(_PRIOR) - math.log1p(-_PRIOR))
    return min(_descend(name, state, exact, start) for start in (keep.logit(), prior))


def _descend(name: str, state: AdapterState, exact: ExactPosterior, start: Tensor) -> float:
    method = METHODS[name]
    config = method.settings.model_validate({"name": name, "prior_prob": _PRIOR})
    initial = method.init(state.specs, state.r, 0, config)
    params = {key: v.double() for key, v in initial.items() if "lora" not in key}
    around = params[PHI].mean() if name == "mask_mixture" else params[PHI]
    params[PHI] = (start + (params[PHI] - around)).clone()
    moved = {key: value.requires_grad_() for key, value in params.items()}
    optimizer = torch.optim.Adam(moved.values(), lr=_DESCENT_LR)
    least = math.inf
    for _ in range(_DESCENT_STEPS):
        log_q = FAMILIES[name](replace(state, params=moved), exact.masks)
        value = divergence(log_q, exact.log_probs)
        least = min(least, float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return least


def write_task(folder: Path, seed: int) -> Path:
    """Write train and held-out rows; a quarter of the training labels are wrong."""
    rng = np.random.default_rng([seed, 17])
    labels = list(_WORDS)

    def row(split: str, i: int) -> dict[str, Any]:
        label = labels[i % len(labels)]
        fillers = [_FILLERS[j] for j in rng.integers(len(_FILLERS), size=rng.integers(1, 4))]
        text = " ".join([*fillers, _WORDS[label]])
        if split == "train" and rng.random() < _WRONG_SHARE:
            label = labels[rng.integers(len(labels))]
        return {"id": f"{split}-{i}", "text": text, "label": label}

    for split, count in (("train", _TRAIN_ROWS), ("validation", _HELD_OUT_ROWS)):
        write_jsonl(folder / f"{split}.jsonl", [row(split, i) for i in range(count)])
    return folder


def study(folder: Path, base: Path, variant: str, seed: int) -> dict[str, Any]:
    """Train one variant, enumerate its masks and compare."""
    data = write_task(folder / "data", seed)
    config = TrainConfig.model_validate(
        {
            "name": "tiny",
            "base": str(base),
            "method": {"prior_prob": _PRIOR, "mask_lr": 3e-2, **VARIANTS[variant]},
            "adapter": {"r": _R, "lora_alpha": 2 * _R},
            "data": {"source": str(data)},
            "optim": {"lr": 2e-2, "steps": _STEPS, "batch_size": 8},
            "run": {"seed": seed, "device": "cpu", "checkpoint_every": _STEPS}
            | {"eval_every": _STEPS},
        }
    )
    adapter = run_training(config, folder / "out", folder / "run", report=lambda _line: None)
    predictor = Predictor.load(adapter, base=str(base), device="cpu", dtype="float32")
    state = state_of(predictor.artifact)
    train, held_out = (_rows(predictor, data / f"{s}.jsonl") for s in ("train", "validation"))
    masks = every_mask(len(state.specs), state.r)
    log_likelihood = _log_likelihood(_answers(predictor, state, masks, train), train)
    exact = ExactPosterior(masks, prior_log_probs(masks, _PRIOR), log_likelihood)
    wide = replace(state, params={k: v.double() for k, v in state.params.items()})
    log_q = FAMILIES[config.method.name](wide, masks)
    compared = compare(log_q, exact)
    compared["best_in_family_nats"] = {
        name: best_in_family(name, state, exact) for name in FAMILIES
    }
    answers = _answers(predictor, state, masks, held_out)  # (2^G, B, C)
    mean_pack = predictor.method.mean_pack(state, config.method)
    mean_answers = _scored(predictor, mean_pack, held_out)
    weights = {name: values.exp() for name, values in (("q", log_q), ("p", exact.log_probs))}
    mixtures = {n: torch.einsum("z,zbc->bc", w, answers.exp()) for n, w in weights.items()}
    apart = 0.5 * (mixtures["q"] - mixtures["p"]).abs().sum(-1)
    compared["held_out"] = {
        "exact": _held_out(answers, exact.log_probs, held_out),
        "q": _held_out(answers, log_q, held_out),
        "prior": _held_out(answers, exact.log_prior, held_out),
        "mean_mask": _held_out(mean_answers, torch.zeros(1, dtype=torch.float64), held_out),
        "total_variation_of_answers": float(apart.mean()),
    }
    return {"variant": variant, "seed": seed, **compared}


def compare(log_q: Tensor, exact: ExactPosterior) -> dict[str, Any]:
    """Return how q differs from the exact posterior; both over all masks."""
    q, p = log_q.exp(), exact.log_probs.exp()
    keep = {n: torch.einsum("z,zlr->lr", w, exact.masks) for n, w in (("q", q), ("p", p))}
    sorted_p = p.sort(descending=True).values
    return {
        "log_evidence_nats": exact.log_evidence,
        "elbo_nats": float((q * (exact.log_likelihood + exact.log_prior - log_q)).sum()),
        "kl_to_exact_nats": float(divergence(log_q, exact.log_probs)),
        "kl_of_prior_to_exact_nats": float(divergence(exact.log_prior, exact.log_probs)),
        "kl_to_prior_nats": float(divergence(log_q, exact.log_prior)),
        "total_variation": float(0.5 * (q - p).abs().sum()),
        "keep_prob_mean_abs_error": float((keep["q"] - keep["p"]).abs().mean()),
        "keep_prob_max_abs_error": float((keep["q"] - keep["p"]).abs().max()),
        "strongest_correlation": {
            "q": _strongest_correlation(q, exact.masks),
            "exact": _strongest_correlation(p, exact.masks),
        },
        "masks_holding_nine_tenths_of_exact": int((sorted_p.cumsum(0) < _MOST).sum()) + 1,
    }


def _strongest_correlation(weights: Tensor, masks: Tensor) -> float:
    """Return the correlation of two gates that is largest in magnitude; 0 for constant gates."""
    covariance = torch.cov(masks.flatten(1).T, aweights=weights, correction=0)
    scale = covariance.diagonal().clamp_min(1e-12).sqrt()
    return float((covariance / torch.outer(scale, scale)).fill_diagonal_(0).abs().max())


def _rows(predictor: Predictor, path: Path) -> list[EncodedExample]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append(predictor.encode(TextExample(row["id"], row["text"], row["label"])))
    return found


def _scored(predictor: Predictor, pack: SamplePack, rows: list[EncodedExample]) -> Tensor:
    found = score_rows(
        predictor.model, pack, rows, num_labels=len(predictor.labels), max_padded_tokens=8192
    )
    return found.log_probs.double()  # (M, B, C)


def _answers(
    predictor: Predictor, state: AdapterState, masks: Tensor, rows: list[EncodedExample]
) -> Tensor:
    """Return ln p(label | row, mask) of all masks, (2^G, B, C)."""
    pack = SamplePack(len(masks), state.scaling, module_packs(state, masks.float()))
    return _scored(predictor, pack.to(torch.device("cpu"), torch.float32), rows)


def _log_likelihood(answers: Tensor, rows: list[EncodedExample]) -> Tensor:
    labels = torch.tensor([row.label for row in rows])
    return answers[:, torch.arange(len(rows)), labels].sum(-1)


def _held_out(answers: Tensor, log_weights: Tensor, rows: list[EncodedExample]) -> dict[str, float]:
    """Return the quality of the weighted mixture of masks on these rows."""
    mixture = torch.einsum("z,zbc->bc", log_weights.exp(), answers.exp())
    labels = torch.tensor([row.label for row in rows])
    right = mixture[torch.arange(len(rows)), labels]
    entropy = -(mixture * mixture.clamp_min(1e-300).log()).sum(-1)
    within = -torch.einsum("z,zbc->b", log_weights.exp(), answers.exp() * answers)
    return {
        "nll": float(-right.log().mean()),
        "accuracy": float((mixture.argmax(-1) == labels).double().mean()),
        "mutual_information": max(0.0, float((entropy - within).mean())),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over the seeds of what is a number in every run."""
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        own = [_numbers(run) for run in runs if run["variant"] == variant]
        found[variant] = {
            key: round(sum(run[key] for run in own) / len(own), 4)
            for key in own[0]
            if key != "seed"
        }
    return found


def _numbers(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _numbers(item, f"{prefix}{key}.")
        elif not isinstance(item, str):
            flat[prefix + key] = float(item)
    return flat


def main() -> None:
    """Run every variant and seed, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.process_time()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        base = save_tiny_base(Path(scratch) / "base")
        for seed in range(1, options.seeds + 1):
            for number, variant in enumerate(VARIANTS):
                place = Path(scratch) / f"{number}-{seed}"
                runs.append(study(place, base, variant, seed))
    report = {
        "hardware": describe_hardware(),
        "torch": torch.__version__,
        "settings": {
            "gates": 5 * _R,
            "train_rows": _TRAIN_ROWS,
            "wrong_labels": _WRONG_SHARE,
            "held_out_rows": _HELD_OUT_ROWS,
            "steps": _STEPS,
            "prior_prob": _PRIOR,
            "variants": VARIANTS,
        },
        "processor_s": round(time.process_time() - began_s, 1),
        "mean_over_seeds": summary(runs),
        "runs": runs,
    }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

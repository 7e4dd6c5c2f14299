"""Slow restatements of docs/method.md in float64 loops, to compare the fast code with.

Nothing of ours is imported here, and nothing is vectorised: each function is the formula as one
would work it out on paper.
"""

import math
from collections.abc import Sequence
from itertools import pairwise, permutations, product

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "adaptive_ece_loop",
    "augrc_loop",
    "aurc_over_all_orders",
    "auroc_loop",
    "brier_loop",
    "ece_loop",
    "elbo_by_enumeration",
    "entropy_loop",
    "every_mask",
    "log_evidence",
    "mask_kl_loop",
    "mask_probability",
    "mixture_loop",
    "nll_loop",
    "philox_words",
    "splitmix64_words",
    "uncertainty_loop",
]

Array = NDArray[np.float64]


def mixture_loop(log_probs: Array) -> Array:
    """Return (B, C): the mean over samples of exp(log_probs (M, B, C))."""
    samples, rows, labels = log_probs.shape
    mixture = np.zeros((rows, labels))
    for b in range(rows):
        for c in range(labels):
            mixture[b, c] = (
                math.fsum(math.exp(log_probs[m, b, c]) for m in range(samples)) / samples
            )
    return mixture


def entropy_loop(probs: Sequence[float]) -> float:
    """Return -sum p ln p in nats, with 0 ln 0 = 0."""
    return -math.fsum(p * math.log(p) for p in probs if p > 0.0)


def uncertainty_loop(log_probs: Array) -> dict[str, list[float]]:
    """Return every measure of one row by its name, a list over rows."""
    samples, rows, labels = log_probs.shape
    mixture = mixture_loop(log_probs)
    out: dict[str, list[float]] = {
        name: []
        for name in (
            "confidence",
            "confidence_std",
            "predictive_entropy",
            "expected_entropy",
            "mutual_information",
            "normalized_entropy",
            "variation_ratio",
        )
    }
    for b in range(rows):
        best = max(range(labels), key=lambda c: mixture[b, c])
        per_sample = [[math.exp(log_probs[m, b, c]) for c in range(labels)] for m in range(samples)]
        total = entropy_loop(list(mixture[b]))
        within = math.fsum(entropy_loop(probs) for probs in per_sample) / samples
        mean = math.fsum(probs[best] for probs in per_sample) / samples
        variance = math.fsum((probs[best] - mean) ** 2 for probs in per_sample) / samples
        dissent = sum(any(p > probs[best] for p in probs) for probs in per_sample)
        allowed = sum(any(probs[c] > 0.0 for probs in per_sample) for c in range(labels))
        out["confidence"].append(float(mixture[b, best]))
        out["confidence_std"].append(math.sqrt(variance))
        out["predictive_entropy"].append(total)
        out["expected_entropy"].append(within)
        out["mutual_information"].append(max(0.0, total - within))
        out["normalized_entropy"].append(total / math.log(allowed) if allowed > 1 else 0.0)
        out["variation_ratio"].append(dissent / samples)
    return out


def ece_loop(confidence: Sequence[float], correct: Sequence[bool], num_bins: int) -> float:
    """Return the ECE with bins [k/K, (k+1)/K) and a last bin for exactly 1."""
    gap = 0.0
    n = len(confidence)
    for k in range(num_bins + 1):
        low = k / num_bins
        high = (k + 1) / num_bins
        inside = [i for i in range(n) if low <= confidence[i] < high]
        gap += abs(math.fsum(float(correct[i]) - confidence[i] for i in inside))
    return gap / n


def adaptive_ece_loop(confidence: Sequence[float], correct: Sequence[bool], num_bins: int) -> float:
    """Return the ECE over equally filled bins; for distinct confidences only."""
    n = len(confidence)
    order = sorted(range(n), key=lambda i: confidence[i])
    gap = 0.0
    start = 0
    for k in range(num_bins):
        size = n // num_bins + (1 if k < n % num_bins else 0)
        chunk = order[start : start + size]
        start += size
        gap += abs(math.fsum(float(correct[i]) - confidence[i] for i in chunk))
    return gap / n


def brier_loop(probs: Array, labels: Sequence[int]) -> float:
    """Return the mean over rows of sum_c (p_c - 1[c = y])^2."""
    rows, num_labels = probs.shape
    total = 0.0
    for i in range(rows):
        for c in range(num_labels):
            total += (probs[i, c] - (1.0 if c == labels[i] else 0.0)) ** 2
    return total / rows


def nll_loop(probs: Array, labels: Sequence[int]) -> float:
    """Return the mean of -ln p(true label)."""
    return math.fsum(-math.log(probs[i, label]) for i, label in enumerate(labels)) / len(labels)


def aurc_over_all_orders(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """Return the mean AURC over every order of the rows that is sorted by confidence."""
    areas = []
    for order in permutations(range(len(confidence))):
        scores = [confidence[i] for i in order]
        if any(a < b for a, b in pairwise(scores)):
            continue
        errors = 0
        risks = []
        for k, i in enumerate(order, start=1):
            errors += not correct[i]
            risks.append(errors / k)
        areas.append(math.fsum(risks) / len(risks))
    return math.fsum(areas) / len(areas)


def auroc_loop(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the share of (positive, negative) pairs in the right order, ties half."""
    won = sum(1.0 if p > q else 0.5 if p == q else 0.0 for p in positive for q in negative)
    return won / (len(positive) * len(negative))


def augrc_loop(confidence: Sequence[float], correct: Sequence[bool]) -> float:
    """Return (1 - AUROC) a (1 - a) + (1 - a)^2 / 2, Traub et al. 2024, eq. (7)."""
    right = [s for s, ok in zip(confidence, correct, strict=True) if ok]
    wrong = [s for s, ok in zip(confidence, correct, strict=True) if not ok]
    accuracy = len(right) / len(confidence)
    ranking = auroc_loop(right, wrong) if right and wrong else 0.0
    return (1 - ranking) * accuracy * (1 - accuracy) + 0.5 * (1 - accuracy) ** 2


def every_mask(num_gates: int) -> list[tuple[int, ...]]:
    """Return all 2^G masks of G gates."""
    return list(product((0, 1), repeat=num_gates))


def mask_probability(mask: Sequence[int], keep: Sequence[float]) -> float:
    """Return prod_j p_j^z_j (1 - p_j)^(1 - z_j)."""
    probability = 1.0
    for z, p in zip(mask, keep, strict=True):
        probability *= p if z else 1.0 - p
    return probability


def mask_kl_loop(keep: Sequence[float], prior: float) -> float:
    """Return sum_z q(z) ln(q(z) / p0(z)) over all masks: the definition, not the closed form."""
    total = 0.0
    for mask in every_mask(len(keep)):
        q = mask_probability(mask, keep)
        total += q * math.log(q / mask_probability(mask, [prior] * len(keep)))
    return total


def elbo_by_enumeration(log_likelihood: Sequence[float], keep: Sequence[float]) -> float:
    """Return E_q[ln p(data | z)] over all masks, in nats.

    Args:
        log_likelihood: ln p(data | z) of each mask, in the order of `every_mask`.
        keep: Keep probability of each gate.
    """
    masks = every_mask(len(keep))
    return math.fsum(
        mask_probability(mask, keep) * value
        for mask, value in zip(masks, log_likelihood, strict=True)
    )


def log_evidence(log_likelihood: Sequence[float], prior: float) -> float:
    """Return ln sum_z p0(z) p(data | z); arguments as in `elbo_by_enumeration`."""
    gates = len(log_likelihood).bit_length() - 1
    return math.log(
        math.fsum(
            mask_probability(mask, [prior] * gates) * math.exp(value)
            for mask, value in zip(every_mask(gates), log_likelihood, strict=True)
        )
    )


def philox_words(key: int, count: int) -> list[int]:
    """Return the first 64-bit words of Philox-4x64-10 with a 128-bit key and counters 1, 2, ...

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low64 = (1 << 64) - 1
    words: list[int] = []
    counter = 0
    while len(words) < count:
        counter += 1
        c0, c1, c2, c3 = counter, 0, 0, 0
        k0, k1 = key & low64, key >> 64
        for _ in range(10):
            left, right = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
            c0, c1 = (right >> 64) ^ c1 ^ k0, right & low64
            c2, c3 = (left >> 64) ^ c3 ^ k1, left & low64
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low64, (k1 + 0xBB67AE8584CAA73B) & low64
        words += [c0, c1, c2, c3]
    return words[:count]


def splitmix64_words(seed: int, count: int) -> list[int]:
    """Return the first words of SplitMix64.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 5.
    """
    low64 = (1 << 64) - 1
    words: list[int] = []
    state = seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & low64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & low64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low64
        words.append(z ^ (z >> 31))
    return words

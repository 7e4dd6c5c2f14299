"""Answers of a method that is Gaussian in the label logits: M draws of logits from one pass.

A sample is a draw of the logits instead of a pack, so the number of samples costs next to nothing;
what costs is one backward pass for each label. Sample m uses the same C standard normal numbers
for every row, so that an answer depends on nothing but its question.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample
from dalorra_core.methods.method import Draw
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.gradients import label_gradients_of_rows
from dalorra_core.predictive.scoring import Prediction, score_rows
from dalorra_core.predictive.trunk import RowStates
from dalorra_core.sampling.streams import normals

__all__ = ["logit_draws", "probit_logits", "score_gaussian"]

_JITTER = 1e-6
"""Added to the variances, relative to the largest, so that a covariance of low rank has a root."""


def logit_draws(mean: Tensor, covariance: Tensor, draw: Draw) -> Tensor:
    """Return M draws of Gaussian logits.

    Args:
        mean: (B, C).
        covariance: (B, C, C), positive semidefinite.
        draw: Names the draws.

    Returns:
        (M, B, C), float32; NaN for a row whose covariance is not finite or not positive
        semidefinite, so that it spoils no other row's answer.
    """
    labels = mean.shape[-1]
    numbers = [normals((*draw.key, "logits", m), labels) for m in range(draw.num_samples)]
    noise = torch.from_numpy(np.stack(numbers)).to(mean.device)  # (M, C)
    wide = covariance.double()
    largest = wide.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    identity = torch.eye(labels, dtype=wide.dtype, device=wide.device)
    ridge = _JITTER * largest[:, None, None] * identity
    root, failed = torch.linalg.cholesky_ex(wide + ridge)  # (B, C, C), (B,)
    root = root.masked_fill((failed != 0)[:, None, None], float("nan"))
    return (mean.double() + torch.einsum("bcd,md->mbc", root, noise)).float()


def probit_logits(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return logits whose softmax is close to the mean probabilities, without draws.

    Each logit is divided by ``sqrt(1 + pi v / 8)``, where v is its variance. With two labels of
    which one has a fixed logit it is the logistic-normal mean to about 1 %; covariances between
    labels are left out.

    Args:
        mean: (B, C).
        covariance: (B, C, C).

    Returns:
        (B, C).

    Source:
        MacKay 1992, The evidence framework applied to classification networks, section 3.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)  # (B, C)
    return (mean / (1 + math.pi / 8 * variance).sqrt()).to(mean.dtype)


def score_gaussian(  # noqa: PLR0913  one call says all that decides the answer
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    *,
    modules: Sequence[str],
    covariance: Callable[[LabelGradients], Tensor],
    draw: Draw | None,
    max_padded_tokens: int,
    label_mass: bool = False,
    on_progress: Callable[[int], None] | None = None,
    wanted: Callable[[int], bool] | None = None,
    stems: RowStates | None = None,
) -> Prediction:
    """Return the label log-probabilities of every draw for every row, in the rows' order.

    Args:
        model: The adapted model.
        pack: The one function at the posterior mean, on the model's device.
        rows: At least one encoded row.
        modules: Adapted modules whose derivatives ``covariance`` looks at.
        covariance: Label gradients -> covariance of the label logits (B, C, C).
        draw: Names the M draws of logits; None asks for the probit approximation, one answer.
        max_padded_tokens: Size of one forward pass; see ``label_gradients_of_rows``.
        label_mass: Also compute that diagnostic, at the posterior mean.
        on_progress: Called with the number of rows finished or left out since the last call.
        wanted: Asked before every chunk for the rows in it; those that are not wanted are left out.
        stems: See ``label_gradients_of_rows``.

    Raises:
        RowMemoryError: See ``label_gradients_of_rows``.
    """
    samples = 1 if draw is None else draw.num_samples
    log_probs = torch.full((samples, len(rows), model.num_labels), float("nan"))
    answered = torch.zeros(len(rows), dtype=torch.bool)
    chunks = label_gradients_of_rows(
        model,
        pack,
        rows,
        modules=modules,
        max_padded_tokens=max_padded_tokens,
        wanted=wanted,
        stems=stems,
    )
    for places, gradients in chunks:
        with torch.no_grad():
            spread = covariance(gradients)
            if draw is None:
                logits = probit_logits(gradients.logits, spread).unsqueeze(0)  # (1, B, C)
            else:
                logits = logit_draws(gradients.logits, spread, draw)
            log_probs[:, places] = label_log_probs(logits, gradients.allowed).cpu()
        answered[places] = True
        if on_progress is not None:
            on_progress(len(places))
    if on_progress is not None and not bool(answered.all()):
        on_progress(int((~answered).sum()))
    mass = _mass(model, pack, rows, answered, max_padded_tokens) if label_mass else None
    return Prediction(log_probs, mass, answered)


def _mass(
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    answered: Tensor,
    max_padded_tokens: int,
) -> Tensor:
    """Return the label mass (B,) of the rows that were answered, at the posterior mean."""
    mass = torch.full((len(rows),), float("nan"))
    places = answered.nonzero().flatten().tolist()
    if places:
        found = score_rows(
            model,
            pack,
            [rows[i] for i in places],
            num_labels=model.num_labels,
            max_padded_tokens=max_padded_tokens,
            label_mass=True,
        ).label_mass
        assert found is not None  # noqa: S101  it was asked for
        mass[places] = found
    return mass

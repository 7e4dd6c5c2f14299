"""Derivatives of the label logits at the adapted layers: what Gaussian posteriors are made of.

A value only; ``predictive/gradients.py`` computes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LabelGradients", "ModuleGradients"]


@dataclass(frozen=True)
class ModuleGradients:
    """One adapted module's share in the label logits of B rows.

    The derivative of row b's logit c in the module's effective weight (d_out, d_in) is
    ``sum_t outputs[c, b, t] inputs[b, t]^T``; padding has zero outputs.

    Attributes:
        inputs: h (B, T, d_in), zero for padding; T is 1 for ``lm_head``.
        outputs: Derivative of each label logit in the module's output, (C, B, T, d_out).
        is_token: (B, T) bool, False for padding.
    """

    inputs: Tensor
    outputs: Tensor
    is_token: Tensor


@dataclass(frozen=True)
class LabelGradients:
    """The label logits of B rows at one function of the adapter, and their derivatives.

    Attributes:
        logits: (B, C), float32, not masked by ``allowed``.
        allowed: (B, C) bool, or None when every label is allowed.
        modules: Module name to its derivatives.
    """

    logits: Tensor
    allowed: Tensor | None
    modules: Mapping[str, ModuleGradients]

"""Gaussian down factors: A + sigma * eps, one draw for each sample, with or without flipout."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from dalorra_core.adapters.flipout import FlippedNoise
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import ModulePack
from dalorra_core.adapters.state import AdapterState, module_packs
from dalorra_core.config import Design, MethodSettings
from dalorra_core.methods.method import Draw
from dalorra_core.sampling.designs import DESIGNS, sample_normals

__all__ = ["NoiseKind", "WeightNoiseSettings", "designs_of_noise", "noisy_packs"]

NoiseKind = Literal["flipout", "weight_sample"]
"""Signs of its own for every token, or one draw of the weights for all of them."""


class WeightNoiseSettings(MethodSettings, frozen=True):
    """How Gaussian noise on A reaches the tokens."""

    train_noise: NoiseKind = Field(
        default="flipout",
        description="Noise on A in training: flipout gives each token of each row signs of its "
        "own; weight_sample draws A once for each of the S samples.",
    )
    test_noise: NoiseKind = Field(
        default="weight_sample",
        description="Noise on A at prediction: weight_sample makes each sample one function; "
        "flipout gives each position signs of its own, as the published code does.",
    )


def designs_of_noise(config: WeightNoiseSettings) -> tuple[Design, ...]:
    """Return the designs of samples with such noise.

    Flipout leaves only iid: the signs of a position undo what a sample's noise has to do with that
    of the others.
    """
    return ("iid",) if config.test_noise == "flipout" else DESIGNS


def noisy_packs(
    state: AdapterState,
    sigma: Callable[[TargetSpec], Tensor],
    draw: Draw,
    *,
    kind: NoiseKind,
    training: bool,
    z: Tensor | None = None,
) -> dict[str, ModulePack]:
    """Return every module with A drawn from N(lora_A, sigma^2), M times.

    Args:
        state: The adapter.
        sigma: Module to its standard deviations, (r, d_in) or (r, 1), on any device.
        draw: Name and number of the samples.
        kind: Where the noise is the same.
        training: Draw the signs of flipout for each row too.
        z: Gates (M, L, r), or None for all ones.
    """
    plain = module_packs(state, z)
    packs: dict[str, ModulePack] = {}
    for spec in state.specs:
        module, spread = plain[spec.name], sigma(spec)
        key, shape = (*draw.key, "A", spec.name), (state.r, spec.d_in)
        eps = sample_normals(key, draw.num_samples, shape, draw.design)
        noise = (spread * eps.to(spread.device)).to(module.lora_A.device)  # (M, r, d_in)
        if kind == "flipout":
            signs = (*(draw.row_key if training else draw.key), "signs", spec.name)
            first_row = draw.first_row if training else 0
            flipped = FlippedNoise(noise, signs, by_row=training, first_row=first_row)
            packs[spec.name] = replace(module, beside=flipped)
        else:
            packs[spec.name] = replace(module, lora_A=module.lora_A + noise)
    return packs

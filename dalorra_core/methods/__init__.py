"""The methods: how uncertainty enters the adapter. One method, one file of plain functions."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from dalorra_core.config import MethodSettings
from dalorra_core.methods import (
    amortised_prompt,
    amortised_token,
    bayesian_lora,
    blob,
    c_lora,
    dalorra,
    ensemble,
    frozen_gates,
    laplace,
    map_estimate,
    mask_markov,
    mask_mixture,
    mask_weight,
    mc_dropout,
    mle,
    rank_dropout,
    scalabl,
    tfb,
)
from dalorra_core.methods.method import Method

__all__ = ["METHODS", "Method", "MethodConfig"]

METHODS: dict[str, Method] = {
    "dalorra": dalorra.METHOD,
    "mle": mle.METHOD,
    "blob": blob.METHOD,
    "scalabl": scalabl.METHOD,
    "mask_weight": mask_weight.METHOD,
    "map": map_estimate.METHOD,
    "mc_dropout": mc_dropout.METHOD,
    "ensemble": ensemble.METHOD,
    "rank_dropout": rank_dropout.METHOD,
    "frozen_gates": frozen_gates.METHOD,
    "laplace": laplace.METHOD,
    "tfb": tfb.METHOD,
    "c_lora": c_lora.METHOD,
    "amortised_prompt": amortised_prompt.METHOD,
    "amortised_token": amortised_token.METHOD,
    "bayesian_lora": bayesian_lora.METHOD,
    "mask_mixture": mask_mixture.METHOD,
    "mask_markov": mask_markov.METHOD,
}

if TYPE_CHECKING:
    MethodConfig = MethodSettings
else:
    MethodConfig = Annotated[
        Union[tuple(method.settings for method in METHODS.values())],  # noqa: UP007  of a tuple
        Field(discriminator="name"),
    ]
    """The settings of any one method, told apart by ``name``."""

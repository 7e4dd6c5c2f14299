"""Every method in a few settings, as finished adapters on a tiny model.

A method's file adds its settings to `VARIANTS`; a method that is not there is tried with its
defaults.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import MethodSettings
from dalorra_core.data.collate import EncodedExample
from dalorra_core.data.prompts import TEXT_TEMPLATES, PromptTemplate
from dalorra_core.methods import METHODS, Method
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.gaussian import score_gaussian
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.training.loop import TrainingResult
from dalorra_core.training.members import fit_after_training, member_seed
from dalorra_core.training.prepare import TrainingData
from dalorra_core.training.settings import TrainConfig
from tests.support.tiny_models import TinyAdapter, random_rows, tiny_adapter

__all__ = [
    "CASES",
    "VARIANTS",
    "R",
    "answers",
    "case_name",
    "filled_state",
    "method_of",
    "tiny",
    "trained_states",
]

R = 3

VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "dalorra": (
        {},
        {"train_masks": "straight_through", "test_masks": "relaxed", "num_train_samples": 2},
    ),
    "map": ({}, {"prior": "weight_decay"}),
    "rank_dropout": ({"num_dropped": 0}, {"num_dropped": 1}, {"num_dropped": 2}),
    "frozen_gates": ({}, {"prior_prob": 0.8, "test_masks": "relaxed", "num_train_samples": 2}),
    "mc_dropout": ({"drop_prob": 0.3}, {"drop_prob": 0.3, "noise": "tied"}, {"drop_prob": 0}),
    "ensemble": ({"num_members": 2}, {"num_members": 3, "average": "logits"}),
    "blob": (
        {"initial_root": 0.7},
        {"initial_root": 0.7, "test_noise": "flipout"},
        {"initial_root": 0.7, "train_noise": "weight_sample", "num_train_samples": 2},
    ),
    "scalabl": (
        {"initial_sigma": 0.5},
        {"initial_sigma": 0.5, "kl_direction": "reverse", "num_train_samples": 2},
    ),
    "mask_weight": (
        {"initial_sigma": 0.3},
        {"initial_sigma": 0.3, "sigma_per": "rank", "test_noise": "flipout"},
        {"initial_sigma": 0.3, "train_noise": "flipout", "num_train_samples": 2},
    ),
    "bayesian_lora": (
        {"prior_sd": 1.0, "max_lambda": 1, "init_lambda": 0.5, "num_inducing": 4},
        {"prior_sd": 1.0, "max_lambda": 1, "init_lambda": 0.5, "flow": True, "kl_weight": 0.1},
        {"prior_sd": 1.0, "max_lambda": 1, "init_lambda": 0.5, "num_train_samples": 2}
        | {"bayesian_modules": ("q_proj", "lm_head"), "label_smoothing": 0.05},
    ),
    "laplace": (
        {},
        {"subset": "last_layer", "trained_as": {"name": "mle"}, "prior_precision": 2.0},
        {"kfac_mean_over": "rows", "evidence_steps": 3},
        {"subset": "last_layer", "link": "probit"},
    ),
    "tfb": (
        {"high": 0.5, "tolerance": 10.0, "search_steps": 2},
        {"high": 0.5, "trained_as": {"name": "dalorra"}, "search_samples": 2}
        | {"criterion": "answers", "tolerance": 1.0},
        {"high": 0.5, "trained_as": {"name": "blob"}, "search": "faithful", "anchor_rows": 4},
    ),
    "mask_mixture": (
        {"component_spread": 1.0},
        {"num_components": 2, "num_train_samples": 2, "diversity": 0.5}
        | {"train_masks": "straight_through", "test_masks": "relaxed"},
    ),
    "mask_markov": (
        {},
        {"train_masks": "straight_through", "test_masks": "relaxed", "num_train_samples": 2},
    ),
    "c_lora": (
        {"width": 5},
        {"width": 5, "noise": "tied", "num_train_samples": 2, "nll_weight": 2.0}
        | {"kl_scale": "per_example", "kl_schedule": "constant", "kl_padding": True},
    ),
    "amortised_prompt": (
        {"width": 5},
        {"width": 5, "projection": "learned", "num_train_samples": 2}
        | {"train_masks": "straight_through", "test_masks": "relaxed"},
    ),
    "amortised_token": (
        {"width": 5},
        {"width": 5, "num_train_samples": 2}
        | {"train_masks": "straight_through", "test_masks": "relaxed"},
    ),
}

CASES: tuple[MethodSettings, ...] = tuple(
    method.settings.model_validate({"name": name, **changes})
    for name, method in METHODS.items()
    for changes in VARIANTS.get(name, ({},))
)


def case_name(config: MethodSettings) -> str:
    """Return the method and what it has besides its defaults."""
    changed = config.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    return ",".join([config.name, *(f"{key}={value}" for key, value in changed.items())])


def method_of(config: MethodSettings) -> Method:
    """Return the method that these are settings of."""
    return METHODS[config.name]


@cache
def tiny() -> TinyAdapter:
    """Return one tiny model for all cases; its own state is DALorRA's."""
    return tiny_adapter(r=R)


def trained_states(config: MethodSettings) -> list[AdapterState]:
    """Return what each member of a method may look like after training.

    A parameter that starts at zero, such as every lora_B, is random and not small instead.
    """
    specs, trained_as = tiny().state.specs, method_of(config).trained_as(config)
    states = []
    for member in range(method_of(config).members(config)):
        own = member_seed(0, member)
        params = METHODS[trained_as.name].init(specs, R, own, trained_as)
        generator = torch.Generator().manual_seed(own % 2**63)
        for name, value in params.items():
            if not value.any():
                params[name] = 0.5 * torch.randn(value.shape, generator=generator)
        states.append(AdapterState(specs, R, 2.0, params))
    return states


def filled_state(config: MethodSettings) -> AdapterState:
    """Return a finished adapter: its members joined, and fitted where the method does that."""
    return _filled_state(config.model_dump_json())


@cache
def _filled_state(settings: str) -> AdapterState:
    values = json.loads(settings)
    config = METHODS[values["name"]].settings.model_validate(values)
    members, method = trained_states(config), method_of(config)
    whole = AdapterState(members[0].specs, R, 2.0, method.join(members))
    if method.fit is None:
        return whole
    template = TEXT_TEMPLATES["intent"]
    data = TrainingData(
        train=random_rows((5, 3, 6, 4, 5, 7), seed=3),
        validation=[],
        label_set=tiny().label_set,
        template=PromptTemplate("text", template.name, template.template),
        examples=[],
    )
    run = TrainConfig.model_validate(
        {"name": "tiny", "data": {"source": "nowhere"}, "method": config}
    )
    result = TrainingResult(whole, steps=1, seconds=0.0, resumed_at=0)
    return fit_after_training(tiny().model, data, run, result, lambda _: None).state


def answers(
    config: MethodSettings,
    state: AdapterState,
    draw: Draw,
    rows: Sequence[EncodedExample],
    *,
    max_padded_tokens: int = 10**6,
) -> Tensor:
    """Return the log-probabilities (M, B, C) of the method's samples, before any averaging."""
    method, model = method_of(config), tiny().model
    if method.logit_covariance is not None:
        return score_gaussian(
            model,
            method.mean_pack(state, config),
            rows,
            modules=method.gradient_modules(state.specs, config),
            covariance=partial(method.logit_covariance, state, config),
            draw=None if method.one_answer(config) else draw,
            max_padded_tokens=max_padded_tokens,
        ).log_probs
    pack = method.predict_pack(state, config, draw).to(torch.device("cpu"), torch.float32)
    labels = model.num_labels
    return score_rows(
        model, pack, rows, num_labels=labels, max_padded_tokens=max_padded_tokens
    ).log_probs

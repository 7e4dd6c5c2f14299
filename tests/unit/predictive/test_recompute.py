"""dalorra_core.predictive.recompute: layers run twice give the gradients of layers run once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dalorra_core.config import AdapterConfig, MethodSettings, OptimConfig
from dalorra_core.data.collate import TokenBatch
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.predictive.stem import stem_states
from dalorra_core.training.step import TrainStep
from tests.support.method_cases import CASES, case_name, method_of, tiny, trained_states
from tests.support.tiny_models import FAMILIES, TinyAdapter, batch_of, random_rows, tiny_adapter

LENGTHS = (3, 9, 5, 8, 4)


def step_on(
    adapter: TinyAdapter, config: MethodSettings, params: dict[str, Tensor], *, recompute: bool
) -> TrainStep:
    step = TrainStep(
        adapter.model,
        adapter.state.specs,
        AdapterConfig(r=adapter.state.r),
        config,
        optim=OptimConfig(),
        num_examples=50,
        seed=4,
        recompute=recompute,
    )
    with torch.no_grad():
        for name, value in step.params.items():
            value.copy_(params[name])
    return step


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the bytes that are kept for the backward pass."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def gradients(step: TrainStep, batch: TokenBatch) -> tuple[dict[str, Tensor], int]:
    """Return the gradients and the bytes kept for them."""
    with counted() as kept:
        out = step(batch, 3)
    out.loss.backward()
    found = {k: v.grad for k, v in step.params.items() if v.grad is not None}
    return found, sum(kept)


def bytes_saved(
    adapter: TinyAdapter, config: MethodSettings, params: dict[str, Tensor], batch: TokenBatch
) -> int:
    """Return how much less is kept; the gradients must be the same."""
    kept, bytes_kept = gradients(step_on(adapter, config, params, recompute=False), batch)
    again, bytes_again = gradients(step_on(adapter, config, params, recompute=True), batch)
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-6)
    assert max(float(value.abs().max()) for value in kept.values()) > 1e-3
    return bytes_kept - bytes_again


@pytest.mark.parametrize("config", CASES, ids=case_name)
def test_masks_noise_and_divergences_are_those_of_the_first_run(config: MethodSettings) -> None:
    trained_as = method_of(config).trained_as(config)
    params = dict(trained_states(config)[0].params)
    batch = batch_of(random_rows(LENGTHS))
    assert bytes_saved(tiny(), trained_as, params, batch) > 100_000


@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_with_every_family(family: str) -> None:
    adapter = tiny_adapter(family)
    params = dict(adapter.state.params)
    batch = batch_of(random_rows(LENGTHS))
    assert bytes_saved(adapter, DalorraConfig(), params, batch) > 100_000


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("stem", [False, True])
def test_it_goes_with_samples_that_begin_to_differ_at_a_layer(stem: bool, last: int) -> None:
    adapter = tiny_adapter(
        targets=("q_proj", "up_proj"), layers=(1, last), num_hidden_layers=last + 1
    )
    rows = random_rows(LENGTHS)
    batch = batch_of(rows)
    if stem:
        states = stem_states(adapter.model, rows)
        assert states is not None
        batch = replace(batch, stem=states.of(range(len(rows))))
    config = DalorraConfig(num_train_samples=3)
    assert bytes_saved(adapter, config, dict(adapter.state.params), batch) > 0


def test_the_model_is_left_as_it_was() -> None:
    decoder: Any = tiny().model.decoder
    layers = list(decoder.layers)
    config = DalorraConfig()
    step = step_on(tiny(), config, dict(tiny().state.params), recompute=True)
    step(batch_of(random_rows(LENGTHS)), 3)
    assert list(decoder.layers) == layers
    assert not tiny().model.trunk.recomputes

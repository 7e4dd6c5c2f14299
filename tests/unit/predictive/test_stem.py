"""dalorra_core.predictive.stem: beginning in the middle gives what beginning at the start gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.predictive import stem as stem_module
from dalorra_core.predictive.stem import stem_states
from tests.support.tiny_models import FAMILIES, assert_near, batch_of, random_rows, tiny_adapter

LENGTHS = (5, 2, 7, 3, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_model(family: str) -> None:
    tiny = tiny_adapter(family, layers=(1, 1))
    rows = random_rows(LENGTHS)
    stems = stem_states(tiny.model, rows)
    assert stems is not None
    places = [4, 1, 2]
    batch = batch_of([rows[i] for i in places])
    found = []
    for one in (batch, replace(batch, stem=stems.of(places))):
        phi = tiny.state.params["phi"].clone().requires_grad_()
        state = replace(tiny.state, params={**tiny.state.params, "phi": phi})
        pack = METHODS["dalorra"].train_pack(state, DalorraConfig(), Draw(("s",), 3))
        logits = tiny.model(one, pack).logits
        logits.square().sum().backward()
        assert phi.grad is not None
        found.append((logits.detach(), phi.grad))
    for whole, begun in zip(*found, strict=True):
        assert_near(begun, whole)


def test_layers_below_are_not_run_and_are_back_afterwards() -> None:
    tiny = tiny_adapter(layers=(1, 2), num_hidden_layers=3)
    rows = random_rows(LENGTHS)
    stems = stem_states(tiny.model, rows)
    assert stems is not None
    batch = replace(batch_of(rows), stem=stems.of(range(len(rows))))
    ran = []
    layers: Any = tiny.model.decoder.layers
    for number, layer in enumerate(layers[:2]):  # the last one's parts are called, not itself
        layer.register_forward_hook(lambda *_, n=number: ran.append(n))
    pack = METHODS["dalorra"].mean_pack(tiny.state, DalorraConfig())
    tiny.model(batch, pack)
    assert ran == [1]
    assert tiny.model.decoder.layers is layers
    tiny.model(batch_of(rows), pack)
    assert ran == [1, 0, 1]


def test_nothing_is_kept_where_it_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(LENGTHS)
    assert stem_states(tiny_adapter().model, rows) is None  # the first layer is adapted
    late = tiny_adapter(layers=(1, 1))
    assert stem_states(late.model, []) is None
    monkeypatch.setattr(stem_module, "MAX_BYTES", sum(LENGTHS) * 32 * 4 - 1)
    assert stem_states(late.model, rows) is None
    monkeypatch.setattr(stem_module, "MAX_BYTES", sum(LENGTHS) * 32 * 4)
    assert stem_states(late.model, rows) is not None


def test_the_states_of_a_row_do_not_depend_on_which_are_asked_for() -> None:
    tiny = tiny_adapter(layers=(1, 1))
    rows = random_rows(LENGTHS)
    first, again = stem_states(tiny.model, rows), stem_states(tiny.model, rows)
    assert first is not None
    assert again is not None
    assert torch.equal(first.of([2, 0])[1, :5], again.of([0])[0])

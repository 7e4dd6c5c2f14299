"""dalorra_core.predictive.label_head: label rows only, equal to the whole output projection."""

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from dalorra_core.adapters.inject import lm_head_of
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.errors import BaseModelError
from dalorra_core.predictive.label_head import LabelHead
from tests.support.tiny_models import (
    FAMILIES,
    LABEL_TOKENS,
    assert_near,
    batch_of,
    gated_pack,
    merged_label_logits,
    random_rows,
    tiny_adapter,
    tiny_model,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_label_rows_equal_the_full_head_indexed(family: str) -> None:
    model = tiny_model(family)
    head = LabelHead(model, LABEL_TOKENS)
    ids = torch.tensor([row.token_ids for row in random_rows((6, 6, 6))])
    with torch.no_grad():
        full = model(input_ids=ids).logits[:, -1]
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, -1]
        found = head(hidden, None)
    assert_near(found, full[:, list(LABEL_TOKENS)])
    if family == "gemma2":  # the cap of the logits is in play
        raw = lm_head_of(model)(hidden)
        assert raw.abs().max() > 8.0 > full.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_label_mass_is_the_share_of_the_full_softmax(family: str) -> None:
    tiny = tiny_adapter(family, targets=("q_proj",))
    rows = random_rows((6, 4))
    z = (torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    with torch.no_grad():
        out = tiny.model(batch_of(rows), gated_pack(tiny.state, z), label_mass=True)
    assert out.label_mass is not None
    everything = type(tiny.label_set)(tuple(f"t{i}" for i in range(480)), tuple(range(480)))
    whole = type(tiny)(tiny.base, tiny.model, tiny.state, everything)
    for m in range(3):
        gates = {spec.name: z[m, i] for i, spec in enumerate(tiny.state.specs)}
        for b, row in enumerate(rows):
            full = merged_label_logits(whole, row.token_ids, gates).softmax(-1)
            expected = float(full[list(tiny.label_set.token_ids)].sum())
            assert out.label_mass[m, b].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_label_mass_counts_the_adapted_head(family: str) -> None:
    tiny = tiny_adapter(family, targets=("lm_head",))
    (row,) = random_rows((6,))
    z = torch.ones(1, 1, 3)
    with torch.no_grad():
        out = tiny.model(batch_of([row]), gated_pack(tiny.state, z), label_mass=True)
        frozen = tiny.base(input_ids=torch.tensor([row.token_ids])).logits[0, -1].double()
    adapted = merged_label_logits(tiny, row.token_ids, {"lm_head": z[0, 0]})
    full = frozen.clone()
    full[list(tiny.label_set.token_ids)] = adapted
    expected = float(full.softmax(-1)[list(tiny.label_set.token_ids)].sum())
    before = float(frozen.softmax(-1)[list(tiny.label_set.token_ids)].sum())
    assert out.label_mass is not None
    assert out.label_mass.item() == pytest.approx(expected, rel=1e-4)
    assert abs(expected - before) > 0.05 * before


def test_a_bias_of_the_head_is_kept() -> None:
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 480), requires_grad=False)
    head = LabelHead(model, LABEL_TOKENS)
    ids = torch.tensor([[5, 6, 7]])
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, -1]
    expected = model(input_ids=ids).logits[:, -1, list(LABEL_TOKENS)]
    assert_near(head(hidden, SamplePack(1, 1.0, {})), expected)


def test_a_family_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    """Granite divides its logits after the projection; nothing here knows that."""
    config = GraniteConfig(
        vocab_size=480,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=3.0,
        initializer_range=1.0,
        pad_token_id=0,
    )
    model = GraniteForCausalLM(config).eval()
    head = LabelHead(model, LABEL_TOKENS)
    with pytest.raises(BaseModelError, match=r"Granite.*differ by .*, the limit is"):
        head.check_against(model, model.base_model)

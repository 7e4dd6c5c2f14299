"""dalorra_core.predictive.gates: what the gates of every method say about given rows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli

from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.adapters.pack import RowContext
from dalorra_core.adapters.state import AdapterState
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.amortised import AmortisedSettings
from dalorra_core.methods.amortised_prompt import AmortisedPromptConfig, prompt_logits
from dalorra_core.methods.amortised_token import AmortisedTokenConfig
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.mle import MleConfig
from dalorra_core.predictive.gates import gate_entropy, gate_probs
from tests.support.tiny_models import TinyAdapter, batch_of, random_rows, tiny_adapter

PROMPT = AmortisedPromptConfig(width=6)
TOKEN = AmortisedTokenConfig(width=6)
LENGTHS = (7, 3, 11, 5)


@pytest.fixture(scope="module")
def tiny() -> TinyAdapter:
    return tiny_adapter()


def state_of(tiny: TinyAdapter, config: AmortisedSettings) -> AdapterState:
    params = METHODS[config.name].init(tiny.state.specs, tiny.state.r, 0, config)
    generator = torch.Generator().manual_seed(5)
    params["gate_out"] = torch.randn(params["gate_out"].shape, generator=generator)
    return replace(tiny.state, params=params | dict(tiny.state.params))


def test_gates_that_do_not_look_at_the_input_are_the_same_in_every_row(tiny: TinyAdapter) -> None:
    pack = METHODS["dalorra"].mean_pack(tiny.state, DalorraConfig())
    found = gate_probs(tiny.model, pack, random_rows(LENGTHS), max_padded_tokens=20)
    torch.testing.assert_close(found, tiny.state.params["phi"].sigmoid().expand(4, -1, -1))


def test_gates_of_prompts_are_those_of_their_logits(tiny: TinyAdapter) -> None:
    state, rows = state_of(tiny, PROMPT), random_rows(LENGTHS)
    pack = METHODS["amortised_prompt"].mean_pack(state, PROMPT)
    found = gate_probs(tiny.model, pack, rows, max_padded_tokens=20)
    embedding: Any = tiny.base.get_input_embeddings()
    table = embedding.weight
    mean = torch.stack([table[list(row.token_ids)].double().mean(0) for row in rows]).float()
    logits = prompt_logits(
        state, PROMPT, RowContext(lambda: mean, torch.ones(4, 1, dtype=torch.bool))
    )
    torch.testing.assert_close(found, logits.sigmoid().float())


def test_gates_of_tokens_are_averaged_over_the_row(tiny: TinyAdapter) -> None:
    """From the inputs of the layers, caught by hooks; one row at a time has no padding."""
    state, rows = state_of(tiny, TOKEN), random_rows(LENGTHS)
    pack = METHODS["amortised_token"].mean_pack(state, TOKEN)
    found = gate_probs(tiny.model, pack, rows, max_padded_tokens=1000)
    inputs: dict[str, Tensor] = {}

    def keep(layer: AdaptedLinear, args: tuple[Tensor, ...]) -> None:
        inputs[layer.name] = args[0]

    layers = [m for m in tiny.model.decoder.modules() if isinstance(m, AdaptedLinear)]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    for b, row in enumerate(rows):
        with torch.no_grad():
            tiny.model(batch_of([row]), pack)
        for i, spec in enumerate(state.specs[:-1]):
            u = inputs[spec.name][0] @ state.params[f"{spec.name}.lora_A"].T  # (T, r)
            hidden = (u @ state.params["gate_in"][i].T + state.params["gate_in_bias"][i]).relu()
            logits = state.params["phi"][i] + hidden @ state.params["gate_out"][i].T
            torch.testing.assert_close(found[b, i], logits.sigmoid().mean(0), rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert (found[0] - found[1]).abs().max() > 1e-2
    small = gate_probs(tiny.model, pack, rows, max_padded_tokens=1)
    torch.testing.assert_close(small, found, rtol=1e-5, atol=1e-5)


def test_a_method_without_gates_is_refused(tiny: TinyAdapter) -> None:
    pack = METHODS["mle"].mean_pack(tiny.state, MleConfig())
    with pytest.raises(ConfigError, match="this method has no gates"):
        gate_probs(tiny.model, pack, random_rows((3,)), max_padded_tokens=20)


def test_the_entropy_of_gates_is_torchs() -> None:
    p = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = Bernoulli(probs=p).entropy().mean((1, 2))
    torch.testing.assert_close(gate_entropy(p), expected, rtol=1e-6, atol=1e-9)
    certain = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]])
    assert gate_entropy(certain).tolist() == pytest.approx([0.0, math.log(2)])

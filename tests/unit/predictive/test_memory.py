"""How many tokens a ceiling on memory allows."""

import pytest
import torch
from torch import nn

from dalorra_core.predictive.memory import activation_bytes, tokens_within
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_token_takes_ten_widths_and_five_of_the_mlp(
    family: str, dtype: torch.dtype, size: int
) -> None:
    model = nn.Module.to(tiny_model(family), dtype)
    assert activation_bytes(model) == (11 * 32 + 5 * 48) * size
    assert tokens_within(model, 3) == 3 * 2**20 // activation_bytes(model)


def test_one_token_always_fits() -> None:
    wide = tiny_model(hidden_size=64, intermediate_size=2**16)
    assert activation_bytes(wide) > 2**20
    assert tokens_within(wide, 1) == 1

"""dalorra_core.adapters.plain_lora: the same function in fewer words, or a reason why not."""

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.flipout import FlippedNoise
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import ModulePack, SamplePack, fold, unfold
from dalorra_core.adapters.plain_lora import (
    Factors,
    PlainLora,
    opened,
    padded,
    plain_loras,
    trimmed,
    why_not_plain,
    with_full_head,
)
from dalorra_core.errors import ConfigError
from dalorra_core.methods.token_notes import TellTokens
from tests.support.tiny_models import assert_near

M, R, D_IN, D_OUT = 3, 4, 6, 5
H = torch.randn(2, D_IN, generator=torch.Generator().manual_seed(9))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pack_of(down: Tensor, up: Tensor, z: Tensor | None, **transforms: FlippedNoise) -> SamplePack:
    module = ModulePack(down, up, z, **transforms)
    return SamplePack(M, 0.7, {"model.layers.0.q_proj": module})


def output(lora: PlainLora, h: Tensor = H) -> Tensor:
    (factors,) = lora.modules.values()
    return lora.scaling * h @ factors.down.T @ factors.up.T


PACKS = {
    "shared, gates": pack_of(random(1, R, D_IN), random(1, D_OUT, R), random(M, R, seed=1)),
    "own A": pack_of(random(M, R, D_IN), random(1, D_OUT, R), None),
    "own B, gates": pack_of(random(1, R, D_IN), random(M, D_OUT, R), random(M, R, seed=1)),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_each_sample_is_the_layers_own(pack: SamplePack) -> None:
    loras = list(plain_loras(pack))
    assert [lora.r for lora in loras] == [R] * M
    (module,) = pack.modules.values()
    expected = unfold(low_rank_delta(fold(H, M), module, M, pack.scaling), M)
    assert_near(torch.stack([output(lora) for lora in loras]), expected)


def test_open_gates_are_the_factors_as_they_are() -> None:
    pack = PACKS["shared, gates"]
    (module,) = pack.modules.values()
    for lora in plain_loras(opened(pack)):
        (factors,) = lora.modules.values()
        assert torch.equal(factors.up, module.lora_B[0])
        assert torch.equal(factors.down, module.lora_A[0])


def test_padding_changes_no_output_and_trimming_undoes_it() -> None:
    lora = next(plain_loras(PACKS["shared, gates"]))
    wide = padded(lora, (2, 8, 16))
    assert wide.r == 8
    assert wide.scaling == lora.scaling
    assert_near(output(wide), output(lora))
    back = trimmed(wide)
    assert back.r == lora.r
    (found,), (expected,) = back.modules.values(), lora.modules.values()
    assert torch.equal(found.down, expected.down)
    assert torch.equal(found.up, expected.up)


def test_a_rank_that_one_factor_has_is_kept() -> None:
    down, up = random(R, D_IN), torch.zeros(D_OUT, R)  # as before training
    assert trimmed(PlainLora(R, 1.0, {"a": Factors(down, up)})).r == R
    nothing = PlainLora(R, 1.0, {"a": Factors(torch.zeros(R, D_IN), up)})
    assert trimmed(nothing).r == 1


def test_a_rank_that_no_engine_has_room_for_is_refused() -> None:
    lora = next(plain_loras(PACKS["own A"]))
    with pytest.raises(ConfigError, match="at most 3 to be exported, got 4"):
        padded(lora, (1, 3))


def test_a_full_head_has_zero_rows_for_all_but_the_labels() -> None:
    head = Factors(random(R, D_IN), random(2, R))
    other = Factors(random(R, D_IN), random(D_OUT, R))
    lora = PlainLora(R, 1.0, {"q": other, "lm_head": head})
    full = with_full_head(lora, (7, 3), 9, "embed_out")
    assert list(full.modules) == ["q", "embed_out"]
    up = full.modules["embed_out"].up
    assert up.shape == (9, R)
    assert torch.equal(up[[7, 3]], head.up)
    assert not up[[0, 1, 2, 4, 5, 6, 8]].any()
    without = PlainLora(R, 1.0, {"q": other})
    assert with_full_head(without, (7, 3), 9, "lm_head") is without


def test_what_factors_cannot_say_is_named() -> None:
    down, up = random(1, R, D_IN), random(1, D_OUT, R)
    noise = FlippedNoise(random(M, R, D_IN), ("signs",))
    reasons = {
        "depend on the question": SamplePack(M, 1.0, PACKS["own A"].modules, per_row=TellTokens()),
        "gates of its own at model": pack_of(down, up, random(M, 2, R)),
        "inputs of model": pack_of(down, up, None, before=noise),
        "noise of its own at model": pack_of(down, up, None, beside=noise),
        "between the factors of model": pack_of(down, up, None, core=noise),
    }
    for reason, pack in reasons.items():
        assert reason in (why_not_plain(pack) or "")
        with pytest.raises(ConfigError, match=reason):
            next(plain_loras(pack))
    assert all(why_not_plain(pack) is None for pack in PACKS.values())

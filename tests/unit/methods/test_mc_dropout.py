"""MC dropout: which inputs are dropped, for whom, and what that does to one layer's output."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import ModulePack, SamplePack, fold, unfold
from dalorra_core.methods import METHODS
from dalorra_core.methods.mc_dropout import McDropoutConfig
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from tests.support.tiny_models import batch_of, random_rows, tiny_adapter

METHOD = METHODS["mc_dropout"]
TINY = tiny_adapter()
SPEC = TINY.state.specs[0]
P = 0.3
CONFIG = McDropoutConfig(drop_prob=P)
TIED = McDropoutConfig(drop_prob=P, noise="tied")


def pack_of(config: McDropoutConfig, samples: int, *, training: bool = False) -> SamplePack:
    make = METHOD.train_pack if training else METHOD.predict_pack
    return make(TINY.state, config, Draw(("drop",), samples))


def kept(pack: SamplePack, rows: int, *tokens: int, module: str = SPEC.name) -> Tensor:
    """Return what is left of ones, (M, B, *tokens, d_in), times 1 - P."""
    transform = pack.modules[module].before
    assert transform is not None
    return transform(torch.ones(pack.num_samples, rows, *tokens, SPEC.d_in)) * (1 - P)


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, SPEC.d_in, generator=torch.Generator().manual_seed(1))


def delta(h: Tensor, module: ModulePack, samples: int) -> Tensor:
    """Return the layer's output (M, B, T, d_out) for inputs (B, T, d_in), s = 2."""
    return unfold(low_rank_delta(fold(h, samples), module, samples, 2.0), samples)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["per_token", "tied"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(
    config: McDropoutConfig, training: bool
) -> None:
    tokens = 1 if config is TIED else 40
    left = kept(pack_of(config, 400 // tokens * 10, training=training), 1, tokens).double()
    assert ((left < 1e-6) | ((left - 1).abs() < 1e-6)).all()
    n = left.numel()
    assert abs(float(left.mean()) - (1 - P)) < 5 * math.sqrt(P * (1 - P) / n)


def test_at_prediction_rows_share_what_tokens_do_not() -> None:
    pack = pack_of(CONFIG, 3)
    left = kept(pack, 4, 9)
    assert torch.equal(left, left[:, :1].expand_as(left))
    assert torch.equal(kept(pack, 2, 5), left[:, :2, :5])  # a shorter batch, fewer rows
    for m, t in ((0, 1), (1, 5), (2, 8)):
        assert not torch.equal(left[m, 0, t], left[m, 0, t - 1])
        assert not torch.equal(left[m, 0, t], left[m - 1, 0, t])


def test_in_training_each_row_has_dropout_of_its_own() -> None:
    left = kept(pack_of(CONFIG, 2, training=True), 3, 6)
    flat = left.flatten(0, 2)
    assert len({tuple(row) for row in flat.tolist()}) == len(flat)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_independent_across_tokens_features_and_samples(training: bool) -> None:
    left = kept(pack_of(CONFIG, 50, training=training), 1, 60)[:, 0].double()  # (M, T, d)
    for axis in range(3):
        ahead = left.roll(1, axis).flatten()
        found = torch.corrcoef(torch.stack([left.flatten(), ahead]))[0, 1]
        assert abs(float(found)) < 5 / math.sqrt(left.numel())
    other = kept(pack_of(CONFIG, 50, training=training), 1, 60, module=TINY.state.specs[2].name)
    found = torch.corrcoef(torch.stack([left.flatten(), other.double().flatten()]))[0, 1]
    assert abs(float(found)) < 5 / math.sqrt(left.numel())  # another module, other coins


@pytest.mark.parametrize("training", [False, True])
def test_tied_dropout_is_one_function_for_each_sample(training: bool) -> None:
    left = kept(pack_of(TIED, 4, training=training), 3, 7)
    assert torch.equal(left, left[:, :1, :1].expand_as(left))
    assert len({tuple(row) for row in left[:, 0, 0].tolist()}) == 4


def test_tied_dropout_is_an_adapter_with_thinned_columns() -> None:
    """methods.md 4.3: A_m = A diag(xi_m) / (1 - p)."""
    samples, h = 3, activations(2, 5)
    module = pack_of(TIED, samples).modules[SPEC.name]
    xi = kept(pack_of(TIED, samples), 1, 1)[:, 0, 0].round()  # (M, d_in)
    thinned = replace(module, lora_A=module.lora_A * xi.unsqueeze(1) / (1 - P), before=None)
    torch.testing.assert_close(
        delta(h, module, samples), delta(h, thinned, samples), rtol=1e-4, atol=1e-5
    )


def test_the_output_is_the_formula() -> None:
    samples, h = 2, activations(1, 4).double()
    module = pack_of(CONFIG, samples).modules[SPEC.name]
    xi = kept(pack_of(CONFIG, samples), 1, 4)[:, 0].round().double()  # (M, T, d_in)
    found = delta(h, module, samples)
    a, b = (TINY.state.params[f"{SPEC.name}.lora_{x}"].double() for x in "AB")
    for m in range(samples):
        for t in range(4):
            expected = 2.0 * b @ (a @ (h[0, t] * xi[m, t] / (1 - P)))
            torch.testing.assert_close(found[m, 0, t].double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_and_variance_of_the_rank_features() -> None:
    """u_j has mean a_j h and variance p / (1 - p) sum_i a_ji^2 h_i^2, apart for each token."""
    n, h = 5000, activations(1, 2)
    eye = torch.eye(TINY.state.r).unsqueeze(0)
    module = replace(pack_of(CONFIG, n).modules[SPEC.name], lora_B=eye / 2.0)
    u = delta(h, module, n)[:, 0].double()  # (M, T, r)
    a = TINY.state.params[f"{SPEC.name}.lora_A"].double()
    mean = h[0].double() @ a.T
    variance = P / (1 - P) * h[0].double().square() @ a.square().T
    assert ((u.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    spread = (u - mean).square()
    error = spread.std(0) / math.sqrt(n)
    assert ((spread.mean(0) - variance).abs() < 5 * error).all()
    apart = ((u[:, 0] - mean[0]) * (u[:, 1] - mean[1])).mean(0)
    assert (apart.abs() < 5 * (variance[0] * variance[1] / n).sqrt()).all()


def test_the_label_head_has_one_position() -> None:
    """Its inputs (M, B, d_in) have no token axis."""
    pack = pack_of(CONFIG, 3)
    left = kept(pack, 4, module="lm_head")
    assert left.shape == (3, 4, SPEC.d_in)
    assert torch.equal(left, left[:, :1].expand_as(left))
    rows = kept(pack_of(CONFIG, 3, training=True), 4, module="lm_head").flatten(0, 1)
    assert len({tuple(row) for row in rows.tolist()}) == 12


def test_no_dropout_is_plain_lora_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dropout per token keeps the whole last layer; for equal bits plain LoRA takes it too.
    monkeypatch.setitem(TINY.model.trunk.__dict__, "shortens", False)
    batch, none = batch_of(random_rows((4, 6))), McDropoutConfig(drop_prob=0)
    plain = METHODS["mle"].mean_pack(TINY.state, MleConfig())
    with torch.no_grad():
        expected = TINY.model(batch, plain).logits
        assert torch.equal(TINY.model(batch, pack_of(none, 1)).logits, expected)
        assert torch.equal(TINY.model(batch, METHOD.mean_pack(TINY.state, CONFIG)).logits, expected)


def test_dropped_inputs_get_no_gradient() -> None:
    module = pack_of(CONFIG, 2, training=True).modules[SPEC.name]
    assert module.before is not None
    x = activations(2, 1, 3).requires_grad_()
    module.before(x).sum().backward()
    xi = kept(pack_of(CONFIG, 2, training=True), 1, 3).round()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, xi / (1 - P))

"""C-LoRA: the contextual matrix, its noise, its divergence, and what an answer depends on."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.c_lora import CLoraConfig, ContextualCore, net_shapes
from dalorra_core.methods.method import Draw
from dalorra_core.objectives.elbo import mean_nll
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.sampling.streams import normals
from dalorra_core.sampling.token_normals import PositionNormals
from tests.support.tiny_models import (
    TinyAdapter,
    assert_near,
    batch_of,
    point_of,
    random_rows,
    tiny_adapter,
)

C_LORA = METHODS["c_lora"]
TOKEN, TIED = CLoraConfig(width=5), CLoraConfig(width=5, noise="tied")
DRAW = Draw(("draw",), 3)
LENGTHS = (7, 3, 11, 5)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def core_of(*, r: int = 3, width: int = 5, **changes: Any) -> ContextualCore:
    """Return a core in float64 whose matrices are not small."""
    net = [random(*shape, seed=i) for i, shape in enumerate(net_shapes(r, width).values())]
    return ContextualCore(*net, prior_std=0.2, **changes)


def matrices(core: ContextualCore, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return E_mu and Omega of one token by the formula, number by number."""
    r, width = len(u), len(core.net_b1)
    hidden = [
        max(0.0, float(core.net_b1[k] + sum(core.net_W1[k, j] * u[j] for j in range(r))))
        for k in range(width)
    ]
    out = [
        float(core.net_b2[i]) + sum(float(core.net_W2[i, k]) * hidden[k] for k in range(width))
        for i in range(2 * r * r)
    ]
    mean, omega = torch.zeros(2, r, r, dtype=torch.float64)
    for i in range(r):
        for j in range(r):
            mean[i, j] = out[i * r + j]
            omega[i, j] = (1 / (1 + math.exp(-out[r * r + i * r + j]))) ** 2
    return mean, omega


def state_of(tiny: TinyAdapter, config: CLoraConfig) -> AdapterState:
    """Return random factors and nets for a tiny model."""
    params = C_LORA.init(tiny.state.specs, tiny.state.r, 0, config)
    own = {name: value for name, value in tiny.state.params.items() if name != "phi"}
    return replace(tiny.state, params=params | own)


@pytest.fixture(scope="module")
def tiny() -> TinyAdapter:
    return tiny_adapter()


# --- sizes ----------------------------------------------------------------------------------


def test_the_published_number_of_parameters() -> None:
    """methods.md 1.6: 65 modules of 8,896 on Llama-3.1-8B."""
    count = sum(math.prod(shape) for shape in net_shapes(8, 64).values())
    assert (count, 65 * count) == (8_896, 578_240)
    for r, width in ((1, 1), (3, 5), (16, 64)):
        of_one = sum(math.prod(shape) for shape in net_shapes(r, width).values())
        assert of_one == width * r + width + 2 * r * r * (width + 1)


@pytest.mark.parametrize("config", [CLoraConfig(), TIED])
def test_shapes_are_those_of_the_initial_tensors(config: CLoraConfig) -> None:
    specs = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 6, 5, None))
    made = {name: tuple(t.shape) for name, t in C_LORA.init(specs, 4, 0, config).items()}
    assert made == dict(C_LORA.shapes(specs, 4, config))


def test_nets_start_as_linear_layers_do() -> None:
    specs = (TargetSpec("layers.0.q", 6, 4, 0),)
    params = C_LORA.init(specs, 8, 3, CLoraConfig())
    assert torch.equal(
        params["layers.0.q.net_W1"], C_LORA.init(specs, 8, 3, CLoraConfig())["layers.0.q.net_W1"]
    )
    for name, inputs in (("net_W1", 8), ("net_b1", 8), ("net_W2", 64), ("net_b2", 64)):
        value, bound = params[f"layers.0.q.{name}"].double(), 1 / math.sqrt(inputs)
        assert value.abs().max() < bound
        error = bound / math.sqrt(3 * value.numel())
        assert abs(float(value.mean())) < 5 * error
        if value.numel() > 400:
            assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


# --- the core -------------------------------------------------------------------------------


def test_the_mean_is_the_nets_matrix_times_the_features() -> None:
    core, x = core_of(), random(2, 2, 4, 3, seed=9)
    found = core(x)
    for m in range(2):
        for b in range(2):
            for t in range(4):
                mean, _ = matrices(core, x[m, b, t])
                torch.testing.assert_close(found[m, b, t], mean @ x[m, b, t])


def test_tied_noise_is_one_matrix_for_all_tokens_of_a_sample() -> None:
    core = core_of(normals=PositionNormals.named(("e",), 2, 9), tied=True)
    x = random(2, 2, 4, 3, seed=9)
    found = core(x)
    for m in range(2):
        eps = torch.from_numpy(normals(("e", m), 9)).float().double().view(3, 3)
        for b in range(2):
            for t in range(4):
                mean, omega = matrices(core, x[m, b, t])
                expected = (mean + omega * eps) @ x[m, b, t]
                torch.testing.assert_close(found[m, b, t], expected)


def test_token_noise_has_the_law_of_fresh_matrices() -> None:
    """Mean E_mu u, variance sum_j Omega_ij^2 u_j^2, nothing between entries or tokens."""
    n, x = 40_000, random(1, 1, 2, 3, seed=9)
    core = core_of(normals=PositionNormals.named(("e",), n, 3))
    drawn = core(x.expand(n, 1, 2, 3))[:, 0].flatten(1)  # (n, T * r)
    moments = [matrices(core, x[0, 0, t]) for t in range(2)]
    means = torch.cat([mean @ x[0, 0, t] for t, (mean, _) in enumerate(moments)])
    variances = torch.cat([(omega**2) @ (x[0, 0, t] ** 2) for t, (_, omega) in enumerate(moments)])
    assert ((drawn.mean(0) - means).abs() < 5 * (variances / n).sqrt()).all()
    expected = torch.diag(variances)
    spread = (torch.outer(variances, variances) * (1 + torch.eye(6)) / n).sqrt()
    assert ((torch.cov(drawn.T) - expected).abs() < 5 * spread).all()
    whole = torch.randn(n, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, omega = moments[0]
    by_matrices = (mean + omega * whole) @ x[0, 0, 0]  # (n, r)
    error = (2 * variances[:3] / n).sqrt()
    assert ((by_matrices.mean(0) - drawn.mean(0)[:3]).abs() < 5 * error).all()
    relative = (by_matrices.var(0) / drawn.var(0)[:3]).log().abs()
    assert (relative < 5 * (4 / n) ** 0.5).all()


def test_the_head_has_one_position_of_its_own_stream() -> None:
    core = core_of(normals=PositionNormals.named(("e",), 2, 3))
    x = random(2, 4, 3, seed=9)
    torch.testing.assert_close(core(x), core(x.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_core(tied: bool) -> None:
    numbers = PositionNormals.named(("e",), 2, 9 if tied else 3)
    core = core_of(normals=numbers, tied=tied)
    names = ("net_W1", "net_b1", "net_W2", "net_b2")

    def through(x: Tensor, *net: Tensor) -> Tensor:
        return replace(core, **dict(zip(names, net, strict=True)))(x)

    inputs = [random(2, 1, 2, 3, seed=9), *(getattr(core, name).clone() for name in names)]
    assert torch.autograd.gradcheck(through, [value.requires_grad_() for value in inputs])


def test_features_of_exactly_zero_have_a_finite_gradient() -> None:
    core = core_of(normals=PositionNormals.named(("e",), 1, 3))
    x = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    core(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_core_keeps_the_dtype_of_the_states() -> None:
    core = core_of(normals=PositionNormals.named(("e",), 2, 3))
    x = random(2, 2, 4, 3, seed=9).bfloat16()
    found = core.to(torch.device("cpu"), torch.float32)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), core(x.double()), rtol=0.01, atol=0.01)


def test_the_layer_scales_what_the_core_gives() -> None:
    """s B E(u) u with u = A h, not E(s u) s u."""
    specs = (TargetSpec("q", 6, 4, 0),)
    params = C_LORA.init(specs, 3, 0, TOKEN)
    params["q.lora_B"] = random(4, 3, seed=5).float()
    state = AdapterState(specs, 3, 2.0, params)
    pack = C_LORA.mean_pack(state, TOKEN)
    h = random(2, 5, 6, seed=6).float()
    found = low_rank_delta(h, pack.modules["q"], 1, 2.0)
    core = pack.modules["q"].core
    assert isinstance(core, ContextualCore)
    for b in range(2):
        for t in range(5):
            u = params["q.lora_A"].double() @ h[b, t].double()
            mean, _ = matrices(core, u)
            expected = 2.0 * params["q.lora_B"].double() @ (mean @ u)
            assert_near(found[b, t].double(), expected)


def test_without_omega_every_sample_is_the_mean(tiny: TinyAdapter) -> None:
    state = state_of(tiny, TOKEN)
    for spec in state.specs:
        state.params[f"{spec.name}.net_b2"][9:] = -1e4
    batch = batch_of(random_rows(LENGTHS))
    with torch.no_grad():
        drawn = tiny.model(batch, C_LORA.predict_pack(state, TOKEN, DRAW)).logits
        mean = tiny.model(batch, C_LORA.mean_pack(state, TOKEN)).logits
    for m in range(3):
        assert_near(drawn[m], mean[0])


# --- what an answer depends on --------------------------------------------------------------


def answers(
    tiny: TinyAdapter, pack: SamplePack, rows: list[EncodedExample], limit: int = 10_000
) -> Tensor:
    return score_rows(tiny.model, pack, rows, num_labels=5, max_padded_tokens=limit).log_probs


@pytest.mark.parametrize("config", [TOKEN, TIED])
@pytest.mark.parametrize("layers", [None, (1, 1)])
def test_answers_do_not_depend_on_company_padding_or_chunks(
    config: CLoraConfig, layers: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_adapter(layers=layers)
    rows = random_rows(LENGTHS)
    state = state_of(tiny, config)
    whole = answers(tiny, C_LORA.predict_pack(state, config, DRAW), rows)
    assert_near(answers(tiny, C_LORA.predict_pack(state, config, DRAW), rows, limit=12), whole)
    for b, row in enumerate(rows):
        alone = answers(tiny, C_LORA.predict_pack(state, config, DRAW), [row])
        assert_near(alone[:, 0], whole[:, b])
    monkeypatch.setattr(tiny.model.trunk, "begins_at", lambda _: False)
    assert_near(answers(tiny, C_LORA.predict_pack(state, config, DRAW), rows), whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize("config", [TOKEN, TIED])
def test_more_samples_begin_with_the_same_ones(tiny: TinyAdapter, config: CLoraConfig) -> None:
    state, rows = state_of(tiny, config), random_rows(LENGTHS)
    few = answers(tiny, C_LORA.predict_pack(state, config, DRAW), rows)
    more = answers(tiny, C_LORA.predict_pack(state, config, Draw(("draw",), 6)), rows)
    other = answers(tiny, C_LORA.predict_pack(state, config, Draw(("other",), 3)), rows)
    assert_near(more[:3], few)
    assert (other - few).abs().max() > 1e-2


def test_training_noise_differs_from_row_to_row(tiny: TinyAdapter) -> None:
    (row,) = random_rows((6,))
    batch = batch_of([row, row])
    for config in (TOKEN, TIED):
        state = state_of(tiny, config)
        with torch.no_grad():
            first, again = (
                tiny.model(batch, C_LORA.train_pack(state, config, DRAW)).logits for _ in range(2)
            )
            drawn = tiny.model(batch, C_LORA.predict_pack(state, config, DRAW)).logits
        assert torch.equal(first, again)
        assert (first[:, 0] - first[:, 1]).abs().max() > 1e-2
        assert_near(drawn[:, 0], drawn[:, 1])


# --- the loss -------------------------------------------------------------------------------


def divergence(
    tiny: TinyAdapter, config: CLoraConfig, lengths: tuple[int, ...]
) -> tuple[float, float, list[Tensor]]:
    """Return the term, its factor, and the features (S, B, T, r) that each module saw."""
    state, seen = state_of(tiny, config), []
    batch = batch_of(random_rows(lengths))
    pack = tiny.model.settled(C_LORA.train_pack(state, config, Draw(("t",), 2)), batch)

    class Watched(ContextualCore):
        def __call__(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().__call__(x)

    def watched(core: Any) -> Watched:
        return Watched(**{name: getattr(core, name) for name in core.__dataclass_fields__})

    modules = {name: replace(m, core=watched(m.core)) for name, m in pack.modules.items()}
    pack = replace(pack, modules=modules)
    tiny.model(batch, pack)
    terms = C_LORA.kl_terms(state, config, point_of(40, step=3), pack)
    (term,) = terms.values()
    assert list(terms) == ["core_kl"]
    return float(term.value), term.weight, seen


@pytest.mark.parametrize("padding", [False, True])
def test_the_divergence_is_torchs_over_all_tokens(tiny: TinyAdapter, padding: bool) -> None:
    config, lengths = TOKEN.model_copy(update={"kl_padding": padding}), (4, 2)
    found, _, seen = divergence(tiny, config, lengths)
    state, expected = state_of(tiny, config), 0.0
    assert len(seen) == len(state.specs)
    for spec, features in zip(state.specs, seen, strict=True):
        net = [state.params[f"{spec.name}.{name}"].double() for name in net_shapes(3, 5)]
        core = ContextualCore(*net, prior_std=0.2)
        for s in range(2):
            for b, length in enumerate(lengths):
                tokens = features[s, b].double().view(-1, 3)
                count = len(tokens) if padding or len(tokens) == 1 else length
                for t in range(count):
                    mean, omega = matrices(core, tokens[t])
                    prior = Normal(torch.zeros_like(mean), 0.2)
                    expected += float(kl_divergence(Normal(mean, omega), prior).sum())
    assert found == pytest.approx(expected / 4, rel=1e-5)  # two samples of two rows


def test_padding_counts_only_where_it_is_asked_for(tiny: TinyAdapter) -> None:
    def of(lengths: tuple[int, ...], *, padding: bool) -> float:
        config = TIED.model_copy(update={"kl_padding": padding, "num_train_samples": 1})
        return divergence(tiny, config, lengths)[0]

    assert of((6, 2), padding=True) > 1.2 * of((6, 2), padding=False)
    assert of((5, 5), padding=True) == pytest.approx(of((5, 5), padding=False))


def test_the_factor_is_the_published_one(tiny: TinyAdapter) -> None:
    """The sum over the batch times 1e-6 / L, times the burst schedule; step 3 is the fourth."""
    _, weight, _ = divergence(tiny, TOKEN, (3, 2))
    cycle = int(100 * 40 ** (math.pi / 8) / 2)
    assert weight == pytest.approx(1e-6 / 5 * 2 * 2**4 / (2 ** (cycle + 1) - 1))
    constant = TOKEN.model_copy(update={"kl_schedule": "constant", "kl_weight": 3.0})
    assert divergence(tiny, constant, (3, 2))[1] == pytest.approx(3e-6 / 5 * 2)
    bound = constant.model_copy(update={"kl_scale": "per_example", "kl_weight": 1.0})
    assert divergence(tiny, bound, (3, 2))[1] == 1.0


def test_settings_and_rank_are_bounded() -> None:
    """A manifest of unknown origin must not ask for tables of any size, or cycles without end."""
    for wrong in ({"gamma": 0.5}, {"gamma": 65}, {"kl_weight": 1e7}):
        with pytest.raises(ValidationError):
            CLoraConfig.model_validate(wrong)
    specs = (TargetSpec("lm_head", 6, 5, None),)
    assert C_LORA.shapes(specs, 64, TOKEN)["lm_head.net_W2"][0] == 2 * 64**2
    with pytest.raises(ConfigError, match=r"needs adapter\.r of at most 64, got 65"):
        C_LORA.shapes(specs, 65, TOKEN)
    with pytest.raises(ConfigError, match=r"needs adapter\.r of at most 64, got 65"):
        C_LORA.init(specs, 65, 0, TOKEN)


def test_a_divergence_needs_a_forward_pass(tiny: TinyAdapter) -> None:
    state, batch = state_of(tiny, TOKEN), batch_of(random_rows((3, 2)))
    pack = C_LORA.train_pack(state, TOKEN, DRAW)
    with pytest.raises(RuntimeError, match="not settled"):
        C_LORA.kl_terms(state, TOKEN, point_of(40), pack)
    with pytest.raises(RuntimeError, match="no forward pass"):
        C_LORA.kl_terms(state, TOKEN, point_of(40), tiny.model.settled(pack, batch))


def test_the_likelihood_has_a_factor_of_its_own() -> None:
    logits, labels = random(2, 4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    config = CLoraConfig(nll_weight=4.0)
    expected = 4 * mean_nll(logits, labels, None)
    torch.testing.assert_close(C_LORA.data_loss(logits, labels, None, config), expected)


def test_the_nets_are_moved_by_plain_sgd(tiny: TinyAdapter) -> None:
    config, optim = CLoraConfig(width=5, net_lr=0.02), OptimConfig(lr=3e-4, weight_decay=0.1)
    state = state_of(tiny, config)
    factors, nets = C_LORA.param_groups(state, optim, config)
    assert sorted((*factors.names, *nets.names)) == sorted(state.params)
    assert all("lora_" in name for name in factors.names)
    assert (factors.optimizer, factors.lr, factors.weight_decay) == ("adamw", 3e-4, 0.1)
    assert (nets.optimizer, nets.lr, nets.weight_decay) == ("sgd", 0.02, 0.0)
    assert not C_LORA.divergence_apart  # one backward pass for both losses
    assert C_LORA.summary(state, config)["net_parameters"] == sum(
        state.params[name].numel() for name in nets.names
    )


@pytest.mark.parametrize("config", [TOKEN, TIED])
def test_a_moved_pack_draws_the_same_noise(tiny: TinyAdapter, config: CLoraConfig) -> None:
    state, rows = state_of(tiny, config), random_rows(LENGTHS)
    pack = C_LORA.predict_pack(state, config, DRAW)
    before = len(list(pack.tensors()))
    expected = answers(tiny, pack, rows)
    assert len(list(pack.tensors())) == before + len(state.specs)  # with the noise drawn so far
    wide = replace(state, params={name: value.double() for name, value in state.params.items()})
    moved = C_LORA.predict_pack(wide, config, DRAW).to(torch.device("cpu"), torch.float32)
    assert_near(answers(tiny, moved, rows), expected)

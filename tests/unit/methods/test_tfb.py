"""dalorra_core.methods.tfb: where the noise goes, how much there is, and how that is searched."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import PHI
from dalorra_core.methods.method import Draw, FitContext
from dalorra_core.methods.tfb import SIGMA, TfbConfig, search_sigma, span_of
from tests.support.tiny_models import (
    TinyAdapter,
    assert_near,
    batch_of,
    gated_pack,
    random_rows,
    tiny_adapter,
)

TFB, DALORRA = METHODS["tfb"], METHODS["dalorra"]
DRAW = Draw(("tfb-test", 2), 5)
PLAIN = TfbConfig()
GATED = TfbConfig.model_validate({"trained_as": "dalorra"})


def state_of(tiny: TinyAdapter, config: TfbConfig, sigma: float) -> AdapterState:
    """Return the tiny adapter as TFB stores it, with this much noise."""
    params = dict(tiny.state.params)
    if config.trained_as.name != "dalorra":
        del params[PHI]
    for spec in tiny.state.specs:
        params[f"{spec.name}.basis"] = span_of(params[f"{spec.name}.lora_B"])
    return replace(tiny.state, params=params | {SIGMA: torch.tensor([sigma])})


def logits(tiny: TinyAdapter, pack: SamplePack) -> Tensor:
    with torch.no_grad():
        return tiny.model(batch_of(random_rows((5, 2))), pack).logits


def weights(state: AdapterState, pack: SamplePack, name: str) -> Tensor:
    """Return s B A of every sample, (M, d_out, d_in), float64."""
    module = pack.modules[name]
    assert module.z is None
    return state.scaling * module.lora_B.double() @ module.lora_A.double()


# --- where the noise goes -----------------------------------------------------------------------


def test_the_span_of_a_matrix_of_full_rank() -> None:
    up = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    basis = span_of(up)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4))
    torch.testing.assert_close(basis @ (basis.T @ up), up)


def test_directions_that_a_matrix_does_not_have_are_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(9, 2, generator=generator) @ torch.randn(2, 4, generator=generator)
    basis = span_of(up)
    assert basis.any(0).tolist() == [True, True, False, False]
    torch.testing.assert_close(basis @ (basis.T @ up), up)
    assert not span_of(torch.zeros(9, 4)).any()
    wide = torch.randn(2, 4, generator=generator)  # lm_head of two labels at rank four
    assert span_of(wide).shape == (2, 4)
    torch.testing.assert_close(span_of(wide) @ (span_of(wide).T @ wide), wide)


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["mle", "dalorra"])
def test_without_noise_it_is_the_trained_adapter(config: TfbConfig) -> None:
    tiny = tiny_adapter()
    pack = TFB.predict_pack(state_of(tiny, config, 0.0), config, DRAW)
    if config is PLAIN:
        expected = logits(tiny, gated_pack(tiny.state, None)).expand(5, -1, -1)
    else:
        expected = logits(tiny, DALORRA.predict_pack(tiny.state, config.trained_as, DRAW))
    assert_near(logits(tiny, pack), expected)
    mean = TFB.mean_pack(state_of(tiny, config, 0.7), config)
    p = None if config is PLAIN else tiny.state.params[PHI].sigmoid().unsqueeze(0)
    assert torch.equal(logits(tiny, mean), logits(tiny, gated_pack(tiny.state, p)))


def test_an_adapter_that_does_nothing_gets_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_adapter()
    # a pack without modules would share more layers, and sum in another order
    monkeypatch.setattr(tiny.model.trunk, "begins_at", lambda _: False)
    params = {
        k: torch.zeros_like(v) if k.endswith("lora_B") else v for k, v in tiny.state.params.items()
    }
    idle = replace(tiny, state=replace(tiny.state, params=params))
    pack = TFB.predict_pack(state_of(idle, PLAIN, 50.0), PLAIN, DRAW)
    base = logits(tiny, SamplePack(5, 2.0, {}))
    assert torch.equal(logits(tiny, pack), base)


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["mle", "dalorra"])
@pytest.mark.parametrize("rank_of_up", [3, 1])
def test_the_noise_is_isotropic_inside_the_span(config: TfbConfig, rank_of_up: int) -> None:
    """Cov[dW] = s^2 sigma_q^2 U U^T (x) I within five standard errors; methods.md 8."""
    tiny, n, sigma = tiny_adapter(hidden_size=16, num_attention_heads=2, head_dim=2), 1000, 0.3
    name = "model.layers.0.self_attn.q_proj"
    params = dict(tiny.state.params)
    params[f"{name}.lora_B"] = params[f"{name}.lora_B"][:, :rank_of_up] @ torch.ones(rank_of_up, 3)
    params[f"{name}.lora_B"][:, :rank_of_up] += tiny.state.params[f"{name}.lora_B"][:, :rank_of_up]
    tiny = replace(tiny, state=replace(tiny.state, params=params))
    state = state_of(tiny, config, sigma)
    draw = Draw(("cov",), n)
    drawn = weights(state, TFB.predict_pack(state, config, draw), name)
    quiet = state_of(tiny, config, 0.0)
    noise = (drawn - weights(quiet, TFB.predict_pack(quiet, config, draw), name)).flatten(1)
    up = params[f"{name}.lora_B"].double()
    projector = up @ torch.linalg.pinv(up, rtol=1e-5)  # U U^T
    assert round(float(projector.trace())) == rank_of_up
    width = drawn.shape[2]
    scale = (state.scaling * sigma) ** 2
    expected = scale * torch.kron(projector, torch.eye(width, dtype=torch.float64))
    variance = expected.diagonal()
    mean_error = (variance / n).sqrt()
    assert (noise.mean(0).abs() <= 5.5 * mean_error + 1e-6).all()
    found = noise.T @ noise / n
    error = ((expected.square() + torch.outer(variance, variance)) / n).sqrt()
    inside = (found - expected).abs() <= 5 * error + 1e-6
    assert inside.double().mean() > 1 - 1e-4  # of tens of thousands of entries
    assert float((found.trace() - variance.sum()).abs()) < 5 * math.sqrt(
        2 * float(expected.square().sum()) / n
    )


def test_samples_are_prefixes_and_named_by_the_draw() -> None:
    state = state_of(tiny_adapter(), GATED, 0.1)
    many = TFB.predict_pack(state, GATED, Draw(("a",), 6))
    few = TFB.predict_pack(state, GATED, Draw(("a",), 2))
    other = TFB.predict_pack(state, GATED, Draw(("b",), 2))
    for spec in state.specs:
        a, b, c = (pack.modules[spec.name].lora_A for pack in (many, few, other))
        assert torch.equal(a[:2], b)
        assert not torch.equal(b, c)
    first, second = (few.modules[spec.name].lora_A for spec in state.specs[:2])
    assert first.shape == second.shape
    noise = [
        m
        - TFB.predict_pack(state_of(tiny_adapter(), GATED, 0.0), GATED, Draw(("a",), 2))
        .modules[spec.name]
        .lora_A
        for m, spec in zip((first, second), state.specs[:2], strict=True)
    ]
    assert not torch.allclose(noise[0], noise[1])  # modules have noise of their own


# --- the search ---------------------------------------------------------------------------------


def linear(slope: float, tested: list[float]) -> Callable[[int, float], float]:
    def change(step: int, sigma: float) -> float:
        assert step == len(tested)
        tested.append(sigma)
        return slope * sigma

    return change


def test_the_corrected_search_returns_the_largest_tested_value_within_the_tolerance() -> None:
    """Change 1 at 0.1; tested by hand: .5 too large, .25, .125 too large, .0625 fits, ..."""
    config = TfbConfig(low=0.0, high=1.0, tolerance=1.0, search_steps=5)
    tested: list[float] = []
    found = search_sigma(linear(10.0, tested), config)
    assert tested == [0.5, 0.25, 0.125, 0.0625, 0.09375]
    assert found == 0.09375
    assert search_sigma(linear(0.0, []), config) == 1 - 2**-5
    assert search_sigma(linear(1e9, []), config) == 0.0
    assert search_sigma(lambda *_: math.nan, config) == 0.0


def test_the_faithful_search_returns_the_smallest_tested_value_beyond_it() -> None:
    config = TfbConfig(search="faithful", low=0.0, high=1.0, tolerance=1.0)
    tested: list[float] = []
    found = search_sigma(linear(10.0, tested), config)
    assert tested == [0.5, 0.25, 0.125, 0.0625, 0.09375]
    assert found == 0.125
    assert search_sigma(linear(0.0, []), config) == 1.0  # high, which was never tested
    assert search_sigma(linear(1e9, []), config) == 2**-5


def test_the_published_intervals() -> None:
    assert TfbConfig(search="faithful").interval == (0.001, 0.015)
    assert TfbConfig().interval == (0.0, 0.015)
    tested: list[float] = []
    assert search_sigma(linear(1e9, tested), TfbConfig(search="faithful")) == pytest.approx(
        0.001 + 0.014 / 32
    )
    assert tested[0] == pytest.approx(0.008)
    assert len(tested) == 5


def test_the_faithful_search_by_answers_stops_at_a_narrow_interval() -> None:
    config = TfbConfig(search="faithful", criterion="answers", tolerance=0.01, search_steps=60)
    tested: list[float] = []
    found = search_sigma(linear(1.0, tested), config)  # 0.01 is the edge
    assert len(tested) == 5  # 0.014 / 2^5 < 5e-4
    assert 0.01 < found < 0.0105
    everything: list[float] = []
    search_sigma(linear(1.0, everything), config.model_copy(update={"search": "corrected"}))
    assert len(everything) == 60


@pytest.mark.parametrize(("criterion", "published"), [("nll", 0.003), ("answers", 0.01)])
def test_each_criterion_has_its_published_tolerance(
    criterion: Literal["nll", "answers"], published: float
) -> None:
    config = TfbConfig(criterion=criterion, low=0.0, high=1.0, search_steps=20)
    assert search_sigma(linear(1.0, []), config) == pytest.approx(published, abs=2e-6)
    own = config.model_copy(update={"tolerance": 0.25})
    assert search_sigma(linear(1.0, []), own) == pytest.approx(0.25, abs=2e-6)


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"low must be below high, got 0\.02 and 0\.015"):
        TfbConfig(low=0.02)


# --- the criterion ------------------------------------------------------------------------------


class FakeModel:
    """Answers that move from label 0 towards label 1 by the mean square of the noise."""

    def __init__(self, tiny: TinyAdapter, rows: int) -> None:
        self.name = tiny.state.specs[0].name
        self.packs: list[SamplePack] = []
        self.asked: list[list[int]] = []
        self.lines: list[str] = []
        self.context = FitContext(rows, 7, self.predict, self.no_gradients, self.lines.append)

    @staticmethod
    def no_gradients(_pack: SamplePack, _rows: Sequence[int]) -> Any:
        pytest.fail("TFB asks for no gradients")

    def predict(self, pack: SamplePack, rows: Sequence[int]) -> Tensor:
        self.packs.append(pack)
        self.asked.append(list(rows))
        spread = pack.modules[self.name].lora_A
        p = torch.tensor(0.8)
        if len(self.packs) > 1:
            quiet = self.quiet
            p = (0.8 - (spread - quiet).square().mean(dim=(1, 2))).clamp_min(0.01)  # (M,)
        else:
            module = pack.modules[self.name]
            self.quiet = span_of(module.lora_B[0]).T @ module.lora_B[0] @ module.lora_A[0]
        p = p.expand(pack.num_samples)
        answer = torch.stack([p, 1 - p], -1).log()  # (M, 2)
        return answer.unsqueeze(1).expand(-1, len(rows), -1)


def fitted(config: TfbConfig, rows: int = 40) -> tuple[FakeModel, AdapterState]:
    tiny = tiny_adapter()
    fake = FakeModel(tiny, rows)
    assert TFB.fit is not None
    params = TFB.fit(tiny.state, config, fake.context)
    return fake, replace(tiny.state, params=params)


def change_of(sigma: float, samples: int, key: tuple[str | int, ...], config: TfbConfig) -> float:
    """Return the fake model's relative change of NLL at one strength, worked out here."""
    tiny = tiny_adapter()
    state = state_of(tiny, config, sigma)
    name = tiny.state.specs[0].name
    noisy = TFB.predict_pack(state, config, Draw(key, samples)).modules[name].lora_A.double()
    quiet = TFB.predict_pack(state_of(tiny, config, 0.0), config, Draw(key, samples))
    square = (noisy - quiet.modules[name].lora_A).square().mean(dim=(1, 2))
    own = -math.log(0.8)
    return abs(-math.log(float((0.8 - square).mean())) - own) / own


def test_the_corrected_fit_uses_one_noise_for_all_strengths() -> None:
    config = TfbConfig(high=0.5, tolerance=0.05, search_samples=4, search_steps=7)
    fake, state = fitted(config)
    sigma = state.params[SIGMA].item()
    assert len(fake.packs) == 8
    assert {tuple(rows) for rows in fake.asked} == {tuple(fake.asked[0])}
    assert sorted(fake.asked[0]) == list(range(40))
    noise = [pack.modules[fake.name].lora_A - fake.quiet for pack in fake.packs[1:]]
    directions = [n / n.norm() for n in noise]
    for other in directions[1:]:
        torch.testing.assert_close(other, directions[0], rtol=1e-4, atol=1e-5)
    key = ("tfb", 7, "search")
    assert change_of(sigma, 4, key, config) <= 0.05
    assert change_of(sigma + 0.5 / 2**7, 4, key, config) > 0.05
    assert any("sigma_q" in line and "tolerance 0.05" in line for line in fake.lines)


def test_the_faithful_fit_draws_anew_and_divides_by_the_number_of_rows() -> None:
    config = TfbConfig(search="faithful", high=0.5, tolerance=0.05 / 30, anchor_rows=30)
    fake, state = fitted(config)
    assert len(fake.packs) == 6
    assert len(fake.asked[0]) == 30
    noise = [pack.modules[fake.name].lora_A - fake.quiet for pack in fake.packs[1:]]
    assert not torch.allclose(noise[1] / noise[1].norm(), noise[0] / noise[0].norm(), atol=1e-3)
    low, high = 0.001, 0.5
    for step in range(5):  # the same bisection, by hand
        middle = (low + high) / 2
        beyond = change_of(middle, 10, ("tfb", 7, "search", step), config) / 30 > 0.05 / 30
        low, high = (low, middle) if beyond else (middle, high)
    assert state.params[SIGMA].item() == pytest.approx(high)


def test_changed_answers_are_counted() -> None:
    """The fake model's answer changes once the mean square of the noise passes 0.3."""
    config = TfbConfig(criterion="answers", tolerance=0.01, high=2.0, search_samples=50)
    _, state = fitted(config)
    assert state.params[SIGMA].item() == pytest.approx(math.sqrt(0.3), rel=0.1)


@pytest.mark.parametrize("base", ["mle", "map", "blob", "dalorra"])
def test_shapes_are_those_of_the_fit(base: str) -> None:
    config = TfbConfig.model_validate({"trained_as": base, "search_steps": 1, "search_samples": 1})
    tiny = tiny_adapter()
    params = METHODS[base].init(tiny.state.specs, tiny.state.r, 0, config.trained_as)
    fake = FakeModel(tiny, 3)
    assert TFB.fit is not None
    found = TFB.fit(replace(tiny.state, params=params), config, fake.context)
    shapes = TFB.shapes(tiny.state.specs, tiny.state.r, config)
    assert {k: tuple(v.shape) for k, v in found.items()} == dict(shapes)
    assert TFB.trained_as(config).name == base
    assert (PHI in found) == (base == "dalorra")


def test_the_summary_says_how_much_and_where() -> None:
    state = state_of(tiny_adapter(num_labels=2), PLAIN, 0.25)
    summary = TFB.summary(state, PLAIN)
    assert summary["sigma_q"] == 0.25
    assert summary["trained_as"] == "mle"
    assert summary["span"]["lm_head"] == 2
    assert summary["span"]["model.layers.0.self_attn.q_proj"] == 3

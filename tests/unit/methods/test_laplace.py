"""dalorra_core.methods.laplace: curvature, evidence, predictive, against dense float64 algebra."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients, ModuleGradients
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState, module_packs
from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.laplace import (
    PRIOR_PRECISION,
    LaplaceConfig,
    Spectrum,
    best_prior_precision,
    log_evidence,
)
from dalorra_core.methods.laplace import _eigen as eigen_of
from dalorra_core.methods.method import FitContext
from dalorra_core.predictive.gradients import label_gradients_of_rows
from tests.support.tiny_models import TinyAdapter, batch_of, random_rows, tiny_adapter

LAPLACE = METHODS["laplace"]
PARTS = ("out_values", "out_vectors", "in_values", "in_vectors")


def silent(_: str) -> None:
    """Swallow what a fit reports."""


def no_answers(_pack: SamplePack, _rows: Sequence[int]) -> Tensor:
    pytest.fail("a Laplace fit asks for gradients only")


def context_of(gradients: Any, rows: int) -> FitContext:
    return FitContext(rows, 1, no_answers, gradients, silent)


def fit(state: AdapterState, config: LaplaceConfig, context: FitContext) -> AdapterState:
    assert LAPLACE.fit is not None
    params = LAPLACE.fit(state, config, context)
    return AdapterState(state.specs, state.r, state.scaling, params)


def covariance(state: AdapterState, config: LaplaceConfig, found: LabelGradients) -> Tensor:
    assert LAPLACE.logit_covariance is not None
    return LAPLACE.logit_covariance(state, config, found)


def plain_state(tiny: TinyAdapter) -> AdapterState:
    params = {k: v for k, v in tiny.state.params.items() if k != "phi"}
    return AdapterState(tiny.state.specs, tiny.state.r, tiny.state.scaling, params)


def model_context(
    tiny: TinyAdapter, rows: Sequence[EncodedExample], limit: int = 1000
) -> FitContext:
    names = tuple(s.name for s in tiny.state.specs)

    def gradients(pack: SamplePack, places: Sequence[int]) -> Iterator[LabelGradients]:
        chosen = [rows[i] for i in places]
        found = label_gradients_of_rows(
            tiny.model, pack, chosen, modules=names, max_padded_tokens=limit
        )
        return (one for _, one in found)

    return context_of(gradients, len(rows))


def block(state: AdapterState, key: str) -> np.ndarray:
    """Return a factor's curvature, dense, rows and columns ordered as its flattened matrix."""
    spectrum = [state.params[f"{key}.{part}"].double().numpy() for part in PARTS]
    out = spectrum[1] @ np.diag(spectrum[0]) @ spectrum[1].T
    within = spectrum[3] @ np.diag(spectrum[2]) @ spectrum[3].T
    return np.kron(out, within)


def jacobian_of(tiny: TinyAdapter, rows: Sequence[EncodedExample]) -> dict[str, np.ndarray]:
    """Return d logits / d factor (B, C, p) by autograd through the layers themselves."""
    state, batch = plain_state(tiny), batch_of(rows)
    names = list(state.params)

    def logits(*values: Tensor) -> Tensor:
        params = dict(zip(names, values, strict=True))
        moved = AdapterState(state.specs, state.r, state.scaling, params)
        pack = SamplePack(1, state.scaling, module_packs(moved, None))
        return tiny.model(batch, pack).logits[0]

    jacobian: Any = torch.autograd.functional.jacobian
    found = jacobian(logits, tuple(state.params.values()))
    return {k: v.flatten(2).double().numpy() for k, v in zip(names, found, strict=True)}


def softmax_fisher(logits: Sequence[float]) -> np.ndarray:
    p = np.exp(np.array(logits) - max(logits))
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


# --- curvature ------------------------------------------------------------------------------


def test_one_token_of_one_row_has_the_exact_gauss_newton_block() -> None:
    """There, and only there, the Kronecker product is no approximation."""
    tiny = tiny_adapter(targets=("q_proj", "v_proj", "down_proj", "lm_head"))
    rows = random_rows((1,))
    state = fit(plain_state(tiny), LaplaceConfig(), model_context(tiny, rows))
    jacobian = jacobian_of(tiny, rows)
    with torch.no_grad():
        pack = SamplePack(1, state.scaling, module_packs(state, None))
        logits = tiny.model(batch_of(rows), pack).logits[0, 0].tolist()
    seen = 0.0
    for key, slope in jacobian.items():
        exact = slope[0].T @ softmax_fisher(logits) @ slope[0]  # (p, p)
        scale = max(1.0, float(np.abs(exact).max()))
        assert np.abs(block(state, key) - exact).max() < 1e-4 * scale, key
        seen += float(np.abs(exact).sum())
    assert seen > 1


def test_with_more_tokens_it_is_an_approximation() -> None:
    tiny, rows = tiny_adapter(), random_rows((6,))
    state = fit(plain_state(tiny), LaplaceConfig(), model_context(tiny, rows))
    slope = jacobian_of(tiny, rows)["model.layers.0.self_attn.v_proj.lora_B"][0]
    with torch.no_grad():
        pack = SamplePack(1, state.scaling, module_packs(state, None))
        logits = tiny.model(batch_of(rows), pack).logits[0, 0].tolist()
    exact = slope.T @ softmax_fisher(logits) @ slope
    found = block(state, "model.layers.0.self_attn.v_proj.lora_B")
    assert np.abs(found - exact).max() > 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("mean_over", ["tokens", "rows"])
def test_the_factors_are_sums_over_rows_tokens_and_labels(mean_over: str) -> None:
    """Against float64 loops over single tokens of single rows, none of them padded."""
    tiny = tiny_adapter()
    allowed = (None, (0, 2), None)
    rows = random_rows((5, 2, 3), allowed=allowed)
    config = LaplaceConfig.model_validate({"kfac_mean_over": mean_over})
    state = fit(plain_state(tiny), config, model_context(tiny, rows))
    key, name = "model.layers.1.self_attn.v_proj", "lora_A"
    up = state.params[f"{key}.lora_B"].double().numpy()
    out, within, tokens = np.zeros((3, 3)), np.zeros((32, 32)), 0
    context = model_context(tiny, rows, limit=1)
    for found in context.gradients(SamplePack(1, 2.0, module_packs(state, None)), range(3)):
        module = found.modules[key]
        logits = found.logits[0].double().numpy()
        open_ = [0, 1, 2, 3, 4] if found.allowed is None else np.flatnonzero(found.allowed[0])
        p = {c: math.exp(logits[c]) / sum(math.exp(logits[d]) for d in open_) for c in open_}
        for t in range(module.inputs.shape[1]):
            h = module.inputs[0, t].double().numpy()
            within += np.outer(h, h)
            tokens += 1
            slopes = module.outputs[:, 0, t].double().numpy()  # (C, d_out)
            for c in open_:
                wrong = sum(p[d] * slopes[d] for d in open_) - slopes[c]  # d(-log p_c)/d output
                g = 2.0 * up.T @ wrong
                out += p[c] * np.outer(g, g)
    assert tokens == 10
    expected = np.kron(out, within / (tokens if mean_over == "tokens" else 3))
    found_block = block(state, f"{key}.{name}")
    assert np.abs(found_block - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_how_rows_are_cut_into_chunks_does_not_matter(limit: int) -> None:
    tiny, rows = tiny_adapter(), random_rows((5, 2, 3, 5))
    one = fit(plain_state(tiny), LaplaceConfig(), model_context(tiny, rows, limit))
    other = fit(plain_state(tiny), LaplaceConfig(), model_context(tiny, rows))
    for spec in tiny.state.specs:
        for factor in ("lora_A", "lora_B"):
            a, b = (block(s, f"{spec.name}.{factor}") for s in (one, other))
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


# --- a linear-softmax toy: only lm_head, dense algebra ----------------------------------------

WIDTH, LABELS, RANK = 130, 3, 2


def toy(rows: int, spread: int, seed: int = 0) -> tuple[AdapterState, LabelGradients]:
    """Return a linear model's adapter and its gradients at inputs from ``spread`` directions."""
    generator = torch.Generator().manual_seed(seed)
    specs = (TargetSpec("lm_head", WIDTH, LABELS, None),)
    params = {
        "lm_head.lora_A": torch.randn(RANK, WIDTH, generator=generator) / 8,
        "lm_head.lora_B": torch.randn(LABELS, RANK, generator=generator),
    }
    state = AdapterState(specs, RANK, 1.5, params)
    directions = torch.randn(spread, WIDTH, generator=generator)
    inputs = torch.randn(rows, spread, generator=generator) @ directions / WIDTH**0.5
    frozen = torch.randn(LABELS, WIDTH, generator=generator) / WIDTH**0.5
    weight = frozen + 1.5 * params["lm_head.lora_B"] @ params["lm_head.lora_A"]
    outputs = torch.eye(LABELS)[:, None, None].expand(LABELS, rows, 1, LABELS)
    is_token = torch.ones(rows, 1, dtype=torch.bool)
    module = ModuleGradients(inputs.unsqueeze(1), outputs, is_token)
    return state, LabelGradients(inputs @ weight.T, None, {"lm_head": module})


def part_of(found: LabelGradients, start: int, stop: int) -> LabelGradients:
    module = found.modules["lm_head"]
    cut = ModuleGradients(
        module.inputs[start:stop], module.outputs[:, start:stop], module.is_token[start:stop]
    )
    return LabelGradients(found.logits[start:stop], None, {"lm_head": cut})


def toy_context(found: LabelGradients, chunk: int) -> FitContext:
    rows = len(found.logits)

    def gradients(_: SamplePack, places: Sequence[int]) -> Iterator[LabelGradients]:
        assert list(places) == list(range(rows))
        return (part_of(found, i, min(i + chunk, rows)) for i in range(0, rows, chunk))

    return context_of(gradients, rows)


def toy_slopes(state: AdapterState, h: np.ndarray) -> dict[str, np.ndarray]:
    """Return the logits' derivatives (C, p) in A and in B at one input, worked out by hand."""
    up = state.params["lm_head.lora_B"].double().numpy()
    down = state.params["lm_head.lora_A"].double().numpy()
    return {
        "lm_head.lora_A": np.stack([np.outer(1.5 * up[c], h).ravel() for c in range(LABELS)]),
        "lm_head.lora_B": np.stack(
            [np.outer(np.eye(LABELS)[c], 1.5 * down @ h).ravel() for c in range(LABELS)]
        ),
    }


def dense_covariance(
    state: AdapterState, found: LabelGradients, precision: float, at: np.ndarray
) -> np.ndarray:
    """Return J P^-1 J^T at one input with P inverted as a dense matrix, factor by factor."""
    inputs = found.modules["lm_head"].inputs[:, 0].double().numpy()
    logits = found.logits.double().numpy()
    up = state.params["lm_head.lora_B"].double().numpy()
    down = state.params["lm_head.lora_A"].double().numpy()
    fisher = [softmax_fisher(row) for row in logits]
    outs = {
        "lm_head.lora_A": sum(2.25 * up.T @ f @ up for f in fisher),
        "lm_head.lora_B": sum(fisher),
    }
    features = {"lm_head.lora_A": inputs, "lm_head.lora_B": 1.5 * inputs @ down.T}
    total = np.zeros((LABELS, LABELS))
    for key, slope in toy_slopes(state, at).items():
        within = features[key].T @ features[key] / len(inputs)
        full = np.kron(outs[key], within)
        total += slope @ np.linalg.solve(full + precision * np.eye(len(full)), slope.T)
    return total


@pytest.mark.parametrize("rank", [None, 10])
def test_the_linearised_predictive_equals_the_closed_form(rank: int | None) -> None:
    """Inputs come from six directions, so a cut to rank ten loses nothing."""
    state, found = toy(rows=24, spread=6)
    config = LaplaceConfig(kfac_rank=rank, prior_precision=0.7)
    fitted = fit(state, config, toy_context(found, chunk=5))
    expected_rank = WIDTH if rank is None else rank
    assert fitted.params["lm_head.lora_A.in_vectors"].shape == (WIDTH, expected_rank)
    _, fresh = toy(rows=4, spread=9, seed=8)  # partly outside of what training has seen
    inputs = fresh.modules["lm_head"].inputs[:, 0].double().numpy()
    ours = covariance(fitted, config, fresh)
    for b in range(4):
        expected = dense_covariance(state, found, 0.7, inputs[b])
        assert np.abs(ours[b].numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_training_row_is_exact_as_a_whole_block() -> None:
    state, found = toy(rows=1, spread=3)
    fitted = fit(state, LaplaceConfig(prior_precision=1.0), toy_context(found, chunk=1))
    h = found.modules["lm_head"].inputs[0, 0].double().numpy()
    fisher = softmax_fisher(found.logits[0].tolist())
    for key, slope in toy_slopes(state, h).items():
        exact = slope.T @ fisher @ slope
        assert np.abs(block(fitted, key) - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_cut_keeps_the_largest_directions_and_forgets_no_variance() -> None:
    """What is cut has the prior's variance, so the covariance can only grow."""
    state, found = toy(rows=40, spread=30)
    whole, cut = (LaplaceConfig(kfac_rank=k, prior_precision=0.1) for k in (None, 8))
    exact = fit(state, whole, toy_context(found, chunk=40))
    for chunk in (40, 3):
        rough = fit(state, cut, toy_context(found, chunk=chunk))
        values = rough.params["lm_head.lora_A.in_values"]
        top = exact.params["lm_head.lora_A.in_values"].sort(descending=True).values[:8]
        found_values = values.sort(descending=True).values
        assert (found_values <= top * (1 + 1e-4)).all()  # a truncated sum is never above
        if chunk == 40:
            torch.testing.assert_close(found_values, top, rtol=1e-4, atol=1e-6)
        vectors = rough.params["lm_head.lora_A.in_vectors"]
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(8), rtol=1e-4, atol=1e-5)
        difference = covariance(rough, cut, found) - covariance(exact, whole, found)
        assert torch.linalg.eigvalsh(difference).min() > -1e-6
        assert difference.diagonal(dim1=1, dim2=2).amax() > 1e-3


def test_unused_ranks_of_a_cut_change_nothing() -> None:
    """Two rows fill two of ten directions; the others have zero eigenvalues."""
    state, found = toy(rows=2, spread=2)
    config = LaplaceConfig(kfac_rank=10, prior_precision=0.7)
    fitted = fit(state, config, toy_context(found, chunk=1))
    assert all(value.isfinite().all() for value in fitted.params.values())
    inputs = found.modules["lm_head"].inputs[:, 0].double().numpy()
    ours = covariance(fitted, config, found)
    expected = dense_covariance(state, found, 0.7, inputs[0])
    assert np.abs(ours[0].numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_more_precision_is_less_variance_and_none_in_the_limit() -> None:
    state, found = toy(rows=10, spread=6)
    traces = []
    for precision in (0.1, 1.0, 10.0, 1e12):
        config = LaplaceConfig(prior_precision=precision)
        fitted = fit(state, config, toy_context(found, chunk=10))
        assert fitted.params[PRIOR_PRECISION].item() == pytest.approx(precision)
        traces.append(float(covariance(fitted, config, found).diagonal(dim1=1, dim2=2).sum()))
    assert traces == sorted(traces, reverse=True)
    assert traces[-1] < 1e-9


# --- the prior precision ----------------------------------------------------------------------


def dense_log_evidence(log_precision: float, curvature: np.ndarray, squares: float) -> float:
    """Return log Z less the log-likelihood: methods.md 4.5, with a dense determinant."""
    precision, p = math.exp(log_precision), len(curvature)
    posterior = np.diag(curvature) + precision * np.eye(p)
    _, log_det = np.linalg.slogdet(posterior)
    return -0.5 * (log_det - p * log_precision + precision * squares)


CURVATURE = torch.tensor([0.0, 0.0, 0.3, 2.0, 150.0], dtype=torch.float64)


@pytest.mark.parametrize("at", [-3.0, 0.0, 2.5])
def test_the_evidence_and_its_gradient(at: float) -> None:
    point = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    squares = torch.tensor(1.7, dtype=torch.float64)
    value = log_evidence(point, CURVATURE, squares)
    assert float(value.detach()) == pytest.approx(dense_log_evidence(at, CURVATURE.numpy(), 1.7))
    (slope,) = torch.autograd.grad(value, point)
    h = 1e-5
    ends = [dense_log_evidence(at + d, CURVATURE.numpy(), 1.7) for d in (h, -h)]
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)
    without_zeros = log_evidence(point, CURVATURE[2:], squares)
    assert float(without_zeros.detach()) == pytest.approx(float(value.detach()))


def test_adam_finds_the_best_precision() -> None:
    squares = torch.tensor(1.7)
    found = best_prior_precision(CURVATURE, squares, steps=500, lr=0.1)
    best: Any = minimize_scalar(
        lambda x: -dense_log_evidence(x, CURVATURE.numpy(), 1.7), bounds=(-10, 10), method="bounded"
    )
    assert math.log(found) == pytest.approx(best.x, abs=1e-3)


def test_the_fit_takes_the_best_precision_of_its_own_curvature() -> None:
    state, found = toy(rows=30, spread=6)
    config = LaplaceConfig(evidence_steps=400)
    fitted = fit(state, config, toy_context(found, chunk=30))
    curvature = []
    for key in ("lm_head.lora_A", "lm_head.lora_B"):
        spectrum = Spectrum(*(fitted.params[f"{key}.{part}"] for part in PARTS))
        curvature.append(spectrum.products.double().flatten())
    flat = torch.cat(curvature).numpy()
    squares = sum(float(state.params[k].double().square().sum()) for k in state.params)
    best: Any = minimize_scalar(
        lambda x: -dense_log_evidence(x, flat, squares), bounds=(-10, 10), method="bounded"
    )
    precision = fitted.params[PRIOR_PRECISION].item()
    assert math.log(precision) == pytest.approx(best.x, abs=1e-2)
    summary = LAPLACE.summary(fitted, config)
    assert summary["prior_precision"] == pytest.approx(precision)
    effective = float((flat / (flat + precision)).sum())
    assert summary["effective_parameters"] == pytest.approx(effective, rel=1e-4)


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("rank", [None, 4])
def test_shapes_are_those_of_the_fit(subset: str, rank: int | None) -> None:
    tiny = tiny_adapter(hidden_size=104, num_attention_heads=4)
    config = LaplaceConfig.model_validate({"subset": subset, "kfac_rank": rank})
    state = fit(plain_state(tiny), config, model_context(tiny, random_rows((3, 2))))
    shapes = LAPLACE.shapes(tiny.state.specs, tiny.state.r, config)
    assert {k: tuple(v.shape) for k, v in state.params.items()} == dict(shapes)
    cut = [n for n, shape in shapes.items() if n.endswith("vectors") and shape[0] > shape[1]]
    assert bool(cut) == (rank is not None)
    adapted = {s.name for s in tiny.state.specs}
    chosen = {"lm_head"} if subset == "last_layer" else adapted
    assert set(LAPLACE.gradient_modules(tiny.state.specs, config)) == chosen


def test_the_last_layer_must_be_adapted() -> None:
    specs = (TargetSpec("layers.0.q", 6, 4, 0),)
    with pytest.raises(ConfigError, match=r"last_layer needs lm_head .* got layers\.0\.q"):
        LAPLACE.shapes(specs, 2, LaplaceConfig(subset="last_layer"))


def test_it_is_trained_as_map_or_mle() -> None:
    assert LAPLACE.trained_as(LaplaceConfig()).name == "map"
    config = LaplaceConfig.model_validate({"trained_as": "mle"})
    assert LAPLACE.trained_as(config).name == "mle"


@pytest.mark.parametrize("seed", [10, 28, 47])
def test_a_gram_matrix_of_mostly_zero_rows_has_eigenvalues(seed: int) -> None:
    """In the last layer only a row's last token has a gradient; LAPACK gives up on these three."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(376, 576, dtype=torch.float64)
    scale = torch.rand(8, 1, generator=generator)
    found = torch.randn(8, 576, generator=generator) * scale * 3e-3
    share = torch.rand(8, 1, generator=generator)
    places = [19, 40, 62, 85, 109, 134, 160, 187, 207, 228, 250, 273, 297, 322, 348, 375]
    rows[places] = torch.cat([found * share, -found * (1 - share)]).double()
    gram = rows @ rows.T
    values, vectors = eigen_of(gram)
    assert (values >= 0).all()
    size = float(gram.diagonal().max())
    assert (vectors @ torch.diag(values) @ vectors.T - gram).abs().max() < 1e-12 * size
    assert int((values > 1e-10 * size).sum()) == 8

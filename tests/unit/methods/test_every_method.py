"""What holds for every method, whatever it computes: see `tests/support/method_cases.py`."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.store import as_stored
from dalorra_core.config import AdapterConfig, Design, MethodSettings, OptimConfig
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.plan import SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.sampling.designs import DESIGNS
from dalorra_core.training.step import TrainStep
from tests.support.method_cases import (
    CASES,
    VARIANTS,
    R,
    answers,
    case_name,
    filled_state,
    method_of,
    tiny,
    trained_states,
)
from tests.support.tiny_artifacts import save_tiny_adapter
from tests.support.tiny_models import (
    assert_near,
    batch_of,
    merged_label_logits,
    point_of,
    random_rows,
    save_tiny_base,
)

DRAW = Draw(("every", 3), 4)
CPU = torch.device("cpu")
ROWS = random_rows((5, 3, 6, 4))

every_case = pytest.mark.parametrize("config", CASES, ids=case_name)
every_trained_case = pytest.mark.parametrize(
    "config", [c for c in CASES if method_of(c).trained_as(c) == c], ids=case_name
)
every_drawn_case = pytest.mark.parametrize(
    "config",
    [c for c in CASES if method_of(c).draws_samples(c)],
    ids=case_name,
)
every_designed_case = pytest.mark.parametrize(
    ("config", "design"),
    [
        pytest.param(c, design, id=f"{case_name(c)},{design}")
        for c in CASES
        for design in method_of(c).designs(c)
        if design != "iid"
    ],
)

MOVED_FROM_THE_START = frozenset({"bayesian_lora"})
"""Methods without a lora_B that starts at zero."""

WITHOUT_NOISE = frozenset({"rank_dropout,num_dropped=0", "mc_dropout,drop_prob=0.0"})
"""Settings of drawn methods under which all samples are the same function."""

FOLLOWERS = {
    "dalorra",
    "frozen_gates",
    "mask_mixture",
    "mask_markov",
    "mask_weight",
    "amortised_prompt",
    "amortised_token",
    "blob",
    "tfb",
    "scalabl",
    "bayesian_lora",
}
"""Methods whose samples can be drawn by every design, without flipout."""


def test_every_variant_is_of_a_method() -> None:
    assert set(VARIANTS) <= set(METHODS)
    assert {config.name for config in CASES} == set(METHODS)
    assert len({case_name(config) for config in CASES}) == len(CASES)


@every_case
def test_shapes_tell_what_is_stored(config: MethodSettings) -> None:
    state = filled_state(config)
    found = {name: tuple(value.shape) for name, value in state.params.items()}
    assert method_of(config).shapes(state.specs, R, config) == found
    assert {value.dtype for value in state.params.values()} == {torch.float32}
    assert not any(value.requires_grad for value in state.params.values())


@every_case
def test_a_larger_adapter_has_the_shapes_of_its_start(config: MethodSettings) -> None:
    method = method_of(config)
    specs, r = tiny().state.specs[1:], 6
    trained_as = method.trained_as(config)
    trained = METHODS[trained_as.name]
    if method.fit is None:
        states = [
            AdapterState(specs, r, 2.0, trained.init(specs, r, seed, trained_as))
            for seed in range(method.members(config))
        ]
        found = {name: tuple(value.shape) for name, value in method.join(states).items()}
        assert method.shapes(specs, r, config) == found
    else:
        factors = {n for n in trained.init(specs, r, 0, trained_as) if "lora_" in n}
        assert factors <= set(method.shapes(specs, r, config))  # a fit may drop what it needs not


@every_case
def test_equal_seeds_start_equally_and_others_do_not(config: MethodSettings) -> None:
    trained_as = method_of(config).trained_as(config)
    first, again, other = (
        METHODS[trained_as.name].init(tiny().state.specs, R, seed, trained_as) for seed in (7, 7, 8)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "config",
    [c for c in CASES if c.name not in MOVED_FROM_THE_START and method_of(c).fit is None],
    ids=case_name,
)
def test_without_up_factors_every_sample_is_the_base_model(config: MethodSettings) -> None:
    method, state = method_of(config), filled_state(config)
    zeroed = {
        name: torch.zeros_like(value) if name.endswith("lora_B") else value
        for name, value in state.params.items()
    }
    state = replace(state, params=zeroed)
    expected = torch.stack([merged_label_logits(tiny(), row.token_ids, None) for row in ROWS])
    packs = [method.predict_pack(state, config, DRAW), method.mean_pack(state, config)]
    if method.trained_as(config) == config:
        packs.append(method.train_pack(state, config, DRAW))
    for pack in packs:
        with torch.no_grad():
            found = tiny().model(batch_of(ROWS), pack).logits
        assert_near(found.double(), expected.expand(pack.num_samples, -1, -1))


@pytest.mark.parametrize(
    "config", [c for c in CASES if method_of(c).logit_covariance is None], ids=case_name
)
def test_a_fused_pass_is_one_pass_for_each_sample(config: MethodSettings) -> None:
    method, state = method_of(config), filled_state(config)
    pack = method.predict_pack(state, config, DRAW).to(CPU, torch.float32)
    with torch.no_grad():
        together = tiny().model(batch_of(ROWS), pack).logits
        for m in range(pack.num_samples):
            single = tiny().model(batch_of(ROWS), pack.narrow(m, m + 1)).logits
            assert_near(single[0], together[m])
        if pack.num_samples > 2:
            middle = pack.narrow(1, pack.num_samples).narrow(0, 1)
            assert_near(tiny().model(batch_of(ROWS), middle).logits[0], together[1])


@every_case
def test_an_answer_depends_neither_on_company_nor_on_order_nor_on_padding(
    config: MethodSettings,
) -> None:
    state = filled_state(config)
    together = answers(config, state, DRAW, ROWS)
    turned = answers(config, state, DRAW, ROWS[::-1]).flip(1)
    in_chunks = answers(config, state, DRAW, ROWS, max_padded_tokens=9)
    beside_long = answers(config, state, DRAW, [*ROWS, *random_rows((40,), seed=5)])[:, :-1]
    alone = torch.cat([answers(config, state, DRAW, [row]) for row in ROWS], dim=1)
    # A draw of logits is a root of their covariance times noise, and rounding grows on the way.
    tolerance = 1e-5 if method_of(config).logit_covariance is None else 1e-4
    for other in (turned, in_chunks, beside_long, alone):
        torch.testing.assert_close(other, together, rtol=tolerance, atol=tolerance)


@every_case
def test_equal_draws_give_equal_answers(config: MethodSettings) -> None:
    state = filled_state(config)
    first, again = (answers(config, state, DRAW, ROWS) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()
    functions = method_of(config).num_functions(config)
    one = method_of(config).one_answer(config) and functions is None
    point = one or not method_of(config).stochastic
    assert len(first) == (1 if point else functions or DRAW.num_samples)


@every_drawn_case
def test_fewer_samples_are_the_first_of_more(config: MethodSettings) -> None:
    state = filled_state(config)
    more = answers(config, state, DRAW, ROWS)
    fewer = answers(config, state, Draw(DRAW.key, 2), ROWS)
    assert_near(fewer, more[:2])
    if case_name(config) not in WITHOUT_NOISE:
        assert more.std(0).max() > 1e-4
        other = answers(config, state, Draw(("every", 4), DRAW.num_samples), ROWS)
        assert (other - more).abs().max() > 1e-4


def test_who_follows_the_designs_is_known() -> None:
    for config in CASES:
        flips = getattr(config, "test_noise", None) == "flipout"
        expected = DESIGNS if config.name in FOLLOWERS and not flips else ("iid",)
        assert method_of(config).designs(config) == expected, case_name(config)


@every_designed_case
def test_samples_by_a_design_are_others_and_each_is_one_function(
    config: MethodSettings, design: Design
) -> None:
    state, draw = filled_state(config), replace(DRAW, num_samples=5, design=design)
    iid, found = (answers(config, state, d, ROWS) for d in (replace(draw, design="iid"), draw))
    assert found.isfinite().all()
    assert found.shape == iid.shape
    assert (found - iid).abs().max() > 1e-4
    assert found.std(0).max() > 1e-4
    assert torch.equal(found, answers(config, state, draw, ROWS))
    pack = method_of(config).predict_pack(state, config, draw).to(CPU, torch.float32)
    chunks = [pack.narrow(0, 2), pack.narrow(2, 5).narrow(0, 1), pack.narrow(3, 5)]
    parts = [
        score_rows(tiny().model, part, ROWS, num_labels=5, max_padded_tokens=9).log_probs
        for part in chunks
    ]
    assert_near(torch.cat(parts), found)


@every_case
def test_a_predictor_refuses_a_design_that_the_method_cannot_follow(
    config: MethodSettings, tmp_path: Path, tiny_base: Path
) -> None:
    state, method = filled_state(config), method_of(config)
    adapter = save_tiny_adapter(
        tmp_path / "demo", tiny_base, num_labels=5, config=config, params=state.params
    )
    predictor = Predictor.load(adapter, base=str(tiny_base), device="cpu", verify_golden=False)
    assert predictor.designs == method.designs(config)
    for design in DESIGNS:
        plan = SamplingPlan(3, 1, design=design)
        if design in predictor.designs:
            assert predictor.predict(ROWS, plan).log_probs.isfinite().all()
            continue
        for ask in (partial(predictor.predict, ROWS, plan), partial(predictor.mask_set, plan)):
            with pytest.raises(ConfigError) as caught:
                ask()
            assert f"design must be iid for method {config.name}" in str(caught.value)
            assert f"got {design}" in str(caught.value)
    # the deterministic pass draws nothing, whatever the adapter's own design is
    ids = {predictor.mask_set(SamplingPlan(3, 1, "mean_mask", design)) for design in DESIGNS}
    assert len(ids) == 1


@every_case
def test_training_leaves_the_design_at_iid(config: MethodSettings) -> None:
    """The design is the draw's own; that of a training step does not name one."""
    trained_as = method_of(config).trained_as(config)
    step = TrainStep(
        tiny().model,
        tiny().state.specs,
        AdapterConfig(r=R, lora_alpha=2.0 * R),
        trained_as,
        optim=OptimConfig(),
        num_examples=9,
        seed=4,
    )
    method = METHODS[trained_as.name]
    seen: list[Draw] = []

    def watched(state: AdapterState, of: MethodSettings, draw: Draw) -> SamplePack:
        seen.append(draw)
        return method.train_pack(state, of, draw)

    step.method = replace(method, train_pack=watched)
    step(batch_of(ROWS), 3)
    assert [draw.design for draw in seen] == ["iid"]


@every_case
def test_the_mean_pass_is_always_the_same(config: MethodSettings) -> None:
    method, state = method_of(config), filled_state(config)
    first, again = (method.mean_pack(state, config).to(CPU, torch.float32) for _ in range(2))
    several = method.num_functions(config) if method.one_answer(config) else None
    assert first.num_samples == (several or 1)
    found = [
        score_rows(tiny().model, pack, ROWS, num_labels=5, max_padded_tokens=10**6).log_probs
        for pack in (first, again)
    ]
    assert torch.equal(*found)
    assert found[0].isfinite().all()


@every_case
def test_a_stored_adapter_answers_bit_for_bit_as_it_did(
    config: MethodSettings, tmp_path: Path, tiny_base: Path
) -> None:
    state = filled_state(config)
    adapter = save_tiny_adapter(
        tmp_path / "demo", tiny_base, num_labels=5, config=config, params=state.params
    )
    predictor = Predictor.load(adapter, base=str(tiny_base), device="cpu")  # checks the probes
    plan = SamplingPlan(4, 5)
    found = predictor.predict(ROWS, plan).log_probs
    assert len(found) == predictor.num_functions(plan)
    rounded = {name: value.contiguous() for name, value in as_stored(state.params).items()}
    expected = answers(
        config,
        replace(state, params=rounded),
        Draw((predictor.artifact.sha256, plan.seed), plan.num_samples),
        ROWS,
        max_padded_tokens=predictor.max_padded_tokens,
    )
    if method_of(config).one_answer(config):
        expected = expected.mean(0, keepdim=True).log_softmax(-1)
    assert torch.equal(found, expected)
    assert predictor.memory_bytes >= sum(v.nbytes for v in predictor.artifact.tensors.values())


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("every-method") / "base")


@every_trained_case
def test_each_parameter_is_moved_by_an_optimiser(config: MethodSettings) -> None:
    (state, *_) = trained_states(config)
    optim = OptimConfig(lr=3e-4, weight_decay=0.1)
    groups = method_of(config).param_groups(state, optim, config)
    for optimizer in ("adamw", "sgd"):
        names = Counter(n for g in groups if g.optimizer == optimizer for n in g.names)
        assert set(names.values()) <= {1}
    assert {name for group in groups for name in group.names} == set(state.params)
    assert any(group.optimizer == "adamw" for group in groups)
    assert all(group.lr >= 0 and group.weight_decay >= 0 for group in groups)


@every_trained_case
def test_each_parameter_has_a_gradient(config: MethodSettings) -> None:
    (state, *_) = trained_states(config)
    adapter = AdapterConfig(r=R, lora_alpha=2.0 * R)
    step = TrainStep(
        tiny().model, state.specs, adapter, config, optim=OptimConfig(), num_examples=9, seed=4
    )
    with torch.no_grad():
        for name, value in step.params.items():
            value.copy_(state.params[name])
    out = step(batch_of(ROWS), 3)
    assert out.loss.isfinite()
    out.loss.backward()
    for name, value in step.params.items():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name
    assert out.pack.num_samples == method_of(config).num_train_samples(config)
    again = step(batch_of(ROWS), 3)
    assert torch.equal(again.loss, out.loss)


@every_trained_case
def test_divergences_are_not_negative(config: MethodSettings) -> None:
    (state, *_) = trained_states(config)
    method = method_of(config)
    pack = tiny().model.settled(method.train_pack(state, config, DRAW), batch_of(ROWS))
    with torch.no_grad():
        tiny().model(batch_of(ROWS), pack)
        terms = method.kl_terms(state, config, point_of(50), pack)
    for name, term in terms.items():
        assert term.value.shape == (), name
        assert term.value >= 0, name
        assert term.weight >= 0, name


@every_case
def test_the_summary_is_plain_values(config: MethodSettings) -> None:
    json.dumps(method_of(config).summary(filled_state(config), config), allow_nan=False)

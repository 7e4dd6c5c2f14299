"""Amortised gates, by prompt and by token: DALorRA at first, then functions of the input."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from dalorra_core.adapters.inject import TargetSpec, find_targets
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import RowContext, SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.data.collate import EncodedExample
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.methods.amortised import AmortisedSettings
from dalorra_core.methods.amortised_prompt import AmortisedPromptConfig, prompt_logits
from dalorra_core.methods.amortised_token import AmortisedTokenConfig, TokenGates
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.scoring import score_rows
from dalorra_core.sampling.designs import iid_uniforms
from dalorra_core.sampling.streams import normals
from tests.support.tiny_models import (
    TinyAdapter,
    assert_near,
    batch_of,
    merged_label_logits,
    point_of,
    random_rows,
    tiny_adapter,
)

DALORRA = METHODS["dalorra"]
FROZEN = AmortisedPromptConfig(width=6)
LEARNED = AmortisedPromptConfig(width=6, projection="learned")
TOKEN = AmortisedTokenConfig(width=6)
CONFIGS = pytest.mark.parametrize("config", [FROZEN, LEARNED, TOKEN], ids=["R", "W1", "token"])
PROMPT = pytest.mark.parametrize("config", [FROZEN, LEARNED], ids=["R", "W1"])
DRAW = Draw(("draw",), 3)
LENGTHS = (7, 3, 11, 5)


@pytest.fixture(scope="module")
def tiny() -> TinyAdapter:
    tiny = tiny_adapter()
    # Plain gates would take the short last layer and gates by token not; here they are compared bit
    # by bit, so all take the whole one.
    tiny.model.trunk.__dict__["shortens"] = False
    return tiny


def state_of(tiny: TinyAdapter, config: AmortisedSettings, *, zero: bool = False) -> AdapterState:
    """Return the tiny adapter with a gate net: as it starts, or with deviations of order one."""
    params = METHODS[config.name].init(tiny.state.specs, tiny.state.r, 0, config)
    generator = torch.Generator().manual_seed(5)
    for name in () if zero else ("gate_out", "gate_out_bias"):
        if name in params:
            params[name] = torch.randn(params[name].shape, generator=generator)
    return replace(tiny.state, params=params | dict(tiny.state.params))


def answers(
    tiny: TinyAdapter, pack: SamplePack, rows: list[EncodedExample], limit: int = 10_000
) -> Tensor:
    return score_rows(tiny.model, pack, rows, num_labels=5, max_padded_tokens=limit).log_probs


def context_of(tiny: TinyAdapter, rows: list[EncodedExample]) -> RowContext:
    """Return what is known of rows, one row at a time and without padding."""
    embedding: Any = tiny.base.get_input_embeddings()
    table = embedding.weight.double()
    means = [table[list(row.token_ids)].mean(0) for row in rows]
    longest = max(len(row.token_ids) for row in rows)
    is_token = torch.tensor([[t < len(row.token_ids) for t in range(longest)] for row in rows])
    return RowContext(lambda: torch.stack(means).float(), is_token)


def gates_of(pack: SamplePack) -> Tensor:
    """Return the gates of a settled pack, (M, B, L, r)."""
    found = [module.z for module in pack.modules.values()]
    return torch.stack([z for z in found if z is not None], dim=2)


# --- sizes ----------------------------------------------------------------------------------


def test_the_proposed_numbers_of_parameters() -> None:
    """methods.md 4.12, on the shapes of Llama-3.1-8B with r = 8 and K = 16."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        specs = find_targets(LlamaForCausalLM(config), ("q_proj", "v_proj", "lm_head"))

    def extra(config: AmortisedSettings) -> int:
        shapes = METHODS[config.name].shapes(specs, 8, config)
        own = {name: shape for name, shape in shapes.items() if ".lora_" not in name}
        assert own.pop("phi") == (65, 8)
        return sum(math.prod(shape) for shape in own.values())

    assert extra(AmortisedPromptConfig()) == 65 * 8 * 16 == 8_320
    assert extra(AmortisedPromptConfig(projection="learned")) == 8_320 + 16 * 4096 == 73_856
    assert extra(AmortisedTokenConfig()) == 65 * (2 * 8 * 16 + 16 + 8) == 18_200


@CONFIGS
def test_shapes_are_those_of_the_initial_tensors(config: AmortisedSettings) -> None:
    specs = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 6, 5, None))
    method = METHODS[config.name]
    made = {name: tuple(t.shape) for name, t in method.init(specs, 4, 0, config).items()}
    assert made == dict(method.shapes(specs, 4, config))


# --- at zero they are DALorRA ---------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("masks", ["relaxed", "straight_through"])
def test_a_zero_net_trains_as_dalorra_with_the_same_draws(
    tiny: TinyAdapter, config: AmortisedSettings, masks: Literal["relaxed", "straight_through"]
) -> None:
    changed = config.model_copy(update={"train_masks": masks})
    batch, state = batch_of(random_rows(LENGTHS)), state_of(tiny, config, zero=True)
    plain = DALORRA.train_pack(tiny.state, DalorraConfig(train_masks=masks), DRAW)
    pack = tiny.model.settled(METHODS[config.name].train_pack(state, changed, DRAW), batch)
    with torch.no_grad():
        found, expected = (tiny.model(batch, p).logits for p in (pack, plain))
    if masks == "straight_through":
        assert torch.equal(found, expected)
    # The last digit of a sigmoid depends on where in memory its argument lies.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    terms = METHODS[config.name].kl_terms(state, changed, point_of(40), pack)
    term = DALORRA.kl_terms(tiny.state, DalorraConfig(), point_of(40), plain)["mask_kl"]
    assert torch.equal(terms["mask_kl"].value, term.value)
    assert terms["mask_kl"].weight == term.weight
    assert abs(float(terms["local_kl"].value)) < 1e-6


@CONFIGS
def test_a_zero_net_predicts_as_dalorra_with_the_same_draws(
    tiny: TinyAdapter, config: AmortisedSettings
) -> None:
    method, state = METHODS[config.name], state_of(tiny, config, zero=True)
    rows = random_rows(LENGTHS)
    plain = answers(tiny, DALORRA.predict_pack(tiny.state, DalorraConfig(), DRAW), rows)
    assert torch.equal(answers(tiny, method.predict_pack(state, config, DRAW), rows), plain)
    mean = answers(tiny, DALORRA.mean_pack(tiny.state, DalorraConfig()), rows)
    assert_near(answers(tiny, method.mean_pack(state, config), rows), mean)
    relaxed = config.model_copy(update={"test_masks": "relaxed"})
    soft = DALORRA.predict_pack(tiny.state, DalorraConfig(test_masks="relaxed"), DRAW)
    assert_near(
        answers(tiny, method.predict_pack(state, relaxed, DRAW), rows), answers(tiny, soft, rows)
    )


@CONFIGS
def test_the_last_layer_of_the_net_gets_the_first_gradient(
    tiny: TinyAdapter, config: AmortisedSettings
) -> None:
    params = {
        name: value.clone().requires_grad_()
        for name, value in state_of(tiny, config, zero=True).params.items()
    }
    state = replace(tiny.state, params=params)
    batch = batch_of(random_rows(LENGTHS))
    pack = METHODS[config.name].train_pack(state, config, DRAW)
    METHODS[config.name].data_loss(
        tiny.model(batch, pack).logits, batch.labels, None, config
    ).backward()
    for name in ("gate_out", "phi"):
        gradient = params[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-6
    if "gate_in" in params:
        first = params["gate_in"].grad
        assert first is not None
        assert first.abs().max() == 0


# --- gates of a prompt ----------------------------------------------------------------------


def logits_by_hand(state: AdapterState, config: AmortisedPromptConfig, mean: Tensor) -> Tensor:
    """Return the gate logits of one row (L, r), number by number."""
    d, width = len(mean), config.width
    centre = float(mean.double().mean())
    spread = math.sqrt(float((mean.double() - centre).square().mean()))
    c = [(float(x) - centre) / spread for x in mean]
    if config.projection == "learned":
        projection = state.params["gate_in"].double()
    else:
        drawn = normals(("amortised_prompt", "projection", width, d), width * d)
        projection = torch.from_numpy(drawn).view(width, d) / math.sqrt(d)
    g = [
        max(0.0, math.fsum(float(projection[k, i]) * c[i] for i in range(d))) for k in range(width)
    ]
    out = state.params["phi"].double().clone()
    for i in range(len(state.specs)):
        for j in range(state.r):
            out[i, j] += math.fsum(
                float(state.params["gate_out"][i, j, k]) * g[k] for k in range(width)
            )
    return out


@PROMPT
def test_prompt_logits_follow_the_formula(tiny: TinyAdapter, config: AmortisedPromptConfig) -> None:
    state, rows = state_of(tiny, config), random_rows(LENGTHS)
    context = context_of(tiny, rows)
    found = prompt_logits(state, config, context)
    for b in range(len(rows)):
        expected = logits_by_hand(state, config, context.mean_embedding[b])
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-10)
    assert (found[0] - found[1]).abs().max() > 0.1


@PROMPT
def test_the_size_of_the_embeddings_does_not_matter(
    tiny: TinyAdapter, config: AmortisedPromptConfig
) -> None:
    """Embeddings of a language model are often 100 times smaller than the tiny model's."""
    state, context = state_of(tiny, config), context_of(tiny, random_rows(LENGTHS))
    small = RowContext(lambda: context.mean_embedding / 256, context.is_token)
    found, expected = (prompt_logits(state, config, c) for c in (small, context))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@PROMPT
def test_each_row_answers_with_its_own_gates(
    tiny: TinyAdapter, config: AmortisedPromptConfig
) -> None:
    """Against weights merged by hand, with v > 1 - sigmoid(phi(x)) worked out beside them."""
    state, rows = state_of(tiny, config), random_rows(LENGTHS)
    found = answers(tiny, METHODS[config.name].predict_pack(state, config, DRAW), rows)
    v = iid_uniforms(("draw", "z"), 3, len(state.specs), state.r)
    context = context_of(tiny, rows)
    different = 0
    for b, row in enumerate(rows):
        drop = 1 - logits_by_hand(state, config, context.mean_embedding[b]).sigmoid()
        different += int(((v > drop) != (v > (1 - state.params["phi"].sigmoid()))).sum())
        for m in range(3):
            gates = {spec.name: (v[m, i] > drop[i]).double() for i, spec in enumerate(state.specs)}
            expected = merged_label_logits(tiny, row.token_ids, gates).log_softmax(-1)
            assert_near(found[m, b].double(), expected)
    assert different > 10


@PROMPT
@pytest.mark.parametrize("kind", ["predict", "mean"])
def test_gates_of_a_prompt_do_not_depend_on_company_or_padding(
    tiny: TinyAdapter, config: AmortisedPromptConfig, kind: str
) -> None:
    method, state = METHODS[config.name], state_of(tiny, config)
    pack = method.mean_pack(state, config)
    if kind == "predict":
        pack = method.predict_pack(state, config, Draw(("many",), 200))
    rows = random_rows((*LENGTHS, 60))
    together = gates_of(tiny.model.settled(pack, batch_of(rows)))
    for b, row in enumerate(rows):
        alone = gates_of(tiny.model.settled(pack, batch_of([row])))
        assert torch.equal(alone[:, 0], together[:, b])


def test_modules_that_do_not_read_the_embeddings_need_the_frozen_projection() -> None:
    tiny = tiny_adapter(targets=("down_proj",))
    batch = batch_of(random_rows(LENGTHS))
    method = METHODS["amortised_prompt"]
    with pytest.raises(ConfigError, match=r"width 32, the adapted modules read 48"):
        tiny.model(batch, method.mean_pack(state_of(tiny, LEARNED), LEARNED))
    with torch.no_grad():
        assert (
            tiny.model(batch, method.mean_pack(state_of(tiny, FROZEN), FROZEN))
            .logits.isfinite()
            .all()
        )


# --- gates of a token -----------------------------------------------------------------------


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_gates(**changes: Any) -> TokenGates:
    """Return gates of three ranks and two samples in float64."""
    values: dict[str, Any] = {
        "phi": random(3, seed=1),
        "gate_in": random(6, 3, seed=2),
        "gate_in_bias": random(6, seed=3),
        "gate_out": random(3, 6, seed=4),
        "gate_out_bias": random(3, seed=5),
        "uniforms": iid_uniforms(("u",), 2, 1, 3)[:, 0],
        "kind": "hard",
        "tau": 0.5,
    }
    return TokenGates(**(values | changes))


def token_logits_by_hand(core: TokenGates, u: Tensor) -> Tensor:
    hidden = [
        max(0.0, math.fsum([float(core.gate_in_bias[k]), *(core.gate_in[k] * u).tolist()]))
        for k in range(6)
    ]
    out = core.phi + core.gate_out_bias
    return torch.stack(
        [
            out[j] + math.fsum(float(core.gate_out[j, k]) * hidden[k] for k in range(6))
            for j in range(3)
        ]
    )


@pytest.mark.parametrize("kind", ["hard", "relaxed", "mean"])
def test_every_token_has_gates_of_its_features(kind: str) -> None:
    core = token_gates(kind=kind, **({"uniforms": None} if kind == "mean" else {}))
    x = random(2, 2, 4, 3, seed=9)
    found = core(x)
    v = iid_uniforms(("u",), 2, 1, 3)[:, 0]
    for m in range(2):
        for b in range(2):
            for t in range(4):
                phi = token_logits_by_hand(core, x[m, b, t])
                noise = v[m].log() - (-v[m]).log1p()
                z = {
                    "hard": (noise > -phi).double(),
                    "relaxed": ((phi + noise) / 0.5).sigmoid(),
                    "mean": phi.sigmoid(),
                }[kind]
                torch.testing.assert_close(found[m, b, t], z * x[m, b, t], rtol=1e-6, atol=1e-6)


def test_tokens_share_their_uniform_numbers() -> None:
    """Equal features have equal gates; a likelier gate is open where a less likely one is."""
    core = token_gates(uniforms=iid_uniforms(("u",), 500, 1, 3)[:, 0])
    x = random(1, 1, 2, 3, seed=9)
    three = torch.cat([x, x[:, :, :1]], dim=2).expand(500, 1, 3, 3)
    z = core(three) / three  # (500, 1, 3, r)
    assert torch.equal(z[:, :, 0], z[:, :, 2])
    first, second = (token_logits_by_hand(core, x[0, 0, t]) for t in range(2))
    for j in range(3):
        low, high = (0, 1) if first[j] < second[j] else (1, 0)
        assert (z[:, 0, low, j] <= z[:, 0, high, j]).all()
        share = (z[:, 0, high, j] - z[:, 0, low, j]).mean()
        gap = abs(float(first[j].sigmoid() - second[j].sigmoid()))
        assert abs(float(share) - gap) < 5 * math.sqrt(gap * (1 - gap) / 500)


def test_the_layer_reads_the_features_before_the_scale() -> None:
    specs = (TargetSpec("q", 6, 4, 0),)
    params = METHODS["amortised_token"].init(specs, 3, 0, TOKEN)
    params |= {
        "q.lora_B": random(4, 3, seed=5).float(),
        "gate_out": random(1, 3, 6, seed=4).float(),
    }
    state = AdapterState(specs, 3, 2.0, params)
    pack = METHODS["amortised_token"].mean_pack(state, TOKEN)
    core = pack.modules["q"].core
    assert isinstance(core, TokenGates)
    h = random(2, 5, 6, seed=6).float()
    found = low_rank_delta(h, pack.modules["q"], 1, 2.0)
    for b in range(2):
        for t in range(5):
            u = params["q.lora_A"] @ h[b, t]
            z = token_logits_by_hand(core, u).sigmoid()
            assert_near(found[b, t], 2.0 * params["q.lora_B"] @ (z * u))


def test_token_gates_keep_the_dtype_of_the_states() -> None:
    core = token_gates(kind="relaxed").to(torch.device("cpu"), torch.float32)
    x = random(2, 2, 4, 3, seed=9).bfloat16()
    found = core(x)
    assert found.dtype == torch.bfloat16
    expected = token_gates(kind="relaxed")(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


# --- what an answer depends on --------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("layers", [None, (1, 1)])
def test_answers_do_not_depend_on_company_padding_or_chunks(
    config: AmortisedSettings, layers: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_adapter(layers=layers)
    method, rows = METHODS[config.name], random_rows(LENGTHS)
    state = state_of(tiny, config)
    pack = method.predict_pack(state, config, DRAW)
    whole = answers(tiny, pack, rows)
    assert_near(answers(tiny, pack, rows, limit=12), whole)  # one sample of one row at a time
    for b, row in enumerate(rows):
        assert_near(answers(tiny, pack, [row])[:, 0], whole[:, b])
    monkeypatch.setattr(tiny.model.trunk, "begins_at", lambda _: False)
    assert_near(answers(tiny, pack, rows), whole)
    more = method.predict_pack(state, config, Draw(("draw",), 6))
    assert_near(answers(tiny, more, rows)[:3], whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


# --- the loss -------------------------------------------------------------------------------


@PROMPT
def test_the_local_divergence_of_prompts_is_torchs(
    tiny: TinyAdapter, config: AmortisedPromptConfig
) -> None:
    state, rows = state_of(tiny, config), random_rows(LENGTHS)
    pack = METHODS[config.name].train_pack(state, config, DRAW)
    settled = tiny.model.settled(pack, batch_of(rows))
    term = METHODS[config.name].kl_terms(state, config, point_of(40), settled)["local_kl"]
    context, expected = context_of(tiny, rows), 0.0
    for b in range(len(rows)):
        local = Bernoulli(logits=logits_by_hand(state, config, context.mean_embedding[b]))
        shared = Bernoulli(logits=state.params["phi"].double())
        expected += float(kl_divergence(local, shared).sum()) / len(rows)
    assert float(term.value) == pytest.approx(expected, rel=1e-5)
    assert term.weight == config.local_kl_weight
    with pytest.raises(RuntimeError, match="not settled"):
        METHODS[config.name].kl_terms(state, config, point_of(40), pack)


def test_the_local_divergence_of_tokens_leaves_padding_out(tiny: TinyAdapter) -> None:
    """The mean over the row's tokens, by passes of one row each, which have no padding."""
    method, state, rows = METHODS["amortised_token"], state_of(tiny, TOKEN), random_rows((6, 2, 3))

    def run(some: list[EncodedExample]) -> tuple[float, list[Tensor]]:
        batch = batch_of(some)
        pack = tiny.model.settled(method.train_pack(state, TOKEN, DRAW), batch)
        tiny.model(batch, pack)
        noted = [
            m.core.notes.value
            for m in pack.modules.values()
            if isinstance(m.core, TokenGates) and m.core.notes
        ]
        term = method.kl_terms(state, TOKEN, point_of(40), pack)["local_kl"]
        return float(term.value), noted

    expected = 0.0
    for row in rows:
        value, noted = run([row])
        shared = [Bernoulli(logits=phi) for phi in state.params["phi"]]
        by_hand = sum(
            float(kl_divergence(Bernoulli(logits=logits), of_module).sum()) / logits.shape[2] / 3
            for logits, of_module in zip(noted, shared, strict=True)
        )
        assert value == pytest.approx(by_hand, rel=1e-4)
        expected += value / len(rows)
    assert run(rows)[0] == pytest.approx(expected, rel=1e-4)


def as_float64(state: AdapterState) -> AdapterState:
    return replace(state, params={name: value.double() for name, value in state.params.items()})


@PROMPT
def test_gradients_of_prompt_gates(tiny: TinyAdapter, config: AmortisedPromptConfig) -> None:
    """Finite differences of the relaxed gates and of both divergences."""
    method, state = METHODS[config.name], as_float64(state_of(tiny, config))
    context = context_of(tiny, random_rows((4, 2)))
    names = [name for name in ("phi", "gate_out", "gate_in") if name in state.params]

    def through(*values: Tensor) -> tuple[Tensor, ...]:
        changed = replace(state, params={**state.params, **dict(zip(names, values, strict=True))})
        pack = method.train_pack(changed, config, Draw(("g",), 2)).for_rows(context)
        terms = method.kl_terms(changed, config, point_of(40), pack)
        return gates_of(pack), terms["mask_kl"].value, terms["local_kl"].value

    inputs = [state.params[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(through, inputs)


def test_gradients_of_token_gates() -> None:
    names = ("phi", "gate_in", "gate_in_bias", "gate_out", "gate_out_bias")
    core = token_gates(kind="relaxed")

    def through(x: Tensor, *values: Tensor) -> Tensor:
        return replace(core, **dict(zip(names, values, strict=True)))(x)

    inputs = [random(2, 1, 2, 3, seed=9), *(getattr(core, name).clone() for name in names)]
    assert torch.autograd.gradcheck(through, [value.requires_grad_() for value in inputs])


@CONFIGS
def test_optimiser_groups_cover_every_parameter_and_decay_the_factors_only(
    tiny: TinyAdapter, config: AmortisedSettings
) -> None:
    changed = config.model_copy(update={"mask_lr": 2e-2, "net_lr": 3e-3})
    state, optim = state_of(tiny, config), OptimConfig(lr=3e-4, weight_decay=0.1)
    groups = METHODS[config.name].param_groups(state, optim, changed)
    assert sorted(name for group in groups for name in group.names) == sorted(state.params)
    rates = {name: (g.lr, g.weight_decay, g.optimizer) for g in groups for name in g.names}
    for name, found in rates.items():
        expected = (3e-4, 0.1) if "lora_" in name else (2e-2, 0.0) if name == "phi" else (3e-3, 0.0)
        assert found == (*expected, "adamw")
    assert METHODS[config.name].summary(state, config)["num_gates"] == 15


# --- packs ----------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("kind", ["train", "predict", "mean"])
def test_moving_a_pack_keeps_its_draws(
    tiny: TinyAdapter, config: AmortisedSettings, kind: str
) -> None:
    method, state = METHODS[config.name], as_float64(state_of(tiny, config))
    pack = method.mean_pack(state, config)
    if kind != "mean":
        drawn = method.train_pack if kind == "train" else method.predict_pack
        pack = drawn(state, config, DRAW)
    moved = pack.to(torch.device("cpu"), torch.float32)
    doubles = {t.shape for t in moved.tensors() if t.dtype == torch.float64}
    assert doubles <= {(3, len(state.specs), state.r), (3, state.r)}  # the uniforms, whole
    rows = random_rows(LENGTHS)
    assert_near(answers(tiny, moved, rows), answers(tiny, pack, rows))


@PROMPT
def test_a_settled_training_pack_moves_with_its_logits(
    tiny: TinyAdapter, config: AmortisedPromptConfig
) -> None:
    method, state = METHODS[config.name], state_of(tiny, config)
    settled = tiny.model.settled(
        method.train_pack(state, config, DRAW), batch_of(random_rows(LENGTHS))
    )
    moved = settled.narrow(1, 3).to(torch.device("cpu"), torch.float64)
    expected = method.kl_terms(state, config, point_of(40), settled)["local_kl"].value
    found = method.kl_terms(as_float64(state), config, point_of(40), moved)["local_kl"].value
    torch.testing.assert_close(found.float(), expected)
    assert len(list(moved.tensors())) == 4 * len(state.specs)  # A, B, gates, logits


def test_gates_that_note_nothing_have_nothing_to_tell(tiny: TinyAdapter) -> None:
    with pytest.raises(RuntimeError, match="note nothing"):
        token_gates().keep_probs()
    mean = METHODS["amortised_token"].mean_pack(state_of(tiny, TOKEN), TOKEN)
    per_row = mean.per_row
    assert per_row is not None
    assert list(per_row.tensors()) == []
    assert per_row.narrow(0, 1) is per_row
    plain = DALORRA.mean_pack(tiny.state, DalorraConfig()).modules
    told = per_row(plain, context_of(tiny, random_rows((3,))))
    assert all(told[name] is module for name, module in plain.items())

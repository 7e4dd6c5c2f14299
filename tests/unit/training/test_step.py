"""dalorra_core.training.step: one negative ELBO, worked out a second time by hand."""

import math

import pytest
import torch

from dalorra_core.config import AdapterConfig, OptimConfig
from dalorra_core.methods.dalorra import DalorraConfig, relaxed_gates
from dalorra_core.methods.mle import MleConfig
from dalorra_core.sampling.designs import iid_uniforms
from dalorra_core.training.step import TrainStep
from tests.support.tiny_models import (
    TinyAdapter,
    batch_of,
    merged_label_logits,
    random_rows,
    tiny_adapter,
)


def step_of(tiny: TinyAdapter, config: DalorraConfig | MleConfig, n: int = 50) -> TrainStep:
    adapter = AdapterConfig(r=3, lora_alpha=6.0)
    step = TrainStep(
        tiny.model, tiny.state.specs, adapter, config, optim=OptimConfig(), num_examples=n, seed=4
    )
    with torch.no_grad():
        for name, value in step.params.items():
            value.copy_(tiny.state.params[name])
    return step


@pytest.mark.parametrize("samples", [1, 3])
def test_the_loss_is_the_mean_nll_over_draws_plus_kl_over_n(samples: int) -> None:
    tiny = tiny_adapter()
    config = DalorraConfig(num_train_samples=samples, tau=0.5, prior_prob=0.3, kl_weight=0.7)
    out = step_of(tiny, config)(batch_of(random_rows((5, 3))), 17)
    phi = tiny.state.params["phi"]
    z = relaxed_gates(phi, iid_uniforms(("train", 4, 17, "z"), samples, 5, 3), 0.5)
    nll = []
    for s in range(samples):
        gates = {spec.name: z[s, i] for i, spec in enumerate(tiny.state.specs)}
        for row in random_rows((5, 3)):
            logits = merged_label_logits(tiny, row.token_ids, gates)
            nll.append(-float(logits.log_softmax(-1)[row.label]))
    p = phi.double().sigmoid()
    kl = float((p * (p / 0.3).log() + (1 - p) * ((1 - p) / 0.7).log()).sum())
    assert out.nll.item() == pytest.approx(math.fsum(nll) / len(nll), rel=1e-5)
    assert out.kl_terms["mask_kl"].value.item() == pytest.approx(kl, rel=1e-5)
    assert out.loss.item() == pytest.approx(out.nll.item() + 0.7 * kl / 50, rel=1e-5)


def test_a_step_number_fixes_the_gates() -> None:
    step = step_of(tiny_adapter(), DalorraConfig())
    batch = batch_of(random_rows((5, 3)))
    first, again, other = step(batch, 1), step(batch, 1), step(batch, 2)
    assert torch.equal(first.loss, again.loss)
    assert abs(first.loss.item() - other.loss.item()) > 1e-3


def test_mle_has_no_divergence() -> None:
    out = step_of(tiny_adapter(), MleConfig())(batch_of(random_rows((5, 3))), 1)
    assert out.kl_terms == {}
    assert torch.equal(out.loss, out.nll)


def test_only_the_adapter_is_trained() -> None:
    tiny = tiny_adapter()
    step = step_of(tiny, DalorraConfig())
    step(batch_of(random_rows((5, 3))), 1).loss.backward()
    trained = {name for name, value in step.named_parameters() if value.requires_grad}
    assert trained == {f"adapter.{name.replace('.', '|')}" for name in step.params}
    assert all(v.grad is not None and v.grad.abs().max() > 0 for v in step.params.values())
    assert all(p.grad is None for p in tiny.model.parameters())
    assert sorted(step.state.params) == sorted(tiny.state.params)
    assert (step.state.scaling, step.state.r) == (2.0, 3)


def test_rows_with_choices_of_their_own_are_scored_among_them() -> None:
    tiny = tiny_adapter()
    rows = random_rows((5, 4), allowed=[(1, 3), None])
    out = step_of(tiny, MleConfig())(batch_of(rows), 0)
    expected = []
    for row in rows:
        ones = {spec.name: torch.ones(3) for spec in tiny.state.specs}
        logits = merged_label_logits(tiny, row.token_ids, ones)
        kept = list(row.allowed) if row.allowed is not None else list(range(5))
        expected.append(-float(logits[kept].log_softmax(-1)[kept.index(row.label)]))
    assert out.nll.item() == pytest.approx(sum(expected) / 2, rel=1e-5)

"""Ensembles: how members are joined, which functions they give, and what is averaged."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.data.collate import EncodedExample
from dalorra_core.methods import METHODS
from dalorra_core.methods.ensemble import EnsembleConfig
from dalorra_core.methods.method import Draw
from dalorra_core.methods.mle import MleConfig
from dalorra_core.predictive.scoring import Prediction
from dalorra_core.predictive.tempering import pooled
from tests.support.method_cases import R, answers, tiny, trained_states
from tests.support.tiny_models import merged_label_logits, random_rows

METHOD = METHODS["ensemble"]
CONFIG = EnsembleConfig(num_members=3)
ROWS = random_rows((5, 3, 6))
DRAW = Draw(("any",), 7)


@pytest.fixture(scope="module")
def members() -> list[AdapterState]:
    return trained_states(CONFIG)


@pytest.fixture(scope="module")
def whole(members: list[AdapterState]) -> AdapterState:
    return replace(members[0], params=METHOD.join(members))


def logits_of(member: AdapterState, row: EncodedExample) -> Tensor:
    """Return one member's label logits from merged weights in float64."""
    plain = replace(tiny(), state=member)
    gates = {spec.name: torch.ones(R) for spec in member.specs}
    return merged_label_logits(plain, row.token_ids, gates)


def test_the_first_member_keeps_its_names(members: list[AdapterState], whole: AdapterState) -> None:
    assert len(whole.params) == 3 * len(members[0].params)
    for name, value in members[0].params.items():
        assert whole.params[name] is value
        assert whole.params[f"member.1.{name}"] is members[1].params[name]
        assert whole.params[f"member.2.{name}"] is members[2].params[name]


def test_each_sample_is_one_member(members: list[AdapterState], whole: AdapterState) -> None:
    found = answers(CONFIG, whole, DRAW, ROWS).double()
    assert len(found) == 3
    for member, of_member in zip(members, found, strict=True):
        expected = torch.stack([logits_of(member, row).log_softmax(-1) for row in ROWS])
        torch.testing.assert_close(of_member, expected, rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1
    again = answers(CONFIG, whole, Draw(("other",), 1), ROWS)
    assert torch.equal(again.double(), found)  # nothing is drawn


def test_the_mean_pass_is_the_first_member(
    members: list[AdapterState], whole: AdapterState
) -> None:
    pack, plain = METHOD.mean_pack(whole, CONFIG), METHODS["mle"].mean_pack(members[0], MleConfig())
    assert pack.num_samples == 1
    for name, module in plain.modules.items():
        assert torch.equal(pack.modules[name].lora_A, module.lora_A)
        assert torch.equal(pack.modules[name].lora_B, module.lora_B)


def test_members_are_trained_as_plain_lora() -> None:
    assert METHOD.trained_as(CONFIG) == MleConfig()
    assert METHOD.members(CONFIG) == METHOD.num_functions(CONFIG) == 3
    assert METHODS["mle"].members(MleConfig()) == 1


def test_mean_logits_are_another_answer_than_mean_probabilities(
    members: list[AdapterState], whole: AdapterState
) -> None:
    config = EnsembleConfig(num_members=3, average="logits")
    assert METHOD.one_answer(config)
    assert not METHOD.one_answer(CONFIG)
    assert METHOD.mean_pack(whole, config).num_samples == 3
    allowed = [(0, 2), None, (1, 3, 4)]
    rows = [replace(row, allowed=own) for row, own in zip(ROWS, allowed, strict=True)]
    each = answers(config, whole, DRAW, rows)
    found = pooled(Prediction(each, label_mass=None)).log_probs
    assert found.shape == (1, 3, 5)
    for b, row in enumerate(rows):
        own = list(row.allowed) if row.allowed is not None else list(range(5))
        logits = torch.stack([logits_of(member, row)[own] for member in members])
        expected = logits.mean(0).log_softmax(-1)
        torch.testing.assert_close(found[0, b, own].double(), expected, rtol=1e-5, atol=1e-5)
        rest = sorted(set(range(5)) - set(own))
        assert (found[0, b, rest] == -torch.inf).all()
        mixture = logits.softmax(-1).mean(0).log()
        assert (mixture - expected).abs().max() > 0.01


def test_rows_that_nobody_wanted_stay_unanswered() -> None:
    log_probs = torch.randn(2, 2, 3).log_softmax(-1)
    log_probs[:, 1] = torch.nan
    answered = torch.tensor([True, False])
    found = pooled(Prediction(log_probs, None, answered))
    assert found.answered is answered
    assert found.log_probs[0, 0].exp().sum().item() == pytest.approx(1)
    assert found.log_probs[0, 1].isnan().all()

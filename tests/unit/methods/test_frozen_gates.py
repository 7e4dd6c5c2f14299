"""Frozen gates: DALorRA at its start, for ever."""

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.config import AdapterConfig, OptimConfig
from dalorra_core.methods import METHODS
from dalorra_core.methods.dalorra import PHI, DalorraConfig
from dalorra_core.methods.frozen_gates import FrozenGatesConfig
from dalorra_core.methods.method import Draw
from dalorra_core.training.processes import Processes
from dalorra_core.training.step import TrainStep
from dalorra_core.training.updates import Updater
from tests.support.tiny_models import batch_of, point_of, random_rows, tiny_adapter

FROZEN, LEARNED = METHODS["frozen_gates"], METHODS["dalorra"]
TINY = tiny_adapter()
SHARED = {"prior_prob": 0.7, "tau": 0.4, "num_train_samples": 2}


def gates_of(pack: SamplePack) -> torch.Tensor:
    gates = [pack.modules[spec.name].z for spec in TINY.state.specs]
    return torch.stack([z for z in gates if z is not None], dim=1)


@pytest.mark.parametrize("train_masks", ["relaxed", "straight_through"])
@pytest.mark.parametrize("test_masks", ["hard", "relaxed"])
def test_equal_logits_give_dalorras_gates(train_masks: str, test_masks: str) -> None:
    masks = {"train_masks": train_masks, "test_masks": test_masks}
    frozen = FrozenGatesConfig.model_validate({**SHARED, **masks})
    learned = DalorraConfig.model_validate({**SHARED, **masks})
    draw = Draw(("gates",), 3)
    for name in ("train_pack", "predict_pack"):
        found = gates_of(getattr(FROZEN, name)(TINY.state, frozen, draw))
        assert torch.equal(found, gates_of(getattr(LEARNED, name)(TINY.state, learned, draw)))
    found = gates_of(FROZEN.mean_pack(TINY.state, frozen))
    assert torch.equal(found, gates_of(LEARNED.mean_pack(TINY.state, learned)))
    assert FROZEN.num_train_samples(frozen) == 2


def test_both_start_equally() -> None:
    specs = TINY.state.specs
    found = FROZEN.init(specs, 3, 5, FrozenGatesConfig(prior_prob=0.7))
    expected = LEARNED.init(specs, 3, 5, DalorraConfig(prior_prob=0.7))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    torch.testing.assert_close(found[PHI].sigmoid(), torch.full((len(specs), 3), 0.7))


@pytest.mark.parametrize("name", ["frozen_gates", "dalorra"])
def test_only_learned_gates_move(name: str) -> None:
    settings = METHODS[name].settings.model_validate({"name": name, "prior_prob": 0.7})
    optim = OptimConfig(lr=0.1, weight_decay=0.1, steps=6, warmup_ratio=0)
    adapter = AdapterConfig(r=3, lora_alpha=6.0)
    step = TrainStep(
        TINY.model, TINY.state.specs, adapter, settings, optim=optim, num_examples=9, seed=4
    )
    start = {key: value.detach().clone() for key, value in step.params.items()}
    accelerator = Accelerator(cpu=True)
    updater = Updater(step, optim, accelerator, Processes(0, 1))
    updater.prepare(0)
    for number in range(5):
        with accelerator.accumulate(step):
            updater.apply(step(batch_of(random_rows((5, 3))), number), number)
    moved = {key for key, value in step.params.items() if not torch.equal(value, start[key])}
    assert moved == set(start) - ({PHI} if name == "frozen_gates" else set())


def test_nothing_about_the_gates_is_in_the_loss() -> None:
    config = FrozenGatesConfig()
    pack = FROZEN.mean_pack(TINY.state, config)
    assert FROZEN.kl_terms(TINY.state, config, point_of(9), pack) == {}


@pytest.mark.parametrize("setting", ["mask_lr", "kl_weight"])
def test_settings_of_learning_are_refused(setting: str) -> None:
    with pytest.raises(ValidationError):
        FrozenGatesConfig.model_validate({setting: 0.5})

"""dalorra_core.predictive.plan: which sample packs are kept."""

import pytest
import torch

from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.predictive import plan as plan_module
from dalorra_core.predictive.plan import PACKS_KEPT, SAMPLES_KEPT, KeptPacks, SamplingPlan


class Drawn:
    """Draws packs and remembers for which plans."""

    def __init__(self) -> None:
        self.plans: list[SamplingPlan] = []

    def __call__(self, plan: SamplingPlan) -> SamplePack:
        self.plans.append(plan)
        z = torch.ones(plan.num_samples, 2)
        return SamplePack(
            plan.num_samples, 1.0, {"a": ModulePack(torch.ones(1, 2, 3), torch.ones(1, 4, 2), z)}
        )


def test_a_pack_that_is_in_use_stays_while_others_come_and_go() -> None:
    drawn = Drawn()
    kept, usual = KeptPacks(drawn), SamplingPlan(4)
    first = kept.of(usual)
    for seed in range(1, 3 * PACKS_KEPT):
        kept.of(SamplingPlan(4, seed))
        assert kept.of(usual) is first
    assert drawn.plans.count(usual) == 1
    kept.of(SamplingPlan(4, 1))  # long gone
    assert drawn.plans.count(SamplingPlan(4, 1)) == 2


def test_large_packs_are_fewer() -> None:
    drawn = Drawn()
    kept, half = KeptPacks(drawn), SAMPLES_KEPT // 2
    first = kept.of(SamplingPlan(half))
    kept.of(SamplingPlan(half, 1))
    assert kept.of(SamplingPlan(half)) is first
    kept.of(SamplingPlan(1, 2))  # one sample too many: seed 1 goes
    kept.of(SamplingPlan(half, 1))
    assert [plan.seed for plan in drawn.plans] == [0, 1, 2, 1]


@pytest.mark.parametrize(("num_samples", "size"), [(SAMPLES_KEPT + 1, 0), (2, 101)])
def test_a_pack_above_a_limit_is_kept_alone(
    num_samples: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one plan draw it once, whatever its size; any other plan pushes it out."""
    monkeypatch.setattr(plan_module, "BYTES_KEPT", 100)
    drawn, huge, small = Drawn(), SamplingPlan(num_samples), SamplingPlan(1)
    kept = KeptPacks(drawn, lambda pack: size if pack.num_samples > 1 else 0)
    first = kept.of(huge)
    assert first.num_samples == num_samples
    assert kept.of(huge) is first
    assert kept.of(small) is kept.of(small)
    kept.of(huge)
    assert drawn.plans == [huge, small, huge]


def test_the_tensors_of_a_pack_are_its_factors_and_gates() -> None:
    pack = Drawn()(SamplingPlan(5))
    assert sorted(tensor.numel() for tensor in pack.tensors()) == [6, 8, 10]
    plain = SamplePack(1, 1.0, {"a": ModulePack(torch.ones(1, 2, 3), torch.ones(1, 4, 2))})
    assert len(list(plain.tensors())) == 2


def test_memory_bounds_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BYTES_KEPT", 100)
    drawn = Drawn()
    kept = KeptPacks(drawn, lambda pack: 10 * pack.num_samples)
    first = kept.of(SamplingPlan(6))
    kept.of(SamplingPlan(4, 1))
    assert kept.of(SamplingPlan(6)) is first  # 100 bytes together
    kept.of(SamplingPlan(1, 2))  # ten too many: seed 1 was used longest ago
    kept.of(SamplingPlan(4, 1))
    assert [plan.seed for plan in drawn.plans] == [0, 1, 2, 1]

"""dalorra_core.training.updates: two parameters, two steps, every number worked out by hand.

The data loss is ``c a g`` and the divergence ``a^2 + g^2`` with factor 1/2; AdamW moves a at rate
0.1, SGD moves a and g at rate 0.01, and the rates are halved in the second of the two steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.config import OptimConfig
from dalorra_core.methods.method import ParamGroup
from dalorra_core.objectives.elbo import KlTerm
from dalorra_core.training.processes import Processes
from dalorra_core.training.step import StepLoss
from dalorra_core.training.updates import Updater

PACK = SamplePack(1, 1.0, {})


@dataclass(frozen=True)
class ToyMethod:
    """What an updater asks of a method."""

    groups: tuple[ParamGroup, ...]
    divergence_apart: bool = True

    def param_groups(self, *_: object) -> tuple[ParamGroup, ...]:
        return self.groups


class Toy(nn.Module):
    """Two parameters in place of an adapter; counts how often its divergence is asked for."""

    def __init__(self, method: ToyMethod) -> None:
        super().__init__()
        self.method, self.method_config, self.state = method, None, None
        self.adapter = nn.ParameterDict({"a": torch.tensor([2.0]), "g": torch.tensor([3.0])})
        self.at: list[tuple[int, float, float]] = []

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.adapter.items())

    def divergences(self, step: int, _: SamplePack) -> Mapping[str, KlTerm]:
        a, g = self.adapter["a"], self.adapter["g"]
        self.at.append((step, a.item(), g.item()))
        return {"kl": KlTerm((a.double() ** 2 + g.double() ** 2).sum(), 0.5)}

    def forward(self, c: float, step: int) -> StepLoss:
        loss = (c * self.adapter["a"] * self.adapter["g"]).sum()
        return StepLoss(loss, loss.detach(), self.divergences(step, PACK), PACK)


def groups_of(adamw: Sequence[str], sgd: Sequence[str]) -> tuple[ParamGroup, ...]:
    found = [ParamGroup(tuple(adamw), 0.1, 0.0)]
    if sgd:
        found.append(ParamGroup(tuple(sgd), 0.01, 0.0, optimizer="sgd"))
    return tuple(found)


def after(
    method: ToyMethod, micro_batches: Sequence[Sequence[float]], *, start: int = 0
) -> tuple[Toy, list[tuple[float, float]]]:
    """Return the toy and (a, g) after each step; a step has one c for each micro-batch."""
    toy, accumulation = Toy(method), len(micro_batches[0])
    optim = OptimConfig(steps=2, warmup_ratio=0.0, gradient_accumulation=accumulation)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    updater = Updater(cast("Any", toy), optim, accelerator, Processes(0, 1))
    updater.prepare(start)
    seen: list[tuple[float, float]] = []
    for step, cs in enumerate(micro_batches, start):
        for c in cs:
            with accelerator.accumulate(toy):
                updater.apply(toy(c, step), step)
        seen.append((toy.adapter["a"].item(), toy.adapter["g"].item()))
    return toy, seen


BLOB = ToyMethod(groups_of(["a"], ["a", "g"]))


def test_the_order_of_blob_by_hand() -> None:
    """AdamW on a; then SGD on a with the divergence's gradient alone and on g with both.

    Step 1: a 2 - 0.1 = 1.9; there d a^2 / d a = 3.8 and d g^2 / d g = 6, so
    a = 1.9 - 0.01 * 1.9 = 1.881 and g = 3 - 0.01 (2 + 3) = 2.95, where 2 is a before AdamW.
    Step 2, rates halved: Adam's averages of the gradients 3 and 2.95 give a step of
    0.05 * 0.999527 to 1.831024; a = 1.831024 - 0.005 * 1.831024 and
    g = 2.95 - 0.005 (1.881 + 2.95).
    """
    toy, seen = after(BLOB, [[1.0], [1.0]])
    assert seen[0] == pytest.approx((1.881, 2.95), abs=2e-6)
    assert seen[1] == pytest.approx((1.821869, 2.925845), abs=3e-6)
    taken = [at for i, at in enumerate(toy.at) if i % 2]  # the others are of the forward pass
    assert [step for step, _, _ in taken] == [0, 1]
    assert [a for _, a, _ in taken] == pytest.approx([1.9, 1.831024], abs=2e-6)


def test_micro_batches_add_up_to_the_step_of_their_mean() -> None:
    """c of 0.5 and 1.5 in turns is one batch with c = 1: the divergence counts once."""
    _, whole = after(BLOB, [[1.0], [1.0]])
    toy, parts = after(BLOB, [[0.5, 1.5], [1.5, 0.5]])
    for part, one in zip(parts, whole, strict=True):
        assert part == pytest.approx(one, abs=1e-6)
    assert len(toy.at) == 4 + 2  # once for each forward, once for each step


def test_the_order_of_scalabl_by_hand() -> None:
    """AdamW on both, which forgets the likelihood's gradient; then SGD on the divergence alone.

    a = 1.9 - 0.01 * 1.9 and g = 2.9 - 0.01 * 2.9.
    """
    method = ToyMethod(groups_of(["a", "g"], ["a", "g"]))
    _, seen = after(method, [[1.0]])
    assert seen[0] == pytest.approx((1.881, 2.871), abs=2e-6)


def test_one_optimiser_takes_the_whole_loss() -> None:
    """d/da (a g + (a^2 + g^2) / 2) = 5 and so in g: Adam's first step is the rate."""
    method = ToyMethod(groups_of(["a", "g"], []), divergence_apart=False)
    toy, seen = after(method, [[1.0]])
    assert seen[0] == pytest.approx((1.9, 2.9), abs=1e-6)
    assert len(toy.at) == 1


def test_sgd_beside_adamw_takes_the_whole_loss_too() -> None:
    """g = 3 - 0.01 (2 + 3): as C-LoRA moves its contextual networks."""
    method = ToyMethod(groups_of(["a"], ["g"]), divergence_apart=False)
    _, seen = after(method, [[1.0]])
    assert seen[0] == pytest.approx((1.9, 2.95), abs=1e-6)
    _, parts = after(method, [[0.5, 1.5]])
    assert parts[0] == pytest.approx(seen[0], abs=1e-6)


def test_a_later_start_has_the_rates_of_its_place() -> None:
    """Step 2 of 2 has half the rates, whoever comes to it: a = 2 - 0.05 - 0.005 * 1.95."""
    _, seen = after(BLOB, [[1.0]], start=1)
    assert seen[0] == pytest.approx((1.94025, 2.975), abs=2e-6)


def test_no_gradient_is_left_behind() -> None:
    toy, _ = after(BLOB, [[1.0], [1.0]])
    grads: list[Tensor | None] = [p.grad for p in toy.params.values()]
    assert grads == [None, None]

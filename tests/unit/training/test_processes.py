"""dalorra_core.training.processes: shares of a batch, and that they add up for every method."""

from typing import Any, cast

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, distributed

from dalorra_core.config import AdapterConfig, MethodSettings, OptimConfig
from dalorra_core.data.collate import TokenBatch
from dalorra_core.errors import ConfigError, DalorraError
from dalorra_core.training.processes import Processes
from dalorra_core.training.step import TrainStep
from tests.support.method_cases import CASES, R, case_name, method_of, tiny, trained_states
from tests.support.tiny_models import batch_of, random_rows

STEP, PART = 7, 1


def step_of(config: MethodSettings) -> TrainStep:
    """Return a step of a method in the middle of training, where no parameter is zero."""
    trained_as = method_of(config).trained_as(config)
    step = TrainStep(
        tiny().model,
        tiny().state.specs,
        AdapterConfig(r=R, lora_alpha=2.0 * R),
        trained_as,
        optim=OptimConfig(steps=20, batch_size=5),
        num_examples=50,
        seed=4,
    )
    with torch.no_grad():
        for name, value in trained_states(config)[0].params.items():
            step.params[name].copy_(value)
    return step


def gradients(
    step: TrainStep, batch: TokenBatch, *, first_row: int = 0, weight: float = 1.0
) -> dict[str, Tensor]:
    step.zero_grad()
    (step(batch, STEP, PART, first_row).loss * weight).backward()
    return {k: v.grad.clone() for k, v in step.params.items() if v.grad is not None}


@pytest.mark.parametrize("config", CASES, ids=case_name)
def test_the_parts_of_a_batch_add_up_to_the_gradient_of_the_whole(config: MethodSettings) -> None:
    """Rows of unlike lengths, shares of unlike sizes, noise of each row by its place."""
    step, batch = step_of(config), batch_of(random_rows((3, 9, 5, 8, 4)))
    whole = gradients(step, batch)
    total = {name: torch.zeros_like(value) for name, value in whole.items()}
    for rank in range(3):
        share = Processes(rank, 3).share(5)
        part = batch.rows(share.rows)
        found = gradients(step, part, first_row=share.rows.start, weight=share.weight)
        assert found.keys() == whole.keys()
        for name, value in found.items():
            total[name] += value
    for name, value in whole.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(total[name], value, rtol=1e-5, atol=2e-6 * scale)
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-3


@pytest.mark.parametrize(("rows", "count"), [(8, 2), (5, 2), (7, 3), (2, 3), (1, 4), (6, 1)])
def test_shares_cover_every_row_once(rows: int, count: int) -> None:
    shares = [Processes(rank, count).share(rows) for rank in range(count)]
    counted = [share for share in shares if share.weight]
    assert [i for s in counted for i in range(rows)[s.rows]] == list(range(rows))
    assert sum(share.weight for share in shares) == pytest.approx(1.0, abs=1e-12)
    sizes = [len(range(rows)[share.rows]) for share in shares]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_one_process_has_nothing_to_send() -> None:
    alone, values = Processes(0, 1), torch.tensor([1.0])
    alone.add_up([values])
    alone.check_alike({}, 0, {})
    assert values.item() == 1.0
    assert alone.total({"loss": 0.1}, torch.device("cpu")) == {"loss": 0.1}


def test_tensors_travel_together_and_come_back_in_their_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Tensor] = []

    def with_a_twin(flat: Tensor) -> None:
        sent.append(flat.clone())
        flat.mul_(2)

    monkeypatch.setattr(distributed, "all_reduce", with_a_twin)
    row, square = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    Processes(0, 2).add_up([row, square.t()])
    assert [flat.tolist() for flat in sent] == [[1.0, 2.0, 3.0, 5.0, 4.0, 6.0]]
    assert row.tolist() == [2.0, 4.0]
    assert square.tolist() == [[6.0, 8.0], [10.0, 12.0]]
    found = Processes(0, 2).total({"loss": 1.5, "nll": 0.5}, torch.device("cpu"))
    assert found == {"loss": 3.0, "nll": 1.0}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, ""),
        ({"optim": {"lr": 2.0}}, "optim"),
        ({"step": 7, "train_rows": 1}, "step, train_rows"),
    ],
)
def test_processes_begin_with_the_same_run_only(
    changed: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(found: list[Any], own: dict[str, Any]) -> None:
        found[:] = [own, own | changed]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    identity = {"optim": {"lr": 1.0}, "train_rows": {"rows": 3}}

    def check() -> None:
        Processes(1, 2).check_alike(identity, 5, {"phi": torch.ones(2)})

    if not named:
        check()
        return
    with pytest.raises(ConfigError, match=f"the 2 processes .* differ in {named}\\."):
        check()


def test_parameters_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    digests: list[str] = []

    def gather(found: list[Any], own: dict[str, Any]) -> None:
        digests.append(own["parameters"])
        found[:] = [own | {"parameters": digests[0]}, own]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    Processes(0, 2).check_alike({}, 5, {"phi": torch.ones(2)})
    with pytest.raises(ConfigError, match=r"differ in parameters\."):
        Processes(0, 2).check_alike({}, 5, {"phi": torch.tensor([1.0, 1.0 + 2**-20])})


def test_a_lost_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Tensor) -> None:
        raise RuntimeError("Connection closed by peer\nand a trace")

    monkeypatch.setattr(distributed, "all_reduce", lost)
    said = r"process 1 of 2 lost another one \(Connection closed by peer\).*--resume"
    with pytest.raises(DalorraError, match=said):
        Processes(1, 2).add_up([torch.zeros(1)])


def test_a_launcher_that_shards_the_model_is_refused() -> None:
    class Sharding:
        distributed_type = DistributedType.FSDP

    with pytest.raises(ConfigError, match=r"with the whole model.*got FSDP"):
        Processes.of(cast("Any", Sharding()))

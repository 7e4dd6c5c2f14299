"""Settings that a grid varies alone."""

from collections.abc import Sequence
from typing import Any

import pytest

from dalorra_core.bench.store import Result
from dalorra_core.bench.sweeps import sweep_figures
from dalorra_core.training.settings import TrainConfig

pytest.importorskip("matplotlib")

LABELS = {"accuracy": "accuracy (%)", "nll": "NLL (nats)"}


def result(label: str, seed: int = 1, **groups: Any) -> Result:
    values = {"name": "a", "data": {"source": "x"}, "run": {"seed": seed}, **groups}
    settings = TrainConfig.model_validate(values).model_dump(mode="json")
    return Result(
        key="0",
        label=label,
        task="sst2",
        seed=seed,
        status="done",
        settings=settings,
        sizes={},
        line=1,
        lines=1,
    )


def drawn(found: Sequence[tuple[Result, float | None]]) -> dict[str, Any]:
    return sweep_figures({"accuracy": found, "nll": found}, LABELS)


def test_a_setting_with_three_values_is_drawn_with_means_over_seeds() -> None:
    found = [
        (result(f"r = {r}", seed, adapter={"r": r}), 0.1 * r + 0.01 * seed)
        for r in (4, 1, 2)
        for seed in (1, 3)
    ]
    figures = drawn(found)
    assert list(figures) == ["sweep-adapter-r"]
    accuracy, nll = figures["sweep-adapter-r"].axes
    (line,) = accuracy.containers
    assert line.lines[0].get_xdata().tolist() == [1, 2, 4]
    assert line.lines[0].get_ydata().tolist() == pytest.approx([12, 22, 42])
    assert nll.containers[0].lines[0].get_ydata().tolist() == pytest.approx([0.12, 0.22, 0.42])
    assert accuracy.get_xlabel() == "adapter.r"


def test_a_setting_that_does_not_vary_alone_is_not_drawn() -> None:
    both = [
        (result("x", adapter={"r": r}, optim={"lr": lr}), 0.5)
        for r, lr in ((1, 1e-3), (2, 2e-3), (4, 4e-3))
    ]
    two = [(result("x", adapter={"r": r}), 0.5) for r in (1, 2)]
    undefined = [(result("x", adapter={"r": r}), None) for r in (1, 2, 4)]
    assert drawn([]) == drawn(both) == drawn(two) == drawn(undefined) == {}


def test_methods_have_curves_of_their_own() -> None:
    found = [
        (result(name, method={"name": name}, adapter={"r": r}), 0.5)
        for name in ("mle", "dalorra")
        for r in (1, 2, 4)
    ]
    (accuracy, _) = drawn(found)["sweep-adapter-r"].axes
    assert len(accuracy.containers) == 2

"""Settings that a grid varies alone."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from dalorra_core.bench.store import Result
from dalorra_core.bench.sweeps import sweep_figures
from dalorra_core.training.settings import TrainConfig

pytest.importorskip("matplotlib")

LABELS = {"accuracy": "accuracy (%)", "nll": "NLL (nats)"}


def result(
    label: str, seed: int = 1, *, task: str = "sst2", train: int = 0, **groups: Any
) -> Result:
    values = {"name": "a", "data": {"source": "x"}, "run": {"seed": seed}, **groups}
    settings = TrainConfig.model_validate(values).model_dump(mode="json")
    return Result(
        key=json.dumps(settings, sort_keys=True),
        label=label,
        task=task,
        seed=seed,
        status="done",
        settings=settings,
        sizes={"train": train},
        line=1,
        lines=1,
        sha256="",
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


def legend_of(figure: Any) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(
    ("alphas", "name"),
    [((16, 16, 16), "x / sst2, alpha 16"), ((2, 4, 8), "x / sst2, alpha/r 2")],
)
def test_over_the_rank_either_alpha_or_alpha_by_rank_stays(
    alphas: tuple[float, ...], name: str
) -> None:
    found = [
        (result("x", adapter={"r": r, "lora_alpha": alpha}), 0.5)
        for r, alpha in zip((1, 2, 4), alphas, strict=True)
    ]
    figure = drawn(found)["sweep-adapter-r"]
    assert legend_of(figure) == [name]
    assert len(figure.axes[0].containers) == 1
    both = [(result("x", adapter={"r": r, "lora_alpha": a}), 0.5) for r, a in ((1, 4), (2, 3))]
    assert drawn([*both, found[2]]) == {}


def test_two_labels_of_one_run_count_once() -> None:
    found = [(result("a", seed, adapter={"r": r}), seed / 10) for r in (1, 2, 4) for seed in (1, 3)]
    twice = [*found, (found[0][0].model_copy(update={"label": "b"}), found[0][1])]
    once, again = (
        drawn(values)["sweep-adapter-r"].axes[0].containers[0] for values in (found, twice)
    )
    assert again.lines[0].get_ydata().tolist() == once.lines[0].get_ydata().tolist()
    bars = [container.lines[2][0].get_segments()[0].tolist() for container in (once, again)]
    assert bars[0] == bars[1]


def test_entries_of_one_task_with_other_rows_are_one_curve() -> None:
    found = [
        (result("x", task=f"sst2-{n}", data={"source": "task:sst2", "train_rows": n}), n / 1000)
        for n in (40, 80, 160)
    ]
    own = result("x", train=640, data={"source": "task:sst2"})
    figure = drawn([*found, (own, 0.9)])["sweep-data-train-rows"]
    (curve,) = figure.axes[0].containers
    assert curve.lines[0].get_xdata().tolist() == [40, 80, 160, 640]
    assert legend_of(figure) == ["x / sst2"]


def test_random_masking_stands_beside_learned_masking() -> None:
    masks = [
        (result(f"K = {k}", method={"name": "rank_dropout", "num_dropped": k}), 0.1 * k)
        for k in (1, 2, 4)
    ]
    learned = [
        (result("DALorRA", seed, method={"name": "dalorra"}, optim={"lr": 1e-3}), 0.5 + seed / 10)
        for seed in (1, 3)
    ]
    other = (result("elsewhere", method={"name": "dalorra"}, adapter={"r": 2}), 0.99)
    figure = drawn([other, *masks, *learned])["sweep-method-num-dropped"]
    accuracy = figure.axes[0]
    assert [one.get_ydata() for one in accuracy.lines if one.get_linestyle() == "--"] == [
        [pytest.approx(70), pytest.approx(70)]
    ]
    assert legend_of(figure) == ["rank_dropout / sst2", "dashed: learned (DALorRA)"]
    assert figure.get_suptitle() == "learned against random masking"
    alone = drawn(masks)["sweep-method-num-dropped"]
    assert legend_of(alone) == ["rank_dropout / sst2"]

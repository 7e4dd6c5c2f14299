"""Grid files: what they mean, and how a wrong one is refused."""

from pathlib import Path
from typing import Any

import pytest

from dalorra_core.bench.grid import Cell, cells, read_grid
from dalorra_core.errors import ConfigError
from tests.support.tiny_grid import tiny_grid, write_grid

ROOT = Path("data")


def found(folder: Path, grid: dict[str, Any]) -> list[Cell]:
    return cells(read_grid(write_grid(folder / "grid.yaml", grid)), ROOT, "cpu")


def fault(folder: Path, grid: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        found(folder, grid)
    return str(caught.value)


def changed(**changes: Any) -> dict[str, Any]:
    return tiny_grid(Path("base"), **changes)


def test_a_grid_is_every_method_on_every_task_with_every_seed(tmp_path: Path) -> None:
    grid = changed(
        tasks=["trec", {"task": "sst2", "name": "few", "train_rows": 8}],
        seeds=[3, 1],
        out_of_distribution={"few": ["trec", "ag_news"]},
    )
    got = found(tmp_path, grid)
    assert [(one.seed, one.task, one.label) for one in got] == [
        (seed, task, label)
        for seed in (3, 1)
        for task in ("trec", "few")
        for label in ("MLE", "MLE+T", "DALorRA")
    ]
    assert [one.others for one in got[:4]] == [(), (), (), ("trec", "ag_news")]
    few = got[3].config
    assert (few.data.source, few.data.train_rows, few.data.root) == (
        "task:sst2",
        8,
        str(ROOT.absolute()),
    )
    assert (few.run.seed, few.run.device) == (3, "cpu")
    assert got[0].config.data.train_rows is None


def test_the_method_wins_over_the_task_and_the_task_over_the_grid(tmp_path: Path) -> None:
    grid = changed(
        tasks=[{"task": "sst2", "optim": {"steps": 7, "batch_size": 9}, "prompt": "{text} ?"}],
        methods={"A": "mle", "B": {"method": "mle", "optim": {"steps": 5}}},
        out_of_distribution={},
    )
    one, two = (cell.config for cell in found(tmp_path, grid))
    assert (one.optim.steps, one.optim.batch_size, one.optim.lr) == (7, 9, 3e-2)
    assert (two.optim.steps, two.optim.batch_size) == (5, 9)
    assert one.data.prompt == "{text} ?"


def test_of_takes_everything_that_is_not_given(tmp_path: Path) -> None:
    methods = {
        "A": {"method": {"name": "dalorra", "tau": 0.5}, "optim": {"lr": 1e-3}},
        "B": {"of": "A", "method": {"prior_prob": 0.7}, "temperature": True},
        "C": {"of": "B", "optim": {"steps": 3}},
        "D": {"of": "C", "method": "mle", "temperature": False},
    }
    a, b, c, d = found(tmp_path, changed(methods=methods))
    assert b.config.method.model_dump() == {**a.config.method.model_dump(), "prior_prob": 0.7}
    assert (b.config.optim, c.config.method) == (a.config.optim, b.config.method)
    assert (c.config.optim.lr, c.config.optim.steps) == (1e-3, 3)
    assert d.config.method.name == "mle"
    assert [cell.temperature for cell in (a, b, c, d)] == [False, True, True, False]


def test_an_adapters_name_is_made_of_settings_and_not_of_labels(tmp_path: Path) -> None:
    one, two, three = found(tmp_path, changed())
    assert (one.config.name, two.config.name) == ("sst2-mle-1", "sst2-mle-1")
    assert three.config.name == "sst2-dalorra-1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, ("seeds", "at least 1", "[]")),
        ({"seeds": [1, 1]}, ("seeds", "different", "1 more than once")),
        ({"seeds": [-1]}, ("seeds.0", "greater than or equal to 0", "-1")),
        ({"seeds": ["one"]}, ("seeds.0", "valid integer", "'one'")),
        ({"seeds": [True]}, ("seeds.0", "valid integer", "True")),
        ({"seeds": 3}, ("seeds", "valid tuple", "3")),
        ({"tasks": ["sst"]}, ("tasks.0.task", "must be one of", "'sst'", "sst2")),
        ({"tasks": []}, ("tasks", "at least 1")),
        ({"tasks": ["sst2", "sst2"]}, ("tasks", "different", "'sst2' more than once")),
        ({"tasks": [{"task": "sst2", "rows": 3}]}, ("tasks.0.rows", "known are", "task")),
        ({"out_of_distribution": {"trec": ["sst2"]}}, ("out_of_distribution", "sst2", "'trec'")),
        ({"out_of_distribution": {"sst2": ["tre"]}}, ("must be one of", "'tre'")),
        ({"out_of_distribution": {"sst2": ["trec"] * 2}}, ("'trec' more than once",)),
        ({"methods": {}}, ("methods", "at least 1")),
        ({"methods": {"a|b": "mle"}}, ("methods", "a|b", "pattern")),
        ({"methods": {"A": {"temperature": True}}}, ("methods.A", "method must be given")),
        ({"methods": {"A": {"of": "B"}}}, ("methods.A.of", "one of the methods (A)", "'B'")),
        (
            {"methods": {"A": {"method": "mle", "temperature": "warm"}}},
            ("methods.A.temperature", "boolean", "'warm'"),
        ),
        (
            {"methods": {"A": {"method": "mle", "tau": 1}}},
            ("methods.A.tau", "known are", "temperature"),
        ),
        ({"settings": {"run": {"seed": 3}}}, ("settings", "run.seed comes from the grid's seeds")),
        ({"settings": {"run": {"device": "cpu"}}}, ("run.device comes from --device",)),
        ({"settings": {"data": {"root": "x"}}}, ("data.root comes from --data-root",)),
        ({"settings": {"data": {"source": "x"}}}, ("data.source comes from the grid's tasks",)),
        ({"evaluation": {"rows": 0}}, ("evaluation.rows", "greater than or equal to 1", "0")),
        ({"evaluation": {"resamples": 1}}, ("evaluation.resamples", "0 or at least 2", "1")),
        ({"evaluation": {"predictives": []}}, ("evaluation.predictives", "at least 1")),
        (
            {"evaluation": {"predictives": ["best"]}},
            ("evaluation.predictives.0.estimator", "'monte_carlo' or 'mean_mask'", "'best'"),
        ),
        (
            {"evaluation": {"predictives": [{"estimator": "mean_mask", "num_samples": 3}]}},
            ("num_samples is for monte_carlo",),
        ),
        (
            {"evaluation": {"predictives": [{"estimator": "mean_mask", "design": "iid"}]}},
            ("design is for monte_carlo",),
        ),
        (
            {"evaluation": {"predictives": [{"design": "sobol"}]}},
            ("evaluation.predictives.0.design", "'iid', 'stratified' or 'antithetic'", "'sobol'"),
        ),
        ({"evaluation": {"predictives": ["mean_mask"] * 2}}, ("'mean_mask' more than once",)),
        ({"evaluation": {"row": 3}}, ("evaluation.row", "known are rows")),
        ({"evalution": {}}, ("evalution", "known are name, tasks")),
        ({"name": "a b"}, ("name", "pattern", "'a b'")),
    ],
)
def test_a_wrong_grid_is_refused_by_name_domain_and_value(
    tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    text = fault(tmp_path, changed(**changes))
    assert all(part in text for part in ("grid.yaml", *said)), text


def test_a_design_that_a_method_cannot_follow_is_refused_before_the_first_run(
    tmp_path: Path,
) -> None:
    """One that draws nothing answers as ever: M and a design are not about it."""
    asked = {"predictives": ["monte_carlo", {"num_samples": 4, "design": "stratified"}]}
    methods = {"A": "mc_dropout", "B": "mle", "C": "dalorra", "D": "ensemble"}
    text = fault(tmp_path, changed(evaluation=asked, methods=methods))
    assert "1 wrong setting(s)" in text
    named = "methods.A, predictive monte_carlo_4_stratified: design must be iid for method mc_"
    assert named in text
    settings = {"predictive": {"design": "antithetic"}}
    text = fault(tmp_path, changed(settings=settings, methods={"A": "c_lora"}))
    assert "methods.A on sst2: predictive: design must be iid for method c_lora" in text


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"A": {"method": "nothing"}}, ("methods.A on sst2", "method", "'nothing'", "'mle'")),
        ({"A": {"method": {"tua": 1}}}, ("methods.A on sst2", "method.dalorra.tua", "1")),
        (
            {"A": {"method": "mle", "optim": {"steps": 0}}},
            ("optim.steps", "greater than or equal to 1", "0"),
        ),
        ({"A": {"method": "mle", "data": {"rows": 1}}}, ("data.rows", "Extra", "1")),
        ({"A": {"of": "B"}, "B": {"of": "A"}}, ("of goes round in a circle", "A -> B -> A")),
    ],
)
def test_wrong_settings_of_a_method_are_refused_before_any_run(
    tmp_path: Path, methods: dict[str, Any], said: tuple[str, ...]
) -> None:
    text = fault(tmp_path, changed(methods=methods, seeds=[1, 2]))
    assert all(part in text for part in said), text
    assert text.count("methods.A on sst2") <= 1  # not once for each seed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nmethods: {A: mle, A: dalorra}\n", ("'A' stands there twice", "line 2")),
        ("name: [\n", ("cannot be parsed",)),
        ("- a\n", ("must hold a mapping", "list")),
        ("name: !!python/object/apply:os.getcwd []\n", ("cannot be parsed",)),
    ],
)
def test_a_file_that_is_no_grid_is_refused(
    tmp_path: Path, text: str, said: tuple[str, ...]
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_grid(path)
    assert all(part in str(caught.value) for part in ("grid.yaml", *said))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read grid .*no\.yaml"):
        read_grid(tmp_path / "no.yaml")

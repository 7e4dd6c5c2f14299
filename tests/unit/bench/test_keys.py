"""Keys: what makes two runs the same, and what does not."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.adapters.plain_lora import Factors, PlainLora
from dalorra_core.artifact.peft_io import write_peft
from dalorra_core.bench import keys
from dalorra_core.bench.grid import EvaluationSettings, Predictive, cells, read_grid
from dalorra_core.bench.keys import Job, Planned, plan_jobs, rows_sha256, spaced
from dalorra_core.data import task_registry
from dalorra_core.data.examples import TextExample
from dalorra_core.errors import ConfigError
from dalorra_core.sampling.designs import DESIGNS
from tests.support.tiny_data_sets import tiny_data_root
from tests.support.tiny_grid import tiny_grid, tiny_root, write_grid
from tests.support.tiny_models import save_tiny_base

Plan = Callable[..., tuple[list[Job], list[Planned]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def plan(base: Path, root: Path, tmp_path: Path) -> Plan:
    def planned(*, at: Path = root, **changes: Any) -> tuple[list[Job], list[Planned]]:
        grid = read_grid(write_grid(tmp_path / "grid.yaml", tiny_grid(base) | changes))
        return plan_jobs(grid, cells(grid, at, "cpu"))

    return planned


def one_method(**groups: Any) -> dict[str, Any]:
    return {"A": {"method": "mle", **groups}}


def test_equal_settings_share_a_run_that_scores_for_both(plan: Plan) -> None:
    jobs, planned = plan()
    assert [p.cell.label for p in planned] == ["MLE", "MLE+T", "DALorRA"]
    assert planned[0].key == planned[1].key != planned[2].key
    assert [job.key for job in jobs] == [planned[0].key, planned[2].key]
    plain, tempered = set(planned[0].wanted), set(planned[1].wanted)
    assert not plain & tempered
    assert {one.id for one in jobs[0].wanted} == plain | tempered
    assert {one.tempered for one in jobs[0].wanted if one.id in tempered} == {True}
    shown = [(one.set, one.predictive.name) for one in jobs[1].wanted]
    assert shown == [(s, p) for s in ("in", "trec") for p in ("monte_carlo", "mean_mask")]


@pytest.mark.parametrize(
    "groups",
    [
        {"method": {"name": "dalorra"}},
        {"optim": {"lr": 1e-3}},
        {"optim": {"steps": 3}},
        {"adapter": {"r": 3}},
        {"data": {"train_rows": 8}},
        {"data": {"prompt": "{text} ="}},
        {"run": {"checkpoint_every": 5}},
        {"predictive": {"num_samples": 7}},
    ],
)
def test_other_settings_are_another_run(plan: Plan, groups: dict[str, Any]) -> None:
    before = plan(methods=one_method())[0][0].key
    assert plan(methods=one_method(**groups))[0][0].key != before


@pytest.mark.parametrize("setting", ["recompute", "shard_base"])
def test_what_changes_no_number_is_no_other_run(plan: Plan, setting: str) -> None:
    before = plan(methods=one_method())[0][0].key
    assert plan(methods=one_method(run={setting: True}))[0][0].key == before


def test_other_seeds_rows_and_base_models_are_other_runs(
    plan: Plan, root: Path, tmp_path: Path
) -> None:
    before = plan(methods=one_method())[0][0].key
    assert plan(methods=one_method(), seeds=[2])[0][0].key != before
    other = save_tiny_base(tmp_path / "other", seed=1)
    assert plan(methods=one_method(base=str(other)))[0][0].key != before
    copy = shutil.copytree(root, tmp_path / "copy")
    for split in ("train", "validation"):
        file = copy / "sst2" / f"{split}.jsonl"
        text = file.read_text()
        file.write_text(text.replace("the", "you", 1))
        assert plan(methods=one_method(), at=copy)[0][0].key != before, split
        file.write_text(text)
    assert plan(methods=one_method(), at=copy)[0][0].key == before


def test_a_start_counts_by_its_content_and_none_changes_no_key(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(start: Path | None) -> str:
        adapter = {"r": 2, "lora_alpha": 4, "start": None if start is None else str(start)}
        return plan(methods=one_method(adapter=adapter))[0][0].key

    factors = Factors(torch.ones(2, 3), torch.ones(4, 2))
    for name, scaling in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        write_peft(tmp_path / name, PlainLora(2, scaling, {"q": factors}), "base")
    found = [key(start) for start in (tmp_path / "a", tmp_path / "b", tmp_path / "c", None)]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    digests: list[dict[str, Any]] = []
    monkeypatch.setattr(keys, "_digest", lambda values: digests.append(values) or "0" * 16)
    key(None)
    assert "start" not in digests[0]["settings"]["adapter"]


def test_labels_places_and_test_sets_do_not_train_again(
    plan: Plan, base: Path, root: Path, tmp_path: Path
) -> None:
    before = plan(methods=one_method())[0][0]
    copied = shutil.copytree(base, tmp_path / "elsewhere")
    renamed = {"another name": one_method(base=str(copied))["A"]}
    task = [{"task": "sst2", "train_rows": "all", "name": "movies"}]
    copy = shutil.copytree(root, tmp_path / "copy")
    file = copy / "sst2" / "test.jsonl"
    file.write_text(file.read_text().replace("the", "you", 1))
    after = plan(
        at=copy,
        methods=renamed,
        tasks=task,
        out_of_distribution={},
        evaluation={"predictives": ["mean_mask"]},
    )[0][0]
    assert after.key == before.key
    assert not {one.id for one in after.wanted} & {one.id for one in before.wanted}


@pytest.mark.parametrize(
    "evaluation",
    [
        {"rows": 11},
        {"resamples": 30},
        {"predictives": [{"num_samples": 5}]},
        {"predictives": [{"design": "stratified"}]},
    ],
)
def test_another_evaluation_has_another_id(plan: Plan, evaluation: dict[str, Any]) -> None:
    old = {"rows": 12, "resamples": 20, "predictives": ["monte_carlo"]}
    before = plan(methods=one_method(), evaluation=old)[0][0]
    after = plan(methods=one_method(), evaluation=old | evaluation)[0][0]
    assert before.key == after.key
    assert not {one.id for one in before.wanted} & {one.id for one in after.wanted}


@pytest.mark.parametrize(
    ("predictive", "recorded"),
    [
        (Predictive(num_samples=5), "5bd431b0e1b9e9f8"),
        (Predictive(estimator="mean_mask"), "8de64a1d34360645"),
    ],
)
def test_ids_of_before_there_were_designs_stay(predictive: Predictive, recorded: str) -> None:
    def id_of(one: Predictive) -> str:
        reading: dict[str, str | None] = {"prompt": "p", "truncate": "end"}
        scored = EvaluationSettings(resamples=20)
        return keys._wanted("in", one, scored, {"in": "a" * 64}, reading, None).id

    assert id_of(predictive) == recorded
    designs = (predictive.model_copy(update={"design": design}) for design in DESIGNS)
    assert len({recorded, *map(id_of, designs)}) == 4


def test_a_tempered_evaluation_depends_on_the_rows_it_is_fitted_on(plan: Plan) -> None:
    methods = one_method(temperature=True)
    ids = [
        plan(methods=methods, evaluation={"temperature_rows": rows})[0][0].wanted[0].id
        for rows in (3, 4, None)
    ]
    assert len(set(ids)) == 3


def test_the_cost_is_rows_times_steps_and_rows_times_functions(plan: Plan) -> None:
    mle, dalorra = plan()[0]
    assert mle.rows_trained == 12 * 4
    assert dalorra.rows_trained == 8 * 4
    assert mle.rows_scored == 2 * (12 + 12)  # two sets, each under two predictives, one function
    assert dalorra.rows_scored == (12 + 12) * 3 + (12 + 12)
    assert dalorra.sizes == {"train": 48, "held_out": 16, "evaluation": 12, "trec": 12}


def test_rows_are_evenly_spaced_and_all_there_without_a_limit() -> None:
    assert spaced(range(10), 4) == [0, 2, 5, 7]
    assert spaced(range(3), 5) == spaced(range(3), None) == [0, 1, 2]


def test_a_digest_of_rows_sees_ids_texts_labels_and_order() -> None:
    rows = [TextExample("1", "a", "x"), TextExample("2", "b", "y")]
    others = [
        rows[::-1],
        rows[:1],
        [TextExample("3", "a", "x"), rows[1]],
        [TextExample("1", "c", "x"), rows[1]],
        [TextExample("1", "a", "y"), rows[1]],
    ]
    assert len({rows_sha256(one) for one in (rows, *others)}) == 6
    assert rows_sha256(list(rows)) == rows_sha256(rows)


def test_a_set_of_questions_is_no_shift_of_texts(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"out_of_distribution\.sst2: openbookqa.*text.*choice"):
        plan(out_of_distribution={"sst2": ["openbookqa"]})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "{text}\nFeeling:"},
        {"truncate": "start"},
        {"labels": ("positive", "negative")},
        {"reserved": ("mixed",)},
    ],
)
def test_another_meaning_of_a_tasks_name_is_another_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    before = plan(methods=one_method())[0][0].key
    meaning = replace(task_registry.TASKS["sst2"], **change)
    monkeypatch.setitem(task_registry.TASKS, "sst2", meaning)  # type: ignore[arg-type]
    assert plan(methods=one_method())[0][0].key != before


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data_root(tmp_path_factory.mktemp("questions"))


def test_another_prompt_of_the_set_out_of_distribution_is_another_evaluation(
    plan: Plan, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned() -> Job:
        tasks = {"tasks": ["openbookqa"], "out_of_distribution": {"openbookqa": ["arc_challenge"]}}
        (job,), _ = plan(at=questions, methods=one_method(), **tasks)
        return job

    before = planned()
    meaning = replace(task_registry.TASKS["arc_challenge"], prompt="so")
    monkeypatch.setitem(task_registry.TASKS, "arc_challenge", meaning)  # type: ignore[arg-type]
    after = planned()
    assert after.key == before.key
    same = {one.set for one in after.wanted if one.id in {old.id for old in before.wanted}}
    assert same == {"in"}


@pytest.mark.parametrize(
    ("task", "other", "said"),
    [
        ("boolq", "openbookqa", r"labels for \(False, True\), got also A, B, C, D"),
        ("openbookqa", "boolq", r"labels for \(A, B, C, D, E\), got also False, True"),
        ("sst2", "sst2", "other evaluation rows than sst2; both have sst2/test"),
        ("aao", "openbookqa", "other evaluation rows than aao; both have openbookqa/validation"),
        ("openbookqa", "aao", "other evaluation rows than openbookqa"),
        ("clinc150", "clinc150_banking", "other evaluation rows than clinc150; both have clinc"),
    ],
)
def test_a_set_that_cannot_be_out_of_distribution_is_refused_before_any_run(
    plan: Plan, questions: Path, task: str, other: str, said: str
) -> None:
    shutil.copytree(questions / "arc_challenge", questions / "arc_easy", dirs_exist_ok=True)
    grid = {"tasks": [task], "out_of_distribution": {task: [other]}, "methods": one_method()}
    if task in {"sst2", "clinc150"}:
        grid["tasks"] = [{"task": task, "train_rows": "all"}]
    with pytest.raises(ConfigError, match=rf"out_of_distribution\.{task}: {other} must be.*{said}"):
        plan(at=questions, **grid)


@pytest.mark.parametrize(
    ("task", "other"),
    [
        ("openbookqa", "arc_challenge"),
        ("clinc150", "clinc150_oos"),
        ("clinc150_banking", "clinc150_travel"),
        ("clinc150_banking", "clinc150_oos"),
    ],
)
def test_other_rows_with_known_labels_or_other_intents_are_out_of_distribution(
    plan: Plan, questions: Path, task: str, other: str
) -> None:
    tasks = [{"task": task, "train_rows": "all"}]
    (job,), _ = plan(
        at=questions, tasks=tasks, out_of_distribution={task: [other]}, methods=one_method()
    )
    assert [one.set for one in job.wanted][-1] == other


def test_a_temperature_needs_held_out_rows(plan: Plan) -> None:
    tasks = [{"task": "trec", "train_rows": "all", "held_out_share": 0}]
    grid = {"tasks": tasks, "out_of_distribution": {}}
    assert len(plan(**grid, methods=one_method())[1]) == 1
    with pytest.raises(
        ConfigError, match=r"methods\.A: temperature needs held-out rows.*trec, got 0"
    ):
        plan(**grid, methods=one_method(temperature=True))

"""The scene that proves drift detection, played with real programs on a tiny calibrated adapter.

``dalorra train``, ``calibrate`` and ``serve`` as a user runs them; the rules are the shipped ones,
at a window of seconds. The same scene on the shipped adapter is ``benchmarks/drift_scene.py``.
"""

import itertools
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.scene.play import play, serve_command
from benchmarks.scene.processes import Service, free_port, running
from benchmarks.scene.values import (
    DRIFT_ALERTS,
    Observation,
    Report,
    SceneError,
    Script,
    check,
)
from server.cli import app
from tests.support.required import require_or_skip
from tests.support.tiny_models import write_jsonl
from tests.support.tiny_tasks import INTENTS, TinyTask, tiny_config

FILLERS = ("the", "what", "is", "you", "and", "how", "which", "to", "in", "it", "of", "an")
OUTSIDE = ("weather", "hotel", "language", "score", "spam", "speed")
STEPS = 800  # until the tiny model is as sure of its own task as a real one


def call(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def texts(words: tuple[str, ...], count: int, seed: int) -> list[str]:
    """Return different texts of three fillers and, in turn, each of the words."""
    starts = list(itertools.permutations(FILLERS, 3))
    random.Random(seed).shuffle(starts)
    return [" ".join([*starts[i], words[i % len(words)]]) for i in range(count)]


def rows(name: str, found: list[str], labels: list[str]) -> list[dict[str, str]]:
    return [
        {"id": f"{name}-{i}", "text": text, "label": labels[i % len(labels)]}
        for i, text in enumerate(found)
    ]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Script]:
    """Train and calibrate an adapter; return the command that serves it, and what to send it."""
    require_or_skip("prometheus", shutil.which("prometheus"))
    folder = tmp_path_factory.mktemp("scene")
    task = TinyTask(folder, "text")
    inside, outside = texts(tuple(INTENTS.values()), 1200, 0), texts(OUTSIDE, 600, 1)
    known = rows("in", inside, list(INTENTS))
    write_jsonl(task.data / "train.jsonl", known[:200])
    unknown = rows("oos", outside[:20], ["oos"])
    write_jsonl(task.data / "validation.jsonl", known[200:800] + unknown)
    config = folder / "run.json"
    settings = tiny_config(task, optim={"steps": STEPS}).model_dump(mode="json")
    config.write_text(json.dumps(settings), encoding="utf-8")
    adapter = folder / "adapter"
    call("train", "-c", config, "-o", adapter, "--run-dir", folder / "run")
    call("calibrate", adapter, "--data", task.data, "--base", task.base, "--target-risk", "0.1")
    script = Script(
        in_scope=tuple(inside[800:]),
        shifted=tuple(outside[20:]),
        window_s=12,
        for_s=3,
        min_rows=200,
        rows_per_s=100,
        hold_s=5,
        patience_s=45,
    )
    return serve_command(adapter, "--base", str(task.base)), script


def test_the_drift_alert_fires_while_traffic_is_shifted_and_clears_after(
    stage: tuple[list[str], Script],
) -> None:
    command, script = stage
    report = play(command, script)
    check(report, script)
    for alert in DRIFT_ALERTS:
        life = [(entry["state"], entry["at_s"]) for entry in report.life if entry["alert"] == alert]
        states = [state for state, _ in life]
        fired = states.index("firing")
        assert states[fired - 1] == "pending"
        # a scrape more or less: it is looked at from outside, once per scrape
        assert life[fired][1] - life[fired - 1][1] >= script.for_s - 2 * script.scrape_s


def test_the_scene_says_so_when_the_server_does_not_start(stage: tuple[list[str], Script]) -> None:
    _, script = stage
    with pytest.raises(RuntimeError, match="no adapter called this"):
        play([sys.executable, "-c", "raise SystemExit('no adapter called this')"], script)


def test_a_program_ends_with_its_block_even_when_the_block_fails(tmp_path: Path) -> None:
    service = Service(free_port())
    command = [sys.executable, "-m", "http.server", str(service.port), "--bind", "127.0.0.1"]
    found: list[int] = []

    def fail() -> None:
        with running(command, tmp_path / "log", service, "/", 30.0):
            found.append(service.call("GET", "/")[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found == [200]
    with pytest.raises(OSError, match="refused"):
        service.call("GET", "/")


QUIET = {"rows": 900.0, "psi": 0.02, "ks": 0.03, "not_accepted": 0.1}
LOUD = {"rows": 900.0, "psi": 0.9, "ks": 0.4, "not_accepted": 0.6}


def seen() -> Report:
    life = [
        {"at_s": at_s, "alert": alert, "state": state}
        for at_s, state in ((20.0, "pending"), (30.0, "firing"), (60.0, "resolved"))
        for alert in DRIFT_ALERTS
    ]
    observations = [
        Observation(10.0, "in scope", dict(QUIET), {}),
        Observation(30.0, "shifted", dict(LOUD), dict.fromkeys(DRIFT_ALERTS, "firing")),
        Observation(60.0, "back in scope", dict(QUIET), {}),
    ]
    return Report(observations, life)


SCRIPT = Script(("in",), ("out",))


def test_a_good_scene_passes() -> None:
    check(seen(), SCRIPT)


def test_a_scene_without_a_rise_fails() -> None:
    report = seen()
    report.observations[1] = replace(report.observations[1], values=dict(QUIET))
    with pytest.raises(SceneError, match=r"psi rose to 0.02.*ks rose.*not accepted rose"):
        check(report, SCRIPT)


def test_a_scene_that_does_not_come_back_fails() -> None:
    report = seen()
    report.observations[2] = replace(report.observations[2], values=dict(LOUD))
    with pytest.raises(SceneError, match=r"psi is 0\.9 back in scope"):
        check(report, SCRIPT)


def test_an_alert_before_the_shift_fails() -> None:
    report = seen()
    early = {DRIFT_ALERTS[0]: "pending"}
    report.observations[0] = replace(report.observations[0], alerts=early)
    with pytest.raises(SceneError, match=f"{DRIFT_ALERTS[0]} was active in scope"):
        check(report, SCRIPT)


def test_an_alert_that_flaps_fails() -> None:
    report = seen()
    report.life.append({"at_s": 61.0, "alert": DRIFT_ALERTS[1], "state": "pending"})
    with pytest.raises(SceneError, match=f"{DRIFT_ALERTS[1]} went through"):
        check(report, SCRIPT)

"""The shipped rules: what the generator writes, valid, tested at the shipped values, documented."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.prometheus.drift_rules import RULES, main, render
from deploy.prometheus.rule_settings import RuleSettings
from server.settings import Settings
from server.telemetry import Telemetry
from tests.support.api import async_test, running
from tests.support.drift_cards import measured
from tests.support.fake_engine import FakeEngine
from tests.support.required import require_or_skip

ROOT = Path(__file__).parents[2]
FOLDER = RULES.parent
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
FILES = sorted(RULES.glob("*.yml"))
SHIPPED: list[dict[str, Any]] = [
    rule
    for file in FILES
    for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
RECORDS = {rule["record"]: rule["expr"] for rule in SHIPPED if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in SHIPPED if "alert" in rule}
TESTS = [
    group
    for file in sorted((FOLDER / "tests").glob("*.yml"))
    for group in yaml.safe_load(file.read_text("utf-8"))["tests"]
]


def promtool(*arguments: object, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    require_or_skip("prometheus", program)
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_the_committed_rules_are_what_the_generator_writes() -> None:
    found = {file.name: file.read_text("utf-8") for file in FILES}
    assert found == render(RuleSettings()), "run python -m deploy.prometheus.drift_rules"


def test_every_number_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--drift-window", "2m", "--min-rows", "77", "--psi", "0.3"])
    found = {file.name: file.read_text("utf-8") for file in tmp_path.iterdir()}
    assert found == render(RuleSettings(drift_window="2m", min_rows=77, psi=0.3))
    assert "dalorra_confidence_bin_total[2m]" in found["drift.yml"]
    assert (
        "dalorra:confidence:psi > 0.3\nand"
        in yaml.safe_load(found["drift.yml"])["groups"][0]["rules"][-5]["expr"]
    )


def test_the_deadline_is_the_servers_own() -> None:
    assert RuleSettings().deadline_s == Settings().request_timeout_s


def test_the_rules_are_valid() -> None:
    checked = promtool("check", "rules", *FILES)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(SHIPPED)}" == str(sum(map(int, re.findall(r"(\d+) rules found", checked.stdout))))


def test_the_configuration_is_valid_and_loads_every_rule_file(tmp_path: Path) -> None:
    config = (FOLDER / "prometheus.yml").read_text("utf-8")
    keys = re.findall(r"credentials_file: (\S+)", config)
    assert keys
    for key in keys:  # mounted when it runs; the check wants it to exist
        config = config.replace(key, str(tmp_path / "key"))
    (tmp_path / "key").write_text("k", encoding="utf-8")
    (tmp_path / "prometheus.yml").write_text(config, encoding="utf-8")
    shutil.copytree(RULES, tmp_path / "rules")
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("rules found") == len(FILES)


@pytest.mark.parametrize("name", ["drift", "feedback", "service"])
def test_the_rules_do_what_their_tests_say(name: str) -> None:
    tested = promtool("test", "rules", FOLDER / "tests" / f"{name}.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("record", RECORDS)
def test_every_recording_rule_has_a_test_with_a_value(record: str) -> None:
    found = [
        case
        for group in TESTS
        for case in group.get("promql_expr_test", ())
        if record in re.findall(r"[\w:]+", case["expr"]) and case["exp_samples"]
    ]
    assert found


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_test_in_which_it_waits_fires_and_clears(alert: str) -> None:
    cases = [
        [
            bool(case["exp_alerts"])
            for case in group.get("alert_rule_test", ())
            if case["alertname"] == alert
        ]
        for group in TESTS
    ]
    assert [False, True, False] in cases


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_severity_a_summary_and_a_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket", "info")
    assert rule["annotations"]["summary"]
    assert re.fullmatch(r"\d+[mh]", rule["for"])
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (ROOT / path).is_file()
    headings = re.findall(r"^### (\w+)$", OPERATIONS, re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_the_runbook_has_no_alert_that_does_not_exist() -> None:
    headings = re.findall(r"^### (Dalorra\w+)$", OPERATIONS, re.MULTILINE)
    assert sorted(headings) == sorted(ALERTS)


def test_every_recording_rule_is_documented() -> None:
    assert set(re.findall(r"`(dalorra:[\w:]+)`", OPERATIONS)) >= RECORDS.keys()


def test_every_name_in_a_rule_exists() -> None:
    telemetry = Telemetry()
    telemetry.adapters_loaded((measured(),), 1.0)
    telemetry.watch_feedback(lambda: ())
    known = {sample.name for family in telemetry.collect() for sample in family.samples}
    known |= {family.name for family in telemetry.collect()}
    expressions = [rule["expr"] for rule in SHIPPED]
    named = {name for expr in expressions for name in re.findall(r"\bdalorra[_:][\w:]+", expr)}
    assert named <= known | RECORDS.keys()


@async_test
async def test_a_live_exposition_is_lint_free() -> None:
    async with running(FakeEngine(measured())) as api:
        api.service.telemetry.watch_feedback(lambda: ())
        await api.classify({"input": ["a sure thing", "lost words"]})
        text = (await api.client.get("/metrics")).text
    assert "dalorra_reference_confidence_cdf_ratio{" in text
    checked = promtool("check", "metrics", text=text)
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


def test_the_lint_finds_what_is_wrong() -> None:
    checked = promtool("check", "metrics", text="# TYPE a_total gauge\na_total 1\n")
    assert checked.returncode != 0


def test_two_settings_give_two_files() -> None:
    usual = RuleSettings()
    assert render(usual) != render(replace(usual, runbook="https://runbooks.example"))

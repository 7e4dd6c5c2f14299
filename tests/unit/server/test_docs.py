"""The tables of docs/api.md and docs/operations.md say what the code does."""

import re
from pathlib import Path

from server.decision import REASONS
from server.errors import PROBLEMS
from server.schemas import ClassifyRequest, FeedbackRequest
from server.schemas.policies import ThresholdPolicy
from server.settings import Settings
from server.telemetry import Telemetry

DOCS = Path(__file__).parents[3] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
SETTINGS = OPERATIONS.partition("## Settings")[2].partition("## Logs")[0]


def test_every_error_is_documented_with_its_status() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", API, re.MULTILINE)
    documented = {code: int(status) for status, code in rows}
    expected = {code: status for code, (status, _) in PROBLEMS.items() if code != "http_error"}
    assert documented == expected


def test_every_field_of_a_request_is_documented() -> None:
    for name in (*ClassifyRequest.model_fields, *FeedbackRequest.model_fields):
        assert f"| `{name}` |" in API


def test_every_form_of_a_policy_and_every_reason_is_documented() -> None:
    limits = (name for name in ThresholdPolicy.model_fields if name != "abstain")
    for name in limits:
        assert f"`{name}`" in API
    documented = set(re.findall(r"^  \| `(\w+)` \|", API, re.MULTILINE))
    assert documented == set(REASONS)


def test_every_setting_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", SETTINGS, re.MULTILINE)
    documented = {name: (default.strip(), text) for name, default, text in rows}
    assert documented.keys() == Settings.model_fields.keys()
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        shown = {"None": "", "True": "true", "False": "false"}.get(shown, shown)
        assert documented[name] == (shown, field.description), name


def test_every_metric_is_documented() -> None:
    documented = set(re.findall(r"`(dalorra_\w+)`", OPERATIONS))
    for family in Telemetry().registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name in documented

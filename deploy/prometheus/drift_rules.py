"""Write the recording and alert rules: ``python -m deploy.prometheus.drift_rules``.

One template makes the rules that are shipped in ``rules/`` and, with short windows, those of the
drift scene. Every number can be given on the command line; see ``RuleSettings``.
``--prometheus-rule FILE`` writes the same groups for the Prometheus operator too.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from deploy.prometheus.alert_rules import Alert, drift_alerts, feedback_alerts, service_alerts
from deploy.prometheus.recording_rules import drift_records, feedback_records, service_records
from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["RULES", "main", "render", "render_prometheus_rule", "write"]

RULES = Path(__file__).parent / "rules"
_HEAD = "# Written by deploy/prometheus/drift_rules.py; do not edit.\n"
_GROUPS = {
    "drift": (drift_records, drift_alerts),
    "feedback": (feedback_records, feedback_alerts),
    "service": (service_records, service_alerts),
}


def render(settings: RuleSettings) -> dict[str, str]:
    """Return file name to content of every rule file."""
    return {
        f"{name}.yml": _HEAD + _dump({"groups": [group]})
        for name, group in _groups(settings).items()
    }


def render_prometheus_rule(settings: RuleSettings) -> str:
    """Return one PrometheusRule with the groups of all rule files."""
    return _HEAD + _dump(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "dalorra", "labels": {"app.kubernetes.io/name": "dalorra"}},
            "spec": {"groups": list(_groups(settings).values())},
        }
    )


def write(settings: RuleSettings, folder: Path) -> None:
    """Write every rule file into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in render(settings).items():
        (folder / name).write_text(text, encoding="utf-8")


def _groups(settings: RuleSettings) -> dict[str, dict[str, Any]]:
    return {
        name: _group(name, records(settings), alerts(settings), settings)
        for name, (records, alerts) in _GROUPS.items()
    }


def _group(
    name: str, records: dict[str, str], alerts: tuple[Alert, ...], settings: RuleSettings
) -> dict[str, Any]:
    rules: list[dict[str, Any]] = [{"record": r, "expr": expr} for r, expr in records.items()]
    rules += [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "runbook_url": f"{settings.runbook}#{alert.name.lower()}",
            },
        }
        for alert in alerts
    ]
    return {"name": f"dalorra_{name}", "interval": settings.interval, "rules": rules}


class _Dumper(yaml.SafeDumper):
    """Writes expressions of several lines as they are read."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=200)


def main(arguments: list[str] | None = None) -> None:
    """Write the rules with the numbers of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RULES, help="folder of the rule files")
    parser.add_argument("--prometheus-rule", type=Path, help="file for them as a PrometheusRule")
    for field in fields(RuleSettings):
        default = field.default
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, dest=field.name)
    values = vars(parser.parse_args(arguments))
    folder: Path = values.pop("out")
    prometheus_rule: Path | None = values.pop("prometheus_rule")
    settings = RuleSettings(**values)
    write(settings, folder)
    if prometheus_rule is not None:
        prometheus_rule.write_text(render_prometheus_rule(settings), encoding="utf-8")


if __name__ == "__main__":
    main()

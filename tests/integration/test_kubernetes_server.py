"""deploy/kubernetes: true to the server's settings, routes, metrics and rules, and its README."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from deploy.prometheus.drift_rules import RULES, render_prometheus_rule
from deploy.prometheus.drift_rules import main as write_rules
from deploy.prometheus.rule_settings import RuleSettings
from server.auth import exposure_fault
from server.auth.table import PROBES, SCOPES
from server.cli import app as commands
from server.settings import Settings
from server.telemetry import Telemetry
from tests.support.api import async_test, running
from tests.support.kubernetes import (
    KUBERNETES,
    OVERLAYS,
    RUNNING,
    one,
    pods,
    selects,
    served,
    servers,
)
from tests.support.required import require_or_skip

ROOT = Path(__file__).parents[2]
PROMETHEUS_RULE = KUBERNETES / "overlays" / "monitoring" / "prometheus-rule.yaml"

every_running = pytest.mark.parametrize("overlay", RUNNING)


# -- true to the server --------------------------------------------------------------------------


@every_running
def test_every_setting_exists_and_the_server_would_start_with_them(overlay: str) -> None:
    found = served(overlay)
    assert exposure_fault(found) is None
    assert found.host == "0.0.0.0"
    assert found.device == ("cuda" if overlay == "gpu" else "cpu")
    assert found.dtype == ("bfloat16" if overlay == "gpu" else "auto")
    for pod in servers(overlay):
        names = {entry["name"] for entry in pod.container["env"]}
        known = {f"DALORRA_{name.upper()}" for name in Settings.model_fields}
        assert names - known == {"OMP_NUM_THREADS"}
        assert [source["configMapRef"]["name"] for source in pod.container["envFrom"]] == [
            one(overlay, "ConfigMap")["metadata"]["name"]
        ]


@every_running
def test_kubernetes_adds_no_variable_that_the_server_would_read(overlay: str) -> None:
    """A Service named dalorra gives pods DALORRA_PORT=tcp://..., and the server ends with it."""
    assert all(pod.spec["enableServiceLinks"] is False for pod in pods(overlay))
    with pytest.raises(ValueError, match="port"):
        Settings(port="tcp://10.0.0.1:8000")  # type: ignore[arg-type]


@every_running
def test_every_argument_is_one_of_the_command_line(overlay: str) -> None:
    command = typer.main.get_command(commands)
    for pod in servers(overlay):
        name, *arguments = pod.container["args"]
        with command.make_context("dalorra", [name]) as parent:
            serve = command.get_command(parent, name)  # type: ignore[attr-defined]
            with serve.make_context(name, list(arguments), parent=parent) as context:
                given = {n for n, v in context.params.items() if v is not None}
        assert given <= {"adapter"}
        adapter = served(overlay).adapter
        assert adapter is not None
        assert (ROOT / adapter / "manifest.json").is_file()


@every_running
@async_test
async def test_every_probe_asks_a_route_that_needs_no_key(overlay: str) -> None:
    for pod in servers(overlay):
        found = {
            kind: pod.container[f"{kind}Probe"]["httpGet"]
            for kind in ("startup", "readiness", "liveness")
        }
        (port,) = pod.container["ports"]
        assert port["containerPort"] == served(overlay).port
        assert {get["port"] for get in found.values()} <= {port.get("name"), port["containerPort"]}
        assert {get["path"] for get in found.values()} <= PROBES
        async with running() as api:
            for kind, get in found.items():
                api.service.lifecycle.begin_drain()
                answer = await api.client.get(get["path"])
                # a server that drains has started and lives, and wants no more traffic
                assert answer.status_code == (503 if kind == "readiness" else 200), kind


@every_running
def test_a_pod_is_given_longer_than_its_longest_stop(overlay: str) -> None:
    found = served(overlay)
    for pod in servers(overlay):
        hook = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        # the server waits a second more than the longest deadline, and traces may take three
        longest_s = hook.get("seconds", 0) + found.drain_seconds + found.max_request_timeout_s + 4
        assert pod.spec["terminationGracePeriodSeconds"] > longest_s
        # and readiness is seen to be gone before the socket closes, should a node be told late
        probe = pod.container["readinessProbe"]
        assert found.drain_seconds >= probe["periodSeconds"] * probe["failureThreshold"]


@every_running
def test_keys_are_files_of_the_secret_that_the_script_fills(overlay: str, tmp_path: Path) -> None:
    script = str(ROOT / "deploy" / "make_secrets.sh")
    subprocess.run([script, str(tmp_path)], check=True, capture_output=True)
    found = served(overlay)
    for pod in servers(overlay):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        (mount,) = (m for m in pod.container["volumeMounts"] if m.get("readOnly"))
        # the directory: a single file would be that of the start for ever
        assert "subPath" not in mount
        items = volumes[mount["name"]]["secret"]["items"]
        files = {str(Path(mount["mountPath"]) / item["path"]): item["key"] for item in items}
        assert files.keys() == {str(found.api_keys_file), str(found.secret_file)}
        assert all((tmp_path / key).is_file() for key in files.values())


@every_running
def test_feedback_is_off_unless_the_secret_names_a_database(overlay: str) -> None:
    assert served(overlay).feedback_url is not None
    for pod in servers(overlay):
        (entry,) = (e for e in pod.container["env"] if e["name"] == "DALORRA_FEEDBACK_URL")
        reference = entry["valueFrom"]["secretKeyRef"]
        assert reference["optional"] is True
        names = {v["secret"]["secretName"] for v in pod.spec["volumes"] if "secret" in v}
        assert names == {reference["name"]}


# -- true to the metrics and rules ---------------------------------------------------------------


def _adapter_rule() -> dict[str, Any]:
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"][
        "custom"
    ]
    return rule


def test_the_autoscaler_scales_on_a_metric_that_the_server_has_and_the_adapter_gives() -> None:
    (metric,) = one("cpu", "HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert metric["type"] == "Pods"
    assert metric["pods"]["target"]["type"] == "AverageValue"
    assert 0 < int(metric["pods"]["target"]["averageValue"]) < Settings().max_queued_tokens
    rule = _adapter_rule()
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].partition("{")[0] in {f.name for f in Telemetry().collect()}


def test_the_adapters_query_adds_the_priorities_of_each_pod(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    require_or_skip("prometheus", program)
    rule = _adapter_rule()
    series = rule["seriesQuery"].partition("{")[0]
    query = rule["metricsQuery"].replace("<<.Series>>", series)
    query = query.replace("<<.LabelMatchers>>", 'namespace="dalorra"').replace(
        "<<.GroupBy>>", "pod"
    )
    record = {"groups": [{"name": "one", "rules": [{"record": "found", "expr": query}]}]}
    (tmp_path / "rule.yml").write_text(yaml.safe_dump(record), encoding="utf-8")
    waiting = {("a", "interactive"): 100, ("a", "batch"): 20, ("b", "interactive"): 7}
    test = {
        "interval": "15s",
        "input_series": [
            {
                "series": f'{series}{{namespace="dalorra",pod="{pod}",priority="{priority}"}}',
                "values": f"{tokens}x20",
            }
            for (pod, priority), tokens in waiting.items()
        ],
        "promql_expr_test": [
            {
                "expr": "found",
                "eval_time": "3m",
                "exp_samples": [
                    {"labels": 'found{pod="a"}', "value": 120},
                    {"labels": 'found{pod="b"}', "value": 7},
                ],
            }
        ],
    }
    document = {"rule_files": ["rule.yml"], "evaluation_interval": "15s", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    command = [str(program), "test", "rules", str(tmp_path / "test.yml")]
    tested = subprocess.run(command, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_prometheus_rule_is_what_the_generator_writes(tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    write_rules(["--out", str(tmp_path), "--prometheus-rule", str(file)])
    assert file.read_text("utf-8") == render_prometheus_rule(RuleSettings())
    command = f"python -m deploy.prometheus.drift_rules --prometheus-rule {PROMETHEUS_RULE}"
    assert PROMETHEUS_RULE.read_text("utf-8") == file.read_text("utf-8"), f"run {command}"


def test_the_prometheus_rule_has_every_rule_of_the_rule_files_and_no_other() -> None:
    groups = [
        group
        for file in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
    ]
    found = one("monitoring", "PrometheusRule")["spec"]["groups"]
    assert sorted(found, key=lambda group: group["name"]) == groups


def test_the_service_reaches_the_pods() -> None:
    service = one("cpu", "Service")
    (pod,) = servers("cpu")
    assert service["spec"]["selector"].items() <= pod.labels.items()
    (port,) = service["spec"]["ports"]
    assert [port["targetPort"]] == [entry["name"] for entry in pod.container["ports"]]


@every_running
def test_the_monitor_scrapes_the_service_under_the_job_of_the_rules(overlay: str) -> None:
    if overlay == "kserve":  # which names port and labels of its Service as the runtime does
        runtime = one(overlay, "ServingRuntime")["spec"]
        labels, (port,) = runtime["labels"], runtime["containers"][0]["ports"]
    else:
        service = one(overlay, "Service")
        labels, (port,) = service["metadata"]["labels"], service["spec"]["ports"]
    spec = one("monitoring", "ServiceMonitor")["spec"]
    assert selects(spec["selector"], labels)
    rules = PROMETHEUS_RULE.read_text("utf-8")
    assert set(re.findall(r'job="(\w+)"', rules)) == {labels[spec["jobLabel"]]}
    (endpoint,) = spec["endpoints"]
    assert SCOPES[endpoint["path"]] == "metrics"
    assert endpoint["port"] == port["name"]


# -- KServe --------------------------------------------------------------------------------------


def test_kserve_finds_the_runtime_and_the_adapter_that_the_job_puts_there() -> None:
    service, runtime = one("kserve", "InferenceService"), one("kserve", "ServingRuntime")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [(f["name"], f["version"]) for f in runtime["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    claim, path = re.fullmatch(r"pvc://([\w-]+)/(.+)", model["storageUri"]).groups()  # type: ignore[union-attr]
    assert claim == one("kserve", "PersistentVolumeClaim")["metadata"]["name"]
    (job,) = (pod for pod in pods("kserve") if not pod.serves)
    assert job.spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    (mount,) = (m for m in job.container["volumeMounts"] if m["name"] == "models")
    assert f"cp -R adapters {mount['mountPath']}/" in job.container["args"][0]
    manifest = json.loads((ROOT / path / "manifest.json").read_text(encoding="utf-8"))
    assert str(manifest["format_version"]) == model["modelFormat"]["version"]
    # a client of KServe asks for /v2/models/<name of the service>/infer
    assert manifest["name"] == service["metadata"]["name"]
    assert "/v2/models/{model}/infer" in SCOPES


# -- the walk-through ----------------------------------------------------------------------------


def test_the_readme_names_every_overlay_and_makes_the_secrets_that_are_asked_for() -> None:
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"apply -k deploy/kubernetes/overlays/(\w+)", text)) == set(OVERLAYS)
    assert all((ROOT / path).exists() for path in re.findall(r"deploy/kubernetes/[\w./-]+\w", text))
    made = {
        name: set(re.findall(r"--from-file=deploy/secrets/(\w+)", keys))
        for name, keys in re.findall(
            r"create secret generic ([\w-]+)((?: \\\n| )(?:.|\\\n)+)", text
        )
    }
    (pod,) = servers("cpu")
    (secret,) = (v["secret"] for v in pod.spec["volumes"] if "secret" in v)
    credentials = one("monitoring", "ServiceMonitor")["spec"]["endpoints"][0]["authorization"]
    assert made == {
        secret["secretName"]: {item["key"] for item in secret["items"]},
        credentials["credentials"]["name"]: {credentials["credentials"]["key"]},
    }

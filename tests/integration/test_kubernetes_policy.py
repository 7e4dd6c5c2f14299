"""deploy/kubernetes: valid, restricted, closed, sized and spread."""

import json
import re
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import __version__
from tests.support.kubernetes import (
    OVERLAYS,
    RUNNING,
    Pod,
    find,
    one,
    pods,
    render,
    selects,
    served,
    servers,
    settings,
)
from tests.support.required import find_tool, require_or_skip

ROOT = Path(__file__).parents[2]
UID = 10001
VERSIONS = ("1.30", "1.37")
CUSTOM = {"InferenceService", "PrometheusRule", "ServiceMonitor", "ServingRuntime"}
MEASURED = ROOT / "benchmarks" / "results" / "serving"
UNITS = {"Mi": 2**20, "Gi": 2**30, "m": Decimal("0.001"), "": 1}

every_running = pytest.mark.parametrize("overlay", RUNNING)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def amount(text: object) -> Decimal:
    """Return a quantity of Kubernetes as a number."""
    found = re.fullmatch(r"(\d+)(\w*)", str(text))
    assert found is not None
    return int(found[1]) * Decimal(UNITS[found[2]])


# -- valid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_the_strict_schema(version: str, tmp_path: Path) -> None:
    program = find_tool("kubernetes-validate")
    require_or_skip("kubernetes-validate", program)
    documents = [m for name in OVERLAYS for m in render(name) if m["kind"] not in CUSTOM]
    documents += [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name}, "spec": pod.spec}
        for pod in pods("kserve")
    ]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    command = [str(program), "--strict", "-k", version, str(tmp_path / "all.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count(f"against version {version}") == len(documents), checked.stdout


def test_custom_objects_have_only_fields_that_their_definitions_know() -> None:
    """Their definitions are in no small package; compared with the models of KServe 0.21."""
    runtime = one("kserve", "ServingRuntime")
    assert runtime["apiVersion"] == "serving.kserve.io/v1alpha1"
    assert runtime["spec"].keys() == {
        "supportedModelFormats",
        "protocolVersions",
        "labels",
        "containers",
        "volumes",
    }
    assert runtime["spec"]["containers"][0]["name"] == "kserve-container"
    service = one("kserve", "InferenceService")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["spec"].keys() == {"predictor"}
    assert service["spec"]["predictor"]["model"].keys() == {
        "modelFormat",
        "protocolVersion",
        "runtime",
        "storageUri",
    }
    monitor = one("monitoring", "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() == {"selector", "jobLabel", "endpoints"}


@every_overlay
def test_everything_is_in_the_one_namespace(overlay: str) -> None:
    for manifest in render(overlay):
        name, space = manifest["metadata"]["name"], manifest["metadata"].get("namespace")
        assert (name if manifest["kind"] == "Namespace" else space) == "dalorra"


# -- restricted ----------------------------------------------------------------------------------


@every_running
def test_every_pod_is_restricted(overlay: str) -> None:
    for pod in pods(overlay):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (UID,) * 3
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        own = pod.container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert pod.spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        kinds = {next(k for k in volume if k != "name") for volume in pod.spec["volumes"]}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}


@every_running
def test_the_cluster_refuses_what_is_not_restricted(overlay: str) -> None:
    labels = one(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    account = one(overlay, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert {pod.spec["serviceAccountName"] for pod in pods(overlay)} == {
        account["metadata"]["name"]
    }


def test_the_user_is_the_images() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == [f"{UID}:{UID}"]


@every_running
def test_every_place_that_is_written_is_a_volume_with_a_limit(overlay: str) -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    written = {"/tmp", *json.loads(re.findall(r"^VOLUME (.+)$", image, re.MULTILINE)[0])}
    for pod in servers(overlay):
        mounts = {mount["mountPath"]: mount for mount in pod.container["volumeMounts"]}
        assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == written
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for path in written:
            volume = volumes[mounts[path]["name"]]
            limited = "sizeLimit" in volume.get("emptyDir", {})
            assert limited or "persistentVolumeClaim" in volume
        disk = sum(amount(v["emptyDir"]["sizeLimit"]) for v in volumes.values() if "emptyDir" in v)
        assert disk <= amount(pod.container["resources"]["limits"]["ephemeral-storage"])


@every_overlay
def test_no_secret_is_in_the_manifests(overlay: str) -> None:
    assert find(overlay, "Secret") == []
    plain = dict(settings(overlay)) if overlay in RUNNING else {}
    for pod in pods(overlay):
        plain |= {e["name"]: e["value"] for e in pod.container.get("env", ()) if "value" in e}
    secret = {n: v for n, v in plain.items() if re.search("SECRET|PASSWORD|KEY|TOKEN|URL", n)}
    assert all(v == "off" or v.startswith("/run/secrets/") for v in secret.values()), secret


@every_running
def test_every_image_is_of_this_version(overlay: str) -> None:
    suffix = "-cuda" if overlay == "gpu" else ""
    assert {pod.container["image"] for pod in pods(overlay)} == {f"dalorra:{__version__}{suffix}"}


# -- closed --------------------------------------------------------------------------------------


def _policies(overlay: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    """Return the network policies that hold for a pod."""
    found = [policy["spec"] for policy in find(overlay, "NetworkPolicy")]
    return [spec for spec in found if selects(spec["podSelector"], labels)]


def _rules(overlay: str, pod: Pod, way: str) -> list[dict[str, Any]]:
    return [rule for spec in _policies(overlay, pod.labels) for rule in spec.get(way, ())]


@every_running
def test_nothing_comes_in_or_goes_out_but_what_is_allowed(overlay: str) -> None:
    deny = [s for s in (p["spec"] for p in find(overlay, "NetworkPolicy")) if len(s) == 2]
    assert deny == [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}]
    for pod in pods(overlay):
        entries = _rules(overlay, pod, "ingress")
        assert bool(entries) == pod.serves
        for rule in entries:
            assert [port["port"] for port in rule["ports"]] == [served(overlay).port]
            assert all(peer["namespaceSelector"]["matchLabels"] for peer in rule["from"])


@every_running
def test_servers_look_up_names_and_only_what_fetches_a_model_goes_further(overlay: str) -> None:
    for pod in pods(overlay):
        ports = {p["port"] for rule in _rules(overlay, pod, "egress") for p in rule["ports"]}
        fetches = not pod.serves or overlay == "cpu"
        assert ports == ({53, 443} if fetches else {53})
        for rule in _rules(overlay, pod, "egress"):
            if rule["ports"][0]["port"] == 443:  # never into the cluster, nor to its metadata
                (peer,) = rule["to"]
                assert {"10.0.0.0/8", "169.254.0.0/16"} <= set(peer["ipBlock"]["except"])


def test_prometheus_may_come_in() -> None:
    (pod,) = servers("cpu")
    (rule,) = _rules("monitoring", pod, "ingress")
    assert [port["port"] for port in rule["ports"]] == [served("cpu").port]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}


# -- sized and spread ----------------------------------------------------------------------------


def _largest_resident_mb() -> float:
    overload = json.loads((MEASURED / "overload.json").read_text(encoding="utf-8"))
    soak = json.loads((MEASURED / "soak.json").read_text(encoding="utf-8"))
    return max(overload["memory_mb"]["last"], soak["usage"]["rss_mb"]["late"])


@every_running
def test_memory_follows_what_was_measured_and_threads_follow_the_limit(overlay: str) -> None:
    measured = Decimal(_largest_resident_mb()) * 2**20
    for pod in servers(overlay):
        resources = pod.container["resources"]
        assert amount(resources["requests"]["memory"]) >= Decimal("1.2") * measured
        # an engine that hung is kept while the next one loads
        assert amount(resources["limits"]["memory"]) >= 2 * measured
        assert amount(resources["requests"]["cpu"]) <= amount(resources["limits"]["cpu"])
        (threads,) = (e for e in pod.container["env"] if e["name"] == "OMP_NUM_THREADS")
        assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"


def test_only_the_gpu_overlay_takes_a_gpu() -> None:
    for overlay in RUNNING:
        for pod in servers(overlay):
            asked = pod.container["resources"]["limits"].get("nvidia.com/gpu")
            assert asked == (1 if overlay == "gpu" else None)
            keys = {entry["key"] for entry in pod.spec.get("tolerations", ())}
            assert keys == ({"nvidia.com/gpu"} if overlay == "gpu" else set())


@every_running
def test_replicas_are_spread_and_one_always_stays(overlay: str) -> None:
    budget = one(overlay, "PodDisruptionBudget")["spec"]
    (pod,) = servers(overlay)
    assert selects(budget["selector"], pod.labels)
    spread = pod.spec["topologySpreadConstraints"]
    assert spread[0]["topologyKey"] == "kubernetes.io/hostname"
    assert all(selects(entry["labelSelector"], pod.labels) for entry in spread)
    if overlay == "kserve":
        scaled = one(overlay, "InferenceService")["spec"]["predictor"]
    else:
        scaled = one(overlay, "HorizontalPodAutoscaler")["spec"]
    assert 1 <= budget["minAvailable"] < scaled["minReplicas"] <= scaled["maxReplicas"]


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_autoscaler_alone_says_how_many_replicas(overlay: str) -> None:
    deployment = one(overlay, "Deployment")
    assert "replicas" not in deployment["spec"]
    target = one(overlay, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }

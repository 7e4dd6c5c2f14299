"""docker-compose.yml, the Dockerfile and what they mount: whole, hardened, and without a secret."""

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.auth import KeyRing, exposure_fault
from server.settings import Settings
from tests.support.required import find_tool, require_or_skip

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
GRAFANA = ROOT / "deploy" / "grafana"
SERVICES = ("dalorra", "prometheus", "grafana")


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _service(name: str) -> dict[str, Any]:
    return _read(COMPOSE)["services"][name]


def _mounts(name: str) -> dict[str, str]:
    """Return what is mounted into a service: place inside -> source."""
    parts = [volume.split(":") for volume in _service(name)["volumes"]]
    return {inside: source for source, inside, *_ in parts}


def test_compose_reads_the_file() -> None:
    program = shutil.which("docker-compose")
    require_or_skip("docker-compose", program)
    result = subprocess.run(
        [str(program), "--file", str(COMPOSE), "config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(yaml.safe_load(result.stdout)["services"]) == set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened_limited_and_watched(name: str) -> None:
    service = _service(name)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["pids_limit"] > 0
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_whatever_is_mounted_is_there(name: str) -> None:
    volumes = set(_read(COMPOSE)["volumes"])
    for inside, source in _mounts(name).items():
        assert source in volumes or (ROOT / source).exists(), inside
        # a folder of ours is never written by a container
        writable = f"{source}:{inside}" in _service(name)["volumes"]
        assert writable == (source in volumes)


def test_secrets_are_files_that_git_ignores() -> None:
    secrets = _read(COMPOSE)["secrets"]
    used = {one for name in SERVICES for one in _service(name)["secrets"]}
    assert used == set(secrets)
    assert {one["file"] for one in secrets.values()} == {f"./deploy/secrets/{n}" for n in secrets}
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_no_variable_holds_a_secret() -> None:
    variables = {
        name: value
        for service in SERVICES
        for name, value in _service(service).get("environment", {}).items()
    }
    secret = {n: v for n, v in variables.items() if re.search("SECRET|PASSWORD|KEY|TOKEN", n)}
    assert set(secret) == {
        "DALORRA_SECRET_FILE",
        "DALORRA_API_KEYS_FILE",
        "GF_SECURITY_ADMIN_PASSWORD__FILE",
    }
    assert all(value.startswith("/run/secrets/") for value in secret.values())


def test_prometheus_finds_its_rules_its_key_and_the_server() -> None:
    config = _read(ROOT / "deploy" / "prometheus" / "prometheus.yml")
    (pattern,) = config["rule_files"]
    assert sorted((ROOT / "deploy" / "prometheus").glob(pattern))
    assert _mounts("prometheus")["/etc/prometheus"] == "./deploy/prometheus"
    job = next(one for one in config["scrape_configs"] if one["job_name"] == "dalorra")
    (key,) = _service("prometheus")["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{key}"
    assert job["static_configs"][0]["targets"] == ["dalorra:8000"]
    assert _service("dalorra")["ports"] == ["127.0.0.1:8000:8000"]


def test_grafana_finds_its_data_source_and_both_dashboards() -> None:
    mounts = _mounts("grafana")
    assert mounts["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"
    (source,) = _read(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert _service("prometheus")["ports"] == ["127.0.0.1:9090:9090"]
    (provider,) = _read(GRAFANA / "provisioning/dashboards/dalorra.yml")["providers"]
    folder = ROOT / mounts[provider["options"]["path"]]
    assert len(list(folder.glob("*.json"))) == 2
    home = Path(_service("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.relative_to(provider["options"]["path"])).exists()
    for path in folder.glob("*.json"):
        variables = json.loads(path.read_text(encoding="utf-8"))["templating"]["list"]
        assert variables[0]["query"] == source["type"] == "prometheus"


def _make_secrets(folder: Path) -> "subprocess.CompletedProcess[str]":
    script = str(ROOT / "deploy" / "make_secrets.sh")
    return subprocess.run([script, str(folder)], check=False, capture_output=True, text=True)


def _contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_the_secrets_script_writes_each_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    assert _make_secrets(folder).returncode == 0
    first = _contents(folder)
    mounted = set(_read(COMPOSE)["secrets"])
    assert set(first) == mounted | {"infer_api_key"}, "all but one are for containers"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in folder.iterdir())
    random = {name: text for name, text in first.items() if name != "api_keys"}
    assert all(len(text.removeprefix("dk_")) == 64 for text in random.values())
    assert len(set(random.values())) == 4

    (folder / "feedback_secret").unlink()
    assert _make_secrets(folder).returncode == 0
    second = _contents(folder)
    assert [name for name in first if first[name] != second[name]] == ["feedback_secret"]


def test_the_server_knows_the_keys_that_the_secrets_script_made(tmp_path: Path) -> None:
    _make_secrets(tmp_path)
    ring = KeyRing(tmp_path / "api_keys", on_failure=lambda: None)
    scopes = {"metrics_api_key": ("metrics",), "infer_api_key": ("infer", "feedback")}
    for name, expected in scopes.items():
        key = ring.find((tmp_path / name).read_text(encoding="utf-8"))
        assert key is not None
        assert key.scopes == expected
        assert (tmp_path / name).read_text() not in (tmp_path / "api_keys").read_text()


def test_the_secrets_script_never_takes_keys_away(tmp_path: Path) -> None:
    _make_secrets(tmp_path)
    before = _contents(tmp_path)
    (tmp_path / "metrics_api_key").unlink()
    refused = _make_secrets(tmp_path)
    assert refused.returncode == 1
    assert "dalorra keys create" in refused.stderr
    assert (tmp_path / "api_keys").read_text() == before["api_keys"]

    (tmp_path / "api_keys").unlink()  # to begin anew; the key that is still there is kept
    assert _make_secrets(tmp_path).returncode == 0
    assert (tmp_path / "infer_api_key").read_text() == before["infer_api_key"]
    ring = KeyRing(tmp_path / "api_keys", on_failure=lambda: None)
    assert ring.find(before["infer_api_key"]) is not None
    assert ring.find(before["metrics_api_key"]) is None


def test_the_image_is_not_open_to_everybody() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    command = json.loads(re.findall(r"^CMD (\[.+)$", text, re.MULTILINE)[-1])
    settings = Settings(host=command[command.index("--host") + 1])
    assert exposure_fault(settings) is not None
    assert not re.search(r"^[^#]*ALLOW_UNAUTHENTICATED", text, re.MULTILINE)
    environment = _service("dalorra")["environment"]
    assert environment["DALORRA_API_KEYS_FILE"] == "/run/secrets/api_keys"
    assert "api_keys" in _service("dalorra")["secrets"]
    assert "DALORRA_ALLOW_UNAUTHENTICATED" not in environment


def test_the_dockerfile_copies_what_its_context_holds() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
        for source in line.split()
    }
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sources == {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_writes_only_where_a_volume_is() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    volumes = set(json.loads(re.findall(r"^VOLUME (.+)$", text, re.MULTILINE)[0]))
    written = set(re.findall(r"DALORRA_(?:CACHE|STATE_DIR)=(\S+)", text))
    assert volumes == written == set(_mounts("dalorra"))
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]


def test_hadolint_has_nothing_to_say() -> None:
    program = find_tool("hadolint")
    require_or_skip("hadolint", program)
    result = subprocess.run(
        [str(program), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout

"""docker-compose.yml, the Dockerfile and what they mount: whole, hardened, and without a secret."""

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.required import require_or_skip

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
    assert set(secret) == {"DALORRA_SECRET_FILE", "GF_SECURITY_ADMIN_PASSWORD__FILE"}
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


def test_the_secrets_script_writes_each_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    script = str(ROOT / "deploy" / "make_secrets.sh")
    subprocess.run([script, str(folder)], check=True, capture_output=True)
    assert {path.name for path in folder.iterdir()} == set(_read(COMPOSE)["secrets"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first = {path: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert all(len(secret) == 64 for secret in first.values())
    assert len(set(first.values())) == 3
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in first)

    (folder / "metrics_api_key").unlink()
    subprocess.run([script, str(folder)], check=True, capture_output=True)
    second = {path: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    changed = [path.name for path in first if first[path] != second[path]]
    assert changed == ["metrics_api_key"]


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
    beside_python = str(Path(sys.executable).parent)  # where `make dev` puts it
    program = shutil.which("hadolint", path=beside_python) or shutil.which("hadolint")
    require_or_skip("hadolint", program)
    result = subprocess.run(
        [str(program), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout

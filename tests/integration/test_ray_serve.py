"""Two replicas on a real Ray cluster of this machine: ``make test-ray``."""

import importlib.util
import itertools
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import SecretStr

from benchmarks.serving.process import free_port
from dalorra.client import Client, Retries
from server.app import create_app
from server.cli import make_engine
from server.settings import Settings
from tests.support.api import async_test
from tests.support.required import require_or_skip
from tests.support.serve_on_ray import ray_serving, replica_pids
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import save_tiny_base

CONFIG = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
START_S = 900.0  # a busy machine may take its time
pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")


@dataclass(frozen=True)
class Cluster:
    """What runs, and how to reach it."""

    process: "subprocess.Popen[bytes]"
    log: Path
    url: str
    metrics: tuple[str, ...]
    settings: dict[str, Any]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + START_S
        while not condition():
            over = self.process.poll() is not None or time.monotonic() > end_s
            assert not over, f"{what}: {self.log.read_text()[-5000:]}"
            time.sleep(0.2)

    def num_ready(self) -> int:
        return sum(_status(f"{url}/readyz") == 200 for url in self.metrics)

    def predictions(self) -> list[dict[str, int]]:
        """Return how many rows each replica has answered, by adapter."""
        found = []
        for url in self.metrics:
            text = httpx.get(f"{url}/metrics", timeout=60).text
            pattern = r'^dalorra_predictions_total\{adapter="(\w)".*\} (.+)$'
            counts = {"a": 0, "b": 0}
            for adapter, value in re.findall(pattern, text, re.MULTILINE):
                counts[adapter] += int(float(value))
            found.append(counts)
        return found


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run the shipped configuration with two tiny adapters instead of the shipped one."""
    require_or_skip("ray", importlib.util.find_spec("ray"))
    folder = tmp_path_factory.mktemp("ray")
    base = save_tiny_base(folder / "base")
    for seed, name in enumerate("ab"):
        save_tiny_adapter(folder / "root" / name, base, seed=seed)
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    port, *ports = [free_port() for _ in range(3)]
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    settings = {
        "adapter_root": str(folder / "root"),
        "base": str(base),
        "device": "cpu",
        "state_dir": str(folder / "state"),
        "allow_unauthenticated": True,
    }
    application["args"] |= {"settings": settings, "metrics_ports": ports}
    (deployment,) = application["deployments"]
    assert deployment["num_replicas"] == 2
    deployment["ray_actor_options"]["num_cpus"] = 0.5
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), "utf-8")
    log = folder / "log"
    with ray_serving(file, log) as process:
        metrics = tuple(f"http://127.0.0.1:{one}" for one in ports)
        made = Cluster(process, log, f"http://127.0.0.1:{port}", metrics, settings)
        made.wait(lambda: made.num_ready() == 2, "two replicas start")
        made.wait(lambda: _status(f"{made.url}/readyz") == 200, "the proxy knows them")
        yield made


def test_answers_are_those_of_the_server_without_ray(cluster: Cluster) -> None:
    body = {"input": list(TEXTS), "num_samples": 8, "seed": 3}
    settings = Settings(**cluster.settings, feedback_url=SecretStr("off"))
    direct = create_app(lambda: make_engine(settings), settings)
    expected: dict[str, list[list[float]]] = {}

    @async_test
    async def ask_directly() -> None:
        transport = httpx.ASGITransport(direct)
        async with (
            direct.router.lifespan_context(direct),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await direct.state.service.lifecycle.loaded()
            for model in "ab":
                answer = await client.post("/v1/classify", json={**body, "model": model})
                expected[model] = [row["probs"] for row in answer.json()["data"]]

    ask_directly()
    before = cluster.predictions()
    with httpx.Client(base_url=cluster.url, timeout=120) as client:
        for model, _ in itertools.product("ab", range(6)):
            answer = client.post("/v1/classify", json={**body, "model": model})
            assert answer.status_code == 200, answer.text
            assert len(answer.headers.get_list("x-request-id")) == 1
            for row, probs in zip(answer.json()["data"], expected[model], strict=True):
                assert row["probs"] == pytest.approx(probs, abs=1e-6)
    answered = [
        sum(now.values()) - sum(then.values())
        for then, now in zip(before, cluster.predictions(), strict=True)
    ]
    assert sum(answered) == 12 * len(TEXTS)
    assert min(answered) > 0, "one replica answered everything"


def test_a_header_keeps_the_requests_of_an_adapter_together(cluster: Cluster) -> None:
    def ask(client: httpx.Client, times: int) -> None:
        for model in "ab" * times:
            headers = {"serve_multiplexed_model_id": model}
            body = {"input": "book a flight", "model": model}
            assert client.post("/v1/classify", json=body, headers=headers).status_code == 200

    with httpx.Client(base_url=cluster.url, timeout=120) as client:
        ask(client, 2)
        time.sleep(5)  # Ray tells its proxies in the background
        before = cluster.predictions()
        ask(client, 8)
    after = cluster.predictions()
    answered = [{m: now[m] - was[m] for m in "ab"} for was, now in zip(before, after, strict=True)]
    for model in "ab":
        assert sorted(one[model] for one in answered) == [0, 8], answered


class Load:
    """Threads that ask without a pause until they are told to stop."""

    def __init__(self, cluster: Cluster) -> None:
        self.failed_bare: list[tuple[float, int]] = []  # when it was sent, status
        self.failed_client: list[Exception] = []
        self.answered = [0, 0]  # without and with our client
        self._cluster = cluster
        self._stop = threading.Event()
        works = [self._bare] * 3 + [self._client] * 3
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(300)
            assert not thread.is_alive()

    def _bare(self) -> None:
        body = {"input": list(TEXTS) * 4, "num_samples": 32, "model": "a"}
        with httpx.Client(base_url=self._cluster.url, timeout=120) as client:
            while not self._stop.is_set():
                sent_s = time.monotonic()
                headers = {"X-Request-Timeout-Ms": "120000"}
                status = client.post("/v1/classify", json=body, headers=headers).status_code
                if status == 200:
                    self.answered[0] += 1
                else:
                    self.failed_bare.append((sent_s, status))

    def _client(self) -> None:
        with Client(self._cluster.url, timeout_s=120, retries=Retries(max_attempts=10)) as client:
            while not self._stop.is_set():
                try:
                    client.classify(list(TEXTS) * 4, num_samples=32, model="a")
                except Exception as error:  # noqa: BLE001 - each is one request lost
                    self.failed_client.append(error)
                else:
                    self.answered[1] += 1


def test_a_killed_replica_loses_only_what_was_on_it_and_that_is_retried(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dalorra.client.calls")
    cluster.wait(lambda: cluster.num_ready() == 2, "two replicas are there")
    victim, other = replica_pids(cluster.process)
    with Load(cluster) as load:
        cluster.wait(lambda: min(load.answered) > 10, "answers before the kill")
        os.kill(victim, signal.SIGKILL)
        cluster.wait(lambda: victim not in replica_pids(cluster.process), "the replica is gone")
        gone_s = time.monotonic()
        seen = list(load.answered)
        cluster.wait(
            lambda: all(n > was + 10 for n, was in zip(load.answered, seen, strict=True)),
            "answers after the kill",
        )
    assert load.failed_client == []
    assert [status for sent_s, status in load.failed_bare if sent_s > gone_s] == []
    assert {status for _, status in load.failed_bare} <= {500}
    repeated = [line for line in caplog.messages if "answered 500" in line]
    assert len(load.failed_bare) + len(repeated) in range(1, 7)  # six at a time

    cluster.wait(lambda: cluster.num_ready() == 2, "another replica in its place")
    assert other in replica_pids(cluster.process)
    assert len(replica_pids(cluster.process)) == 2

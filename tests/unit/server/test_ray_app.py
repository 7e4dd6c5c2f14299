"""A replica of the Ray application, without Ray: what it refuses, how it starts, what it tells."""

import contextlib
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from server.auth.exposure import is_loopback
from server.ray_app import RayOptions, Replica, app
from tests.support.api import async_test
from tests.support.fake_engine import QUIZ, TOPICS, FakeEngine

ROOT = Path(__file__).parents[3]
OPEN: dict[str, Any] = {"adapter": "topics", "allow_unauthenticated": True}


class NotingReplica(Replica):
    """Keeps what Ray would be told."""

    def __init__(self, options: RayOptions, engine: FakeEngine) -> None:
        super().__init__(options, lambda: engine)
        self.noted: list[str] = []

    async def remember(self, model: str) -> str:
        self.noted.append(model)
        return model


def replica(engine: FakeEngine | None = None, **options: Any) -> NotingReplica:
    settings = {**OPEN, "batch_wait_ms": 0}
    made = RayOptions(settings=settings, **options)
    return NotingReplica(made, engine or FakeEngine(TOPICS, QUIZ))


@contextlib.asynccontextmanager
async def started(one: Replica) -> AsyncIterator[httpx.AsyncClient]:
    """Start a replica as Ray does: the app is built, then its lifespan entered."""
    built: FastAPI = one.__serve_build_asgi_app__()
    transport = httpx.ASGITransport(built)
    async with (
        built.router.lifespan_context(built),
        httpx.AsyncClient(transport=transport, base_url="http://node:8000") as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"allow_unauthenticated": True}, "adapter"),
        ({"adapter": "topics"}, "api_keys_file"),
        ({**OPEN, "tls_cert": "c", "tls_key": "k"}, "TLS"),
        ({**OPEN, "feedback_url": "sqlite:////labels"}, "secret_file"),
        ({**OPEN, "max_row": 3}, "max_row"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RayOptions(settings=settings).server_settings()


def test_feedback_is_off_unless_it_is_shared() -> None:
    def feedback_of(**more: Any) -> str | None:
        url = RayOptions(settings={**OPEN, **more}).server_settings().feedback_url
        return url.get_secret_value() if url else None

    assert feedback_of() == "off"
    assert feedback_of(feedback_url="off") == "off"
    shared = "postgresql://labels"
    assert feedback_of(feedback_url=shared, secret_file="/secret") == shared


def test_options_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="metrics_port"):
        RayOptions.model_validate({"metrics_port": 9464})


@async_test
async def test_a_replica_that_has_started_answers() -> None:
    one = replica()
    async with started(one) as client:
        await one.check_health()
        answer = await client.post("/v1/classify", json={"input": "hi", "model": "topics"})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 1
        assert "x-request-id" not in answer.headers  # Ray's proxy adds it


@async_test
async def test_a_replica_whose_load_fails_does_not_start() -> None:
    engine = FakeEngine()
    engine.load_fault = ValueError("a byte has changed")
    with pytest.raises(RuntimeError, match="a byte has changed"):
        async with started(replica(engine)):
            pass


@async_test
async def test_a_replica_that_is_not_ready_is_not_healthy() -> None:
    one = replica()
    async with started(one):
        one._service.lifecycle.begin_drain()
        with pytest.raises(RuntimeError, match="draining"):
            await one.check_health()


@async_test
async def test_adapters_cannot_be_changed_through_an_address_that_replicas_share() -> None:
    async with started(replica()) as client:
        for path in ("/v1/adapters", "/v1/aliases/topics@prod"):
            assert (await client.put(path, json={})).status_code == 404
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("header", ["serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"])
@async_test
async def test_ray_is_told_of_adapters_that_there_are(header: str) -> None:
    one = replica()
    async with started(one) as client:
        for named in ("quiz", "quiz:77aa00112233", "nobody", ""):
            body = {"input": "hi", "model": "topics"}
            answer = await client.post("/v1/classify", json=body, headers={header: named})
            assert answer.json()["model"].startswith("topics"), answer.text  # the body decides
        await client.post("/v1/classify", json=body)
    assert one.noted == ["quiz", "quiz:77aa00112233"]


def free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as open_:
        probes = [open_.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return tuple(probe.getsockname()[1] for probe in probes)


@async_test
async def test_each_replica_shows_its_own_metrics_while_it_lives() -> None:
    ports = free_ports(2)
    one, two, three = (replica(metrics_ports=ports) for _ in range(3))
    async with httpx.AsyncClient() as prometheus:

        async def answered(port: int) -> int:
            """Return how many requests the replica behind a port has answered with 200."""
            text = (await prometheus.get(f"http://127.0.0.1:{port}/metrics")).text
            found = re.findall(r'^dalorra_http_requests_total\{.*"200"\} (.+)$', text, re.MULTILINE)
            return int(sum(map(float, found)))

        async with started(one) as client, started(two), started(three):
            await client.post("/v1/classify", json={"input": "hi", "model": "topics"})
            assert [await answered(port) for port in ports] == [1, 0]
            probe = await prometheus.get(f"http://127.0.0.1:{ports[0]}/readyz")
            assert probe.status_code == 200
            asked = await prometheus.post(f"http://127.0.0.1:{ports[0]}/v1/classify", json={})
            assert asked.status_code == 404
        with pytest.raises(httpx.ConnectError):
            await answered(ports[0])


class FakeServe(SimpleNamespace):
    """The parts of ``ray.serve`` that are called, each saying what it was called with."""

    def deployment(self, made: type[Replica], **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(bind=lambda *args: (made, args))

    def multiplexed(self, max_num_models_per_replica: int) -> Callable[[Any], Any]:
        self.most = max_num_models_per_replica
        return lambda method: method

    def ingress(self) -> Callable[[Any], Any]:
        return lambda made: made


def test_ray_lets_more_in_than_the_server_admits_and_waits_longer_than_its_deadlines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = FakeServe()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    monkeypatch.setitem(sys.modules, "ray.serve.config", SimpleNamespace(BackpressureConfig=dict))
    limits = {"max_requests": 10, "request_timeout_s": 7, "max_request_timeout_s": 30.5}
    options = RayOptions(settings={**OPEN, **limits}, adapters_per_replica=3)
    made, arguments = app(options)
    assert issubclass(made, Replica)
    assert arguments == (options,)
    assert serve.most == 3
    assert serve.options["max_ongoing_requests"] > 10
    assert serve.options["max_queued_requests"] == 10
    assert serve.options["graceful_shutdown_timeout_s"] > 30.5


def test_the_shipped_configuration_is_one_that_a_replica_takes() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text("utf-8"))
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(sys.modules[module], name) is app
    options = RayOptions.model_validate(application["args"])
    settings = options.server_settings()
    assert settings.adapter is not None
    assert (ROOT / settings.adapter / "manifest.json").is_file()
    assert config["http_options"]["request_timeout_s"] > settings.max_request_timeout_s
    assert is_loopback(config["http_options"]["host"])  # it lets everybody in
    (deployment,) = application["deployments"]
    assert deployment["name"] == "Dalorra"
    assert len(options.metrics_ports) >= deployment["num_replicas"]


def test_a_replica_makes_the_engine_of_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Path | None] = []

    def make_engine(settings: Any) -> FakeEngine:
        asked.append(settings.adapter)
        return FakeEngine()

    monkeypatch.setattr("server.ray_app.make_engine", make_engine)
    one = Replica(RayOptions(settings={**OPEN, "adapter": str(tmp_path)}))

    @async_test
    async def start() -> None:
        async with started(one):
            assert await one.remember("topics") == "topics"

    start()
    assert asked == [tmp_path]

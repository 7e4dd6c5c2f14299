"""Faults of the whole server in a process of its own; after each a normal request succeeds.

Real sockets, real signals, the fake engine: what a unit test of one part cannot show.
"""

import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.load import count
from benchmarks.serving.process import ServerProcess, serving
from benchmarks.serving.wire import LOST, Reply, Wire
from tests.support.api import async_test, running

pytestmark = pytest.mark.integration


FAKE = [sys.executable, "-m", "tests.support.serve_fake", "--faults"]
SURE = {"input": "a sure thing"}
WAIT_S = 30.0


@contextlib.contextmanager
def faulty(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    with serving([*FAKE, *arguments], folder / "log", timeout_s=WAIT_S) as server:
        yield server


async def classify(wire: Wire, text: str, **fields: Any) -> Reply:
    return await wire.ask("POST", "/v1/classify", {"input": text, **fields}, timeout_s=WAIT_S)


async def metrics(wire: Wire) -> dict[str, float]:
    """Return every sample of the server's metrics by name and labels."""
    text = (await wire.ask("GET", "/metrics")).body.decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def check_healthy(wire: Wire, within_s: float = WAIT_S) -> None:
    """A normal request succeeds soon, and then nothing is inside."""
    end_s = time.monotonic() + within_s
    while (reply := await classify(wire, "a sure thing")).status != 200:
        assert time.monotonic() < end_s, reply
        await asyncio.sleep(0.05)
    assert (await wire.ask("GET", "/health/ready")).status == 200
    while True:
        found = await metrics(wire)
        inside = {
            name: value
            for name, value in found.items()
            if value and ("requests_in_progress" in name or "queue_depth" in name)
        }
        if not inside:
            return
        assert time.monotonic() < end_s, inside
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    """Return a server that faults of one batch are tried on, and its log."""
    folder = tmp_path_factory.mktemp("patient")
    with faulty(folder) as server:
        yield server, folder / "log"


@pytest.mark.parametrize("word", ["boom", "nan", "misshape"])
@async_test
async def test_a_failing_batch_is_a_500_of_its_own_and_no_more(
    patient: tuple[ServerProcess, Path], word: str
) -> None:
    server, log = patient
    wire = Wire(server.port)
    for _ in range(2):
        texts = [f"fine {n}" for n in range(6)] + [f"{word} my-secret"]
        replies = await asyncio.gather(*(classify(wire, text) for text in texts))
        assert [reply.status for reply in replies] == [200] * 6 + [500]
        assert replies[-1].json()["code"] == "internal_error"
        assert b"my-secret" not in replies[-1].body
    await check_healthy(wire)
    await wire.close()
    assert "my-secret" not in log.read_text()  # no digits: a random id may hold any of those


@async_test
async def test_a_batch_that_never_fits_is_halved_and_then_a_503(
    patient: tuple[ServerProcess, Path],
) -> None:
    wire = Wire(patient[0].port)
    replies = await asyncio.gather(classify(wire, "oom"), *(classify(wire, "x") for _ in "abc"))
    assert replies[0].status == 503
    assert replies[0].json()["code"] == "out_of_memory"
    assert [reply.status for reply in replies[1:]] == [200] * 3
    await check_healthy(wire)
    await wire.close()


@pytest.mark.parametrize("word", ["hang", "fatal"])
def test_a_lost_engine_is_told_and_replaced(tmp_path: Path, word: str) -> None:
    async def attack(server: ServerProcess) -> None:
        wire = Wire(server.port)
        reply = await classify(wire, word)
        assert reply.status == 503, reply
        assert reply.json()["code"] == "engine_unavailable"
        assert reply.took_s < 15
        await check_healthy(wire)
        found = await metrics(wire)
        assert sum(v for name, v in found.items() if "engine_restarts_total" in name) == 1
        await wire.close()

    with faulty(tmp_path, "--set", "stall_s=0.5") as server:
        asyncio.run(attack(server))


def test_a_storm_of_clients_that_hang_up_leaves_nothing_behind(tmp_path: Path) -> None:
    draw = random.Random(5)
    body = json.dumps(SURE).encode()
    head = (
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )

    async def hang_up(port: int) -> None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            message = (head + body) * draw.choice((1, 1, 3))
            writer.write(message[: draw.randint(0, len(message))])
            await asyncio.sleep(draw.random() * 0.05)
            if draw.random() < 0.3:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await reader.read(draw.randint(1, 200))
            if draw.random() < 0.5:
                writer.transport.abort()  # a reset; else an orderly close
            writer.close()
            await writer.wait_closed()

    async def attack(server: ServerProcess) -> None:
        before = server.usage()
        for _ in range(6):
            await asyncio.gather(*(hang_up(server.port) for _ in range(80)))
        wire = Wire(server.port)
        await check_healthy(wire)
        end_s = time.monotonic() + WAIT_S
        while server.usage().files > before.files + 8:  # connections are closed in the background
            assert time.monotonic() < end_s, server.usage()
            await asyncio.sleep(0.1)
        assert server.usage().threads <= before.threads + 4
        await wire.close()

    with faulty(tmp_path, "--tokens-per-second", "20000") as server:
        asyncio.run(attack(server))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_what_was_done_survives_a_kill(tmp_path: Path) -> None:
    for name in ("rev-a", "rev-b"):
        (tmp_path / "root" / name).mkdir(parents=True)
    state = ["--state-dir", str(tmp_path / "state"), "--adapter-root", str(tmp_path / "root")]

    async def before(server: ServerProcess) -> tuple[str, str]:
        wire = Wire(server.port)
        load = {"source": "rev-b", "name": "second", "pin": True}
        loaded = await wire.ask("POST", "/v1/adapters", load)
        assert loaded.status == 201, loaded
        targets = {"targets": [{"model": "second", "weight": 1.0}]}
        assert (await wire.ask("PUT", "/v1/aliases/second@prod", targets)).status == 201
        row = (await classify(wire, "a sure thing", model="second@prod")).json()["data"][0]
        label = {"prediction_id": row["prediction_id"], "label": row["label"]}
        told = await wire.ask("POST", "/v1/feedback", label)
        assert told.json()["stored"] is True
        await wire.close()
        return row["prediction_id"], row["label"]

    async def after(server: ServerProcess, prediction_id: str, label: str) -> None:
        wire = Wire(server.port)
        answer = await classify(wire, "a sure thing", model="second@prod")
        assert answer.status == 200, answer
        assert answer.json()["model"].startswith("second:")
        again = {"prediction_id": prediction_id, "label": label}
        told = await wire.ask("POST", "/v1/feedback", again)
        assert (told.status, told.json()["stored"]) == (202, False)
        entries = (await wire.ask("GET", "/v1/adapters")).json()["data"]
        assert {entry["name"]: entry["pinned"] for entry in entries}["second"] is True
        assert (await classify(wire, "a sure thing", model="topics")).status == 200
        await wire.close()

    with faulty(tmp_path, *state) as server:
        kept = asyncio.run(before(server))
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with faulty(tmp_path, *state) as server:
        asyncio.run(after(server, *kept))


def test_sigterm_under_load_fails_no_request(tmp_path: Path) -> None:
    async def attack(server: ServerProcess) -> list[Reply]:
        wire, probe = Wire(server.port), Wire(server.port, keep=False)
        replies: list[Reply] = []
        ready = True

        async def balancer() -> None:
            """Stop sending once the server says it is not ready, as a load balancer does."""
            nonlocal ready
            while ready:
                ready = (await probe.ask("GET", "/health/ready")).status == 200
                await asyncio.sleep(0.05)

        async def client(number: int) -> None:
            while ready:
                replies.append(await classify(wire, f"text {number} {len(replies)}"))

        async def stop() -> None:
            while len(replies) < 50:  # noqa: ASYNC110 - a list has no event
                await asyncio.sleep(0.01)
            server.popen.send_signal(signal.SIGTERM)

        await asyncio.gather(balancer(), stop(), *(client(number) for number in range(12)))
        assert await asyncio.to_thread(server.popen.wait, WAIT_S) == 0
        await wire.close()
        return replies

    with faulty(tmp_path, "--tokens-per-second", "4000") as server:
        replies = asyncio.run(attack(server))
    assert set(count(replies)) == {"200"}, count(replies)
    assert len(replies) > 50
    assert LOST not in {reply.status for reply in replies}


@async_test
async def test_a_jump_of_the_clock_changes_no_deadline_and_loses_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    async with running(state_dir=tmp_path, request_timeout_s=20) as api:
        for jump_s in (0, 3600, -86_400, 86_400, 0):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
            answer = await api.classify(SURE)
            assert answer.status_code == 200
            row = answer.json()["data"][0]
            monkeypatch.setattr(time, "time", real)  # the label comes when the clock is right again
            label = {"prediction_id": row["prediction_id"], "label": row["label"]}
            told = await api.client.post("/v1/feedback", json=label)
            assert told.status_code == 202, (jump_s, told.text)
        await api.check_healthy()

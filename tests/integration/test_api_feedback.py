"""True labels over HTTP: what is stored, what is refused, and what survives a crash."""

import asyncio
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, func, select
from typer.testing import CliRunner

import server.cli
from server.feedback import FeedbackStore, PredictionSigner, RiskMonitor
from server.feedback.database import FEEDBACK
from server.feedback.store import MAX_INSIDE
from tests.support.api import Api, async_test, running, until
from tests.support.fake_engine import QUIZ, TOPICS, TOPICS_CERTIFIED, FakeEngine
from tests.support.feedback import make_claim
from tests.support.postgresql import PostgresServer

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
FORMAT = {"adapter": "topics", "revision": "3f9a00112233"}


async def ask(api: Api, text: str = "a sure thing", **fields: Any) -> dict[str, Any]:
    """Return the first row of an answer."""
    response = await api.classify({"input": text, **fields})
    assert response.status_code == 200, response.text
    return response.json()["data"][0]


async def tell(api: Api, prediction_id: Any, label: Any, **fields: Any) -> httpx.Response:
    body = {"prediction_id": prediction_id, "label": label, **fields}
    return await api.client.post("/v1/feedback", json=body)


def store_of(api: Api) -> FeedbackStore:
    assert api.service.feedback is not None
    return api.service.feedback


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


@pytest.fixture
def on(database_url: str, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a server that keeps feedback in a database of either kind."""
    return {"state_dir": tmp_path / "state", "feedback_url": database_url}


@async_test
async def test_a_label_is_stored_once_and_never_changed(on: dict[str, Any]) -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED), **on) as api:
        row = await ask(api)
        first = await tell(api, row["prediction_id"], row["label"], source="audit-1")
        assert first.status_code == 202
        expected = {"prediction_id": row["prediction_id"], "outcome": "correct"}
        assert first.json() == expected | {"stored": True}
        again = await tell(api, row["prediction_id"], row["label"])
        assert (again.status_code, again.json()) == (202, expected | {"stored": False})
        other = next(label for label in TOPICS.labels if label != row["label"])
        for label in (other, None, "oos"):
            conflict = await tell(api, row["prediction_id"], label)
            assert code_of(conflict) == (409, "feedback_conflict")
            assert row["label"] not in conflict.text
        assert store_of(api).count() == 1


@async_test
async def test_none_of_the_labels_may_be_said_in_two_ways(on: dict[str, Any]) -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED), **on) as api:
        row = await ask(api)
        for label, stored in (("oos", True), (None, False)):
            response = await tell(api, row["prediction_id"], label)
            assert response.json()["outcome"] == "wrong"
            assert response.json()["stored"] is stored


@async_test
async def test_feedback_reaches_the_metrics_once(on: dict[str, Any]) -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED), **on) as api:
        for number in range(30):
            row = await ask(api)
            assert row["decision"] == "accept"
            label = row["label"] if number < 15 else None
            for _ in range(2):
                await tell(api, row["prediction_id"], label)
        # answers that were sampled in another way say nothing about the certificate
        row = await ask(api, num_samples=2)
        assert (await tell(api, row["prediction_id"], None)).json()["stored"]

        counts = {
            outcome: await api.metric(
                "feedback_total", **FORMAT, decision="accept", outcome=outcome
            )
            for outcome in ("correct", "wrong")
        }
        assert counts == {"correct": 15, "wrong": 15}
        risk = await risk_once_known(store_of(api))
        assert (risk.n, risk.wrong) == (30, 15)
        assert (risk.policy, risk.target_risk) == ("risk_0.05", 0.05)
        assert risk.violated


@async_test
async def test_limits_that_a_client_wrote_are_no_fault_of_the_adapters_policies(
    tmp_path: Path,
) -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED), state_dir=tmp_path) as api:
        row = await ask(api, policy={"min_confidence": 0})
        assert row["decision"] == "accept"
        assert (await tell(api, row["prediction_id"], None)).json()["outcome"] == "wrong"
        wrong = await api.metric("feedback_total", **FORMAT, decision="accept", outcome="wrong")
        assert wrong == 0
        # how sure it was, and whether it was right, has nothing to do with any policy
        bins = [
            await api.metric("calibration_bin_total", **FORMAT, bin=str(number))
            for number in range(15)
        ]
        assert sum(bins) == 1


async def risk_once_known(store: FeedbackStore) -> Any:
    monitor = RiskMonitor(store)
    await until(lambda: bool(list(monitor.read())))
    (risk,) = monitor.read()
    return risk


@async_test
async def test_a_scrape_shows_that_a_certificate_is_broken(on: dict[str, Any]) -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED), **on) as api:
        for _ in range(20):
            row = await ask(api)
            await tell(api, row["prediction_id"], None)
        wanted = 'dalorra_certificate_violated{adapter="topics",policy="risk_0.05"'
        # the first scrape starts the question to the database, a later one has the answer
        end_s = time.monotonic() + 20
        found: list[str] = []
        while not any(line.endswith(" 1.0") for line in found) and time.monotonic() < end_s:
            text = (await api.client.get("/metrics")).text
            found = [line for line in text.splitlines() if line.startswith(wanted)]
            await asyncio.sleep(0.02)
        assert [line.rpartition(" ")[2] for line in found] == ["1.0"]


def test_no_text_of_a_request_is_stored(tmp_path: Path) -> None:
    @async_test
    async def check() -> None:
        async with running(state_dir=tmp_path) as api:
            row = await ask(api, "a sure xylophone", metadata={"who": "zebra"})
            await tell(api, row["prediction_id"], row["label"])

    check()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"billing" in kept or b"fraud" in kept or b"other" in kept
    assert b"xylophone" not in kept
    assert b"zebra" not in kept


# -- what is refused --------------------------------------------------------------------------


@async_test
async def test_an_unknown_label_is_told_its_neighbours(tmp_path: Path) -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED), state_dir=tmp_path) as api:
        row = await ask(api)
        for label, close in (("bilings", ["billing"]), ("ooos", ["oos"]), ("zzz", [])):
            response = await tell(api, row["prediction_id"], label)
            assert code_of(response) == (422, "unknown_label")
            assert response.json()["errors"][0]["close_names"] == close
        assert await api.metric("feedback_rejections_total", reason="unknown_label") == 3
        assert store_of(api).count() == 0


@async_test
async def test_a_choice_adapter_takes_its_choices_labels(tmp_path: Path) -> None:
    async with running(FakeEngine(QUIZ), state_dir=tmp_path) as api:
        asked = {"input": {"question": "a sure thing?", "choices": ["x", "y", "z"]}}
        row = (await api.classify(asked)).json()["data"][0]
        assert code_of(await tell(api, row["prediction_id"], "x")) == (422, "unknown_label")
        assert (await tell(api, row["prediction_id"], "B")).status_code == 202


@async_test
async def test_ids_that_this_server_did_not_sign(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path) as api:
        good = (await ask(api))["prediction_id"]
        foreign = PredictionSigner(["x" * 40]).sign(make_claim())
        for bad in ("p_1", good[:-4], good.replace(".", ",", 1), foreign, "é"):
            response = await tell(api, bad, None)
            assert code_of(response) == (404, "prediction_not_found"), bad
        assert await api.metric("feedback_rejections_total", reason="bad_prediction_id") == 5
        assert store_of(api).count() == 0


@async_test
async def test_an_id_of_an_adapter_that_is_not_loaded(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path) as api:
        sign = api.service.signer.sign
        response = await tell(api, sign(make_claim(adapter="gone")), "billing")
        assert code_of(response) == (404, "model_not_found")
        assert await api.metric("feedback_rejections_total", reason="unknown_adapter") == 1


@async_test
async def test_labels_for_an_earlier_revision_are_kept_under_its_name(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path) as api:
        claim = make_claim(revision="000000000000", issued_at=int(time.time()))
        response = await tell(api, api.service.signer.sign(claim), "billing")
        assert response.json()["stored"]
        (count,) = store_of(api).risk_counts()
        assert count.revision == "000000000000"
        text = (await api.client.get("/metrics")).text
        assert "000000000000" not in text


@async_test
async def test_an_id_older_than_the_retention(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path, feedback_retention_days=7) as api:
        old = make_claim(issued_at=int(time.time()) - 8 * 86_400)
        response = await tell(api, api.service.signer.sign(old), "billing")
        assert code_of(response) == (404, "prediction_not_found")
        assert "more than 7 days ago" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "#/prediction_id"),
        ({"prediction_id": "x"}, "#/label"),
        ({"prediction_id": "", "label": "a"}, "#/prediction_id"),
        ({"prediction_id": "x" * 4097, "label": "a"}, "#/prediction_id"),
        ({"prediction_id": 1, "label": "a"}, "#/prediction_id"),
        ({"prediction_id": "\ud800", "label": "a"}, "#/prediction_id"),
        ({"prediction_id": "x", "label": 1}, "#/label"),
        ({"prediction_id": "x", "label": ["a"]}, "#/label"),
        ({"prediction_id": "x", "label": "a\x00"}, "#/label"),
        ({"prediction_id": "x", "label": None, "lable": "a"}, "#/lable"),
        (
            {"prediction_id": "x", "label": "a", "source": "two words"},
            "#/source",
        ),
        ({"prediction_id": "x", "label": "a", "source": "x" * 65}, "#/source"),
        ([], "#"),
    ],
)
@async_test
async def test_bodies_that_do_not_keep_to_the_schema(
    tmp_path: Path, body: Any, pointer: str
) -> None:
    async with running(state_dir=tmp_path) as api:
        headers = {"content-type": "application/json"}
        sent = json.dumps(body)  # in ASCII: a lone surrogate can be sent like this
        response = await api.client.post("/v1/feedback", content=sent, headers=headers)
        assert code_of(response) == (422, "invalid_request")
        assert pointer in [fault["pointer"] for fault in response.json()["errors"]]


@async_test
async def test_a_misspelt_field_is_told_the_right_one(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path) as api:
        response = await tell(api, "x", None, sorce="audit")
        assert "did you mean source?" in response.json()["detail"]


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (b"{", "application/json", (400, "malformed_json")),
        (b'{"label": "a", "label": "b"}', "application/json", (400, "malformed_json")),
        (b"\xff", "application/json", (400, "malformed_json")),
        (b"{}", "text/plain", (415, "unsupported_media_type")),
        (b" " * 2000, "application/json", (413, "body_too_large")),
    ],
)
@async_test
async def test_bodies_that_are_no_json_or_too_large(
    tmp_path: Path, content: bytes, kind: str, expected: tuple[int, str]
) -> None:
    async with running(state_dir=tmp_path, max_body_bytes=1024) as api:
        headers = {"content-type": kind}
        response = await api.client.post("/v1/feedback", content=content, headers=headers)
        assert code_of(response) == expected


@async_test
async def test_feedback_may_be_turned_off() -> None:
    async with running(feedback_url="off") as api:
        row = await ask(api)
        assert row["prediction_id"]
        response = await tell(api, row["prediction_id"], row["label"])
        assert code_of(response) == (404, "feedback_disabled")


@async_test
async def test_before_the_model_is_loaded_nothing_is_taken(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    async with running(engine, wait=False, state_dir=tmp_path) as api:
        response = await tell(api, "x", None)
        assert code_of(response) == (503, "not_ready")


# -- when the database is away ----------------------------------------------------------------


@async_test
async def test_without_its_database_the_server_still_answers(
    postgresql: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgresql.make_database()
    async with running(state_dir=tmp_path, feedback_url=url) as api:
        row = await ask(api)
        await asyncio.to_thread(postgresql.stop, "immediate")
        try:
            with caplog.at_level(logging.ERROR):
                response = await tell(api, row["prediction_id"], row["label"])
            assert code_of(response) == (503, "feedback_unavailable")
            assert int(response.headers["retry-after"]) > 0
            assert (await ask(api, "another sure thing"))["decision"] == "accept"
            assert (await api.client.get("/health/ready")).status_code == 200
            assert (await api.client.get("/metrics")).status_code == 200
        finally:
            await asyncio.to_thread(postgresql.start)
        assert (await tell(api, row["prediction_id"], row["label"])).json()["stored"]
        assert await api.metric("feedback_rejections_total", reason="unavailable") == 1
    assert postgresql.password not in caplog.text


@async_test
async def test_a_slow_database_holds_up_nothing_else(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path, request_timeout_s=1.0) as api:
        rows = [await ask(api, f"a sure thing {number}") for number in range(MAX_INSIDE + 1)]
        with sqlite3.connect(tmp_path / "feedback.sqlite3", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = [
                asyncio.ensure_future(tell(api, row["prediction_id"], row["label"]))
                for row in rows[:MAX_INSIDE]
            ]
            await until(lambda: store_of(api)._num_inside == MAX_INSIDE)
            # one more than may wait is told to come back, at once; the rest goes on
            response = await tell(api, rows[-1]["prediction_id"], None)
            assert code_of(response) == (503, "feedback_unavailable")
            assert (await ask(api))["decision"] == "accept"
            answers = await asyncio.gather(*waiting)
            assert {code_of(answer) for answer in answers} == {(504, "deadline_exceeded")}
            other.execute("ROLLBACK")
        other.close()
        assert store_of(api)._num_inside == 0
        # whether it was stored or not: sending it again is safe
        assert (await tell(api, rows[0]["prediction_id"], rows[0]["label"])).status_code == 202


# -- crashes ----------------------------------------------------------------------------------


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server in a process of its own; yield it and its URL once it is ready."""
    command = [sys.executable, "-m", "tests.support.serve_fake", *arguments]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=output) as process,
    ):
        try:
            yield process, f"http://127.0.0.1:{read_log(log, process)['listening']['port']}"
        finally:
            process.kill()


def read_log(log: Path, process: subprocess.Popen[bytes]) -> dict[str, dict[str, Any]]:
    """Return the log by event, once the server is ready."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        events = {line["event"]: line for line in map(json.loads, lines)}
        if "ready" in events:
            return events
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_what_was_acknowledged_survives_kill_9(database_url: str, tmp_path: Path) -> None:
    options = ("--state-dir", str(tmp_path / "state"), "--feedback-url", database_url)
    acknowledged: dict[str, str] = {}
    texts = [f"a sure thing {number}" for number in range(64)]
    with (
        serving(tmp_path / "log", *options) as (process, url),
        httpx.Client(base_url=url, timeout=WAIT_S) as client,
    ):
        answered = client.post("/v1/classify", json={"input": texts}).json()["data"]
        ids = {row["prediction_id"]: row["label"] for row in answered}
        assert len(ids) == 64

        def send(prediction_id: str) -> None:
            body = {"prediction_id": prediction_id, "label": ids[prediction_id]}
            try:
                response = client.post("/v1/feedback", json=body)
            except httpx.TransportError:
                return
            if response.status_code == 202:
                acknowledged[prediction_id] = response.json()["outcome"]
                if len(acknowledged) == 20:
                    process.send_signal(signal.SIGKILL)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(send, ids))
        assert process.wait(WAIT_S) == -signal.SIGKILL
    assert 20 <= len(acknowledged) < 64
    database = create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with database.connect() as connection:
        stored = connection.execute(select(func.count()).select_from(FEEDBACK)).scalar_one()
    database.dispose()
    assert len(acknowledged) <= stored <= len(acknowledged) + 4

    # a new process verifies the old ids: the secret outlived the old one as well
    with serving(tmp_path / "log2", *options) as (_, url):
        for prediction_id in acknowledged:
            body = {"prediction_id": prediction_id, "label": ids[prediction_id]}
            response = httpx.post(f"{url}/v1/feedback", json=body, timeout=WAIT_S)
            assert (response.status_code, response.json()["stored"]) == (202, False)


@async_test
async def test_replicas_that_share_a_secret_take_each_others_ids(
    postgresql: PostgresServer, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 40 + "\n")
    url = postgresql.make_database()
    shared = {"secret_file": secret, "feedback_url": url}
    async with running(**shared) as one, running(**shared) as two:
        row = await ask(one)
        assert (await tell(two, row["prediction_id"], row["label"])).json()["stored"]
        assert not (await tell(one, row["prediction_id"], row["label"])).json()["stored"]


# -- at the start -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"DALORRA_FEEDBACK_URL": "postgresql://u:hunter2@127.0.0.1:1/d"},
            "feedback_url: postgresql://u:***@127.0.0.1:1/d cannot be used: ",
        ),
        ({"DALORRA_FEEDBACK_URL": "hunter2"}, "feedback_url: not a database URL"),
        ({"DALORRA_SECRET_FILE": "/no/such/secret"}, "secret_file: /no/such/secret cannot be read"),
        ({"DALORRA_STATE_DIR": "/dev/null/state"}, "state_dir: /dev/null/state cannot be made"),
    ],
)
def test_a_server_that_could_not_keep_feedback_does_not_start(
    tmp_path: Path, variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(server.cli, "configure_logging", lambda _level: None)
    arguments = ["serve", str(tmp_path), "--port", "0"]
    env = {"DALORRA_STATE_DIR": str(tmp_path / "state")} | variables
    result = CliRunner().invoke(server.cli.app, arguments, env=env)
    assert result.exit_code == 1
    assert says in result.output
    assert "hunter2" not in result.output


def test_a_user_without_a_home_is_told_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "~")  # what expanduser calls a home that cannot be determined
    monkeypatch.setattr(server.cli, "configure_logging", lambda _level: None)
    result = CliRunner().invoke(server.cli.app, ["serve", str(tmp_path), "--port", "0"])
    assert result.exit_code == 1
    assert "set DALORRA_STATE_DIR to a directory this user may write to" in result.output


@async_test
async def test_the_policy_and_its_target_travel_in_the_id() -> None:
    uncertified = replace(TOPICS_CERTIFIED, name="plain", policies=TOPICS.policies)
    async with running(FakeEngine(TOPICS_CERTIFIED, uncertified), feedback_url="off") as api:
        verify = api.service.signer.verify
        claim = verify((await ask(api, model="topics"))["prediction_id"])
        assert (claim.policy, claim.target_risk, claim.decision) == ("risk_0.05", 0.05, "accept")
        assert claim.default_sampling
        claim = verify((await ask(api, model="plain"))["prediction_id"])
        assert (claim.policy, claim.target_risk) == ("default", None)
        claim = verify((await ask(api, model="topics", num_samples=2))["prediction_id"])
        assert (claim.num_samples, claim.target_risk) == (2, None)
        assert not claim.default_sampling

"""What every route that classifies has in common: slow bodies, priorities, times, the log line."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.api import Api, async_test, running, until

TENSOR = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["one two"]}
SHAPES: dict[str, dict[str, Any]] = {
    "/v1/classify": {"input": "one two"},
    "/classify": {"input": "one two"},
    "/predict": {"inputs": "one two"},
    "/v2/models/topics/infer": {"inputs": [TENSOR]},
}
LATER: dict[str, dict[str, Any]] = {
    "/v1/classify": {"input": "one two", "priority": 3},
    "/v2/models/topics/infer": {"inputs": [TENSOR], "parameters": {"priority": "batch"}},
}
BODIES = (*SHAPES, "/v1/policies/evaluate", "/v1/feedback")


class SlowBody:
    """A body that begins, and goes on when it is told to."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'{"inp'
        self.begun.set()
        await self.go_on.wait()

    async def post(self, api: Api, path: str) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return await api.client.post(path, content=self, headers=headers)


@pytest.mark.parametrize("path", BODIES)
@async_test
async def test_a_body_that_does_not_come_is_a_408(path: str, tmp_path: Path) -> None:
    async with running(body_timeout_s=0.02, state_dir=tmp_path) as api:
        response = await SlowBody().post(api, path)
        assert response.status_code == 408
        problem = response.json()
        assert problem["code"] == "request_timeout"
        assert "body_timeout_s (0.02 s)" in problem["detail"]
        assert response.headers["connection"] == "close"
        await api.check_healthy()


@async_test
async def test_slow_bodies_are_counted() -> None:
    async with running(body_timeout_s=0.01) as api:
        await SlowBody().post(api, "/v1/classify")
        assert await api.metric("rejections_total", reason="slow_client") == 1


@async_test
async def test_the_deadline_of_a_request_comes_before_the_time_for_its_body() -> None:
    async with running(body_timeout_s=20) as api:
        headers = {"Content-Type": "application/json", "X-Request-Timeout-Ms": "20"}
        response = await api.client.post("/predict", content=SlowBody(), headers=headers)
        assert (response.status_code, response.json()["code"]) == (504, "deadline_exceeded")


@async_test
async def test_clients_that_send_slowly_do_not_keep_others_from_giving_feedback(
    tmp_path: Path,
) -> None:
    async with running(state_dir=tmp_path) as api:
        (row,) = (await api.classify({"input": "a sure thing"})).json()["data"]
        slow = [SlowBody() for _ in range(70)]  # there are 64 places
        tasks = [asyncio.create_task(body.post(api, "/v1/feedback")) for body in slow]
        await asyncio.gather(*(body.begun.wait() for body in slow))
        given = {"prediction_id": row["prediction_id"], "label": row["label"]}
        assert (await api.client.post("/v1/feedback", json=given)).status_code == 202
        for body in slow:
            body.go_on.set()
        assert {response.status_code for response in await asyncio.gather(*tasks)} == {400}


@pytest.mark.parametrize("path", SHAPES)
@async_test
async def test_every_shape_says_how_long_its_stages_took(path: str) -> None:
    async with running() as api:
        response = await api.client.post(path, json=SHAPES[path])
        assert response.status_code == 200
        stages = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
        assert [name for name, _ in stages] == ["queue", "tokenize", "forward", "uq"]
        assert all(float(duration) >= 0 for _, duration in stages)
        assert response.headers["x-model-revision"] == "3f9a00112233"
        assert response.headers["x-compute-tokens"] == str(4 * 4)


@pytest.mark.parametrize("path", SHAPES)
@async_test
async def test_the_log_line_knows_who_answered_and_how_long_it_took(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.middleware")
    async with running() as api:
        await api.client.post(path, json=SHAPES[path])
    (line,) = [record for record in caplog.records if record.message == "request"]
    facts = {name: getattr(line, name) for name in ("model", "revision", "rows", "tokens")}
    expected = {"model": "topics", "revision": "3f9a00112233", "rows": 1, "tokens": 4}
    assert facts == expected
    for stage in ("queue", "tokenize", "forward", "uq"):
        assert getattr(line, f"{stage}_ms") >= 0
    assert "one two" not in str(line.__dict__)


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [(path, body, {"X-Priority": "batch"}) for path, body in SHAPES.items()]
    + [(path, body, {}) for path, body in LATER.items()]
    + [(path, body, {"X-Priority": "interactive"}) for path, body in LATER.items()],
)
@async_test
async def test_a_request_of_priority_batch_takes_a_place_among_its_kind(
    path: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    async with running(max_requests=2, batch_priority_share=0.5) as api:
        api.engine.gate.clear()

        async def post() -> httpx.Response:
            return await api.client.post(path, json=body, headers=headers)

        first = asyncio.create_task(post())
        await until(api.engine.entered.is_set)
        refused = await post()
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert "priority batch" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        urgent = asyncio.create_task(api.client.post(path, json=SHAPES[path]))
        await until(lambda: api.service.admission.num_requests == 2)
        api.engine.gate.set()
        assert [(await task).status_code for task in (first, urgent)] == [200, 200]
        api.check_idle()


@pytest.mark.parametrize("bad", ["", "Batch", "urgent", "batch, interactive"])
@async_test
async def test_a_priority_that_is_none_is_refused(bad: str) -> None:
    async with running() as api:
        response = await api.classify({"input": "x"}, X_Priority=bad)
        assert (response.status_code, response.json()["code"]) == (400, "bad_header")
        assert response.json()["errors"][0]["code"] == "X-Priority"

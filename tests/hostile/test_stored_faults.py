"""Faults of what is stored: adapters cut short, numbers gone bad, a full disk, a lost database.

The real engine on tiny models where it matters; after each fault a normal request succeeds.
"""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from sqlalchemy import event

from benchmarks.serving.tiny import tiny_revisions
from server.app import create_app
from server.engines.local import LocalEngine
from server.settings import Settings
from tests.support.api import Api, async_test, running
from tests.support.postgresql import PostgresServer

pytestmark = pytest.mark.integration


TEXT = {"model": "tiny", "input": "book a flight"}
TENSORS = "adapter.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model and a root of two revisions of one adapter."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_revisions(folder, ["rev-a", "rev-b"])
    return folder


@pytest.fixture
def root(tiny: Path, tmp_path: Path) -> Path:
    """Return an adapter root that a test may spoil."""
    return shutil.copytree(tiny / "root", tmp_path / "root")


@contextlib.asynccontextmanager
async def served(
    tiny: Path, root: Path, folder: Path
) -> AsyncIterator[tuple[httpx.AsyncClient, LocalEngine, FastAPI]]:
    """Serve the first revision; the adapter root is there to load the other one from."""
    engine = LocalEngine([tiny / "root" / "rev-a"], base=str(tiny / "base"), device="cpu")
    values = {"adapter_root": root, "state_dir": folder / "state", "feedback_url": "off"}
    app = create_app(lambda: engine, Settings.model_validate(values))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await app.state.service.lifecycle.loaded()
        yield client, engine, app


async def load(client: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    return await client.post("/v1/adapters", json={"source": "rev-b", "name": "other", **changes})


async def check_healthy(client: httpx.AsyncClient, app: FastAPI) -> None:
    answer = await client.post("/v1/classify", json=TEXT)
    assert answer.status_code == 200, answer.text
    admission = app.state.service.admission
    assert (admission.num_requests, admission.num_rows, admission.num_tokens) == (0, 0, 0)


@async_test
async def test_a_truncated_adapter_is_refused_and_served_once_it_is_whole(
    tiny: Path, root: Path, tmp_path: Path
) -> None:
    path = root / "rev-b" / TENSORS
    whole = path.read_bytes()
    async with served(tiny, root, tmp_path) as (client, _, app):
        for size in (0, 7, 8, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            refused = await load(client)
            assert (refused.status_code, refused.json()["code"]) == (422, "adapter_invalid")
            assert str(tmp_path) not in refused.text
            asked = await client.post("/v1/classify", json={**TEXT, "model": "other"})
            assert asked.status_code == 404
            await check_healthy(client, app)
        path.write_bytes(whole)
        assert (await load(client)).status_code == 201
        asked = await client.post("/v1/classify", json={**TEXT, "model": "other"})
        assert asked.status_code == 200
        await check_healthy(client, app)


@async_test
async def test_an_adapter_that_is_cut_while_it_loads_is_whole_or_refused(
    tiny: Path, root: Path, tmp_path: Path
) -> None:
    path = root / "rev-b" / TENSORS
    whole = path.read_bytes()
    stop = threading.Event()

    def cut_and_mend() -> None:
        while not stop.is_set():
            path.write_bytes(whole[: len(whole) // 2])
            path.write_bytes(whole)

    vandal = threading.Thread(target=cut_and_mend, daemon=True)
    async with served(tiny, root, tmp_path) as (client, _, app):
        assert (await load(client)).status_code == 201
        asked = {**TEXT, "model": "other"}
        expected = (await client.post("/v1/classify", json=asked)).json()["data"][0]["probs"]
        vandal.start()
        try:
            for _ in range(12):
                assert (await load(client)).status_code in (201, 422)
                found = (await client.post("/v1/classify", json=asked)).json()["data"][0]["probs"]
                assert found == pytest.approx(expected, abs=1e-4)
        finally:
            stop.set()
            vandal.join(10)
        await check_healthy(client, app)


@async_test
async def test_numbers_that_went_bad_are_never_an_answer(
    tiny: Path, root: Path, tmp_path: Path
) -> None:
    async with served(tiny, root, tmp_path) as (client, engine, app):
        tensors = [value for value in _tensors_of(engine) if value.is_floating_point()]
        assert tensors
        kept = [value.clone() for value in tensors]
        for value in tensors:
            value.fill_(torch.nan)
        answer = await client.post("/v1/classify", json={**TEXT, "seed": 91})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "nan" not in answer.text.lower().replace("finance", "")
        for value, good in zip(tensors, kept, strict=True):
            value.copy_(good)
        answer = await client.post("/v1/classify", json={**TEXT, "seed": 92})
        assert answer.status_code == 200
        await check_healthy(client, app)


def _tensors_of(engine: LocalEngine) -> list[torch.Tensor]:
    """Return the parameters of the adapter that a new seed's samples are made from."""
    (loaded,) = engine._loaded.values()
    return list(loaded.predictor._state.params.values())


@async_test
async def test_a_full_disk_refuses_labels_and_nothing_else(tmp_path: Path) -> None:
    async with running(state_dir=tmp_path) as api:
        store = api.service.feedback
        assert store is not None
        rows = [await answered(api, n) for n in range(40)]
        limit = {"pages": 0}

        def limit_pages(connection: Any, *_: Any) -> None:
            connection.execute(f"PRAGMA max_page_count={limit['pages'] or 10**6}")

        event.listen(store._engine, "checkout", limit_pages)
        limit["pages"] = 1  # SQLite keeps what it has: the file may not grow from here on
        told = [await tell(api, row, source="x" * 64) for row in rows]
        refused = [answer for answer in told if answer.status_code != 202]
        assert refused, "the disk never was full"
        for answer in refused:
            assert (answer.status_code, answer.json()["code"]) == (503, "feedback_unavailable")
            assert answer.headers["retry-after"]
            assert str(tmp_path) not in answer.text
        await api.check_healthy()
        limit["pages"] = 0
        again = [await tell(api, row, source="x" * 64) for row in rows]
        assert {answer.status_code for answer in again} == {202}
        assert store.count() == len(rows)
        await api.check_healthy()


@async_test
async def test_a_lost_database_refuses_labels_and_nothing_else(
    postgresql: PostgresServer, tmp_path: Path
) -> None:
    url = postgresql.make_database()
    async with running(state_dir=tmp_path, feedback_url=url) as api:
        row = await answered(api, 0)
        assert (await tell(api, row)).status_code == 202
        await asyncio.to_thread(postgresql.stop, "immediate")
        try:
            missed = await answered(api, 1)
            refused = await tell(api, missed)
            assert (refused.status_code, refused.json()["code"]) == (503, "feedback_unavailable")
            assert postgresql.password not in refused.text
            await api.check_healthy()
        finally:
            await asyncio.to_thread(postgresql.start)
        assert (await tell(api, missed)).json()["stored"] is True
        assert (await tell(api, row)).json()["stored"] is False
        await api.check_healthy()


async def answered(api: Api, number: int) -> dict[str, Any]:
    answer = await api.classify({"input": f"a sure thing {number}"})
    assert answer.status_code == 200
    return answer.json()["data"][0]


async def tell(api: Api, row: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"prediction_id": row["prediction_id"], "label": row["label"], **fields}
    return await api.client.post("/v1/feedback", json=body)

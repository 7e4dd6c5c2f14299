"""Adapters at run time through the API: load, replace, alias, canary, shadow, unload."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.ports import AdapterBaseMismatchError, AdapterLoadError
from tests.support.api import Api, async_test, running, until
from tests.support.fake_engine import QUIZ, TOPICS, FakeEngine

OLD = replace(TOPICS, memory_bytes=2**20)
NEW = replace(OLD, revision="bbbb00112233")
TONE = replace(
    OLD, name="tone", revision="cccc00112233", labels=("angry", "calm", "glad", "sad"), policies=()
)


@asynccontextmanager
async def serving(tmp_path: Path, **settings: Any) -> AsyncIterator[Api]:
    """An app over a root of directories, with the adapter ``quiz`` given at start."""
    engine = FakeEngine(QUIZ)
    engine.library = {"topics-v1": OLD, "topics-v2": NEW, "tone": TONE}
    for name in (*engine.library, "broken"):
        (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
    where = {"adapter_root": tmp_path / "root", "state_dir": tmp_path / "state"}
    async with running(engine, **where, **settings) as api:
        yield api


async def load(api: Api, source: str, **fields: Any) -> httpx.Response:
    return await api.client.post("/v1/adapters", json={"source": source, **fields})


async def ask(api: Api, model: str, text: str = "a sure thing", **headers: str) -> httpx.Response:
    return await api.classify({"model": model, "input": text}, **headers)


@async_test
async def test_an_adapter_is_loaded_asked_and_unloaded(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await ask(api, "topics")).status_code == 404
        loaded = await load(api, "topics-v1", pin=True)
        assert loaded.status_code == 201, loaded.text
        entry = loaded.json()
        assert entry["id"] == f"topics:{OLD.revision}"
        assert (entry["state"], entry["pinned"], entry["saved"]) == ("resident", True, True)
        answer = await ask(api, "topics")
        assert answer.json()["model"] == f"topics:{OLD.revision}"
        cards = {card["id"] for card in (await api.client.get("/v1/models")).json()["data"]}
        assert cards == {"quiz", "topics"}
        gone = await api.client.delete("/v1/adapters/topics")
        assert gone.json() == {"id": entry["id"], "removed": True, "saved": True}
        assert (await ask(api, "topics")).status_code == 404
        assert (await api.client.delete("/v1/adapters/topics")).status_code == 404
        await until(lambda: set(api.engine.cards) == {"quiz"})


@async_test
async def test_the_listing_shows_what_is_loaded_and_what_could_be(tmp_path: Path) -> None:
    async with serving(tmp_path, adapter_memory_mb=64) as api:
        await load(api, "topics-v1")
        listing = (await api.client.get("/v1/adapters")).json()
        assert [entry["id"] for entry in listing["data"]] == [
            f"quiz:{QUIZ.revision}",
            f"topics:{OLD.revision}",
        ]
        assert listing["data"][0]["source"] is None
        stored = {entry["source"]: entry["problem"] for entry in listing["stored"]}
        assert stored == {
            "broken": "no manifest.json",
            "tone": None,
            "topics-v1": None,
            "topics-v2": None,
        }
        assert listing["memory_bytes"] == 2**20
        assert listing["memory_limit_bytes"] == 64 * 2**20
        assert str(tmp_path) not in str(listing)


@async_test
async def test_replacing_an_adapter_under_load_fails_no_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        stop = asyncio.Event()
        answers: list[httpx.Response] = []

        async def traffic(n: int) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                answers.append(await ask(api, "topics", f"text {n} {count}"))

        clients = [asyncio.create_task(traffic(n)) for n in range(4)]
        for source in ("topics-v2", "topics-v1") * 5:
            swapped = await load(api, source)
            assert swapped.status_code == 201
            revision = swapped.json()["revision"]
            # whoever asks after the load was confirmed is answered by what was loaded
            assert (await ask(api, "topics")).json()["model"] == f"topics:{revision}"
        stop.set()
        await asyncio.gather(*clients)
        assert len(answers) > 20
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-model-revision"] for answer in answers} == {
            OLD.revision,
            NEW.revision,
        }
        await until(lambda: len(api.engine.cards) == 2)
        api.check_idle()


@async_test
async def test_requests_for_adapters_with_other_labels_share_a_batch(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        await load(api, "tone")
        api.engine.gate.clear()
        first = asyncio.create_task(ask(api, "topics", "who comes first"))
        await until(api.engine.entered.is_set)
        others = [
            asyncio.create_task(ask(api, "topics", "same length here")),
            asyncio.create_task(ask(api, "tone", "same length there")),
        ]
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 2)
        api.engine.gate.set()
        await first
        topics, tone = [(await task).json() for task in others]
        assert len(api.engine.batches[-1]) == 2  # one batch for both
        assert topics["data"][0]["labels"] == list(OLD.labels)
        assert tone["data"][0]["labels"] == list(TONE.labels)
        alone = (await ask(api, "tone", "same length there")).json()
        assert alone["data"][0]["probs"] == tone["data"][0]["probs"]


@async_test
async def test_a_canary_gets_its_weight_and_says_who_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        await load(api, "topics-v2", activate=False)
        old, new = f"topics:{OLD.revision}", f"topics:{NEW.revision}"
        body = {"targets": [{"model": old, "weight": 3}, {"model": new, "weight": 1}]}
        made = await api.client.put("/v1/aliases/topics@prod", json=body)
        assert made.status_code == 201, made.text
        assert [target["share"] for target in made.json()["targets"]] == [0.75, 0.25]
        models = [
            (await ask(api, "topics@prod", X_Request_Id=f"r{n}")).json()["model"] for n in range(60)
        ]
        assert set(models) == {old, new}
        assert models.count(old) > models.count(new)
        again = await ask(api, "topics@prod", X_Request_Id="r7")
        assert again.json()["model"] == models[7]
        moved = await api.client.put("/v1/aliases/topics@prod", json={"targets": [{"model": new}]})
        assert moved.status_code == 200
        assert (await ask(api, "topics@prod", X_Request_Id="r0")).json()["model"] == new
        in_use = await api.client.delete(f"/v1/adapters/{new}")
        assert (in_use.status_code, in_use.json()["code"]) == (409, "adapter_in_use")
        assert (await api.client.delete("/v1/aliases/topics@prod")).status_code == 200
        assert (await ask(api, "topics@prod")).status_code == 404


@async_test
async def test_a_shadow_is_compared_and_never_seen(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        # another seed by default, so that the two sometimes disagree
        api.engine.library["topics-v2"] = replace(
            NEW, defaults=replace(OLD.defaults, num_samples=1, seed=9)
        )
        await load(api, "topics-v2", activate=False)
        candidate = f"topics:{NEW.revision}"
        body = {
            "targets": [{"model": "topics"}],
            "shadow": {"model": candidate, "share": 1.0},
        }
        await api.client.put("/v1/aliases/topics@prod", json=body)
        whose = {"adapter": "topics", "revision": OLD.revision, "candidate": candidate}
        for n in range(12):
            answer = await ask(api, "topics@prod", f"unclear words {n}")
            assert answer.json()["model"] == f"topics:{OLD.revision}"
        await until(lambda: api.service.shadows.num_running == 0)
        assert await api.metric("shadow_comparisons_total", **whose) == 12
        disagreements = await api.metric("shadow_disagreements_total", aspect="decision", **whose)
        assert 0 <= disagreements <= 12
        # what the shadow answered is not counted as an answer
        assert await api.metric(
            "predictions_total",
            adapter="topics",
            revision=NEW.revision,
            label="billing",
            decision="accept",
        ) in (0, None)
        api.check_idle()


@async_test
async def test_a_shadow_that_fails_fails_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        await load(api, "topics-v2", activate=False)
        body = {
            "targets": [{"model": f"topics:{OLD.revision}"}],
            "shadow": {"model": f"topics:{NEW.revision}", "share": 1.0},
        }
        await api.client.put("/v1/aliases/topics@prod", json=body)
        calls: list[int] = []

        def second_fails(_: list[str]) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise ValueError

        api.engine.fault = second_fails
        assert (await ask(api, "topics@prod")).status_code == 200
        await until(lambda: api.service.shadows.num_running == 0)
        assert await api.metric("shadow_dropped_total", reason="failed") == 1
        api.engine.fault = lambda _: None
        api.check_idle()


@async_test
async def test_an_evicted_adapter_is_loaded_again_when_it_is_asked(tmp_path: Path) -> None:
    async with serving(tmp_path, adapter_memory_mb=1) as api:
        await load(api, "topics-v1")
        await load(api, "tone")
        listing = (await api.client.get("/v1/adapters")).json()["data"]
        assert {entry["name"]: entry["state"] for entry in listing}["topics"] == "evicted"
        assert (await ask(api, "topics")).status_code == 200
        assert (await ask(api, "tone")).status_code == 200
        assert await api.metric("adapter_evictions_total") == 3


@async_test
async def test_pinning_is_changed_by_patch(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        pinned = await api.client.patch("/v1/adapters/topics", json={"pinned": True})
        assert pinned.json()["pinned"] is True
        unknown = await api.client.patch("/v1/adapters/nobody", json={"pinned": True})
        assert unknown.status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"source": "topics-v9"}, 404, "source_not_found"),
        ({"source": "broken"}, 422, "adapter_invalid"),
        ({"source": ".."}, 422, "invalid_request"),
        ({"source": "../root/tone"}, 422, "invalid_request"),
        ({"source": "/etc"}, 422, "invalid_request"),
        ({"source": "tone\x00"}, 422, "invalid_request"),
        ({"source": "tone", "name": "a:b"}, 422, "invalid_request"),
        ({"source": "tone", "name": "a@b"}, 422, "invalid_request"),
        ({"source": "tone", "paht": 1}, 422, "invalid_request"),
        ({"source": "tone", "pin": "yes"}, 422, "invalid_request"),
        ({}, 422, "invalid_request"),
        ([], 422, "invalid_request"),
    ],
)
def test_a_bad_load_is_refused_and_changes_nothing(
    tmp_path: Path, body: Any, status: int, code: str
) -> None:
    @async_test
    async def run() -> None:
        async with serving(tmp_path) as api:
            refused = await api.client.post("/v1/adapters", json=body)
            assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
            assert str(tmp_path) not in refused.text
            listing = (await api.client.get("/v1/adapters")).json()["data"]
            assert [entry["name"] for entry in listing] == ["quiz"]

    run()


@async_test
async def test_the_wrong_base_is_a_conflict_with_both_fingerprints(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:

        def fault(_: str) -> None:
            raise AdapterBaseMismatchError("another base", expected="sha256:a", found="sha256:b")

        api.engine.adapter_fault = fault
        refused = await load(api, "tone")
        assert (refused.status_code, refused.json()["code"]) == (409, "base_mismatch")
        fault_said = refused.json()["errors"][0]
        assert (fault_said["expected"], fault_said["found"]) == ("sha256:a", "sha256:b")


@async_test
async def test_a_file_cut_short_while_it_is_loaded_leaves_the_old_one_serving(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")

        def fault(_: str) -> None:
            raise AdapterLoadError("adapter.safetensors has another sha256 than the manifest says")

        api.engine.adapter_fault = fault
        assert (await load(api, "topics-v2")).status_code == 422
        assert (await ask(api, "topics")).json()["model"] == f"topics:{OLD.revision}"
        api.check_idle()


@pytest.mark.parametrize("alias", ["prod", "@prod", "topics@", "a@b@c", "to pics@prod", "..@x"])
def test_an_alias_has_a_name_and_its_own_half(tmp_path: Path, alias: str) -> None:
    @async_test
    async def run() -> None:
        async with serving(tmp_path) as api:
            path = httpx.URL("http://localhost/v1/aliases/").copy_with(
                raw_path=f"/v1/aliases/{alias.replace(' ', '%20')}".encode()
            )
            refused = await api.client.put(path, json={"targets": [{"model": "quiz"}]})
            assert refused.status_code == 422, refused.text

    run()


@async_test
async def test_a_restart_serves_what_was_loaded_before(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await load(api, "topics-v1")
        await api.client.put("/v1/aliases/topics@prod", json={"targets": [{"model": "topics"}]})
    async with serving(tmp_path) as api:
        answer = await ask(api, "topics@prod")
        assert answer.json()["model"] == f"topics:{OLD.revision}"


@async_test
async def test_a_load_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    """Its thread is left behind, as that of a hung batch is."""
    async with serving(tmp_path) as api:
        api.engine.load_gate.clear()
        loading = asyncio.create_task(load(api, "tone"))
        await until(lambda: api.service.adapters.loading)
        await api.service.lifecycle.stop()
        assert api.service.lifecycle.abandoned
        assert (await loading).json()["code"] == "engine_unavailable"


@async_test
async def test_an_adapter_given_at_start_is_not_let_go(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        refused = await api.client.patch("/v1/adapters/quiz", json={"pinned": False})
        assert (refused.status_code, refused.json()["code"]) == (409, "adapter_in_use")
        assert (await api.client.get("/v1/adapters")).json()["data"][0]["pinned"] is True

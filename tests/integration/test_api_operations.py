"""Model cards, probes, metrics, versions and documentation."""

import math
import re
from pathlib import PurePosixPath

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.middleware import route_template
from server.schemas.examples import CLASSIFY_EXAMPLES
from tests.support.api import async_test, running
from tests.support.fake_engine import QUIZ, TOPICS, TOPICS_POINT, FakeEngine

WHOSE = {"adapter": "topics", "revision": TOPICS.revision}
PROBES = [
    "/health/live",
    "/health/ready",
    "/health/startup",
    "/livez",
    "/readyz",
    "/health",
    "/v2/health/live",
    "/v2/health/ready",
]


@async_test
async def test_model_cards_hold_what_a_client_needs_and_no_host_path() -> None:
    async with running(FakeEngine(TOPICS, QUIZ, TOPICS_POINT), max_rows=7) as api:
        response = await api.client.get("/v1/models")
        listed = response.json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["quiz", "topics", "topics-mle"]
        card = (await api.client.get("/v1/models/topics")).json()
        assert card == listed["data"][1]
        assert card["parent"] == "tiny-base"
        assert card["labels"] == ["billing", "fraud", "other"]
        assert card["sampling"]["mask_set"] == "ms_4_0"
        assert card["policies"][0]["guarantee"] is None
        assert card["limits"] == {
            "max_rows": 7,
            "max_text_chars": 65536,
            "max_tokens": 64,
            "max_num_samples": 64,
            "max_body_bytes": 2097152,
        }
        assert listed["data"][2]["limits"]["max_num_samples"] == 1
        assert listed["data"][2]["sampling"]["seed"] is None
        values = re.findall(r'"([^"]*)"', response.text)
        assert not any(PurePosixPath(value).is_absolute() for value in values)
        named = await api.client.get("/v1/models/topics:3f9a00112233")
        assert named.json() == card


@pytest.mark.parametrize("path", PROBES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@async_test
async def test_probes(path: str, method: str) -> None:
    async with running() as api:
        response = await api.client.request(method, path)
        assert response.status_code == 200
        if method == "GET":
            assert response.json() == {"status": "ok"}


@async_test
async def test_version() -> None:
    async with running(git_sha="abc123") as api:
        body = (await api.client.get("/version")).json()
        assert body.keys() == {"version", "api", "git", "torch"}
        assert (body["api"], body["git"]) == ("v1", "abc123")
        info = {"version": body["version"], "torch": body["torch"], "git": "abc123"}
        assert await api.metric("build_info", **info) == 1


@async_test
async def test_metrics_as_text_and_as_openmetrics() -> None:
    async with running() as api:
        await api.classify({"input": "x"})
        text = await api.client.get("/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in parse_text(text.text)}
        assert families["dalorra_confidence_ratio"].type == "histogram"
        wanted = {"accept": "application/openmetrics-text; version=1.0.0"}
        opened = await api.client.get("/metrics", headers=wanted)
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert opened.text.endswith("# EOF\n")
        assert {f.name for f in parse_open(opened.text)} >= {"dalorra_predictions"}
        for answer in (text.text, opened.text):
            assert "_created" not in answer


@async_test
async def test_every_series_of_an_adapter_exists_before_traffic() -> None:
    async with running(FakeEngine(TOPICS, TOPICS_POINT)) as api:
        before = {line.rsplit(" ", 1)[0] for line in (await lines(api))}
        for body in (
            {"input": ["a sure thing", "lost words", "unclear"]},
            {"input": "long " * 90, "truncate": "end"},
            {"input": "x", "num_samples": 1},
        ):
            assert (await api.classify({**body, "model": "topics"})).status_code == 200
        after = {line.rsplit(" ", 1)[0] for line in (await lines(api))}
        assert after == before


async def lines(api: object) -> list[str]:
    text = (await api.client.get("/metrics")).text  # type: ignore[attr-defined]
    return [line for line in text.splitlines() if line.startswith("dalorra_")]


@async_test
async def test_metrics_for_a_client_that_asks_for_nonsense() -> None:
    async with running() as api:
        for version in ("x", "1.x", "1x.0", "", "1.0.0application", "-1", "9" * 5000, "\u00b2"):
            for kind in ("application/openmetrics-text", "text/plain"):
                accept = f"{kind};version={version}".encode("latin-1")
                answer = await api.client.get("/metrics", headers={b"accept": accept})
                assert answer.status_code == 200
                assert "dalorra_build_info" in answer.text


@async_test
async def test_adapter_metrics() -> None:
    async with running() as api:
        info = {
            "adapter": "topics",
            "revision": "3f9a00112233",
            "base": "tiny-base",
            "mask_set": "ms_4_0",
            "rank": "0",
            "signed": "no",
        }
        assert await api.metric("adapter_info", **info) == 1
        assert await api.metric("adapter_loaded", adapter="topics") == 1
        assert await api.metric("selftest_ok", **WHOSE) == 1
        assert await api.metric("selftest_max_abs_error", **WHOSE) == 1e-7
        policy = {"adapter": "topics", "revision": TOPICS.revision, "policy": "default"}
        assert await api.metric("policy_threshold", **policy, signal="accept_confidence") == 0.8
        entropy = "abstain_predictive_entropy"  # over ln 3, as in its histogram
        assert await api.metric("policy_threshold", **policy, signal=entropy) == 1 / math.log(3)
        assert await api.metric("policy_target_risk_ratio", **policy) == 0.05


@async_test
async def test_batch_metrics() -> None:
    async with running() as api:
        await api.classify({"input": ["one two three", "one"]})  # 5 and 3 tokens
        await api.check_healthy()
        assert await api.metric("batch_rows_count") >= 1
        assert await api.metric("batch_tokens_sum") >= 10 * 4
        assert await api.metric("batch_padding_ratio_sum") == pytest.approx(0.2)
        assert await api.metric("batch_released_total", reason="timeout") >= 1
        assert await api.metric("stage_duration_seconds_count", stage="forward") >= 1


@async_test
async def test_two_apps_share_no_metrics() -> None:
    async with running() as first, running() as second:
        await first.classify({"input": "x"})
        served = {"method": "POST", "route": "/v1/classify", "status": "200"}
        assert await first.metric("http_requests_total", **served) == 1
        assert await second.metric("http_requests_total", **served) == 0


@async_test
async def test_every_documented_example_works() -> None:
    async with running(FakeEngine(TOPICS, QUIZ)) as api:
        document = (await api.client.get("/openapi.json")).json()
        content = document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
        examples = content["application/json"]["examples"]
        assert examples.keys() == CLASSIFY_EXAMPLES.keys()
        for name, example in examples.items():
            model = "quiz" if name.startswith("question") else "topics"
            response = await api.classify({**example["value"], "model": model})
            assert response.status_code == 200, (name, response.text)


@async_test
async def test_documentation_can_be_switched_off() -> None:
    async with running() as api:
        assert "<h1>Dalorra" in (await api.client.get("/docs")).text
    async with running(docs=False) as api:
        for path in ("/docs", "/openapi.json"):
            assert (await api.client.get(path)).status_code == 404


@async_test
async def test_telemetry_knows_every_route() -> None:
    async with running() as api:
        document = (await api.client.get("/openapi.json")).json()
        for path in document["paths"]:
            assert route_template(path) != "unmatched"

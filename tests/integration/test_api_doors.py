"""Who may come in: every route, every spelling of a path, before the body, and without a trace."""

import contextlib
import io
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, WebSocketRoute

from server.app import create_app
from server.auth import PUBLIC_PATHS, SCOPES
from server.auth.keys import KeyFileError, write_keys
from server.logs import JsonFormatter
from server.settings import Settings
from tests.support.api import Api, async_test, running
from tests.support.fake_engine import FakeEngine
from tests.support.keys import bearer, make_entry, write_key_file

WAIT_S = 20.0
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
ROUTES = sorted(SCOPES)
EVERY_SCOPE = ("infer", "feedback", "metrics", "admin")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def concrete(template: str) -> str:
    return re.sub(r"\{\w+\}", "topics", template)


def is_refused(response: httpx.Response) -> bool:
    """A 401 in the form of every error, with what a client needs to know."""
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code == 401


# -- every route ----------------------------------------------------------------------------------


def templates(routes: Any) -> Iterator[str]:
    """Yield the template of every route, those of included routers too."""
    for route in routes:
        assert not isinstance(route, (Mount, WebSocketRoute)), route
        inner = getattr(route, "original_router", None)
        if inner is None:
            yield route.path
        else:
            prefix = route.include_context.prefix
            yield from (prefix + path for path in templates(inner.routes))


def test_every_route_is_public_or_has_a_scope_and_none_is_both() -> None:
    found = {re.sub(r"\{\w+(:\w+)?\}", "{}", path) for path in templates(_app().routes)}
    guarded = {re.sub(r"\{\w+\}", "{}", path) for path in SCOPES}
    assert found == guarded | PUBLIC_PATHS
    assert not guarded & PUBLIC_PATHS


def _app() -> Any:
    return create_app(FakeEngine, Settings(feedback_url="off"))  # type: ignore[arg-type]


@contextlib.contextmanager
def _keys(**scopes: tuple[str, ...]) -> Iterator[tuple[Path, dict[str, str]]]:
    """A file of keys for the length of a block: its path and the keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.json"
        yield path, write_key_file(path, **scopes)


@async_test
async def test_a_route_that_the_table_forgot_is_never_reached() -> None:
    with _keys(everything=EVERY_SCOPE) as (path, keys):
        async with running(api_keys_file=path) as api:
            reached: list[str] = []
            api.app.add_api_route("/forgotten", lambda: reached.append("x"), methods=["GET"])
            assert is_refused(await api.client.get("/forgotten"))
            answer = await api.client.get("/forgotten", headers=bearer(keys["everything"]))
            assert answer.status_code == 404
            assert reached == []


@async_test
async def test_no_route_answers_without_a_key() -> None:
    with _keys(one=("infer",)) as (path, _):
        async with running(api_keys_file=path) as api:
            for route in ROUTES:
                for method in METHODS:
                    assert is_refused(await api.client.request(method, concrete(route))), route
            for public in PUBLIC_PATHS:
                assert (await api.client.get(public)).status_code in (200, 503), public
                assert (await api.client.request("DELETE", public)).status_code == 405


@async_test
async def test_each_route_needs_its_own_scope() -> None:
    with _keys(**{scope: (scope,) for scope in EVERY_SCOPE}) as (path, keys):
        async with running(api_keys_file=path) as api:
            for route in ROUTES:
                for scope in EVERY_SCOPE:
                    for method in ("GET", "HEAD", "POST", "DELETE"):
                        answer = await api.client.request(
                            method, concrete(route), headers=bearer(keys[scope])
                        )
                        assert (answer.status_code == 403) == (scope != SCOPES[route]), route
                        if answer.status_code == 403 and method != "HEAD":
                            assert f"scope {SCOPES[route]}" in answer.json()["detail"]
                            assert f'scope="{SCOPES[route]}"' in answer.headers["www-authenticate"]


SPELLINGS = [
    *("//metrics", "/metrics/", "/metrics//", "/./metrics", "/x/../metrics", "/METRICS"),
    *("/%2e/metrics", "/%2fmetrics", "/metrics%2f", "/metrics%0a", "/metrics%00", "/%6detrics"),
    *("/v1/adapters%2ftopics", "/v1/adapters/topics%0a", "/v1/adapters/%2e%2e", "/v1/Adapters"),
    *("/metrics;a=b", "/metrics%3fa", "/health/live/../../metrics", "/health/live%2f..%2fmetrics"),
    *("/health/live%0a", "/health/%2e%2e/metrics", "/docs/", "/docs/oauth2-redirect", "/redoc"),
    *("/v1/models/%2e%2e/adapters", "/v1/models/x/../../adapters", "/nothing", "/", "/favicon.ico"),
]


@async_test
async def test_no_spelling_of_a_path_gets_past_its_scope() -> None:
    with _keys(infer=("infer",)) as (path, keys):
        async with running(api_keys_file=path) as api:
            for target in SPELLINGS:
                for method in ("GET", "POST"):
                    url = httpx.URL("http://localhost/").copy_with(raw_path=target.encode())
                    assert is_refused(await api.client.request(method, url)), target
                    known = bearer(keys["infer"])
                    answer = await api.client.request(method, url, headers=known)
                    # with the key of another scope: no such route, or not with this key
                    assert answer.status_code in (403, 404), (target, answer.status_code)


@async_test
async def test_without_keys_everybody_may_do_all() -> None:
    async with running() as api:
        assert (await api.classify({"input": "a"})).status_code == 200
        assert (await api.client.get("/metrics")).status_code == 200
        unknown = await api.client.get("/nothing")
        assert unknown.status_code == 404
        assert unknown.json()["instance"] == "/"


# -- keys -----------------------------------------------------------------------------------------


@async_test
async def test_only_one_well_formed_known_key_opens() -> None:
    with _keys(shop=("infer",)) as (path, keys):
        async with running(api_keys_file=path) as api:
            key = keys["shop"]
            wrong: list[list[tuple[str, str]]] = [
                [],
                [("authorization", "")],
                [("authorization", key)],
                [("authorization", "Bearer")],
                [("authorization", "Bearer ")],
                [("authorization", f"Basic {key}")],
                [("authorization", f"Bearer {key[:-1]}")],
                [("authorization", f"Bearer {key} {key}")],
                [("authorization", f"Bearer {key},{key}")],
                [("authorization", "Bearer " + "x" * 10_000)],
                [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")],
                [("authorization", "Bearer wrong"), ("authorization", f"Bearer {key}")],
                [("x-api-key", key)],
                [("cookie", f"authorization={key}")],
            ]
            for headers in wrong:
                assert is_refused(await api.client.get("/v1/models", headers=headers)), headers
            assert is_refused(await api.client.get(f"/v1/models?key={key}"))
            assert await api.metric("rejections_total", reason="auth") == len(wrong) + 1
            for form in (f"Bearer {key}", f"bearer {key}", f"BEARER   {key} "):
                answer = await api.client.get("/v1/models", headers={"authorization": form})
                assert answer.status_code == 200


@async_test
async def test_keys_are_rotated_without_a_restart() -> None:
    with _keys(old=("infer",)) as (path, keys):
        async with running(api_keys_file=path) as api:
            ring = _ring(api)
            assert (await _models(api, keys["old"])).status_code == 200
            new = write_key_file(path, new=("infer",))["new"]
            ring._looked_s -= 2  # a second has passed
            assert (await _models(api, new)).status_code == 200
            assert is_refused(await _models(api, keys["old"]))
            path.write_text("no longer JSON")
            ring._looked_s -= 2
            assert (await _models(api, new)).status_code == 200
            assert await api.metric("api_keys_reload_failures_total") == 1
            path.write_text("")
            ring._looked_s -= 2
            assert is_refused(await _models(api, new))


def _ring(api: Api) -> Any:
    (doors,) = [one for one in api.app.user_middleware if "keys" in one.kwargs]
    return doors.kwargs["keys"]


async def _models(api: Api, key: str) -> httpx.Response:
    return await api.client.get("/v1/models", headers=bearer(key))


@async_test
async def test_an_expired_key_is_told_so() -> None:
    with _keys() as (path, _):
        key, entry = make_entry("late", ("infer",))
        write_keys(path, (entry.model_copy(update={"expires": entry.created}),))
        async with running(api_keys_file=path) as api:
            answer = await _models(api, key)
            assert is_refused(answer)
            assert "expired" in answer.json()["detail"]


@async_test
async def test_each_key_has_its_own_rate() -> None:
    with _keys() as (path, _):
        slow, slow_entry = make_entry("slow", ("infer",), rate_limit="3/hour")
        free, free_entry = make_entry("free", ("infer",))
        write_keys(path, (slow_entry, free_entry))
        async with running(api_keys_file=path) as api:
            for left in (2, 1, 0):
                answer = await _models(api, slow)
                assert answer.status_code == 200
                assert answer.headers["ratelimit-policy"] == '"key";q=3;w=3600'
                assert answer.headers["ratelimit"].startswith(f'"key";r={left};t=')
            refused = await _models(api, slow)
            assert refused.status_code == 429
            assert refused.json()["code"] == "rate_limited"
            assert 3590 <= int(refused.headers["retry-after"]) <= 3600
            assert refused.headers["ratelimit"].startswith('"key";r=0;t=')
            assert await api.metric("rejections_total", reason="rate_limit") == 1
            assert "ratelimit" not in (await _models(api, free)).headers
            # probes are not counted, and need no key
            assert (await api.client.get("/health/ready")).status_code == 200


def test_a_file_of_keys_that_cannot_be_used_stops_the_start(key_file: Path) -> None:
    key_file.write_text("{}x")
    with pytest.raises(KeyFileError):
        create_app(FakeEngine, Settings(feedback_url="off", api_keys_file=key_file))  # type: ignore[arg-type]


# -- nothing gets out -----------------------------------------------------------------------------


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    """Everything that is logged, as the server writes it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(lambda record: not record.name.startswith("http"))  # the client's own
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


SECRET = "s3cr3t-c4n4ry"
TEXTS = [
    json.dumps({"input": SECRET}),
    json.dumps({"input": SECRET, "policy": 3}),
    json.dumps({"input": [SECRET, 5]}),
    f'{{"input": "{SECRET}',
    f"{SECRET} is no JSON",
]


def exposures() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """Yield requests with a secret wherever a client can put one: method, path, body, headers."""
    paths = (*map(concrete, ROUTES), *sorted(PUBLIC_PATHS), f"/{SECRET}", f"/v1/{SECRET}/x")
    for number, (path, method, text) in enumerate(itertools.product(paths, ("GET", "POST"), TEXTS)):
        headers: dict[str, str] = dict.fromkeys(
            ("traceparent", "user-agent", "cookie", "x-request"), SECRET
        )
        headers["content-type"] = "application/json"
        if number % 3 == 0:
            headers["x-priority"] = SECRET
        if number % 5 == 0:
            headers["x-request-timeout-ms"] = SECRET
        yield method, f"{path}?q={SECRET}", text, headers


def test_no_secret_is_logged_or_sent_back(log_text: io.StringIO) -> None:
    def fail(texts: list[str]) -> None:
        raise ValueError(f"a bug with {SECRET} and {texts}")

    @async_test
    async def ask_everything() -> None:
        with _keys(shop=EVERY_SCOPE) as (path, keys):
            known = bearer(keys["shop"])
            async with running(api_keys_file=path) as api:
                answers = [
                    await api.client.request(method, url, content=text, headers=headers | caller)
                    for method, url, text, headers in exposures()
                    for caller in ({}, bearer(f"dk_{SECRET}"), known)
                ]
                api.engine.fault = fail
                answers.append(await api.classify({"input": SECRET}, **known))
                assert answers[-1].status_code == 500
            assert {200, 400, 401, 404, 405, 422} <= {one.status_code for one in answers}
            everything = "\n".join(f"{one.headers}{one.text}" for one in answers)
            logs = log_text.getvalue()
            assert logs.count("\n") >= len(answers) // 2
            here = str(Path(__file__).parents[2])
            for forbidden in (SECRET, keys["shop"], str(path), here, "Traceback"):
                assert forbidden not in logs, forbidden
                assert forbidden not in everything, forbidden

    ask_everything()


def test_the_caller_is_on_the_log_line(log_text: io.StringIO) -> None:
    @async_test
    async def ask() -> None:
        with _keys(shop=("infer",)) as (path, keys):
            async with running(api_keys_file=path) as api:
                await api.classify({"input": "a"}, **bearer(keys["shop"]))
                await api.classify({"input": "a"})

    ask()
    lines = [json.loads(line) for line in log_text.getvalue().splitlines()]
    known, unknown = [line for line in lines if line["event"] == "request"]
    assert (known["caller"], known["status"]) == ("shop", 200)
    assert {"model", "revision", "rows", "tokens", "queue_ms", "forward_ms"} <= known.keys()
    assert "caller" not in unknown
    assert unknown["status"] == 401


@async_test
async def test_every_answer_tells_a_browser_to_keep_out() -> None:
    with _keys(shop=EVERY_SCOPE) as (path, keys):
        async with running(api_keys_file=path) as api:
            for route in (*ROUTES, *PUBLIC_PATHS, "/nothing"):
                for headers in ({}, bearer(keys["shop"])):
                    answer = await api.client.get(concrete(route), headers=headers)
                    told = answer.headers
                    assert told["x-content-type-options"] == "nosniff"
                    assert told["x-frame-options"] == "DENY"
                    assert told["referrer-policy"] == "no-referrer"
                    assert told["cache-control"] == "no-store"
                    assert told["content-security-policy"].startswith("default-src 'none'")
                    assert "frame-ancestors 'none'" in told["content-security-policy"]
                    assert "strict-transport-security" not in told
                    assert "server" not in told


@async_test
async def test_the_page_of_the_api_needs_nothing_from_elsewhere() -> None:
    async with running() as api:
        page = await api.client.get("/docs")
        document = (await api.client.get("/openapi.json")).json()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script" not in page.text
    assert re.findall(r"(?:src|href)=\"(?!#)([^\"]+)\"", page.text) == ["/openapi.json"]
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page.text
    for name in document["components"]["schemas"]:
        assert f'<details id="{name}">' in page.text
    anchors = set(re.findall(r'href="#([^"]+)"', page.text))
    assert anchors <= set(document["components"]["schemas"])


def test_the_document_names_the_scope_of_every_operation() -> None:
    for path, item in _app().openapi()["paths"].items():
        for operation in item.values():
            if path in PUBLIC_PATHS:
                assert "security" not in operation
            else:
                assert operation["security"] == [{"apiKey": [SCOPES[path]]}, {}]
                assert {"401", "403", "429"} <= operation["responses"].keys()


@async_test
async def test_a_websocket_is_closed_before_it_opens() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async with running() as api:
        scope = {"type": "websocket", "path": "/v1/classify", "headers": []}
        await api.app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


@async_test
async def test_without_keys_a_page_that_rebinds_its_name_is_refused() -> None:
    async with running() as api:
        page = {"Host": "evil.example:8000"}
        refused = await api.client.post("/v1/classify", json={"input": "hi"}, headers=page)
        assert (refused.status_code, refused.json()["code"]) == (421, "bad_host")
        assert api.engine.batches == []
        assert (await api.client.get("/health/ready", headers=page)).status_code == 200
        await api.check_healthy()
    async with running(allow_unauthenticated=True) as api:
        answered = await api.client.post("/v1/classify", json={"input": "hi"}, headers=page)
        assert answered.status_code == 200

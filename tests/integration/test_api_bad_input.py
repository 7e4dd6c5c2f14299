"""Bad input: a status, a problem that says what and where, and a healthy server after."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from server.parsing import MAX_FAULTS
from server.ports import Limit
from tests.support.api import Api, async_test, running
from tests.support.fake_engine import (
    POLICY,
    QUIZ,
    TOPICS,
    TOPICS_ENSEMBLE,
    TOPICS_POINT,
    FakeEngine,
)

JSON = {"content-type": "application/json"}
QUESTION = {"question": "which", "choices": ["trout", "whale"]}


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check the form of a problem document and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    assert body.keys() == {
        *("type", "title", "status", "detail", "instance", "code", "request_id", "errors", "error")
    }
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"] == "urn:dalorra:error:" + code.replace("_", "-")
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"]["message"] == body["detail"]
    assert body["error"]["code"] == code
    return body


@dataclass(frozen=True)
class Bad:
    """A bad body and what the API must say to it."""

    name: str
    body: Any
    status: int = 422
    code: str = "invalid_request"
    pointer: str | None = None
    fault: str | None = None
    says: str = ""
    param: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


SCHEMA = [
    Bad("not an object", [1], pointer="#"),
    Bad("input missing", {}, pointer="#/input", fault="missing_field", param="input"),
    Bad(
        "unknown field",
        {"input": "x", "num_sample": 3},
        pointer="#/num_sample",
        fault="unknown_field",
        says="did you mean num_samples",
    ),
    Bad(
        "unknown field unlike any",
        {"input": "x", "zzz": 3},
        pointer="#/zzz",
        fault="unknown_field",
        says="allowed: model, input",
    ),
    Bad(
        "unknown field in a row",
        {"input": [{"txt": "x"}]},
        pointer="#/input/0/text",
        fault="missing_field",
        param="input[0].text",
    ),
    Bad(
        "pointer escapes",
        {"input": "x", "a/b~c": 1},
        pointer="#/a~1b~0c",
        param="a/b~c",
    ),
    Bad("empty text", {"input": ""}, pointer="#/input", fault="empty_text"),
    Bad("white space", {"input": ["ok", " \n\t"]}, pointer="#/input/1", fault="empty_text"),
    Bad("empty text in an object", {"input": [{"text": " "}]}, pointer="#/input/0/text"),
    Bad("no rows", {"input": []}, pointer="#/input"),
    Bad("a number", {"input": 3}, pointer="#/input"),
    Bad("a null row", {"input": [None]}, pointer="#/input/0"),
    Bad("mixed forms", {"input": ["x", {"text": "y"}]}, pointer="#/input", fault="mixed_forms"),
    Bad("NUL", {"input": "a\x00b"}, pointer="#/input", fault="nul_character"),
    Bad("NUL in an id", {"input": [{"id": "\x00", "text": "x"}]}, pointer="#/input/0/id"),
    Bad("no samples", {"input": "x", "num_samples": 0}, pointer="#/num_samples"),
    Bad(
        "a huge number of samples",
        {"input": "x", "num_samples": 10**30},
        pointer="#/num_samples",
        says="between 1 and 64",
    ),
    Bad(
        "samples as text",
        {"input": "x", "num_samples": "4"},
        pointer="#/num_samples",
        says='whole number or "auto"',
    ),
    Bad("samples as truth", {"input": "x", "num_samples": True}, pointer="#/num_samples"),
    Bad("samples as a fraction", {"input": "x", "num_samples": 2.0}, pointer="#/num_samples"),
    Bad("negative seed", {"input": "x", "seed": -1}, pointer="#/seed"),
    Bad("huge seed", {"input": "x", "seed": 2**63}, pointer="#/seed"),
    Bad("no labels asked", {"input": "x", "top_k": 0}, pointer="#/top_k"),
    Bad("unknown estimator", {"input": "x", "estimator": "mean"}, pointer="#/estimator"),
    Bad("unknown extra", {"input": "x", "include": ["logits"]}, pointer="#/include/0"),
    Bad("unknown truncation", {"input": "x", "truncate": "middle"}, pointer="#/truncate"),
    Bad(
        "a policy of two forms",
        {"input": "x", "policy": {"name": "default", "max_risk": 0.05}},
        pointer="#/policy",
        fault="policy_forms",
        says='{"max_risk": ...}',
    ),
    Bad(
        "a named policy with limits",
        {"input": "x", "policy": {"name": "default", "min_confidence": 0.5}},
        pointer="#/policy",
        fault="policy_forms",
    ),
    Bad(
        "a target risk with limits",
        {"input": "x", "policy": {"max_risk": 0.1, "abstain": {"min_confidence": 0.5}}},
        pointer="#/policy",
        fault="policy_forms",
    ),
    Bad("a policy as a text", {"input": "x", "policy": "default"}, pointer="#/policy"),
    Bad("a policy as a list", {"input": "x", "policy": []}, pointer="#/policy"),
    Bad(
        "a policy without limits",
        {"input": "x", "policy": {}},
        pointer="#/policy",
        fault="no_limit",
        says="needs at least one limit of min_confidence, max_predictive_entropy",
    ),
    Bad(
        "a policy that only abstains",
        {"input": "x", "policy": {"abstain": {"max_predictive_entropy": 1.0}}},
        pointer="#/policy",
        fault="no_limit",
    ),
    Bad(
        "a policy that abstains by nothing",
        {"input": "x", "policy": {"min_confidence": 0.5, "abstain": {}}},
        pointer="#/policy/abstain",
        fault="no_limit",
    ),
    Bad(
        "an unknown limit",
        {"input": "x", "policy": {"min_confidense": 0.5}},
        pointer="#/policy/min_confidense",
        fault="unknown_field",
        says="did you mean min_confidence",
    ),
    Bad(
        "an unknown field beside a name",
        {"input": "x", "policy": {"name": "default", "risk": 0.5}},
        pointer="#/policy/risk",
        fault="unknown_field",
        says="allowed: name",
    ),
    Bad(
        "an unknown limit to abstain by",
        {"input": "x", "policy": {"min_confidence": 0.5, "abstain": {"max_entropy": 1}}},
        pointer="#/policy/abstain/max_entropy",
        fault="unknown_field",
        says="did you mean max_predictive_entropy",
    ),
    Bad(
        "abstaining within abstaining",
        {"input": "x", "policy": {"min_confidence": 0.5, "abstain": {"abstain": {}}}},
        pointer="#/policy/abstain/abstain",
        fault="unknown_field",
    ),
    Bad(
        "a policy's name as a number",
        {"input": "x", "policy": {"name": 3}},
        pointer="#/policy/name",
    ),
    *(
        Bad(
            f"{name} of {value!r}",
            {"input": "x", "policy": {name: value}},
            pointer=f"#/policy/{name}",
        )
        for name, values in {
            "max_risk": (0, 1, -0.1, "0.05", True, None),
            "min_confidence": (-0.1, 1.1, "high", True, [0.5]),
            "max_predictive_entropy": (-1, "1"),
            "max_mutual_information": (-1e-9,),
            "min_label_mass": (2,),
            "min_combined": (1.5,),
        }.items()
        for value in values
    ),
    Bad(
        "a limit on a score that is not stored",
        {"input": "x", "policy": {"min_combined": 0.5}},
        code="policy_not_applicable",
        pointer="#/policy",
        says="policy 'inline' limits the combined score, but the adapter stores none",
    ),
    Bad(
        "a target risk of an adapter that is not calibrated",
        {"input": "x", "policy": {"max_risk": 0.05}},
        code="not_certified",
        pointer="#/policy/max_risk",
        says="it has no certified policy; dalorra calibrate makes them",
    ),
    Bad(
        "metadata that is no plain value",
        {"input": "x", "metadata": {"a": [1]}},
        pointer="#/metadata/a",
        fault="metadata_value",
    ),
    Bad(
        "too much metadata",
        {"input": "x", "metadata": {str(n): 1 for n in range(17)}},
        pointer="#/metadata",
    ),
    Bad(
        "one choice",
        {"input": {"question": "q", "choices": ["a"]}},
        pointer="#/input/choices",
    ),
    Bad(
        "too many choices",
        {"input": {"question": "q", "choices": ["a"] * 27}},
        pointer="#/input/choices",
    ),
    Bad(
        "no choices",
        {"input": [{"question": "q"}]},
        pointer="#/input/0/choices",
        fault="missing_field",
    ),
    Bad(
        "mixed choices",
        {"input": {"question": "q", "choices": ["a", {"label": "B", "text": "b"}]}},
        pointer="#/input",
        fault="mixed_forms",
    ),
    Bad(
        "a label twice",
        {"input": {"question": "q", "choices": [{"label": "A", "text": t} for t in "xy"]}},
        pointer="#/input",
        fault="duplicate_label",
    ),
    Bad(
        "an unknown field in a choice",
        {"input": {"question": "q", "choices": [{"label": "A", "txt": "x"}, "b"]}},
        pointer="#/input/choices/0/text",
    ),
    Bad(
        "1 MB of text",
        {"input": ["ok", "word " * 200_000]},
        code="input_too_long",
        pointer="#/input/1",
        says="row 1 has 1000000 characters; the limit max_text_chars is 65536",
    ),
    Bad(
        "long text in an object",
        {"input": [{"text": "x" * 70_000}]},
        code="input_too_long",
        pointer="#/input/0",
    ),
    Bad(
        "long context",
        {"input": {**QUESTION, "context": "x" * 65_530}},
        code="input_too_long",
        pointer="#/input",
    ),
    Bad(
        "too many rows",
        {"input": ["x"] * 65},
        status=413,
        code="too_many_rows",
        pointer="#/input",
        says="input has 65 rows; the limit max_rows is 64",
    ),
    Bad(
        "too many tokens under truncate none",
        {"input": ["short", "word " * 100]},
        code="input_too_long",
        pointer="#/input/1",
        says="the prompt has 102 tokens; the limit is 64",
        param="input[1]",
    ),
    Bad(
        "unknown model",
        {"input": "x", "model": "topic"},
        status=404,
        code="model_not_found",
        pointer="#/model",
        says="close names: topics",
    ),
    Bad(
        "unknown revision",
        {"input": "x", "model": "topics:beef"},
        status=404,
        code="model_not_found",
        says="close names: topics:3f9a00112233",
    ),
    Bad(
        "unknown model unlike any, too long to repeat",
        {"input": "x", "model": "z" * 128},
        status=404,
        code="model_not_found",
        says="zzz...' is loaded",
    ),
    Bad(
        "unknown policy",
        {"input": "x", "policy": {"name": "strict"}},
        code="unknown_policy",
        pointer="#/policy/name",
        says="it has: default",
    ),
    Bad(
        "a question for a text adapter",
        {"input": QUESTION},
        pointer="#/input",
        fault="wrong_input_form",
        says="send a text per row",
    ),
    Bad(
        "several samples of one pass",
        {"input": "x", "estimator": "mean_mask", "num_samples": 5},
        pointer="#/num_samples",
        says="one deterministic pass",
    ),
    Bad(
        "a design of one pass",
        {"input": "x", "estimator": "mean_mask", "design": "stratified"},
        pointer="#/design",
        says="design must be iid or left out, got stratified: the mean_mask estimator is one",
    ),
    Bad(
        "no such design",
        {"input": "x", "design": "sobol"},
        pointer="#/design",
        says="'iid', 'stratified' or 'antithetic'",
    ),
]


@pytest.mark.parametrize("bad", SCHEMA, ids=lambda bad: bad.name)
@async_test
async def test_bad_body(bad: Bad) -> None:
    async with running(**bad.settings) as api:
        content = json.dumps(bad.body)
        response = await api.client.post("/v1/classify", content=content, headers=JSON)
        body = check_problem(response, bad.status, bad.code)
        assert body["instance"] == "/v1/classify"
        first = body["errors"][0]
        if bad.pointer is not None:
            assert first["pointer"] == bad.pointer
        if bad.fault is not None:
            assert first["code"] == bad.fault
        if bad.param is not None:
            assert body["error"]["param"] == bad.param
        assert bad.says in body["detail"]
        assert not api.engine.batches
        await api.check_healthy()


MALFORMED = {
    "empty": b"",
    "cut off": b'{"input": "x"',
    "not JSON": b"input=x",
    "not a number": b'{"input": "x", "seed": NaN}',
    "infinite": b'{"input": "x", "seed": -Infinity}',
    "a key twice": b'{"input": "x", "input": "y"}',
    "not UTF-8": b'{"input": "\xff"}',
    "UTF-16": '{"input": "x"}'.encode("utf-16"),
    "nested too deeply": b'{"input": ' + b"[" * 200_000,
    "an endless integer": b'{"input": "x", "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
@async_test
async def test_malformed_json(content: bytes) -> None:
    async with running() as api:
        response = await api.client.post("/v1/classify", content=content, headers=JSON)
        check_problem(response, 400, "malformed_json")
        await api.check_healthy()


SURROGATES = {
    "in a text": (rb'{"input": "a\ud800b"}', "#/input"),
    "in a row": (rb'{"input": ["ok", "\udfff"]}', "#/input/1"),
    "in metadata": (rb'{"input": "x", "metadata": {"a": "\ud800"}}', "#/metadata/a"),
    "in the model": (rb'{"input": "x", "model": "\ud800"}', "#/model"),
}


@pytest.mark.parametrize(("content", "pointer"), SURROGATES.values(), ids=SURROGATES.keys())
@async_test
async def test_lone_surrogates(content: bytes, pointer: str) -> None:
    async with running() as api:
        response = await api.client.post("/v1/classify", content=content, headers=JSON)
        body = check_problem(response, 422, "invalid_request")
        assert body["errors"][0]["pointer"] == pointer
        await api.check_healthy()


@pytest.mark.parametrize(
    ("content", "pointer"),
    [
        (b'{"input": "x", "num_samples": 1e999}', "#/num_samples"),
        (b'{"input": "x", "metadata": {"a": -1e999}}', "#/metadata/a"),
        (
            b'{"input": "x", "policy": {"max_predictive_entropy": 1e999}}',
            "#/policy/max_predictive_entropy",
        ),
    ],
)
@async_test
async def test_numbers_beyond_the_finite(content: bytes, pointer: str) -> None:
    async with running() as api:
        response = await api.client.post("/v1/classify", content=content, headers=JSON)
        body = check_problem(response, 422, "invalid_request")
        assert body["errors"][0]["pointer"] == pointer
        await api.check_healthy()


@async_test
async def test_a_lone_surrogate_in_a_field_name() -> None:
    async with running() as api:
        content = rb'{"input": "x", "\ud800": 1, "metadata": {"\ud800": 1}}'
        response = await api.client.post("/v1/classify", content=content, headers=JSON)
        check_problem(response, 422, "invalid_request")
        await api.check_healthy()


@async_test
async def test_a_surrogate_pair_is_fine() -> None:
    async with running() as api:
        content = rb'{"input": "\ud83d\ude00 smile"}'
        response = await api.client.post("/v1/classify", content=content, headers=JSON)
        assert response.status_code == 200


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "", "application/x-www-form-urlencoded", "application/json; charset=latin-1"],
)
@async_test
async def test_wrong_content_type(content_type: str) -> None:
    async with running() as api:
        headers = {"content-type": content_type} if content_type else {}
        response = await api.client.post("/v1/classify", content=b"{}", headers=headers)
        check_problem(response, 415, "unsupported_media_type")
        assert response.headers["accept"] == "application/json"
        await api.check_healthy()


@pytest.mark.parametrize("content_type", ["application/json; charset=UTF-8", "Application/JSON"])
@async_test
async def test_spellings_of_the_content_type(content_type: str) -> None:
    async with running() as api:
        response = await api.client.post(
            "/v1/classify", content=b'{"input": "x"}', headers={"content-type": content_type}
        )
        assert response.status_code == 200


async def check_too_large(api: Api, content: Any, actual: int | None) -> None:
    response = await api.client.post("/v1/classify", content=content, headers=JSON)
    body = check_problem(response, 413, "body_too_large")
    assert "max_body_bytes is 2000 bytes" in body["detail"]
    assert body["errors"][0].get("actual") == actual
    assert await api.metric("rejections_total", reason="too_large") == 1
    await api.check_healthy()


@async_test
async def test_a_body_over_the_limit_is_refused_by_its_length() -> None:
    async with running(max_body_bytes=2000) as api:
        content = json.dumps({"input": "x" * 3000}).encode()
        await check_too_large(api, content, len(content))


@async_test
async def test_a_body_over_the_limit_is_refused_while_it_comes() -> None:
    async with running(max_body_bytes=2000) as api:
        sent = 0

        async def chunks() -> Any:
            nonlocal sent
            for _ in range(1000):
                sent += 1
                yield b"x" * 100

        await check_too_large(api, chunks(), None)
        assert sent == 21  # read no further than it must


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "", "²", "120001", "9" * 5000])
@async_test
async def test_a_bad_deadline(value: str) -> None:
    async with running() as api:
        headers = {**JSON, "x-request-timeout-ms": value.encode()}
        response = await api.client.post("/v1/classify", content=b"{}", headers=headers)
        body = check_problem(response, 400, "bad_header")
        assert "between 1 and 120000" in body["detail"]


@async_test
async def test_unknown_route() -> None:
    async with running() as api:
        for path in ("/", "/v2/classify", "/v1/classify/", "/v1/models/"):
            check_problem(await api.client.get(path), 404, "not_found")
        served = {"method": "GET", "route": "unmatched", "status": "404"}
        assert await api.metric("http_requests_total", **served) == 4


@async_test
async def test_wrong_method() -> None:
    async with running() as api:
        response = await api.client.get("/v1/classify")
        body = check_problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"
        assert "allowed: POST" in body["detail"]
        response = await api.client.request("BREW", "/v1/classify")
        check_problem(response, 405, "method_not_allowed")
        served = {"method": "OTHER", "route": "/v1/classify", "status": "405"}
        assert await api.metric("http_requests_total", **served) == 1


@async_test
async def test_unknown_model_card() -> None:
    async with running() as api:
        body = check_problem(await api.client.get("/v1/models/topix"), 404, "model_not_found")
        assert body["errors"][0]["close_names"] == ["topics"]


@async_test
async def test_the_model_must_be_named_when_there_are_several() -> None:
    async with running(FakeEngine(TOPICS, QUIZ)) as api:
        body = check_problem(await api.classify({"input": "x"}), 422, "invalid_request")
        assert "quiz, topics" in body["detail"]
        assert body["errors"][0]["pointer"] == "#/model"


@async_test
async def test_a_text_for_a_multiple_choice_adapter() -> None:
    async with running(FakeEngine(QUIZ)) as api:
        body = check_problem(await api.classify({"input": ["x"]}), 422, "invalid_request")
        assert body["errors"][0] == {"pointer": "#/input/0", "code": "wrong_input_form"}
        assert "question and choices" in body["detail"]


@async_test
async def test_a_choice_the_adapter_does_not_know() -> None:
    async with running(FakeEngine(QUIZ)) as api:
        choices = [{"label": label, "text": "x"} for label in ("A", "Z")]
        asked = {"input": [{"question": "q", "choices": choices}]}
        body = check_problem(await api.classify(asked), 422, "input_rejected")
        assert body["errors"][0]["pointer"] == "#/input/0"
        assert "'Z'" in body["detail"]
        api.check_idle()


@async_test
async def test_several_samples_of_a_point_method() -> None:
    async with running(FakeEngine(TOPICS_POINT)) as api:
        response = await api.classify({"input": "x", "num_samples": 5})
        body = check_problem(response, 422, "invalid_request")
        assert "does not sample" in body["detail"]
        assert (await api.classify({"input": "x", "num_samples": 1})).status_code == 200


@async_test
async def test_another_number_of_samples_than_an_ensemble_has_members() -> None:
    async with running(FakeEngine(TOPICS_ENSEMBLE)) as api:
        for wrong in (1, 2, 4):
            response = await api.classify({"input": "x", "num_samples": wrong})
            body = check_problem(response, 422, "invalid_request")
            assert "has 3 functions (method ensemble)" in body["detail"]
            fault = {"pointer": "#/num_samples", "limit": 3, "actual": wrong}
            assert fault.items() <= body["errors"][0].items()
        one_pass = {"input": "x", "estimator": "mean_mask"}
        response = await api.classify({**one_pass, "num_samples": 3})
        assert "deterministic pass" in check_problem(response, 422, "invalid_request")["detail"]
        assert (await api.classify({**one_pass, "num_samples": 1})).status_code == 200
        await api.check_healthy()


@async_test
async def test_a_design_that_an_adapter_cannot_follow() -> None:
    card = replace(TOPICS, method="mc_dropout", designs=("iid",))
    for other, why in (
        (card, "method mc_dropout of adapter topics draws no other"),
        (TOPICS_POINT, "does not sample (method mle)"),
        (TOPICS_ENSEMBLE, "has 3 functions (method ensemble)"),
    ):
        async with running(FakeEngine(other)) as api:
            response = await api.classify({"input": "x", "design": "stratified"})
            body = check_problem(response, 422, "invalid_request")
            assert "design must be iid or left out, got stratified: " in body["detail"]
            assert why in body["detail"]
            assert body["errors"][0]["pointer"] == "#/design"
            assert (await api.classify({"input": "x", "design": "iid"})).status_code == 200


@async_test
async def test_more_samples_than_the_engine_has_memory_for() -> None:
    async with running(FakeEngine(replace(TOPICS, max_num_samples=5))) as api:
        response = await api.classify({"input": "x", "num_samples": 6})
        body = check_problem(response, 422, "invalid_request")
        assert "num_samples must be at most 5 for adapter topics" in body["detail"]
        fault = {"pointer": "#/num_samples", "limit": 5, "actual": 6}
        assert fault.items() <= body["errors"][0].items()
        assert (await api.classify({"input": "x", "num_samples": 5})).status_code == 200
        assert (await api.client.get("/v1/models/topics")).json()["limits"]["max_num_samples"] == 5


@async_test
async def test_a_sampling_that_is_fixed_refuses_every_other() -> None:
    own = TOPICS.defaults
    card = replace(TOPICS, fixed_sampling="only these samples were exported")
    async with running(FakeEngine(card)) as api:
        for name, value in (
            *(("num_samples", 5), ("seed", 1)),
            *(("estimator", "mean_mask"), ("design", "stratified")),
        ):
            response = await api.classify({"input": "x", name: value})
            body = check_problem(response, 422, "invalid_request")
            expected = f"{name} must be {getattr(own, name)} or left out, got {value}: only these"
            assert expected in body["detail"]
            assert body["errors"][0]["pointer"] == f"#/{name}"
        same = {"num_samples": 4, "seed": 0, "estimator": "monte_carlo", "design": "iid"}
        assert (await api.classify({"input": "x", **same})).status_code == 200
        assert (await api.classify({"input": "x", "num_samples": "auto"})).status_code == 200
        await api.check_healthy()


@async_test
async def test_a_policy_on_mutual_information_needs_samples() -> None:
    policy = replace(POLICY, abstain=(Limit("mutual_information", 0.5),))
    async with running(FakeEngine(replace(TOPICS, policies=(policy,)))) as api:
        for override in ({"num_samples": 1}, {"estimator": "mean_mask"}):
            response = await api.classify({"input": "x", **override})
            check_problem(response, 422, "policy_not_applicable")
        assert (await api.classify({"input": "x", "num_samples": 2})).status_code == 200
        await api.check_healthy()


@async_test
async def test_errors_never_repeat_the_text() -> None:
    async with running(max_text_chars=50) as api:
        secret = "my secret is 4711 "
        for body in (
            {"input": secret * 10},
            {"input": [secret, 3]},
            {"input": [{"text": secret, "id": 4}]},
            {"input": secret, "truncate": "x"},
        ):
            response = await api.classify(body)
            assert response.status_code == 422
            assert "4711" not in response.text


@async_test
async def test_the_type_of_an_error_can_point_to_documentation() -> None:
    async with running(error_base="https://docs.example.org/errors/") as api:
        body = (await api.classify({})).json()
        assert body["type"] == "https://docs.example.org/errors/invalid-request"


@async_test
async def test_a_flood_of_faults_is_not_described_one_by_one() -> None:
    async with running() as api:
        same = "a" * 70  # cut to the same name, so that all are one place
        for fields in ({f"k{n}": 1 for n in range(5000)}, {f"{same}{n}": 1 for n in range(5000)}):
            body = check_problem(await api.classify(fields), 422, "invalid_request")
            assert len(body["errors"]) <= MAX_FAULTS
            assert "(and at least " in body["detail"]
        many = {"input": "x", "metadata": {f"k{n}": [] for n in range(5000)}}
        body = check_problem(await api.classify(many), 422, "invalid_request")
        assert [fault["pointer"] for fault in body["errors"]] == ["#/metadata"]
        assert "at most 16" in body["detail"]
        await api.check_healthy()

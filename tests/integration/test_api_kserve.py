"""The Open Inference Protocol (KServe v2) as its clients speak it."""

from typing import Any

import pytest

from server.schemas.examples import INFER_EXAMPLES
from tests.support.api import Api, async_test, running, until
from tests.support.fake_engine import QUIZ, TOPICS, TOPICS_POINT, FakeEngine

SURE, UNCLEAR, LOST = "a sure thing", "unclear", "lost words"
INFER = "/v2/models/topics/infer"
ALL = ["label", "probs", "confidence", "mutual_information", "decision", "prediction_id"]


def tensor(*texts: str, **changes: Any) -> dict[str, Any]:
    plain = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return {**plain, **changes}


def body(*texts: str, **others: Any) -> dict[str, Any]:
    return {"inputs": [tensor(*texts)], **others}


async def infer(api: Api, sent: Any, path: str = INFER) -> dict[str, dict[str, Any]]:
    response = await api.client.post(path, json=sent)
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def check_error(response: Any, status: int, words: str) -> dict[str, Any]:
    """The protocol wants a string in ``error``."""
    assert response.status_code == status, response.text
    problem = response.json()
    assert isinstance(problem["error"], str)
    assert words in problem["error"]
    assert problem["error"] == problem["detail"]
    assert response.headers["x-request-id"] == problem["request_id"]
    return problem


@async_test
async def test_every_output_says_what_the_main_route_says() -> None:
    async with running() as api:
        texts = [SURE, UNCLEAR, LOST]
        rows = (await api.classify({"input": texts})).json()["data"]
        response = await api.client.post(INFER, json=body(*texts, id="42"))
        answer = response.json()
        assert (answer["id"], answer["model_name"]) == ("42", "topics")
        assert answer["model_version"] == "3f9a00112233"
        assert [output["name"] for output in answer["outputs"]] == ALL
        found = {output["name"]: output for output in answer["outputs"]}
        assert found["probs"]["shape"] == [3, 3]
        assert found["probs"]["data"] == [prob for row in rows for prob in row["probs"]]
        for name, datatype in (("label", "BYTES"), ("confidence", "FP64"), ("decision", "BYTES")):
            assert (found[name]["shape"], found[name]["datatype"]) == ([3], datatype)
            assert found[name]["data"] == [row[name] for row in rows]
        unsure = [row["uncertainty"]["mutual_information"] for row in rows]
        assert found["mutual_information"]["data"] == unsure
        for prediction_id in found["prediction_id"]["data"]:
            assert api.service.signer.verify(prediction_id).adapter == "topics"


@async_test
async def test_an_answer_to_a_request_without_an_id_has_none() -> None:
    async with running() as api:
        assert "id" not in (await api.client.post(INFER, json=body(SURE))).json()


@async_test
async def test_only_the_asked_outputs_come_in_their_order() -> None:
    async with running() as api:
        asked = [{"name": "decision", "parameters": {"binary_data": False}}, {"name": "label"}]
        found = await infer(api, body(SURE, LOST, outputs=asked))
        assert list(found) == ["decision", "label"]
        assert found["decision"]["data"] == ["accept", "abstain"]


@pytest.mark.parametrize(
    "sent",
    [
        tensor(SURE, LOST, shape=[2, 1]),
        tensor(SURE, LOST, shape=[2, 1], data=[[SURE], [LOST]]),
        tensor(SURE, LOST, parameters={"content_type": "str"}),
    ],
    ids=["flat", "nested", "content_type"],
)
@async_test
async def test_a_column_of_texts_is_as_good_as_a_row(sent: dict[str, Any]) -> None:
    async with running() as api:
        plain, other = await infer(api, body(SURE, LOST)), await infer(api, {"inputs": [sent]})
        assert plain["probs"] == other["probs"]


@async_test
async def test_parameters_mean_what_they_mean_on_the_main_route() -> None:
    async with running() as api:
        chosen = {"num_samples": 2, "seed": 7, "design": "iid"}
        (row,) = (await api.classify({"input": UNCLEAR, **chosen})).json()["data"]
        parameters = {**chosen, "policy": "default", "binary_data_output": False}
        found = await infer(api, body(UNCLEAR, parameters=parameters))
        assert found["probs"]["data"] == row["probs"]


@async_test
async def test_nothing_epistemic_comes_from_an_adapter_with_one_function() -> None:
    async with running(FakeEngine(TOPICS_POINT)) as api:
        path = "/v2/models/topics-mle/infer"
        found = await infer(api, body(SURE), path)
        assert list(found) == [name for name in ALL if name != "mutual_information"]
        asked = [{"name": "label"}, {"name": "mutual_information"}]
        response = await api.client.post(path, json=body(SURE, outputs=asked))
        problem = check_error(response, 422, "does not sample")
        assert problem["errors"][0]["pointer"] == "#/outputs/1/name"
        drawn = body(SURE, parameters={"design": "stratified"})
        problem = check_error(await api.client.post(path, json=drawn), 422, "iid")
        assert problem["errors"][0]["pointer"] == "#/parameters/design"
        metadata = (await api.client.get("/v2/models/topics-mle")).json()
        assert [output["name"] for output in metadata["outputs"]] == list(found)


@pytest.mark.parametrize(
    ("sent", "pointer", "reason"),
    [
        ({"inputs": []}, "#/inputs", "at least 1"),
        ({"inputs": [tensor(SURE), tensor(SURE)]}, "#/inputs", "at most 1"),
        ({"inputs": [tensor(SURE, name="input0")]}, "#/inputs/0/name", "text"),
        ({"inputs": [tensor(SURE, datatype="FP32")]}, "#/inputs/0/datatype", "BYTES"),
        ({"inputs": [tensor(SURE, shape=[2])]}, "#/inputs/0", "shape says 2"),
        ({"inputs": [tensor(SURE, LOST, shape=[1, 2])]}, "#/inputs/0", "[n] or [n, 1]"),
        ({"inputs": [tensor(SURE, data=[[SURE]])]}, "#/inputs/0", "deeper"),
        ({"inputs": [tensor(SURE, data=[3])]}, "#/inputs/0/data/0", "string"),
        ({"inputs": [tensor(SURE, LOST, data=[SURE, " "])]}, "#/inputs/0/data/1", "empty"),
        (
            {"inputs": [tensor(SURE, parameters={"binary_data_size": 9})]},
            "#/inputs/0/parameters/binary_data_size",
            "unknown field; allowed: content_type",
        ),
        (body(SURE, outputs=[{"name": "labels"}]), "#/outputs/0/name", "label"),
        (body(SURE, outputs=[{"name": "label"}] * 2), "#/outputs", "twice"),
        (
            body(SURE, outputs=[{"name": "label", "parameters": {"binary_data": True}}]),
            "#/outputs/0/parameters/binary_data",
            "JSON",
        ),
        (
            body(SURE, parameters={"binary_data_output": True}),
            "#/parameters/binary_data_output",
            "JSON",
        ),
        (body(SURE, parameters={"num_samples": 65}), "#/parameters/num_samples", ""),
        (body(SURE, parameters={"design": "sobol"}), "#/parameters/design", "stratified"),
        (body(SURE, parameters={"num_sample": 2}), "#/parameters/num_sample", "num_samples"),
        (body(SURE, parameters={"policy": "nope"}), "#/parameters/policy/name", ""),
    ],
    ids=str,
)
@async_test
async def test_what_cannot_be_answered_is_refused_by_name(
    sent: dict[str, Any], pointer: str, reason: str
) -> None:
    async with running() as api:
        problem = check_error(await api.client.post(INFER, json=sent), 422, "")
        (fault,) = [f for f in problem["errors"] if f["pointer"] == pointer]
        assert reason in fault.get("detail", "")
        assert api.engine.batches == []


@async_test
async def test_rows_that_cannot_be_encoded_are_named_as_they_were_sent() -> None:
    async with running() as api:
        response = await api.client.post(INFER, json=body(SURE, "word " * 80))
        problem = check_error(response, 422, "#/inputs/0/data/1: ")
        assert problem["errors"][0]["pointer"] == "#/inputs/0/data/1"


@async_test
async def test_too_many_rows_are_a_413() -> None:
    async with running(max_rows=2) as api:
        response = await api.client.post(INFER, json=body("a", "b", "c"))
        check_error(response, 413, "inputs/0/data has 3 rows; the limit max_rows is 2")


@async_test
async def test_binary_tensors_are_refused_as_such() -> None:
    async with running() as api:
        headers = {"Inference-Header-Content-Length": "80"}
        response = await api.client.post(INFER, json=body(SURE), headers=headers)
        check_error(response, 415, "binary tensors are not spoken")
        raw = {"Content-Type": "application/octet-stream"}
        response = await api.client.post(INFER, content=b"\x00", headers=raw)
        check_error(response, 415, "application/json")


@async_test
async def test_errors_of_every_layer_have_the_form_of_the_protocol() -> None:
    async with running() as api:
        response = await api.client.post("/v2/models/topic/infer", json=body(SURE))
        problem = check_error(response, 404, "topics")
        assert problem["code"] == "model_not_found"
        check_error(await api.client.get(INFER), 405, "not allowed")
        check_error(await api.client.post(INFER, content=b"{"), 415, "application/json")
        headers = {"Content-Type": "application/json"}
        response = await api.client.post(INFER, content=b"{", headers=headers)
        check_error(response, 400, "not JSON")
        api.engine.fault = _fail
        check_error(await api.client.post(INFER, json=body(SURE)), 500, "failed")


def _fail(_texts: list[str]) -> None:
    raise ValueError("of no interest to a client")


@async_test
async def test_an_adapter_for_questions_is_refused_with_the_way_to_ask_it() -> None:
    async with running(FakeEngine(TOPICS, QUIZ)) as api:
        for response in (
            await api.client.post("/v2/models/quiz/infer", json=body(SURE)),
            await api.client.get("/v2/models/quiz"),
            await api.client.get("/v2/models/quiz/ready"),
        ):
            check_error(response, 422, "only /v1/classify can carry")


@async_test
async def test_metadata_tells_what_to_send_and_what_comes() -> None:
    async with running() as api:
        server = (await api.client.get("/v2")).json()
        assert server.keys() == {"name", "version", "extensions"}
        assert (server["name"], server["extensions"]) == ("dalorra", [])
        for path in ("/v2/models/topics", "/v2/models/topics:3f9a00112233"):
            model = (await api.client.get(path)).json()
            assert (model["name"], model["versions"]) == ("topics", ["3f9a00112233"])
            assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
            assert model["labels"] == ["billing", "fraud", "other"]
        found = await infer(api, body(SURE))
        for form in model["outputs"]:
            assert form["datatype"] == found[form["name"]]["datatype"]
            assert [-1, *form["shape"][1:]] == [-1, *found[form["name"]]["shape"][1:]]
        check_error(await api.client.get("/v2/models/nope"), 404, "nope")


@async_test
async def test_an_adapter_is_ready_when_the_server_is() -> None:
    engine = FakeEngine()
    engine.load_gate.clear()
    async with running(engine, wait=False) as api:
        check_error(await api.client.get("/v2/models/topics/ready"), 503, "load")
        engine.load_gate.set()
        await api.service.lifecycle.loaded()
        response = await api.client.get("/v2/models/topics/ready")
        assert (response.status_code, response.json()) == (200, {"name": "topics", "ready": True})
        api.service.lifecycle.begin_drain()
        check_error(await api.client.get("/v2/models/topics/ready"), 503, "")
        await until(lambda: api.service.lifecycle.draining)


@pytest.mark.parametrize("name", INFER_EXAMPLES)
@async_test
async def test_the_examples_of_the_document_are_answered(name: str) -> None:
    async with running() as api:
        await infer(api, INFER_EXAMPLES[name]["value"])

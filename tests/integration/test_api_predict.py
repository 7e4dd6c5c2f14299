"""``/predict`` as clients of text-embeddings-inference use it."""

from typing import Any

import pytest

from server.schemas.examples import PREDICT_EXAMPLES
from tests.support.api import Api, async_test, running
from tests.support.fake_engine import QUIZ, TOPICS, FakeEngine

SURE, UNCLEAR, LOST = "a sure thing", "unclear", "lost words"
LONG = " ".join(["first", *["word"] * 80, "last"])


async def probs(api: Api, text: str) -> dict[str, float]:
    (row,) = (await api.classify({"model": "topics", "input": text})).json()["data"]
    return dict(zip(row["labels"], row["probs"], strict=True))


@async_test
async def test_one_text_gets_its_labels_best_first() -> None:
    async with running() as api:
        response = await api.client.post("/predict", json={"inputs": SURE})
        assert response.status_code == 200
        found = response.json()
        assert {entry["label"]: entry["score"] for entry in found} == await probs(api, SURE)
        scores = [entry["score"] for entry in found]
        assert scores == sorted(scores, reverse=True)
        assert all(entry.keys() == {"label", "score"} for entry in found)
        assert response.headers["x-decision"] == "accept"


@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: [text]], ids=["flat", "wrapped"])
@async_test
async def test_a_batch_gets_a_list_of_lists_and_all_decisions(wrap: Any) -> None:
    async with running() as api:
        texts = [SURE, UNCLEAR, LOST]
        response = await api.client.post("/predict", json={"inputs": [wrap(t) for t in texts]})
        for text, found in zip(texts, response.json(), strict=True):
            assert {entry["label"]: entry["score"] for entry in found} == await probs(api, text)
        assert response.headers["x-decision"] == "accept,review,abstain"


@async_test
async def test_a_list_of_one_is_a_batch_of_one() -> None:
    async with running() as api:
        ((best, *_),) = (await api.client.post("/predict", json={"inputs": [SURE]})).json()
        (alone, *_) = (await api.client.post("/predict", json={"inputs": SURE})).json()
        assert best == alone


@pytest.mark.parametrize(
    ("field", "pointer", "reason"),
    [
        ({"inputs": [["premise", "hypothesis"]]}, "inputs/0", "pair"),
        ({"inputs": [[]]}, "inputs/0", "at least 1"),
        ({"inputs": []}, "inputs", "at least 1"),
        ({"inputs": ""}, "inputs", "empty"),
        ({"inputs": [SURE, " "]}, "inputs/1", "empty"),
        ({"inputs": {"text": "x"}}, "inputs", "string"),
        ({"raw_scores": True}, "raw_scores", "no logits"),
        ({"truncation_direction": "Up"}, "truncation_direction", "Left"),
        ({"truncate": "yes"}, "truncate", "boolean"),
        ({"top_k": 3}, "top_k", "unknown field"),
    ],
    ids=str,
)
@async_test
async def test_what_cannot_be_answered_is_refused_by_name(
    field: dict[str, Any], pointer: str, reason: str
) -> None:
    async with running() as api:
        response = await api.client.post("/predict", json={"inputs": SURE, **field})
        assert response.status_code == 422
        problem = response.json()
        assert problem["instance"] == "/predict"
        (fault,) = [f for f in problem["errors"] if f["pointer"] == f"#/{pointer}"]
        assert reason in fault["detail"]
        assert api.engine.batches == []


@pytest.mark.parametrize(("direction", "kept"), [("Left", "last"), ("Right", "first")])
@async_test
async def test_a_text_that_is_too_long_is_cut_only_when_asked(direction: str, kept: str) -> None:
    async with running() as api:
        refused = await api.client.post("/predict", json={"inputs": [SURE, LONG]})
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == "#/inputs/1"
        assert refused.json()["detail"].startswith("#/inputs/1: ")
        body = {"inputs": LONG, "truncate": True, "truncation_direction": direction}
        body |= {"raw_scores": False}
        response = await api.client.post("/predict", json=body)
        assert response.status_code == 200
        assert kept in api.engine.batches[-1][0].split()
        # a decision about a part of a text is never an accept
        assert response.headers["x-decision"] != "accept"


@async_test
async def test_limits_are_those_of_every_route() -> None:
    async with running(max_rows=2, max_text_chars=20) as api:
        many = await api.client.post("/predict", json={"inputs": ["x"] * 3})
        assert (many.status_code, many.json()["code"]) == (413, "too_many_rows")
        assert many.json()["errors"][0] == {"pointer": "#/inputs", "limit": 2, "actual": 3}
        long = await api.client.post("/predict", json={"inputs": ["x", "x" * 21]})
        assert (long.status_code, long.json()["code"]) == (422, "input_too_long")
        assert long.json()["errors"][0]["pointer"] == "#/inputs/1"


@async_test
async def test_the_model_is_implied_or_in_the_query_or_in_the_body() -> None:
    async with running(FakeEngine(TOPICS, QUIZ)) as api:
        missing = await api.client.post("/predict", json={"inputs": SURE})
        assert (missing.status_code, missing.json()["code"]) == (422, "invalid_request")
        in_query = await api.client.post("/predict?model=topics", json={"inputs": SURE})
        in_body = await api.client.post("/predict", json={"inputs": SURE, "model": "topics"})
        assert in_query.json() == in_body.json()
        both = {"inputs": SURE, "model": "quiz"}
        response = await api.client.post("/predict?model=topics", json=both)
        assert response.status_code == 422
        assert "another model" in response.json()["detail"]
        unknown = await api.client.post("/predict?model=topic", json={"inputs": SURE})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "model_not_found")


@async_test
async def test_an_adapter_for_questions_is_refused_with_the_way_to_ask_it() -> None:
    async with running(FakeEngine(QUIZ)) as api:
        response = await api.client.post("/predict", json={"inputs": SURE})
        assert response.status_code == 422
        assert "only /v1/classify can carry" in response.json()["detail"]


@pytest.mark.parametrize("name", PREDICT_EXAMPLES)
@async_test
async def test_the_examples_of_the_document_are_answered(name: str) -> None:
    async with running() as api:
        response = await api.client.post("/predict", json=PREDICT_EXAMPLES[name]["value"])
        assert response.status_code == 200

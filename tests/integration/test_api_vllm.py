"""What clients of vLLM's ``/classify`` send, and how they read the answer."""

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from tests.support.api import async_test, running, same_answer

TEXT = "a sure thing"
LONG = " ".join(["first", *["word"] * 80, "last"])


class ClassificationData(BaseModel):
    """As vLLM has it, but strict."""

    model_config = ConfigDict(strict=True)

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class UsageInfo(BaseModel):
    model_config = ConfigDict(strict=True)

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = 0


class ClassificationResponse(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str
    object: str
    created: int
    model: str
    data: list[ClassificationData]
    usage: UsageInfo


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
@pytest.mark.parametrize("sent", [TEXT, [TEXT], [TEXT, "lost words", "unclear"]])
@async_test
async def test_a_vllm_client_understands_the_answer(path: str, sent: Any) -> None:
    async with running() as api:
        response = await api.client.post(path, json={"model": "topics", "input": sent})
        assert response.status_code == 200
        answer = ClassificationResponse.model_validate_json(response.content)
        assert answer.object == "list"
        assert answer.id.startswith("classify-")
        texts = [sent] if isinstance(sent, str) else sent
        assert [row.index for row in answer.data] == list(range(len(texts)))
        for row in answer.data:
            assert row.num_classes == len(row.probs) == 3
            assert sum(row.probs) == pytest.approx(1)
            assert row.label in {"billing", "fraud", "other"}
        assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    "field",
    [
        {"use_activation": True},
        {"activation": True},
        {"softmax": True},
        {"use_activation": None},
        {"add_special_tokens": True},
        {"priority": 0},
        {"truncate_prompt_tokens": -1},
        {"truncate_prompt_tokens": None, "truncation_side": None},
    ],
    ids=str,
)
@async_test
async def test_what_asks_for_what_happens_anyway_changes_nothing(field: dict[str, Any]) -> None:
    async with running() as api:
        plain = await api.classify({"input": TEXT})
        response = await api.classify({"model": "topics", "input": TEXT, **field})
        assert response.status_code == 200
        assert same_answer(response) == same_answer(plain)


@pytest.mark.parametrize(
    ("field", "pointer", "reason"),
    [
        ({"use_activation": False}, "use_activation", "no raw scores"),
        ({"activation": False}, "activation", "no raw scores"),
        ({"softmax": False}, "softmax", "no raw scores"),
        ({"use_activation": 1}, "use_activation", "boolean"),
        ({"add_special_tokens": False}, "add_special_tokens", "trained with"),
        ({"truncate_prompt_tokens": 10}, "truncate_prompt_tokens", "can only be -1"),
        ({"truncation_side": "left"}, "truncation_side", "no effect"),
        (
            {"truncate_prompt_tokens": -1, "truncate": "end"},
            "truncate_prompt_tokens",
            "send one of them",
        ),
        ({"priority": -1}, "priority", "greater than or equal to 0"),
        ({"user": "u-1"}, "user", "metadata"),
        ({"request_id": "r-1"}, "request_id", "X-Request-Id"),
        ({"messages": []}, "messages", "as input"),
        ({"padding": "max_length"}, "padding", "never changes"),
        ({"cache_salt": "s"}, "cache_salt", "nothing is cached"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs", "only text"),
        ({"chat_template": "t"}, "chat_template", "unknown field"),
        ({"input": [1, 2, 3]}, "input/0", "string"),
        ({"input": [[1, 2], [3]]}, "input/0", "string"),
    ],
    ids=str,
)
@async_test
async def test_what_cannot_be_had_is_refused_by_name(
    field: dict[str, Any], pointer: str, reason: str
) -> None:
    async with running() as api:
        response = await api.client.post("/classify", json={"input": TEXT, **field})
        assert response.status_code == 422
        (fault,) = [f for f in response.json()["errors"] if f["pointer"] == f"#/{pointer}"]
        assert reason in fault["detail"]
        assert api.engine.batches == []


@pytest.mark.parametrize(("side", "kept"), [("left", "last"), ("right", "first"), (None, "first")])
@async_test
async def test_all_the_room_is_what_truncation_leaves(side: str | None, kept: str) -> None:
    async with running() as api:
        assert (await api.classify({"input": LONG})).status_code == 422
        body = {"input": LONG, "truncate_prompt_tokens": -1, "truncation_side": side}
        (row,) = (await api.classify(body)).json()["data"]
        assert row["truncated"]
        ((text,),) = api.engine.batches
        assert kept in text.split()
        assert len({"first", "last"} & set(text.split())) == 1

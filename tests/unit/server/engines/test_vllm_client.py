"""What vLLM's answers say, and which are none."""

import math
from typing import Any

import pytest

from server.engines.vllm_client import VllmAnswerError, label_row, shown_row, top_tokens

TABLES = ({"token_id:7": -0.5, "token_id:3": -1}, {"token_id:3": -0.1, "token_id:9": -9999.0})


def answer(*tables: Any, order: tuple[int, ...] | None = None) -> dict[str, Any]:
    places = order or tuple(range(len(tables)))
    return {
        "choices": [
            {"index": place, "logprobs": {"top_logprobs": [tables[place]]}} for place in places
        ]
    }


def test_prompts_are_put_in_order() -> None:
    assert top_tokens(answer(*TABLES, order=(1, 0)), 2) == list(TABLES)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        {},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{"index": 0, "logprobs": None}]},
        {"choices": [{"index": 0, "logprobs": {"top_logprobs": []}}]},
        answer(None),
        answer(["token_id:7"]),
        answer(*TABLES),
        answer(TABLES[0], order=(0, 0)) | {"choices": []},
    ],
)
def test_an_answer_to_other_prompts_is_none(broken: Any) -> None:
    with pytest.raises(VllmAnswerError, match="for each of them, and for no others"):
        top_tokens(broken, 1)


def test_labels_are_found_by_token() -> None:
    assert label_row(TABLES[0], (3, 7)) == [-1.0, -0.5]
    assert shown_row(TABLES[0], (3, 8)) == [-1.0, None]


def test_a_missing_label_names_the_flags_of_vllm() -> None:
    with pytest.raises(
        VllmAnswerError,
        match=r"of 2 of 3 label tokens \(the first is 4\): .* --max-logprobs of at least 3",
    ):
        label_row(TABLES[0], (3, 4, 5))


@pytest.mark.parametrize("value", [math.nan, -math.inf, "-1.0", [], {}])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(VllmAnswerError, match="no finite numbers"):
        shown_row({"token_id:3": value}, (3,))

"""Every decision of the client, by feeding it replies: no sockets, no sleeps, no real time."""

import json
import logging
import random
from typing import Any

import pytest

from dalorra.client import (
    ApiError,
    Choice,
    Conflict,
    ConnectionFailed,
    DalorraError,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    Question,
    Retries,
    Row,
    ServerFailed,
    Text,
    Unauthorized,
    UnreadableAnswer,
)
from dalorra.client.calls import Setup, classify, give_feedback, list_models, probe
from dalorra.client.hooks import Hooks
from dalorra.client.steps import Lost, Received
from tests.support.client_steps import ANSWER, Clock, Played, play, reply

TEXT = "a very private text"
BUSY = reply(429, {"code": "queue_full", "detail": "no room"}, retry_after="2")
DRAINING = reply(503, {"code": "draining", "detail": "about to stop"})
REFUSED = Lost("could not connect to the server")


class Case:
    """One call, its clock and what it did."""

    def __init__(self, timeout_s: float = 30.0, max_attempts: int = 5) -> None:
        self.clock, self.played = Clock(), Played()
        retries = Retries(max_attempts=max_attempts, stream=random.Random(0))
        self.setup = Setup(timeout_s, retries, self.clock, lambda: 0.0)

    def ask(self, *replies: Received | Lost, took_s: float = 0.0, **options: Any) -> Any:
        rows, hooks = options.pop("rows", TEXT), options.pop("hooks", Hooks())
        steps = classify(self.setup, rows, hooks, options)  # type: ignore[arg-type]
        return play(steps, self.clock, self.played, *replies, took_s=took_s)


def answer_of(*decisions: str) -> dict[str, Any]:
    row = ANSWER["data"][0]
    rows = [{**row, "index": n, "decision": decision} for n, decision in enumerate(decisions)]
    return {**ANSWER, "data": rows}


def test_an_answer_is_read_with_its_input_and_request_id() -> None:
    case = Case()
    answer = case.ask(reply(200, ANSWER, x_request_id="r-1"))
    assert (answer.id, answer.model, answer.request_id) == ("classify-1", "topics:1", "r-1")
    (row,) = answer.rows
    assert (row.label, row.confidence, row.input) == ("billing", 0.9, TEXT)
    assert (row.final_label, row.settled_by) == ("billing", "model")
    assert TEXT not in repr(answer)


def test_fields_of_a_newer_server_do_no_harm() -> None:
    newer = json.loads(json.dumps(ANSWER))
    newer["new"], newer["data"][0]["new"], newer["sampling"]["new"] = 1, [2], {"x": 3}
    assert Case().ask(reply(200, newer)).rows == Case().ask(reply(200, ANSWER)).rows


def test_answers_cannot_be_changed() -> None:
    (row,) = Case().ask(reply(200, ANSWER)).rows
    with pytest.raises(ValueError, match="frozen"):
        row.label = "fraud"


def test_what_is_asked_reaches_the_body_and_the_headers() -> None:
    case = Case()
    case.ask(
        reply(200, ANSWER),
        model="topics@prod",
        policy="risk_0.05",
        num_samples=8,
        seed=1,
        include=("timings",),
        metadata={"tenant": "acme"},
        priority="batch",
        request_id="r-1",
        timeout_s=7.0,
    )
    (sent,) = case.played.sent
    assert (sent.method, sent.path) == ("POST", "/v1/classify")
    assert sent.headers["X-Priority"] == "batch"
    assert sent.headers["X-Request-Id"] == "r-1"
    assert sent.headers["X-Request-Timeout-Ms"] == "7000"
    assert case.played.bodies == [
        {
            "input": [TEXT],
            "model": "topics@prod",
            "policy": {"name": "risk_0.05"},
            "num_samples": 8,
            "seed": 1,
            "include": ["timings"],
            "metadata": {"tenant": "acme"},
        }
    ]


def test_questions_and_texts_with_ids_are_sent_as_they_are() -> None:
    case = Case()
    case.ask(reply(200, ANSWER), rows=Text(text="x", id="t1"), policy={"max_risk": 0.05})
    question = Question(
        question="q", choices=(Choice(label="A", text="a"), Choice(label="B", text="b"))
    )
    case.ask(reply(200, ANSWER), rows=[question])
    first, second = case.played.bodies
    assert (first["input"], first["policy"]) == ([{"text": "x", "id": "t1"}], {"max_risk": 0.05})
    choices = [{"label": "A", "text": "a"}, {"label": "B", "text": "b"}]
    assert second["input"] == [{"question": "q", "choices": choices}]


def test_an_option_that_is_none_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="num_sample"):
        Case().ask(num_sample=3)


@pytest.mark.parametrize("option", ["request_id", "priority"])
@pytest.mark.parametrize("value", ["", "a b", "a\r\nx: y", "\u00e9", "a" * 129])
def test_an_option_never_leaves_its_header(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option):
        Case().ask(reply(200, ANSWER), **dict[str, Any]({option: value}))


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_outside_of_its_domain_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        Case().ask(timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        Case(timeout_s=timeout_s)


def test_a_busy_server_is_asked_again_when_it_said_and_not_before() -> None:
    case = Case()
    case.ask(BUSY, BUSY, reply(200, ANSWER))
    assert len(case.played.slept) == 2
    assert all(2.0 <= seconds <= 2.25 for seconds in case.played.slept)
    assert case.played.slept[0] != case.played.slept[1]  # or all who were refused come back at once


def test_without_a_hint_waits_grow_with_full_jitter_up_to_a_cap() -> None:
    case = Case(timeout_s=1000, max_attempts=12)
    case.ask(*[DRAINING] * 11, reply(200, ANSWER))
    longest = [min(8.0, 0.25 * 2**n) for n in range(11)]
    assert all(0 <= slept <= most for slept, most in zip(case.played.slept, longest, strict=True))
    stream = random.Random(0)
    assert case.played.slept == [stream.uniform(0, most) for most in longest]


def test_a_date_says_when_to_come_back_by_the_servers_own_clock() -> None:
    case = Case()
    dates = {
        "date": "Sun, 22 Nov 2026 10:00:00 GMT",
        "retry_after": "Sun, 22 Nov 2026 10:00:03 GMT",
    }
    case.ask(reply(503, {}, **dates), reply(200, ANSWER))
    assert 3.0 <= case.played.slept[0] <= 3.25


def test_a_connection_that_fails_is_tried_again() -> None:
    case = Case()
    case.ask(REFUSED, Lost("the connection broke off (ReadError)"), reply(200, ANSWER))
    assert len(case.played.sent) == 3


@pytest.mark.parametrize("status", [500, 502])
@pytest.mark.parametrize("body", [b"", b"The actor died unexpectedly", b"<html>", b"{}"])
def test_a_server_that_is_lost_behind_a_proxy_is_tried_again(status: int, body: bytes) -> None:
    lost = reply(status, body, x_request_id="r-1")
    case = Case()
    case.ask(lost, lost, reply(200, ANSWER))
    assert len(case.played.sent) == 3
    with pytest.raises(ConnectionFailed, match=str(status)):
        Case(max_attempts=1).ask(lost)


def test_attempts_are_bounded_and_the_last_error_is_told() -> None:
    case = Case(max_attempts=3)
    with pytest.raises(Overloaded) as caught:
        case.ask(BUSY, BUSY, BUSY)
    assert (caught.value.code, caught.value.status) == ("queue_full", 429)
    assert caught.value.retry_after_s == 2.0
    with pytest.raises(ConnectionFailed, match="could not connect"):
        Case(max_attempts=2).ask(REFUSED, REFUSED)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (307, InvalidRequest),
        (400, InvalidRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (408, InvalidRequest),
        (409, Conflict),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (500, ServerFailed),
        (502, ServerFailed),
    ],
)
def test_what_would_fail_again_is_asked_once(status: int, kind: type[ApiError]) -> None:
    case = Case()
    problem = {
        "code": "some_code",
        "detail": "a detail",
        "request_id": "r-9",
        "errors": [{"pointer": "#/input"}, "no fault"],
    }
    with pytest.raises(DalorraError) as caught:
        case.ask(reply(status, problem, retry_after="1"))
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, ApiError)
    assert (error.code, error.detail, error.request_id) == ("some_code", "a detail", "r-9")
    assert (error.status, error.errors) == (status, ({"pointer": "#/input"},))
    assert str(error) == "some_code: a detail (request id r-9)"
    assert case.played.slept == []


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"[" * 100_000, b'{"errors": 3}'])
def test_an_error_of_whatever_stands_in_between_is_still_typed(body: bytes) -> None:
    with pytest.raises(NotFound) as caught:
        Case().ask(reply(404, body, x_request_id="r-2"))
    assert (caught.value.code, caught.value.request_id) == ("http_error", "r-2")
    assert "404" in caught.value.detail


def test_every_attempt_is_told_the_time_that_is_left() -> None:
    case = Case(timeout_s=10)
    case.ask(BUSY, reply(200, ANSWER), took_s=1.0)
    first, second = case.played.sent
    assert first.timeout_s == 10
    assert second.timeout_s == pytest.approx(10 - 1 - case.played.slept[0])
    assert int(second.headers["X-Request-Timeout-Ms"]) == int(second.timeout_s * 1000)


def test_a_server_is_never_told_more_than_servers_allow() -> None:
    case = Case(timeout_s=600)
    case.ask(reply(200, ANSWER))
    assert case.played.sent[0].headers["X-Request-Timeout-Ms"] == "120000"
    assert case.played.sent[0].timeout_s == 600


def test_a_wait_that_would_pass_the_deadline_is_not_waited_for() -> None:
    case = Case(timeout_s=5)
    late = reply(503, {"code": "not_ready"}, retry_after="60")
    with pytest.raises(Overloaded) as caught:
        case.ask(late)
    assert caught.value.retry_after_s == 60
    assert case.played.slept == []


def test_time_that_is_up_is_a_deadline_whoever_noticed() -> None:
    for answer in (Lost("no answer in time", timed_out=True), reply(504, {"code": "x"})):
        with pytest.raises(DeadlineExceeded, match="30 s") as caught:
            Case().ask(answer)
        assert caught.value.timeout_s == 30


def test_no_time_is_left_after_a_slow_failure() -> None:
    case = Case(timeout_s=5)
    with pytest.raises((ConnectionFailed, DeadlineExceeded)):
        case.ask(REFUSED, took_s=5.0)
    assert len(case.played.sent) == 1


def test_a_machine_that_oversleeps_sends_nothing_after_the_deadline() -> None:
    case = Case(timeout_s=5)
    case.clock.oversleeps_s = 5
    with pytest.raises(DeadlineExceeded):
        case.ask(REFUSED)
    assert len(case.played.sent) == 1


@pytest.mark.parametrize(
    "document",
    [b"not json", b"[]", {**ANSWER, "data": [{"label": TEXT}]}, {**ANSWER, "data": []}],
    ids=["text", "list", "row", "too few"],
)
def test_a_200_that_is_no_answer_is_said_to_be_none(document: Any) -> None:
    with pytest.raises(UnreadableAnswer) as caught:
        Case().ask(reply(200, document))
    assert TEXT not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_hook_settles_what_the_model_leaves_open() -> None:
    asked: list[Row] = []

    def escalate(row: Row) -> str | None:
        asked.append(row)
        return "fraud" if row.decision == "abstain" else None

    hooks = Hooks(on_review=escalate, on_abstain=escalate)
    found = reply(200, answer_of("accept", "review", "abstain"))
    answer = Case().ask(found, rows=["a", "b", "c"], hooks=hooks)
    settled = [(row.final_label, row.settled_by) for row in answer.rows]
    assert settled == [("billing", "model"), (None, None), ("fraud", "on_abstain")]
    assert [(row.decision, row.input) for row in asked] == [("review", "b"), ("abstain", "c")]
    assert [row.label for row in answer.rows] == ["billing"] * 3  # what the model said stays


def test_rows_without_a_hook_stay_open() -> None:
    answer = Case().ask(reply(200, answer_of("review", "abstain")), rows=["a", "b"])
    assert [(row.final_label, row.settled_by) for row in answer.rows] == [(None, None)] * 2


def test_a_hook_that_returns_no_label_is_a_type_error() -> None:
    hooks = Hooks(on_abstain=lambda _row: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="on_abstain must return a label or None, not int"):
        Case().ask(reply(200, answer_of("abstain")), hooks=hooks)


def test_a_coroutine_that_nobody_can_await_is_a_type_error() -> None:
    async def hook(_row: Row) -> str:
        return "fraud"

    with pytest.raises(TypeError, match="not coroutine"):
        Case().ask(reply(200, answer_of("review")), hooks=Hooks(on_review=hook))


def test_feedback_is_sent_and_repeated_when_the_server_is_busy() -> None:
    case = Case()
    stored = {"prediction_id": "p-0", "outcome": "wrong", "stored": True}
    steps = give_feedback(case.setup, "p-0", None, "audit")
    found = play(steps, case.clock, case.played, BUSY, reply(202, stored))
    assert (found.outcome, found.stored) == ("wrong", True)
    body = {"prediction_id": "p-0", "label": None, "source": "audit"}
    assert case.played.bodies == [body, body]


def test_models_are_listed() -> None:
    case = Case()
    model = {
        "id": "topics",
        "revision": "1",
        "kind": "text",
        "method": "dalorra",
        "parent": "tiny",
        "labels": ["a", "b"],
        "sampling": ANSWER["sampling"],
        "limits": {"max_rows": 64},
        "new": True,
    }
    found = play(list_models(case.setup), case.clock, case.played, reply(200, {"data": [model]}))
    assert [(model.id, model.labels, model.limits) for model in found] == [
        ("topics", ("a", "b"), {"max_rows": 64})
    ]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply(200), True),
        (DRAINING, False),
        (REFUSED, False),
        (Lost("", timed_out=True), False),
    ],
    ids=["ready", "draining", "refused", "hung"],
)
def test_ready_asks_once(answer: Received | Lost, expected: bool) -> None:
    case = Case()
    assert play(probe(case.setup), case.clock, case.played, answer) is expected
    assert case.played.slept == []


def test_ready_does_not_hide_a_server_that_is_no_dalorra() -> None:
    case = Case()
    with pytest.raises(NotFound):
        play(probe(case.setup), case.clock, case.played, reply(404))


def test_neither_text_nor_answer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    case = Case()
    case.ask(BUSY, reply(200, ANSWER), metadata={"who": "somebody"})
    assert [record.name for record in caplog.records] == ["dalorra.client.calls"]
    assert "queue_full" in caplog.text
    for private in (TEXT, "somebody", "billing"):
        assert private not in caplog.text
    assert TEXT not in repr(case.played.sent)

"""Carry out the steps of a client's call by hand: prepared replies, a clock that sleeps move."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from dalorra.client.steps import Ask, Lost, Received, Send, Sleep, Step, Steps

__all__ = ["ANSWER", "Clock", "Played", "play", "reply"]

T = TypeVar("T")
UNCERTAINTY = {"predictive_entropy": 0.4, "normalized_entropy": 0.3, "variation_ratio": 0.0}
ROW = {
    "index": 0,
    "id": None,
    "prediction_id": "p-0",
    "label": "billing",
    "labels": ["billing", "fraud"],
    "probs": [0.9, 0.1],
    "confidence": 0.9,
    "decision": "accept",
    "reasons": [],
    "uncertainty": UNCERTAINTY,
}
ANSWER: dict[str, Any] = {
    "id": "classify-1",
    "created": 1,
    "model": "topics:1",
    "data": [ROW],
    "policy": None,
    "sampling": {"num_samples": 4, "seed": 0, "estimator": "monte_carlo", "design": "iid"},
    "usage": {"prompt_tokens": 5, "total_tokens": 5},
}


def reply(status: int, document: Any = None, **headers: str) -> Received:
    """Return an answer; ``headers`` have underscores for dashes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = document if isinstance(document, bytes) else json.dumps(document or {}).encode()
    return Received(status, named, body)


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self.oversleeps_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Played:
    """What a call did."""

    def __init__(self) -> None:
        self.sent: list[Send] = []
        self.slept: list[float] = []

    @property
    def bodies(self) -> list[Mapping[str, Any]]:
        return [json.loads(send.body or b"{}") for send in self.sent]


def play(
    steps: Steps[T], clock: Clock, played: Played, *replies: Received | Lost, took_s: float = 0.0
) -> T:
    """Carry out a call; every request takes ``took_s`` and gets the next reply.

    Fails when a request is left without a reply, or a reply without a request.
    """
    waiting = list(replies)
    answer: object = None
    while True:
        try:
            step: Step = steps.send(answer)
        except StopIteration as done:
            assert not waiting, f"never asked for: {waiting}"
            return done.value
        match step:
            case Send():
                played.sent.append(step)
                clock.now_s += took_s
                answer = waiting.pop(0)
            case Sleep(seconds):
                played.slept.append(seconds)
                clock.now_s += seconds + clock.oversleeps_s
                answer = None
            case Ask(function):
                answer = function()

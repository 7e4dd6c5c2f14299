"""What can be asked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict

__all__ = ["Choice", "Item", "Options", "Question", "Rows", "Text", "as_items", "classify_body"]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(_Asked):
    """A text with an id of your own, which its row has again."""

    text: str
    id: str | None = None


class Choice(_Asked):
    """A possible answer with a label of its own."""

    label: str
    text: str


class Question(_Asked):
    """A multiple-choice question; choices that are strings get the labels A, B, C ..."""

    question: str
    choices: tuple[str | Choice, ...]
    context: str | None = None
    id: str | None = None


Item = str | Text | Question
Rows = Item | Sequence[Item]


class Options(TypedDict, total=False):
    """What a classification may choose; all of it has a default on the server.

    Attributes:
        model: Adapter: ``name``, ``name:revision`` or ``name@alias``.
        policy: Name of a policy, or one of the forms of the HTTP API, such as
            ``{"max_risk": 0.05}``.
        num_samples: Posterior samples that are averaged, at least 1; ``auto`` for the adapter's
            own number, as if it were left out.
        seed: Picks the set of samples.
        estimator: ``mean_mask`` is one deterministic pass, ``linearised`` for few labels.
        design: How the samples are drawn together.
        truncate: Which side of a text to cut that is too long.
        top_k: How many labels ``Row.top`` shall have.
        include: ``samples`` and ``timings``.
        metadata: Plain values that are sent back.
        timeout_s: Time for this call, all attempts together, in seconds.
        priority: ``batch`` lets those go first who wait for an answer.
        request_id: By which the server's logs shall know the request: 1 to 128 of
            ``A-Za-z0-9._-``.
    """

    model: str
    policy: str | Mapping[str, object]
    num_samples: int | Literal["auto"]
    seed: int
    estimator: Literal["monte_carlo", "mean_mask", "linearised"]
    design: Literal["iid", "stratified", "antithetic"]
    truncate: Literal["none", "start", "end"]
    top_k: int
    include: Sequence[Literal["samples", "timings"]]
    metadata: Mapping[str, str | bool | int | float | None]
    timeout_s: float
    priority: Literal["interactive", "batch"]
    request_id: str


_NOT_IN_BODY = frozenset({"timeout_s", "priority", "request_id"})


def as_items(rows: Rows) -> list[Item]:
    """Return one or more questions as a list."""
    return [rows] if isinstance(rows, str | Text | Question) else list(rows)


def classify_body(items: Sequence[Item], options: Options) -> bytes:
    """Return the body of a classification.

    Raises:
        TypeError: There is no such option.
    """
    if unknown := sorted(set(options) - Options.__annotations__.keys()):
        raise TypeError(f"classify has no option {unknown[0]!r}")
    body: dict[str, Any] = {"input": [_plain(item) for item in items]}
    body |= {name: value for name, value in options.items() if name not in _NOT_IN_BODY}
    if isinstance(policy := options.get("policy"), str):
        body["policy"] = {"name": policy}
    for name, plain in (("include", list), ("metadata", dict), ("policy", dict)):
        if name in body:
            body[name] = plain(body[name])
    return json.dumps(body, ensure_ascii=True, allow_nan=False).encode()


def _plain(item: Item) -> object:
    return item if isinstance(item, str) else item.model_dump(exclude_none=True)

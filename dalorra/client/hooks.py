"""Who decides where the model does not: functions of yours, called for the rows they are for."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from dalorra.client.answers import Row
from dalorra.client.steps import Ask, Steps

__all__ = ["AsyncHook", "Hook", "Hooks", "settle"]

Hook = Callable[[Row], str | None]
"""Gets a row (``row.input`` is the question) and returns the final label; None leaves it open."""

AsyncHook = Callable[[Row], str | Awaitable[str | None] | None]
"""The same; it may also be a coroutine function."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The functions of one call."""

    on_review: AsyncHook | None = None
    on_abstain: AsyncHook | None = None


def settle(row: Row, hooks: Hooks) -> Steps[Row]:
    """Return a row with its ``final_label``, if there is one.

    Raises:
        TypeError: A hook returned something else than a label or None.
    """
    if row.decision == "accept":
        return row.model_copy(update={"final_label": row.label, "settled_by": "model"})
    review = row.decision == "review"
    name, hook = ("on_review", hooks.on_review) if review else ("on_abstain", hooks.on_abstain)
    if hook is None:
        return row
    label: object = yield Ask(partial(hook, row))
    if label is None:
        return row
    if not isinstance(label, str):
        if inspect.iscoroutine(label):
            label.close()  # a blocking client cannot await it, and it would warn
        raise TypeError(f"{name} must return a label or None, not {type(label).__name__}")
    return row.model_copy(update={"final_label": label, "settled_by": name})

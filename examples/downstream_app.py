"""A help desk that lets Dalorra sort its mail and knows when not to believe it.

    python examples/downstream_app.py http://127.0.0.1:8000 < messages.txt

One message a line. An accepted label goes to its queue, a doubtful one is shown to a person, and a
message outside of what the adapter knows is refused politely. Only the standard library is used.
"""

# ruff: noqa: S310, T201 - the address comes from whoever starts the program, and it talks to them

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Person = Callable[[str, list[dict[str, Any]]], str | None]
MAX_TRIES = 5
TOO_MANY, UNAVAILABLE = 429, 503


@dataclass(frozen=True)
class Routed:
    """Where one message went, and who decided it: ``model``, ``person`` or ``nobody``."""

    message: str
    queue: str | None
    decided_by: str


def classify(url: str, messages: list[str], sleep: Callable[[float], None]) -> list[dict[str, Any]]:
    """Return the answer to each message; waits as long as a busy server asks for."""
    body = json.dumps({"input": messages, "top_k": 3}).encode()
    headers = {"Content-Type": "application/json", "X-Request-Timeout-Ms": "30000"}
    request = urllib.request.Request(f"{url}/v1/classify", body, headers)
    for attempt in range(1, MAX_TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=35) as response:
                return list(json.load(response)["data"])
        except urllib.error.HTTPError as error:
            with error:
                problem = json.load(error)
            if error.code not in (TOO_MANY, UNAVAILABLE) or attempt == MAX_TRIES:
                raise RuntimeError(f"{problem['title']}: {problem['detail']}") from None
            sleep(float(error.headers.get("Retry-After", 1)))
    raise AssertionError("the last try returns or raises")


def route(message: str, answer: dict[str, Any], ask_person: Person) -> Routed:
    """Act on one decision."""
    if answer["decision"] == "accept":
        return Routed(message, answer["label"], "model")
    if answer["decision"] == "review":
        label = ask_person(message, answer["top"])
        return Routed(message, label, "person" if label is not None else "nobody")
    return Routed(message, None, "nobody")


def run(
    url: str,
    messages: list[str],
    ask_person: Person,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Routed]:
    """Route every message."""
    answers = classify(url, messages, sleep)
    return [route(m, answer, ask_person) for m, answer in zip(messages, answers, strict=True)]


def ask_at_the_terminal(message: str, top: list[dict[str, Any]]) -> str | None:
    """Let a person choose among the best labels; just Enter means none of them."""
    print(f"\nNot sure about: {message}")
    for number, choice in enumerate(top, start=1):
        print(f"  {number}. {choice['label']} ({choice['prob']:.0%})")
    with Path("/dev/tty").open() as terminal:
        print("Which one? ", end="", flush=True)
        answer = terminal.readline().strip()
    chosen = {str(number): choice["label"] for number, choice in enumerate(top, start=1)}
    return chosen.get(answer)


def main() -> None:
    """Route the messages on standard input."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    messages = [line.strip() for line in sys.stdin if line.strip()]
    for routed in run(url, messages, ask_at_the_terminal):
        if routed.queue is None:
            print(f"refused   {routed.message}  (sorry, we cannot help with this)")
        else:
            print(f"{routed.queue:<9} {routed.message}  (decided by {routed.decided_by})")


if __name__ == "__main__":
    main()

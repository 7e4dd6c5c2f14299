"""Let Dalorra label messages, ask you about the doubtful ones, and tell the server what you said.

    python examples/escalate.py http://127.0.0.1:8000 < messages.txt

One message a line. A message that the model does not know is handed over as a line of JSON on
standard error, for whatever queue people work through. The client does the rest: retries,
deadlines, the key in DALORRA_API_KEY.
"""

# ruff: noqa: T201 - it talks to whoever starts it

import json
import sys
from collections.abc import Callable
from pathlib import Path

from dalorra.client import Client, DalorraError, NotFound, Row

Person = Callable[[Row], str | None]


def label(client: Client, messages: list[str], ask_person: Person) -> list[Row]:
    """Return each message's row; ``final_label`` is None where nobody has decided yet."""
    reviewed: list[Row] = []

    def review(row: Row) -> str | None:
        reviewed.append(row)
        return ask_person(row)

    def hand_over(row: Row) -> None:
        note = {"message": row.input, "best_guess": row.label, "why": row.reasons}
        print(json.dumps(note), file=sys.stderr)

    answer = client.classify(messages, top_k=3, on_review=review, on_abstain=hand_over)
    for row in answer.rows:
        if row.settled_by == "on_review":
            tell(client, row)
    return list(answer.rows)


def tell(client: Client, row: Row) -> None:
    """Let the server learn how often its doubtful answers were right after all."""
    try:
        client.feedback(row.prediction_id, row.final_label, source="person")
    except NotFound as error:
        if error.code != "feedback_disabled":
            raise


def ask_at_the_terminal(row: Row) -> str | None:
    """Let a person choose among the best labels; just Enter leaves the message open."""
    print(f"\nNot sure about: {row.input}")
    choices = {str(n): best for n, best in enumerate(row.top or (), start=1)}
    for number, best in choices.items():
        print(f"  {number}. {best.label} ({best.prob:.0%})")
    print("Which one? ", end="", flush=True)
    with Path("/dev/tty").open() as terminal:
        chosen = choices.get(terminal.readline().strip())
    return chosen.label if chosen else None


def main() -> int:
    """Label the messages on standard input."""
    messages = [line.strip() for line in sys.stdin if line.strip()]
    try:
        with Client(*sys.argv[1:2]) as client:
            rows = label(client, messages, ask_at_the_terminal)
    except DalorraError as error:
        print(f"no answer: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print(f"{row.final_label or '?':<12} {row.settled_by or 'nobody':<12} {row.input}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

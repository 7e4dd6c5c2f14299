"""Serve the fake engine in a process of its own: ``python -m tests.support.serve_fake``.

Logs to standard error as the real server does. Prints ``entered`` when a batch with the word
``wait`` begins to run, and lets it go on when a line comes on standard input. With ``--slow-load``
the model never loads, with ``--bad-load`` it cannot be loaded; ``--port N`` takes that port.
``--certified`` serves an adapter as after calibration, ``--locked-policy NAME`` locks one of its
policies, and ``--state-dir DIR`` turns feedback on, in the database ``--feedback-url`` if given.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import SecretStr

from server.app import create_app
from server.logs import configure_logging
from server.ports import BatchKey, BatchScores, EncodedRow
from server.run import leave, run_server
from server.settings import Settings
from tests.support.fake_engine import TOPICS_CERTIFIED, FakeEngine

__all__ = ["main"]


class ToldEngine(FakeEngine):
    """Runs a batch with the word ``wait`` only when it is told to."""

    def run_batch(self, key: BatchKey, rows: Sequence[EncodedRow]) -> BatchScores:
        if any("wait" in str(row.payload) for row in rows):
            say("entered")
            sys.stdin.readline()
        return super().run_batch(key, rows)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def main(arguments: list[str]) -> int:
    configure_logging("info")
    engine = ToldEngine(TOPICS_CERTIFIED) if "--certified" in arguments else ToldEngine()
    if "--slow-load" in arguments:
        engine.load_gate.clear()
    if "--bad-load" in arguments:
        engine.load_fault = ValueError("a byte has changed")
    state_dir = option(arguments, "--state-dir")
    url = option(arguments, "--feedback-url") or (None if state_dir else "off")
    settings = Settings(
        port=int(option(arguments, "--port") or 0),
        drain_seconds=1.5,
        locked_policy=option(arguments, "--locked-policy"),
        state_dir=Path(state_dir) if state_dir else None,
        feedback_url=SecretStr(url) if url else None,
    )
    app = create_app(lambda: engine, settings)
    exit_code = run_server(app, settings)
    if app.state.service.lifecycle.abandoned:
        leave(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Shared by every test: markers from folders, golden files, one thread, no model hub.

Nothing of the product is imported at the top: the shape checker must see each module's first
import.
"""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.postgresql import PostgresServer, find_postgresql, postgresql_server
from tests.support.required import require_or_skip

__all__ = [
    "database_url",
    "golden",
    "postgresql",
    "pytest_addoption",
    "pytest_collection_modifyitems",
]

TESTS = Path(__file__).parent
FOLDER_MARKERS = frozenset({"property", "golden", "integration", "benchmark"})

# Read by the Hugging Face libraries when they are imported: a test never asks the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Tiny tensors: a second thread costs more than it brings, and sums would depend on their number.
torch.set_num_threads(1)

# A busy machine is slow, which is no fault of the code; the same inputs are tried on every run.
settings.register_profile(
    "dalorra", deadline=None, derandomize=True, database=None, max_examples=60
)
settings.load_profile("dalorra")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the files that golden tests compare with; read the difference in review",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the folder it lies in, and skip GPU tests where there is no device."""
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.path.is_relative_to(TESTS):
            folder = item.path.relative_to(TESTS).parts[0]
            if folder in FOLDER_MARKERS:
                item.add_marker(getattr(pytest.mark, folder))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_device)


@pytest.fixture(autouse=True)
def _logs_are_put_back() -> Iterator[None]:
    """Undo what a command that ran in process did to the root logger: its stream is closed now."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the server's state, where a test names no place for it, out of the home directory."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """Return a real PostgreSQL server of the session's own; see ``require_or_skip``."""
    programs = find_postgresql()
    require_or_skip("postgresql", programs)
    assert programs is not None
    with postgresql_server(programs) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, of each kind that feedback can be kept in."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'feedback.sqlite3'}"
    server: PostgresServer = request.getfixturevalue("postgresql")
    return server.make_database()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return a check that a text equals the recorded one, ``golden(name, text)``.

    The record is ``tests/golden/<name>``. Under ``--update-golden`` it is rewritten instead; a
    missing record is a failure, never a pass.
    """
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        path = TESTS / "golden" / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: record it with --update-golden"
        assert text == path.read_text(encoding="utf-8"), (
            f"{path} differs; if that is meant, rewrite it with --update-golden"
        )

    return check


def pytest_unconfigure() -> None:
    # Exporters of collectors that hung in a test give up some time after the last one.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

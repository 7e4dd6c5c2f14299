"""The store of true labels, on SQLite and on a real PostgreSQL."""

import contextlib
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text, update
from sqlalchemy.exc import DBAPIError

from server.feedback import (
    ExpiredPredictionError,
    FeedbackConflictError,
    FeedbackSetupError,
    FeedbackStore,
    FeedbackUnavailableError,
    StoredFeedback,
)
from server.feedback.database import _SCHEMA, FEEDBACK, open_database, reason_of, shown_url
from server.feedback.store import DAY_S, MAX_INSIDE, RiskCount
from tests.support.feedback import NOW, make_claim
from tests.support.postgresql import PostgresServer


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database_url: str, clock: Clock) -> Iterator[FeedbackStore]:
    store = FeedbackStore(database_url, retention_days=30, clock=clock)
    yield store
    store.close()


def rows(store: FeedbackStore) -> list[dict[str, object]]:
    with store._engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(FEEDBACK)).mappings()]


def test_a_label_is_stored_with_what_the_id_carries_and_nothing_else(store: FeedbackStore) -> None:
    claim = make_claim(confidence=0.75)
    assert store.insert(claim, "fraud", "audit") == StoredFeedback(correct=False, stored=True)
    (row,) = rows(store)
    assert row == {
        "digest": claim.digest,
        "adapter": "topics",
        "revision": "3f9a00112233",
        "predicted": "billing",
        "confidence": 0.75,
        "decision": "accept",
        "policy": "risk-0.05",
        "target_risk": 0.05,
        "default_sampling": True,
        "label": "fraud",
        "correct": False,
        "source": "audit",
        "issued_at": NOW,
        "received_at": NOW,
    }


def test_none_of_the_labels_is_wrong_and_is_not_no_label(store: FeedbackStore) -> None:
    claim = make_claim()
    assert store.insert(claim, None, None) == StoredFeedback(correct=False, stored=True)
    assert store.insert(claim, None, None) == StoredFeedback(correct=False, stored=False)
    with pytest.raises(FeedbackConflictError):
        store.insert(claim, "billing", None)


def test_the_same_label_again_changes_nothing(store: FeedbackStore, clock: Clock) -> None:
    claim = make_claim()
    assert store.insert(claim, "billing", "first") == StoredFeedback(correct=True, stored=True)
    clock.now += 60
    assert store.insert(claim, "billing", "again") == StoredFeedback(correct=True, stored=False)
    (row,) = rows(store)
    assert (row["source"], row["received_at"]) == ("first", NOW)


def test_another_label_is_a_conflict_that_names_no_label(store: FeedbackStore) -> None:
    claim = make_claim()
    store.insert(claim, "billing", None)
    with pytest.raises(FeedbackConflictError) as caught:
        store.insert(claim, "fraud", None)
    assert "billing" not in str(caught.value)
    assert [row["label"] for row in rows(store)] == ["billing"]


def test_text_of_any_script_is_kept(store: FeedbackStore) -> None:
    claim = make_claim(adapter="thémes", label="отказ 拒否 🙂", policy=None, target_risk=None)
    assert store.insert(claim, "отказ 拒否 🙂", None).correct
    assert rows(store)[0]["label"] == "отказ 拒否 🙂"


def test_one_of_many_that_come_at_once_is_stored(store: FeedbackStore) -> None:
    claim = make_claim()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: store.insert(claim, "billing", None), range(64)))
    assert sorted(result.stored for result in found) == [False] * 63 + [True]
    assert store.count() == 1


def test_of_two_labels_that_come_at_once_one_wins(store: FeedbackStore) -> None:
    claim = make_claim()
    labels = ["billing", "fraud"] * 16

    def attempt(label: str) -> str | None:
        try:
            store.insert(claim, label, None)
        except FeedbackConflictError:
            return None
        return label

    with ThreadPoolExecutor(16) as threads:
        won = [label for label in threads.map(attempt, labels) if label]
    assert won == [won[0]] * 16
    assert [row["label"] for row in rows(store)] == [won[0]]


def test_two_stores_on_one_database_see_each_other(database_url: str, clock: Clock) -> None:
    first, second = (FeedbackStore(database_url, retention_days=9, clock=clock) for _ in range(2))
    try:
        claims = [make_claim() for _ in range(100)]
        with ThreadPoolExecutor(8) as threads:
            results = list(
                threads.map(
                    lambda pair: pair[0].insert(pair[1], "billing", None),
                    [(store, claim) for claim in claims for store in (first, second)],
                )
            )
        assert sum(result.stored for result in results) == 100
        assert first.count() == second.count() == 100
    finally:
        first.close()
        second.close()


# -- retention --------------------------------------------------------------------------------


def test_rows_go_when_their_time_is_over(store: FeedbackStore, clock: Clock) -> None:
    for _ in range(3):
        store.insert(make_claim(), "billing", None)
    clock.now += 30 * DAY_S
    store.insert(make_claim(issued_at=int(clock.now)), "billing", None)
    assert store.purge() == 0
    clock.now += 1
    assert store.purge() == 3
    assert store.count() == 1


def test_a_label_cannot_be_changed_by_waiting_until_it_is_deleted(
    store: FeedbackStore, clock: Clock
) -> None:
    claim = make_claim()
    store.insert(claim, "billing", None)
    clock.now += 30 * DAY_S + 1
    store.purge()
    with pytest.raises(ExpiredPredictionError, match="30 days ago, the limit feedback_retention"):
        store.insert(claim, "fraud", None)
    assert store.count() == 0


def test_a_row_of_a_replica_whose_clock_is_behind_lives_as_long_as_its_id(
    store: FeedbackStore, clock: Clock
) -> None:
    store.insert(make_claim(issued_at=NOW + 100), "billing", None)
    clock.now += 30 * DAY_S + 50
    assert store.purge() == 0


def test_retention_works_at_the_start_and_by_a_timer(database_url: str, clock: Clock) -> None:
    store = FeedbackStore(database_url, retention_days=1, clock=clock, purge_every_s=0.02)
    try:
        store.insert(make_claim(), "billing", None)
        clock.now += DAY_S + 1
        store.start()
        wait_until_empty(store)
        store.insert(make_claim(issued_at=int(clock.now)), "billing", None)
        clock.now += DAY_S + 1
        wait_until_empty(store)
    finally:
        store.close()
    assert "dalorra-retention" not in {thread.name for thread in threading.enumerate()}


def wait_until_empty(store: FeedbackStore) -> None:
    end_s = time.monotonic() + 10
    while store.count():
        assert time.monotonic() < end_s, "the rows were not deleted"
        time.sleep(0.01)


# -- what the monitor reads -------------------------------------------------------------------


def test_risk_is_counted_over_accepted_answers_with_a_certificate(store: FeedbackStore) -> None:
    for number in range(10):
        store.insert(make_claim(), "billing" if number < 7 else "fraud", None)
    store.insert(make_claim(), None, None)
    store.insert(make_claim(decision="review"), "fraud", None)
    store.insert(make_claim(target_risk=None), "fraud", None)
    store.insert(make_claim(policy=None, target_risk=None), "fraud", None)
    store.insert(make_claim(revision="other"), "billing", None)
    store.insert(make_claim(policy="risk-0.01", target_risk=0.01), "fraud", None)
    found = sorted(store.risk_counts(), key=lambda count: (count.revision, count.policy))
    assert found == [
        RiskCount("topics", "3f9a00112233", "risk-0.01", 0.01, n=1, wrong=1),
        RiskCount("topics", "3f9a00112233", "risk-0.05", 0.05, n=11, wrong=4),
        RiskCount("topics", "other", "risk-0.05", 0.05, n=1, wrong=0),
    ]


def test_the_newest_target_of_a_policy_counts(store: FeedbackStore) -> None:
    store.insert(make_claim(target_risk=0.1), "fraud", None)
    store.insert(make_claim(target_risk=0.02, issued_at=NOW + 5), "billing", None)
    (count,) = store.risk_counts()
    assert (count.target_risk, count.n, count.wrong) == (0.02, 1, 0)


# -- the database -----------------------------------------------------------------------------


def test_rows_outlive_the_store(database_url: str, clock: Clock) -> None:
    for stored in (True, False):
        store = FeedbackStore(database_url, retention_days=9, clock=clock)
        claim = make_claim(nonce="always the same")
        assert store.insert(claim, "billing", None).stored is stored
        store.close()


def test_sqlite_keeps_what_it_acknowledged_even_without_power(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'f.sqlite3'}")
    with engine.connect() as connection:
        read = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        ]
    engine.dispose()
    assert read == ["wal", 2, 5000]  # 2 is FULL


def test_postgresql_keeps_what_it_acknowledged(postgresql: PostgresServer) -> None:
    url = postgresql.make_database()
    lax = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with lax.begin() as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    lax.dispose()
    engine = open_database(url)
    with engine.connect() as connection:
        read = [
            connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("synchronous_commit", "statement_timeout")
        ]
    engine.dispose()
    assert read == ["on", "5s"]


WRITER = """
import sys
from server.feedback.store import FeedbackStore
from tests.support.feedback import NOW, make_claim
store = FeedbackStore(sys.argv[1], retention_days=30, clock=lambda: NOW)
print("ready", flush=True)
sys.stdin.readline()
while True:
    claim = make_claim()
    store.insert(claim, "billing", None)
    print(claim.digest.hex(), flush=True)
"""


@contextlib.contextmanager
def writers(url: str, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes that wait for a line, then store rows and print the digest of each."""
    command = [sys.executable, "-c", WRITER, url]
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[str]] = []
        for _ in range(number):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        assert [read_line(process) for process in processes] == ["ready"] * number
        yield processes


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_nothing_acknowledged_is_lost_when_writers_are_killed(
    database_url: str, clock: Clock
) -> None:
    acknowledged: set[str] = set()
    with writers(database_url, 3) as processes:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for number, process in enumerate(processes):
            acknowledged |= {read_line(process) for _ in range(20 + number)}
            process.send_signal(signal.SIGKILL)
            # what was printed before the kill came was acknowledged too
            assert process.stdout is not None
            acknowledged |= {line.strip() for line in process.stdout if line.endswith("\n")}
            assert process.wait(timeout=20) == -signal.SIGKILL
    store = FeedbackStore(database_url, retention_days=30, clock=clock)
    stored = {row["digest"].hex() for row in rows(store) if isinstance(row["digest"], bytes)}
    store.close()
    assert len(acknowledged) >= 63
    assert acknowledged <= stored
    # at most the one row of each that was on its way
    assert len(stored - acknowledged) <= len(processes)


def test_processes_that_start_at_once_make_one_schema(database_url: str) -> None:
    for _ in range(3):
        with ThreadPoolExecutor(6) as threads:
            engines = list(threads.map(lambda _: open_database(database_url), range(6)))
        with engines[0].begin() as connection:
            assert connection.execute(select(_SCHEMA.c.version)).scalars().all() == [1]
            connection.execute(text(f"DROP TABLE {FEEDBACK.name}"))
            connection.execute(text(f"DROP TABLE {_SCHEMA.name}"))
        for engine in engines:
            engine.dispose()


def test_real_processes_that_start_at_once_make_one_schema(database_url: str) -> None:
    with writers(database_url, 4):
        engine = open_database(database_url)
    with engine.connect() as connection:
        assert connection.execute(select(_SCHEMA.c.version)).scalars().all() == [1]
    engine.dispose()


def test_a_schema_of_another_version_is_refused(database_url: str) -> None:
    engine = open_database(database_url)
    with engine.begin() as connection:
        connection.execute(update(_SCHEMA).values(version=7))
    engine.dispose()
    with pytest.raises(FeedbackSetupError, match="schema version 7, this server knows 1"):
        open_database(database_url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://u:hunter2@h/d", "must be sqlite or postgresql"),
        ("postgresql+asyncpg://u:hunter2@h/d", "must be sqlite or postgresql"),
        ("sqlite://", "path of a file"),
        ("sqlite:///:memory:", "path of a file"),
        ("sqlite:////no/such/place/f.sqlite3", "/no/such/place is not a directory"),
        ("postgresql://u:hunter2@127.0.0.1:1/d", "(?i)refused"),
        ("postgresql://u:hunter2@127.0.0.1:1/d?sslpassword=hunter2", "(?i)refused"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(url: str, says: str) -> None:
    with pytest.raises(FeedbackSetupError, match=says) as caught:
        open_database(url)
    assert str(caught.value).startswith("feedback_url: ")
    assert "hunter2" not in str(caught.value)


def test_a_wrong_password_is_an_error_that_does_not_repeat_it(postgresql: PostgresServer) -> None:
    url = postgresql.url().replace(postgresql.password, "hunter2")
    with pytest.raises(FeedbackSetupError, match="password authentication failed") as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "f.sqlite3"
    path.write_bytes(b"this is no database, and long enough to be looked at" * 20)
    with pytest.raises(FeedbackSetupError, match="file is not a database"):
        open_database(f"sqlite:///{path}")


def test_a_file_that_is_locked_for_too_long_is_unavailable(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.feedback.database.WAIT_S", 0.1)
    path = tmp_path / "f.sqlite3"
    store = FeedbackStore(f"sqlite:///{path}", retention_days=30, clock=clock)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with (
            caplog.at_level(logging.ERROR),
            pytest.raises(FeedbackUnavailableError, match="cannot be reached"),
        ):
            store.insert(make_claim(), "billing", None)
        other.execute("ROLLBACK")
    assert [record.__dict__["reason"] for record in caplog.records] == ["database is locked"]
    assert store.insert(make_claim(), "billing", None).stored
    other.close()
    store.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_acknowledged_into_a_file_that_is_gone(
    tmp_path: Path, clock: Clock, *, replaced: bool
) -> None:
    path, copy = tmp_path / "f.sqlite3", tmp_path / "copy.sqlite3"
    store = FeedbackStore(f"sqlite:///{path}", retention_days=30, clock=clock)
    store.insert(make_claim(), "billing", None)
    with (
        contextlib.closing(sqlite3.connect(path)) as old,
        contextlib.closing(sqlite3.connect(copy)) as new,
    ):
        old.backup(new)
    for name in ("f.sqlite3", "f.sqlite3-wal", "f.sqlite3-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    later = make_claim()
    if replaced:  # as by an operator who restores a backup
        copy.rename(path)
        assert store.insert(later, "billing", None).stored
    else:
        with pytest.raises(FeedbackUnavailableError):
            store.insert(later, "billing", None)
        with pytest.raises(FeedbackUnavailableError):
            store.insert(later, "billing", None)
    store.close()
    again = FeedbackStore(f"sqlite:///{path}", retention_days=30, clock=clock)
    assert again.count() == (2 if replaced else 0)
    assert again.insert(later, "billing", None).stored is not replaced
    again.close()


def test_postgresql_may_go_away_and_come_back(postgresql: PostgresServer, clock: Clock) -> None:
    store = FeedbackStore(postgresql.make_database(), retention_days=30, clock=clock)
    kept, missed = make_claim(), make_claim()
    store.insert(kept, "billing", None)
    postgresql.stop("immediate")
    try:
        for work in (lambda: store.insert(missed, "billing", None), store.risk_counts, store.purge):
            with pytest.raises(FeedbackUnavailableError, match="cannot be reached"):
                work()
    finally:
        postgresql.start()
    assert not store.insert(kept, "billing", None).stored
    assert store.insert(missed, "billing", None).stored
    store.close()


def test_a_row_that_the_database_drops_without_a_word_is_not_acknowledged(
    tmp_path: Path, clock: Clock
) -> None:
    store = FeedbackStore(f"sqlite:///{tmp_path / 'f.sqlite3'}", retention_days=30, clock=clock)
    with store._engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TRIGGER drops BEFORE INSERT ON {FEEDBACK.name} BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(FeedbackUnavailableError, match="neither be stored nor found"):
        store.insert(make_claim(), "billing", None)
    store.close()


def test_without_psycopg_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(FeedbackSetupError, match=r"dalorra\[postgresql\]"):
        open_database("postgresql://u:hunter2@h/d")


def test_a_database_error_never_shows_the_row(database_url: str, clock: Clock) -> None:
    store = FeedbackStore(database_url, retention_days=30, clock=clock)
    with store._engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {FEEDBACK.name}"))
    with pytest.raises(DBAPIError) as caught:
        store._insert({"digest": b"0" * 32, "label": "very-private"})
    assert "very-private" not in str(caught.value)
    assert "very-private" not in reason_of(caught.value)
    store.close()


def test_so_many_may_wait_and_no_more(tmp_path: Path) -> None:
    store = FeedbackStore(f"sqlite:///{tmp_path / 'f.sqlite3'}", retention_days=30)
    places = [store.enter() for _ in range(MAX_INSIDE)]
    for place in places:
        place.__enter__()
    with pytest.raises(FeedbackUnavailableError, match="64 requests"), store.enter():
        pass
    places[0].__exit__(None, None, None)
    with store.enter():
        pass
    store.close()


def test_a_shown_url_has_neither_password_nor_options() -> None:
    url = create_engine("postgresql+psycopg://u:hunter2@h:5433/d?sslpassword=hunter3").url
    assert shown_url(url) == "postgresql+psycopg://u:***@h:5433/d"

"""The table of true labels, and how each database is opened so that a stored row stays stored.

Two databases: SQLite, embedded, the default; PostgreSQL by URL.
"""

import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    OperationalError,
    SQLAlchemyError,
)

from server.feedback.errors import FeedbackSetupError

__all__ = ["FEEDBACK", "POOL_SIZE", "SCHEMA_VERSION", "open_database", "reason_of", "shown_url"]

SCHEMA_VERSION = 1
WAIT_S = 5  # for a lock, a connection or a statement; a waiting request holds a thread
POOL_SIZE = 5
_LOCKED = "database is locked"
_LOCKED_PAUSE_S = 0.02
_SCHEMA_LOCK = 0x64616C6F727261  # "dalorra": the number of PostgreSQL's advisory lock
_METADATA = MetaData()

# One row per prediction. No text of any request is here or can be: an id does not carry it.
FEEDBACK = Table(
    "dalorra_feedback",
    _METADATA,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("adapter", String, nullable=False),
    Column("revision", String, nullable=False),
    Column("predicted", String, nullable=False),
    Column("confidence", Double, nullable=False),
    Column("decision", String, nullable=False),
    Column("policy", String),
    Column("target_risk", Double),  # of the certificate that held; null: none did
    Column("default_sampling", Boolean, nullable=False),
    Column("label", String),  # the true one; null: none of the adapter's labels
    Column("correct", Boolean, nullable=False),
    Column("source", String),
    Column("issued_at", BigInteger, nullable=False),  # seconds since 1970, as received_at
    Column("received_at", BigInteger, nullable=False),
    Index("dalorra_feedback_received_at", "received_at"),
    Index(
        "dalorra_feedback_risk",
        *("decision", "adapter", "revision", "policy", "target_risk", "correct", "issued_at"),
    ),
)
_SCHEMA = Table(
    "dalorra_feedback_schema",
    _METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
)


def open_database(url_text: str) -> Engine:
    """Return the database at a URL with its tables made, when they were not there.

    Args:
        url_text: ``sqlite:////path/to/file`` or ``postgresql://user:password@host/database``.

    Raises:
        FeedbackSetupError: The URL or the database cannot be used. No password is in its text.
    """
    url = _checked(url_text)
    engine = _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)
    try:
        _prepare(engine)
    except SQLAlchemyError as error:
        raise _unusable(url, reason_of(error)) from None
    finally:
        engine.dispose()  # the connections that requests use are made by the threads that serve
    return engine


def _prepare(engine: Engine) -> None:
    """Make the schema; wait for others who start at this moment.

    SQLite waits for a lock by itself, but not while it switches a new file to WAL mode.
    """
    until_s = time.monotonic() + WAIT_S
    while True:
        try:
            with engine.begin() as connection:
                _make_schema(connection)
        except OperationalError as error:
            if reason_of(error) != _LOCKED or time.monotonic() >= until_s:
                raise
            time.sleep(_LOCKED_PAUSE_S)
        else:
            return


def shown_url(url: URL) -> str:
    """Return a URL that may be logged: without password and options."""
    return url.set(query={}).render_as_string(hide_password=True)


def reason_of(error: SQLAlchemyError) -> str:
    """Return what the database itself said, in one line, without statement and parameters."""
    said = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    return (said.strip().splitlines() or [type(error).__name__])[0]


def _checked(url_text: str) -> URL:
    try:
        url = make_url(url_text)
    except (ArgumentError, ValueError):
        raise FeedbackSetupError(
            "feedback_url: not a database URL; use sqlite:////path/to/file, "
            "postgresql://user:password@host/database or off"
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite":
        if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
            raise _unusable(url, "SQLite needs the path of a file")
        return url.set(query={})
    if url.drivername != "postgresql+psycopg":
        raise _unusable(url, "the database must be sqlite or postgresql")
    return url


def _unusable(url: URL, reason: str) -> FeedbackSetupError:
    said = reason.replace(url.password, "***") if url.password else reason
    shown = shown_url(url.set(drivername=url.get_backend_name()))
    return FeedbackSetupError(f"feedback_url: {shown} cannot be used: {said}")


def _sqlite(url: URL) -> Engine:
    path = Path(str(url.database))
    if not path.parent.is_dir():
        raise _unusable(url, f"{path.parent} is not a directory")
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_size=POOL_SIZE,
        pool_timeout=WAIT_S,
        connect_args={"timeout": WAIT_S},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {WAIT_S * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        # in WAL mode only FULL flushes each commit to the disk; NORMAL loses the last ones when
        # the power fails
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()
        record.info["file"] = _identity(path)

    @event.listens_for(engine, "checkout")
    def check(_connection: object, record: Any, _proxy: object) -> None:
        # SQLite goes on writing to a file that was deleted or replaced, and nobody would ever find
        # those rows; a new connection takes the file that is there now, or fails
        if (found := _identity(path)) is None or found != record.info["file"]:
            raise DisconnectionError("the database file was deleted or replaced")

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one of the same name; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgresql(url: URL) -> Engine:
    try:
        engine = create_engine(
            url,
            hide_parameters=True,
            pool_size=POOL_SIZE,
            pool_timeout=WAIT_S,
            pool_pre_ping=True,
            connect_args={"connect_timeout": WAIT_S, "tcp_user_timeout": WAIT_S * 1000},
        )
    except ModuleNotFoundError:
        raise _unusable(url, "psycopg is missing: pip install 'dalorra[postgresql]'") from None

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = '{WAIT_S}s'")
            # an acknowledged row must be on the disk, even where the database's default is laxer
            cursor.execute(
                "SELECT set_config('synchronous_commit', 'on', false) "
                "WHERE current_setting('synchronous_commit') = 'off'"
            )
        connection.commit()

    return engine


def _make_schema(connection: Connection) -> None:
    """Make the tables once, whoever else starts at this moment, and check their version."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # one writer at a time
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        if mode != "wal":
            raise _unusable(connection.engine.url, f"its journal mode is {mode}, not WAL")
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SCHEMA_LOCK})
    _METADATA.create_all(connection)
    found = connection.execute(select(_SCHEMA.c.version)).scalars().all()
    if not found:
        connection.execute(insert(_SCHEMA).values(version=SCHEMA_VERSION))
    elif list(found) != [SCHEMA_VERSION]:
        raise _unusable(
            connection.engine.url,
            f"its tables have schema version {max(found)}, this server knows {SCHEMA_VERSION}",
        )

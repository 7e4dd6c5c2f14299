"""True labels, kept in a database until retention deletes them; every call runs in a thread."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine, case, delete, func, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import SQLAlchemyError

from server.feedback.claim import PredictionClaim
from server.feedback.database import FEEDBACK, POOL_SIZE, open_database, reason_of
from server.feedback.errors import (
    ExpiredPredictionError,
    FeedbackConflictError,
    FeedbackUnavailableError,
)

__all__ = ["FeedbackStore", "RiskCount", "StoredFeedback"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
DAY_S = 86_400
PURGE_EVERY_S = 3600.0
MAX_INSIDE = 64  # requests that read, wait or write; more are told to come back
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class StoredFeedback:
    """What became of a label: whether the answer was right, and whether the row is new."""

    correct: bool
    stored: bool


@dataclass(frozen=True, slots=True)
class RiskCount:
    """Accepted answers with a certificate and a true label, and how many were wrong."""

    adapter: str
    revision: str
    policy: str
    target_risk: float
    n: int
    wrong: int


class FeedbackStore:
    """The database of true labels.

    Args:
        url: See ``open_database``.
        retention_days: Rows received longer ago are deleted, and ids issued longer ago refused.
        clock: Seconds since 1970.
        purge_every_s: Pause between two deletions.

    Raises:
        FeedbackSetupError: The database cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        retention_days: int,
        clock: Callable[[], float] = time.time,
        purge_every_s: float = PURGE_EVERY_S,
    ) -> None:
        self._engine: Engine = open_database(url)
        self._retention_s = retention_days * DAY_S
        self._clock = clock
        self._purge_every_s = purge_every_s
        self._threads = ThreadPoolExecutor(POOL_SIZE, thread_name_prefix="dalorra-feedback")
        self._stopping = threading.Event()
        self._janitor = threading.Thread(
            target=self._purge_for_ever, name="dalorra-retention", daemon=True
        )
        self._num_inside = 0

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to enforce retention, now and every so often."""
        self._janitor.start()

    def close(self) -> None:
        """Finish what runs and let go of the database."""
        self._stopping.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._janitor.is_alive():
            self._janitor.join()
        self._engine.dispose()

    # -- from the event loop --------------------------------------------------------------------

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Hold one of the places inside; from the event loop only.

        Raises:
            FeedbackUnavailableError: All are taken, as when the database hangs.
        """
        if self._num_inside >= MAX_INSIDE:
            raise FeedbackUnavailableError(f"{MAX_INSIDE} requests wait for the database")
        self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1

    async def add(
        self, claim: PredictionClaim, label: str | None, source: str | None
    ) -> StoredFeedback:
        """Store a label in a thread; see ``insert``. Cancelled, it may be stored or not."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.insert, claim, label, source)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run something that reads the database in one of its threads."""
        return self._threads.submit(work)

    # -- in a thread ----------------------------------------------------------------------------

    def insert(
        self, claim: PredictionClaim, label: str | None, source: str | None
    ) -> StoredFeedback:
        """Store the true label of a prediction; when this returns, the row is on the disk.

        The database's primary key decides between two that come at once. A row that is there
        already is left as it is.

        Args:
            claim: The prediction.
            label: Its true label; None when none of the adapter's labels is right.
            source: Who says so.

        Raises:
            FeedbackConflictError: Another label is stored for the prediction.
            ExpiredPredictionError: The id is older than the retention.
            FeedbackUnavailableError: The database cannot be reached or does not take the row.
        """
        now = int(self._clock())
        # or a label could be changed by sending another after its row was deleted
        if claim.issued_at < now - self._retention_s:
            raise ExpiredPredictionError(self._retention_s // DAY_S)
        correct = label == claim.label
        row = {
            "digest": claim.digest,
            "adapter": claim.adapter,
            "revision": claim.revision,
            "predicted": claim.label,
            "confidence": claim.confidence,
            "decision": claim.decision,
            "policy": claim.policy,
            "target_risk": claim.target_risk,
            "default_sampling": claim.default_sampling,
            "label": label,
            "correct": correct,
            "source": source,
            "issued_at": claim.issued_at,
            # clocks of two replicas differ; a row must not go before its id has expired
            "received_at": max(now, claim.issued_at),
        }
        with _reported():
            stored = self._insert(row)
        return StoredFeedback(correct=correct, stored=stored)

    def _insert(self, row: dict[str, object]) -> bool:
        """Return whether the row is new.

        Raises:
            FeedbackConflictError: It is not, and its label is another.
        """
        is_sqlite = self._engine.dialect.name == "sqlite"
        insert = sqlite_insert if is_sqlite else postgresql_insert
        statement = (
            insert(FEEDBACK)
            .values(row)
            .on_conflict_do_nothing(index_elements=["digest"])
            .execution_options(preserve_rowcount=True)
        )
        stored_label = select(FEEDBACK.c.label).where(FEEDBACK.c.digest == row["digest"])
        for _ in range(_ATTEMPTS):
            with self._engine.begin() as connection:
                if connection.execute(statement).rowcount == 1:
                    return True
                found = connection.execute(stored_label).one_or_none()
            if found is not None:
                if found.label != row["label"]:
                    raise FeedbackConflictError
                return False
            # deleted between the two statements: it can be stored now
        raise FeedbackUnavailableError("the row could neither be stored nor found")

    def count(self) -> int:
        """Return the number of rows."""
        with _reported(), self._engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(FEEDBACK)).scalar_one()

    def risk_counts(self) -> list[RiskCount]:
        """Return errors among accepted answers, for each policy whose certificate held.

        Should a policy's target have changed within a revision, only the newest target counts.

        Raises:
            FeedbackUnavailableError: The database cannot be reached.
        """
        table = FEEDBACK.c
        keys = (table.adapter, table.revision, table.policy, table.target_risk)
        newest = func.max(table.issued_at)
        wrong = func.sum(case((table.correct, 0), else_=1))
        statement = (
            select(*keys, func.count(), wrong)
            .where(
                table.decision == "accept",
                table.policy.is_not(None),
                table.target_risk.is_not(None),
            )
            .group_by(*keys)
            .order_by(newest)
        )
        with _reported(), self._engine.connect() as connection:
            rows = connection.execute(statement).all()
        counts = [RiskCount(*row[:5], wrong=int(row[5])) for row in rows]
        latest = {(count.adapter, count.revision, count.policy): count for count in counts}
        return list(latest.values())

    def purge(self) -> int:
        """Delete the rows that are older than the retention; return how many.

        Raises:
            FeedbackUnavailableError: The database cannot be reached.
        """
        oldest = int(self._clock()) - self._retention_s
        statement = delete(FEEDBACK).where(FEEDBACK.c.received_at < oldest)
        with _reported(), self._engine.begin() as connection:
            return connection.execute(statement).rowcount

    def _purge_for_ever(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(FeedbackUnavailableError):  # logged; tried again later
                if deleted := self.purge():
                    logger.info("deleted old feedback", extra={"rows": deleted})
            self._stopping.wait(self._purge_every_s)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn a database's error into ours, and log what the database said."""
    try:
        yield
    except SQLAlchemyError as error:
        logger.error("the feedback database failed", extra={"reason": reason_of(error)})  # noqa: TRY400
        raise FeedbackUnavailableError("the feedback database cannot be reached") from None

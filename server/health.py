"""Whether an engine is sound: hung or only slow, its self tests, how often it may be replaced.

Nothing here waits: the supervisor of ``lifecycle.py`` looks at these about twice a second.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from server.batching import Pulse
from server.ports import AdapterCard, Engine, SelfTest
from server.telemetry import Telemetry

__all__ = ["RestartBudget", "SelfTests", "StallWatch"]

logger = logging.getLogger(__name__)

RETEST_S = 2.0  # between self tests while something is wrong
MAX_AGE = 3  # intervals after which the last passed self test proves nothing any more
SLOW = 10  # times the slowest gap between two signs of life: that is not slow any more
WINDOW_S = 3600.0


class StallWatch:
    """Tells a hung engine from a slow one. To be asked regularly.

    Silence while the watcher itself was held up does not count: then the whole process stood still
    (a suspended machine, a stopped process), and the engine has had no time to give a sign.
    """

    def __init__(self, stall_s: float, tick_s: float) -> None:
        self._stall_s = stall_s
        self._tick_s = tick_s
        self._looked_s = time.monotonic()
        self._sign_s: float | None = None
        self._excused_s = 0.0

    def hung(self, pulse: Pulse) -> bool:
        """Whether the batch that runs has been silent for too long."""
        sign_s = pulse.last_sign_s
        now_s = time.monotonic()
        late_s = max(now_s - self._looked_s - 2 * self._tick_s, 0.0)
        self._looked_s = now_s
        if sign_s is None:
            self._sign_s = None
            return False
        self._excused_s = late_s + (self._excused_s if sign_s == self._sign_s else 0.0)
        self._sign_s = sign_s
        limit_s = max(self._stall_s, SLOW * pulse.slowest_gap_s)
        return now_s - sign_s - self._excused_s > limit_s


class RestartBudget:
    """At most so many restarts in any hour."""

    def __init__(self, limit: int, window_s: float = WINDOW_S) -> None:
        self._limit = limit
        self._window_s = window_s
        self._taken_s: deque[float] = deque()

    def take(self) -> bool:
        """Whether one more restart is allowed now; it then counts."""
        now_s = time.monotonic()
        while self._taken_s and self._taken_s[0] <= now_s - self._window_s:
            self._taken_s.popleft()
        if len(self._taken_s) >= self._limit:
            return False
        self._taken_s.append(now_s)
        return True


class SelfTests:
    """Tests every resident adapter again and again, in a thread of its own; used on the event loop.

    A test takes turns with the batches, so it may take long while there is much to do. Until it is
    through, the last result stands, and grows old.
    """

    def __init__(
        self,
        engine: Engine,
        resident: Callable[[], tuple[AdapterCard, ...]],
        interval_s: float,
        telemetry: Telemetry,
        wake: Callable[[], None],
    ) -> None:
        """Take the adapters for tested: loading them has just done so.

        Args:
            engine: To be tested.
            resident: Gives the adapters that can answer now.
            interval_s: Time from the end of one round to the beginning of the next, in seconds.
            telemetry: Told about each result.
            wake: Called from any thread when a result is there for ``look``.
        """
        self._engine = engine
        self._resident = resident
        self._interval_s = interval_s
        self._telemetry = telemetry
        self._wake = wake
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="dalorra-selftest")
        self._round: list[tuple[AdapterCard, Future[SelfTest]]] = []
        self._failing: list[str] = []
        self._passed_s = time.monotonic()
        self._next_s = self._passed_s + interval_s
        self._soonest_s = self._passed_s

    @property
    def problem(self) -> str | None:
        """What readiness has against the last self tests; None when they are good and recent."""
        if self._failing:
            return "; ".join(self._failing)
        age_s = time.monotonic() - self._passed_s
        if age_s > MAX_AGE * self._interval_s:
            return f"the last self test was passed {age_s:.0f} s ago"
        return None

    @property
    def running(self) -> bool:
        """Whether a test has not come back yet."""
        return any(not future.done() for _, future in self._round)

    def look(self, *, soon: bool) -> bool:
        """Begin a round when it is time for one, or take note of one that has ended.

        Args:
            soon: Whether something else is wrong, so that the next round should not wait.

        Returns:
            Whether a round has just ended and every adapter passed.
        """
        if self.running:
            return False
        if self._round:
            return self._collect()
        due_s = self._soonest_s if soon or self._failing else self._next_s
        if time.monotonic() >= due_s:
            self._begin()
        return False

    def end(self) -> None:
        """Begin no more tests; the one that runs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def wait(self, timeout_s: float) -> None:
        """Wait until no test is running, or for so long."""
        running = [asyncio.wrap_future(future) for _, future in self._round if not future.done()]
        if running:
            await asyncio.wait(running, timeout=timeout_s)

    def _begin(self) -> None:
        for card in self._resident():
            future = self._threads.submit(self._engine.self_test, card.key)
            self._round.append((card, future))
            future.add_done_callback(lambda _: self._wake())
        if not self._round:  # nothing is loaded, so nothing can be wrong
            self._ended([])

    def _collect(self) -> bool:
        ended, self._round = self._round, []
        resident = {card.key for card in self._resident()}
        failing: list[str] = []
        for card, future in ended:
            if card.key not in resident:  # it was unloaded, perhaps in the middle of its test
                continue
            error = future.exception()
            result = SelfTest(math.nan, 0.0) if error is not None else future.result()
            self._telemetry.selftest(card, result)
            if not result.passed:
                failing.append(_describe(card, result, error))
                logger.error(
                    "self test failed",
                    extra={"adapter": f"{card.name}:{card.revision}", "reason": failing[-1]},
                )
        self._ended(failing)
        return not failing

    def _ended(self, failing: list[str]) -> None:
        now_s = time.monotonic()
        if self._failing and not failing:
            logger.info("self test passed")
        self._failing = failing
        self._passed_s = self._passed_s if failing else now_s
        self._next_s = now_s + self._interval_s
        self._soonest_s = now_s + min(RETEST_S, self._interval_s)


def _describe(card: AdapterCard, result: SelfTest, error: BaseException | None) -> str:
    who = f"adapter {card.name}:{card.revision} fails its self test"
    if error is not None:
        return f"{who}: {type(error).__name__}"
    return f"{who}: largest difference {result.max_abs_error:.3g}, limit {result.limit:.3g}"

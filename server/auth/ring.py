"""The keys in force: read from their file, looked at again at most once a second."""

import hmac
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from server.auth.keys import ApiKey, KeyFileError, digest_of, read_keys
from server.auth.rate import Allowance, KeyRates, parse_rate

__all__ = ["KeyRing"]

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
_Signature = tuple[int, int, int, int]


class KeyRing:
    """Knows every key and how often it may ask; used on the event loop only.

    The file is replaced to rotate keys, and no restart is needed. One that has become unreadable or
    invalid changes nothing: the last good keys stay, the fault is logged once and counted each time
    it is met. An empty file holds no keys, so it locks everyone out.

    Args:
        path: The file.
        on_failure: Called each time the file could not be read again.
        clock: Seconds on the monotonic clock.
        now: The present time, for keys that expire.

    Raises:
        KeyFileError: The file cannot be used now.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_failure: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = path
        self._on_failure = on_failure
        self._clock = clock
        self._now = now
        self._rates = KeyRates(clock)
        self._failing = False
        self._looked_s = clock()
        # taken before the content: what is written in between is then found at the next look
        self._signature: _Signature | None = self._sign()
        self._take(read_keys(path))

    def __len__(self) -> int:
        """Return how many keys there are, expired ones included."""
        return len(self._keys)

    def find(self, presented: str) -> ApiKey | None:
        """Return the key that was presented; None when there is none like it.

        Takes the same time whichever key it is: every stored digest is compared.
        """
        self._look()
        digest = bytes.fromhex(digest_of(presented))
        found: ApiKey | None = None
        for stored, key in self._keys:
            if hmac.compare_digest(stored, digest):
                found = key
        return found

    def has_expired(self, key: ApiKey) -> bool:
        """Return whether a key is past its time."""
        return key.has_expired(self._now())

    def take(self, key: ApiKey) -> Allowance | None:
        """Count one request of a key against its rate; None when it has none."""
        if key.rate_limit is None:
            return None
        return self._rates.take(key.id, parse_rate(key.rate_limit))

    def _look(self) -> None:
        """Read the file again if it is another one than at the last look."""
        if self._clock() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = self._clock()
        try:
            signature = self._sign()
            if signature == self._signature and not self._failing:
                return
            keys = read_keys(self._path)
        except KeyFileError as error:
            self._fail(str(error))
            return
        self._signature = signature
        self._failing = False
        self._take(keys)
        logger.info("API keys read", extra={"keys": len(keys)})

    def _sign(self) -> _Signature:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise KeyFileError(error.strerror or type(error).__name__) from None
        # whoever unpacks or copies a file chooses its mtime, and a deleted file's inode is used
        # again: without the ctime a key that was revoked like that could stay
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size

    def _fail(self, reason: str) -> None:
        self._on_failure()
        if not self._failing:
            logger.error(
                "the API keys could not be read again; the last good ones stay",
                extra={"setting": "api_keys_file", "reason": reason},
            )
        self._failing = True

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys = tuple((bytes.fromhex(key.sha256), key) for key in keys)
        if not keys:
            logger.warning("there are no API keys: nobody may come in")

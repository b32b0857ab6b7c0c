"""Outages of the server that are waited out: how long to pause, and one log record at the beginning and the end."""

from __future__ import annotations

import logging
import random
import time

from mesh_storage.errors import MeshStorageError, StorageTimeoutError

logger = logging.getLogger("mesh_storage")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_LOCK_NOT_AVAILABLE = "55P03"
"""Whoever holds a lock, for example to migrate a table, is done with it some time."""


class Outage:
    """The outages seen by one loop that goes on for as long as the storage is open."""

    def __init__(self) -> None:
        self._attempts = 0
        self._begun = 0.0

    def pause(self, error: MeshStorageError) -> float:
        """Return the seconds to wait after a failed attempt; log the first one.

        Raises:
            MeshStorageError: The error, if it is not retryable, nor a lock that will be free some time.
        """
        if not error.retryable and error.sqlstate != _LOCK_NOT_AVAILABLE:
            raise error
        if not self._attempts:
            self._begun = time.monotonic()
            self._log_begin(error)
        self._attempts += 1
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._attempts - 1, 10))
        return longest * (0.5 + random.random() / 2)  # noqa: S311 - not used for security

    def over(self) -> None:
        """Note that an attempt succeeded; log the end of an outage."""
        if self._attempts:
            self._log_end(self._attempts, round(time.monotonic() - self._begun, 3))
            self._attempts = 0

    def _log_begin(self, error: MeshStorageError) -> None:
        logger.warning(
            "watch interrupted; it goes on by itself",
            extra={"event": "watch", "error": type(error).__name__, "sqlstate": error.sqlstate},
        )

    def _log_end(self, attempts: int, seconds: float) -> None:
        logger.info("watch goes on", extra={"event": "watch", "attempts": attempts, "duration_s": seconds})


class ConsumingOutage(Outage):
    """The outages seen by a loop that consumes deliveries; a server that does not answer in time is one too."""

    def __init__(self, receiver: str) -> None:
        super().__init__()
        self._receiver = receiver

    def pause(self, error: MeshStorageError) -> float:
        """Return the seconds to wait after a failed attempt; log the first one."""
        if isinstance(error, StorageTimeoutError):
            error.retryable = True
        return super().pause(error)

    def _log_begin(self, error: MeshStorageError) -> None:
        logger.warning(
            "consuming interrupted; it goes on by itself",
            extra={
                "event": "consume",
                "receiver": self._receiver,
                "error": type(error).__name__,
                "sqlstate": error.sqlstate,
            },
        )

    def _log_end(self, attempts: int, seconds: float) -> None:
        logger.info(
            "consuming goes on",
            extra={"event": "consume", "receiver": self._receiver, "attempts": attempts, "duration_s": seconds},
        )

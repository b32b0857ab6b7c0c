"""What a cache logs: that something is away, once a minute."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("mesh_storage")

_PAUSE_S = 60.0


class Reports:
    """A log record about one matter, at most once a minute."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._next = float("-inf")

    def report(self, error: BaseException) -> None:
        """Log a warning with the class of an error, whose text may contain values."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PAUSE_S
            logger.warning(self._message, extra={"event": "cache", "error": type(error).__name__})

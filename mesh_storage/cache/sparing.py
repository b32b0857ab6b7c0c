"""Log records about something that goes on for long: one a minute."""

from __future__ import annotations

import time

_PAUSE_S = 60.0


class Sparing:
    """Says when the next record about one matter is due."""

    def __init__(self) -> None:
        self._next = float("-inf")

    def due(self) -> bool:
        """Return whether a record is due, which is then taken to be written."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _PAUSE_S
        return True

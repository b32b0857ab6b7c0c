"""Where a look at what comes first begins, so that the dead index entries before it need not be passed every time.

Each row that was claimed or removed leaves an entry behind, until vacuum has been there, which can do nothing while an
old snapshot is held elsewhere. A look from the beginning passes all of them.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import NamedTuple

BEGINNING = datetime.min.replace(tzinfo=UTC)
_FROM_THE_BEGINNING_S = 0.25
"""How often a look goes from the beginning, for rows that were committed late with an early time."""
_MOST = 1_000
_REMOVING_S = 10.0


class Place(NamedTuple):
    """Where a message is in the order of time."""

    timestamp: int = -(2**63)
    id: str = ""


FIRST = Place()


class Floors:
    """The earliest due time of each queue, as one connection saw it a moment ago."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[datetime, float]] = {}

    def of(self, queue: str) -> datetime:
        """Return where to begin."""
        floor, until = self._known.get(queue, (BEGINNING, 0.0))
        return floor if time.monotonic() < until else BEGINNING

    def note(self, queue: str, floor: datetime, begun: datetime) -> None:
        """Note the first row that a look found, and where that look had begun."""
        if begun == BEGINNING:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[queue] = floor, time.monotonic() + _FROM_THE_BEGINNING_S
        else:
            self._known[queue] = floor, self._known[queue][1]

    def forget(self, queue: str) -> None:
        """Begin the next look from the beginning."""
        self._known.pop(queue, None)


class Removed:
    """Up to where one connection has removed old messages, for as long as it finds as many as it looks for."""

    def __init__(self) -> None:
        self._last = FIRST
        self._until = 0.0

    @property
    def last(self) -> Place:
        """The last one that was looked at; `FIRST` if that was a while ago, for what was committed late."""
        return self._last if time.monotonic() < self._until else FIRST

    def note(self, last: Place, begun: Place) -> None:
        """Note the last one that a look found, and behind which that look had begun."""
        self._last = last
        if begun == FIRST:
            self._until = time.monotonic() + _REMOVING_S

    def forget(self) -> None:
        """Begin the next look from the beginning."""
        self._last = FIRST

"""Where the look at a queue begins, so that the dead index entries before it need not be passed every time.

Each claimed row leaves an entry behind. While an old snapshot is held elsewhere, nothing can remove these entries, and
a look from the beginning passes all of them.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

BEGINNING = datetime.min.replace(tzinfo=UTC)
_FROM_THE_BEGINNING_S = 0.25
"""How often a look goes from the beginning, for rows that were committed late with an early time."""
_MOST = 1_000


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

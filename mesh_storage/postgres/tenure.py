"""How long a lease is held, by the clock of this process alone."""

from __future__ import annotations

import sys
import time

from mesh_storage.postgres.ownership import Ownership

if sys.platform == "linux":

    def now() -> float:
        """Return the seconds of a clock that nobody sets, and that goes on while the machine is suspended."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:

    def now() -> float:
        """Return the seconds of a clock that nobody sets."""
        return time.monotonic()


class Tenure:
    """The time of one holder, counted from before each request, so that it ends before the server's does."""

    def __init__(self, owner: Ownership, token: int, seconds: float, asked: float) -> None:
        self.owner = owner
        self.token = token
        self._seconds = seconds
        self._end = asked + seconds
        self.over = False
        """Whether it was given up or taken by another."""

    @property
    def left(self) -> float:
        """The seconds until it is over unless it is renewed; 0 once it is over, and in a forked child."""
        if self.over or self.owner.inherited:
            return 0.0
        return max(0.0, self._end - now())

    def renew(self, asked: float) -> None:
        """Count from a later request; once it is over, it stays so."""
        if self.left:
            self._end = asked + self._seconds

    def end(self) -> None:
        """Let it be over now."""
        self.over = True

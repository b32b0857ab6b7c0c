"""Liveness checks of connections: whether an idle one is still usable, and how long to wait for a response."""

from __future__ import annotations

import select
import time
from typing import Any

import psycopg

GRACE_S = 0.4
"""Seconds the server has to respond to a cancel request before the connection is closed."""


class Liveness:
    """Checks, without a round trip, whether an idle connection is still usable.

    The server sends nothing on an idle connection, so a readable socket means a final error message or end of file. Old
    connections are replaced, so that a failover or a changed address is eventually noticed.
    """

    _LONGEST_LIFE_S = 1800

    def __init__(self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self.born = time.monotonic()
        """The time of connecting, by `time.monotonic()`."""
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)

    def usable(self) -> bool:
        """Return whether the connection is open, quiet and not too old."""
        return not (
            self._connection.closed or self._poll.poll(0) or time.monotonic() - self.born > self._LONGEST_LIFE_S
        )

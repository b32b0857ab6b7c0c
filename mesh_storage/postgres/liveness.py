"""When a connection is given up: after a moment without an answer, or when it cannot be used again."""

from __future__ import annotations

import select
import time
from typing import Any

import psycopg

GRACE_S = 0.4
"""Seconds that the server has to answer a request to cancel; then the connection is given up."""


class Liveness:
    """Tells by the socket, without a round trip, whether an idle connection is still good.

    Nothing is under way on such a connection, so a socket that is readable holds the server's last words or the end of
    the stream. An old connection is replaced, so that a failover or a new address is found in the end.
    """

    _LONGEST_LIFE_S = 1800

    def __init__(self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self.born = time.monotonic()
        """The moment when it was connected."""
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)

    def usable(self) -> bool:
        """Return whether it is connected, silent and not too old."""
        return not (
            self._connection.closed or self._poll.poll(0) or time.monotonic() - self.born > self._LONGEST_LIFE_S
        )

"""The time limit of a unit of work, on either side: kept in the waits of its connection, and told to the server."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

from mesh_storage.errors import StorageTimeoutError
from mesh_storage.postgres.liveness import GRACE_S

_CALLER_GRACE_MS = 1000
_LONGEST_LIMIT_MS = 2**31 - 1
"""About 24 days: PostgreSQL stores its timeouts as 32-bit milliseconds."""

_AS_IT_IS = nullcontext()


class SessionLimits(NamedTuple):
    """The session's own limits on transactions in milliseconds; 0 for no limit."""

    idle_in_transaction_session_timeout: int
    transaction_timeout: int | None
    """None before PostgreSQL 17, which introduced it."""


class Timed(Protocol):
    """A connection whose waits end at a deadline."""

    deadline: float | None
    tidying: bool


class Deadline:
    """The time, by `time.monotonic()`, by which a unit of work must end; None if it has no timeout."""

    def __init__(self, connection: Timed, moment: float | None) -> None:
        self._connection = connection
        self._moment = moment
        connection.deadline = moment

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return self._moment is not None

    @property
    def has_passed(self) -> bool:
        """Whether there is one, and it has passed."""
        return self._moment is not None and time.monotonic() >= self._moment

    def check(self) -> None:
        """Raise if the deadline has passed.

        Raises:
            StorageTimeoutError: The deadline has passed.
        """
        if self.has_passed:
            raise StorageTimeoutError("the unit of work exceeded its timeout")

    def limits(self, session: SessionLimits) -> list[str]:
        """Return the statements that make the server end the transaction of an unresponsive caller.

        The server does so a little after the deadline, so that a late caller gets our timeout error. Stricter limits
        set by an operator are kept.
        """
        assert self._moment is not None, "only a timeout needs limits"
        remaining = math.ceil((self._moment - time.monotonic()) * 1000)
        limit = max(1, min(remaining + _CALLER_GRACE_MS, _LONGEST_LIMIT_MS))
        return [
            f"SET LOCAL {name} = {limit}"
            for name, stricter in session._asdict().items()
            if stricter is not None and not 0 < stricter <= limit
        ]

    def extended(self) -> AbstractContextManager[None]:
        """Extend the deadline by a grace period, since cleaning up is allowed even after the timeout.

        A block inside of another has no grace period of its own.
        """
        if self._moment is None or self._connection.tidying:
            return _AS_IT_IS
        return self._extended(self._moment)

    @contextmanager
    def _extended(self, before: float) -> Generator[None]:
        self._connection.tidying = True
        self._moment = self._connection.deadline = max(before, time.monotonic()) + GRACE_S
        try:
            yield
        finally:
            self._connection.tidying = False
            self._moment = self._connection.deadline = before

    def hurry(self) -> None:
        """Let the deadline pass now, since the caller has been interrupted and only cleanup is left."""
        now = time.monotonic()
        if self._moment is None or self._moment > now:
            self._moment = self._connection.deadline = now

    def lift(self) -> None:
        """Remove the limit, since the connection is about to serve another unit of work."""
        self._moment = self._connection.deadline = None

"""What kind of transaction a unit of work runs in: the parameters of `begin()`, and what the server is told of them."""

from __future__ import annotations

import math
import time
from typing import Literal, NamedTuple

from psycopg import IsolationLevel

from mesh_storage.errors import InvalidInputError, StorageTimeoutError

Isolation = Literal["read committed", "repeatable read", "serializable"]
Durability = Literal["strict", "relaxed"]

_LEVELS: dict[Isolation | None, IsolationLevel | None] = {
    None: None,
    "read committed": IsolationLevel.READ_COMMITTED,
    "repeatable read": IsolationLevel.REPEATABLE_READ,
    "serializable": IsolationLevel.SERIALIZABLE,
}
_ISOLATIONS = tuple(_LEVELS)
_LONGEST_TIMEOUT_S = 365 * 86_400
LONGEST_LIMIT_MS = 2**31 - 1
"""About 24 days: PostgreSQL has its timeouts in 32 bits of milliseconds."""


class Mode(NamedTuple):
    """How psycopg begins the next transaction; in autocommit it begins none."""

    autocommit: bool = False
    isolation: Isolation | None = None
    read_only: bool | None = None

    @property
    def level(self) -> IsolationLevel | None:
        """The isolation level in psycopg's terms."""
        return _LEVELS[self.isolation]


class Characteristics(NamedTuple):
    """The characteristics of a transaction (PostgreSQL manual, SET TRANSACTION), its durability and its timeout."""

    read_only: bool = False
    isolation: Isolation | None = None
    durability: Durability = "strict"
    timeout: float | None = None
    """Seconds for the whole unit of work."""

    def check(self) -> None:
        """Refuse what PostgreSQL does not have.

        Raises:
            InvalidInputError: Names the parameter.
        """
        if not isinstance(self.read_only, bool):
            raise InvalidInputError(
                f"read_only must be True or False, not {type(self.read_only).__name__}", field="read_only"
            )
        if self.isolation not in _ISOLATIONS:
            raise InvalidInputError("isolation must be 'repeatable read' or 'serializable'", field="isolation")
        if self.durability not in ("strict", "relaxed"):
            raise InvalidInputError("durability must be 'strict' or 'relaxed'", field="durability")
        if self.timeout is not None:
            if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool):
                raise InvalidInputError(
                    f"timeout must be a number of seconds, not {type(self.timeout).__name__}", field="timeout"
                )
            if not 0 < self.timeout <= _LONGEST_TIMEOUT_S:  # NaN is not either.
                raise InvalidInputError(
                    f"timeout must be more than 0 and at most {_LONGEST_TIMEOUT_S} seconds (a year)", field="timeout"
                )

    def deadline(self) -> float | None:
        """Return the moment of `time.monotonic()` at which the timeout expires, counted from now."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    @property
    def has_snapshot(self) -> bool:
        """Whether it sees the database as of its first statement (manual, 13.2.2), not as of each statement."""
        return self.isolation in ("repeatable read", "serializable")

    @property
    def needs_transaction(self) -> bool:
        """Whether its statements need a transaction; reading at READ COMMITTED has a snapshot for each anyway."""
        return not self.read_only or self.has_snapshot

    def mode(self, *, explicit: bool) -> Mode:
        """Return how psycopg is to begin its transaction; not at all where it begins by an explicit BEGIN."""
        if explicit or not self.needs_transaction:
            return _AUTOCOMMIT
        return Mode(isolation=self.isolation, read_only=self.read_only or None)

    def begin(self, *parameters: str) -> bytes:
        """Return the BEGIN of its transaction, followed by the statements that set `parameters` for it.

        SET takes no snapshot, so the first statement after it still decides what the transaction sees.
        """
        level = f" ISOLATION LEVEL {self.isolation}" if self.isolation else ""
        access = " READ ONLY" if self.read_only else ""
        return "; ".join([f"BEGIN{level}{access}", *parameters]).encode()


_AUTOCOMMIT = Mode(autocommit=True)


class Deadline(NamedTuple):
    """The moment of `time.monotonic()` by which a unit of work must be done."""

    moment: float

    def remaining(self) -> float:
        """Return the seconds that are left, which may be negative."""
        return self.moment - time.monotonic()

    def check(self) -> None:
        """Refuse to go on when the time is over.

        Raises:
            StorageTimeoutError: It is.
        """
        if self.remaining() <= 0:
            raise StorageTimeoutError("the unit of work took longer than its timeout")

    def limits(self, session: SessionLimits) -> list[str]:
        """Return the statements by which the server ends the transaction of a caller who does not come back.

        It does so somewhat later, so that a caller who comes back late learns from us that the time is over. What the
        operator limits more narrowly stays as it is.
        """
        limit = min(math.ceil(self.remaining() * 1000) + _CALLER_GRACE_MS, LONGEST_LIMIT_MS)
        return [
            f"SET LOCAL {name} = {limit}"
            for name, narrower in session._asdict().items()
            if narrower is not None and not 0 < narrower <= limit
        ]


_CALLER_GRACE_MS = 1000


class SessionLimits(NamedTuple):
    """The server's limits for a whole transaction that a session has already, in milliseconds; 0 for no limit."""

    idle_in_transaction_session_timeout: int
    transaction_timeout: int | None
    """None where the server does not know it, before PostgreSQL 17."""

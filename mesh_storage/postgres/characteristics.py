"""Transaction characteristics: the parameters of `begin()`, and their SQL."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

from psycopg import IsolationLevel

from mesh_storage.errors import InvalidInputError

Isolation = Literal["read committed", "repeatable read", "serializable"]
"""The isolation levels (PostgreSQL manual, 13.2)."""
Durability = Literal["strict", "relaxed"]
"""When `commit()` returns: once the commit is on disk, or before."""

_LEVELS: dict[Isolation | None, IsolationLevel | None] = {
    None: None,
    "read committed": IsolationLevel.READ_COMMITTED,
    "repeatable read": IsolationLevel.REPEATABLE_READ,
    "serializable": IsolationLevel.SERIALIZABLE,
}
_ISOLATIONS = tuple(_LEVELS)
_LONGEST_TIMEOUT_S = 365 * 86_400


class Mode(NamedTuple):
    """How psycopg begins the next transaction; in autocommit mode it begins none."""

    autocommit: bool = False
    isolation: Isolation | None = None
    read_only: bool | None = None

    @property
    def level(self) -> IsolationLevel | None:
        """The isolation level as psycopg's enum."""
        return _LEVELS[self.isolation]


class Characteristics(NamedTuple):
    """The characteristics of a transaction (PostgreSQL manual, SET TRANSACTION), its durability and its timeout."""

    read_only: bool = False
    isolation: Isolation | None = None
    durability: Durability = "strict"
    timeout: float | None = None
    """Seconds for the whole unit of work."""
    position: bool = False
    """Whether a commit asks where in the write-ahead log it is."""

    def check(self) -> None:
        """Validate the parameters.

        Raises:
            InvalidInputError: A parameter is invalid; names it.
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
            if not 0 < self.timeout <= _LONGEST_TIMEOUT_S:  # also rejects NaN
                raise InvalidInputError(
                    f"timeout must be more than 0 and at most {_LONGEST_TIMEOUT_S} seconds (a year)", field="timeout"
                )

        if not isinstance(self.position, bool):
            raise InvalidInputError(
                f"position must be True or False, not {type(self.position).__name__}", field="position"
            )

    def check_writable(self) -> None:
        """Raise if the unit of work is read-only.

        Raises:
            InvalidInputError: It is read-only.
        """
        if self.read_only:
            raise InvalidInputError("this unit of work is read-only", field="read_only")

    def deadline(self) -> float | None:
        """Return the `time.monotonic()` at which the timeout, counted from now, expires."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    @property
    def has_snapshot(self) -> bool:
        """Whether all statements see the snapshot taken by the first one (PostgreSQL manual, 13.2.2)."""
        return self.isolation in ("repeatable read", "serializable")

    @property
    def needs_transaction(self) -> bool:
        """Whether a transaction is needed; reads at READ COMMITTED take a new snapshot per statement anyway."""
        return not self.read_only or self.has_snapshot

    def mode(self, *, explicit: bool) -> Mode:
        """Return the mode in which psycopg begins the transaction; autocommit if it begins by an explicit BEGIN."""
        if explicit or not self.needs_transaction:
            return AUTOCOMMIT
        return Mode(isolation=self.isolation, read_only=self.read_only or None)

    def begin(self, *parameters: str) -> bytes:
        """Return the BEGIN of the transaction, followed by the statements that set `parameters` for it.

        SET takes no snapshot, so the first statement after it still determines what the transaction sees.
        """
        level = f" ISOLATION LEVEL {self.isolation}" if self.isolation else ""
        access = " READ ONLY" if self.read_only else ""
        return "; ".join([f"BEGIN{level}{access}", *parameters]).encode()


AUTOCOMMIT = Mode(autocommit=True)
"""The mode in which every statement is a transaction."""

"""The ORM session of a unit of work, on either side: a session of SQLAlchemy's that joins a transaction of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol
from weakref import WeakSet

import sqlalchemy
from sqlalchemy.orm import Session

from mesh_storage.postgres.failure import DRIVER_ERRORS

logger = logging.getLogger("mesh_storage")


class Joinable(Protocol):
    """The connection of a unit of work as its session needs it; what returns Any is awaited for asyncio."""

    joined: UnitOfWorkSession | None

    def failed(self, error: BaseException) -> Any:
        """Remember why the transaction ended."""
        ...

    def check_whole(self) -> None:
        """Refuse to end the transaction inside of a savepoint."""
        ...

    def rollback(self) -> Any:
        """Roll the transaction back."""
        ...

    def join(self) -> Any:
        """Begin the transaction, and return SQLAlchemy's sync connection."""
        ...


class UnitOfWorkSession(Session):
    """An ORM session that joins a unit of work's transaction when it first needs the database."""

    def __init__(self, connection: Joinable, wait: Callable[[Any], Any], **_: Any) -> None:
        """Take the connection, and what waits for its coroutines where it has coroutines."""
        super().__init__(expire_on_commit=False, join_transaction_mode="rollback_only")
        self._connection = connection
        self._wait = wait
        self._written = WeakSet[Any]()
        connection.joined = self

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Flush; when that fails, SQLAlchemy has rolled back, and nothing but a rollback may follow."""
        self._written.update(chain(self.new, self.dirty, self.deleted))
        try:
            super().flush(objects)
        except BaseException as error:
            self._wait(self._connection.failed(error))
            raise

    def commit(self) -> None:
        """Flush; SQLAlchemy would take for stored what the unit of work may still roll back."""
        self.flush()

    def rollback(self) -> None:
        """Roll back everything, also what the repositories did."""
        self._connection.check_whole()
        self._wait(self._connection.rollback())

    def undo(self) -> None:
        """Follow a rollback, so that what was written is written again when it is added again."""
        self._written.clear()
        if not self.is_active:  # SQLAlchemy has rolled back, and would warn of what was changed since.
            for changed in set(chain(self.new, self.dirty, self.deleted)):
                self.expunge(changed)
        try:
            super().rollback()
        except DRIVER_ERRORS as error:
            # The server undoes the work of a connection that it lost.
            logger.debug("rollback failed", exc_info=error)

    def settle(self) -> None:
        """Follow a commit: what was written is stored."""
        self._written.clear()
        super().commit()

    def leave(self) -> None:
        """Expunge what was only read, so that it stays readable: a rollback makes SQLAlchemy forget all values."""
        self._written.update(chain(self.dirty, self.deleted))
        for read in set(self.identity_map.values()).difference(self._written):
            self.expunge(read)

    def get_bind(self, *_arguments: Any, **_keywords: Any) -> sqlalchemy.Connection:
        """Return the connection of the unit of work; SQLAlchemy asks before each statement."""
        connection: sqlalchemy.Connection = self._wait(self._connection.join())
        return connection

"""The ORM session of a unit of work, sync or asyncio: a SQLAlchemy session that joins our transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol
from weakref import WeakSet

import sqlalchemy
from sqlalchemy.orm import Session

from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.failure import DRIVER_ERRORS
from mesh_storage.postgres.savepoints import Savepoints

logger = logging.getLogger("mesh_storage")


class Joined(Protocol):
    """Where the connection of a unit of work keeps its session."""

    session: UnitOfWorkSession | None


class Joinable(Protocol):
    """What a session needs of its unit of work's connection; methods that return Any are coroutines for asyncio."""

    @property
    def joined(self) -> Joined:
        """Where the session is kept."""
        ...

    @property
    def characteristics(self) -> Characteristics:
        """Whether the unit of work is read-only, among others."""
        ...

    @property
    def savepoints(self) -> Savepoints:
        """The open savepoints."""
        ...

    def failed(self, error: BaseException) -> Any:
        """Record why the transaction failed."""
        ...

    def rollback(self) -> Any:
        """Roll back the transaction."""
        ...

    def join(self) -> Any:
        """Begin the transaction, and return SQLAlchemy's sync connection."""
        ...


class UnitOfWorkSession(Session):
    """An ORM session that joins its unit of work's transaction when it first needs the database."""

    def __init__(self, connection: Joinable, wait: Callable[[Any], Any], **_: Any) -> None:
        """Initialize with the connection, and a function that awaits its coroutines, if any."""
        super().__init__(expire_on_commit=False, join_transaction_mode="rollback_only")
        self._connection = connection
        self._wait = wait
        self._written = WeakSet[Any]()
        connection.joined.session = self

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Flush; after a failure SQLAlchemy has rolled back, so only a rollback may follow."""
        if self._connection.characteristics.read_only and (
            self.new or self.deleted or any(map(self.is_modified, self.dirty))
        ):
            self._connection.characteristics.check_writable()
        self._written.update(chain(self.new, self.dirty, self.deleted))
        try:
            super().flush(objects)
        except BaseException as error:
            # In a savepoint of the caller's, SQLAlchemy has rolled back to it, and the transaction can continue.
            if self._connection.savepoints.are_open or not self.in_nested_transaction():
                self._wait(self._connection.failed(error))
            raise

    def commit(self) -> None:
        """Flush only: SQLAlchemy would consider as committed what the unit of work may still roll back."""
        self.flush()

    def rollback(self) -> None:
        """Roll back everything, including the changes of the repositories."""
        self._connection.savepoints.check_none_open()
        self._wait(self._connection.rollback())

    def undo(self) -> None:
        """Follow a rollback: objects that were flushed become new again."""
        self._written.clear()
        if not self.is_active:  # rolled back by SQLAlchemy, which would warn of later changes
            for changed in set(chain(self.new, self.dirty, self.deleted)):
                self.expunge(changed)
        try:
            super().rollback()
        except DRIVER_ERRORS as error:
            # The server rolls back the transaction of a lost connection.
            logger.debug("rollback failed", exc_info=error)

    def settle(self) -> None:
        """Follow a commit: flushed objects are persistent."""
        self._written.clear()
        super().commit()

    def leave(self) -> None:
        """Expunge unchanged objects, so that they stay readable: a rollback makes SQLAlchemy expire all attributes."""
        self._written.update(chain(self.dirty, self.deleted))
        for read in set(self.identity_map.values()).difference(self._written):
            self.expunge(read)

    def get_bind(self, *_arguments: Any, clause: Any = None, **_keywords: Any) -> sqlalchemy.Connection:
        """Return the connection of the unit of work; called by SQLAlchemy before each statement."""
        if clause is not None and clause.is_dml:
            self._connection.characteristics.check_writable()
        connection: sqlalchemy.Connection = self._wait(self._connection.join())
        return connection

"""The unit of work: all repositories in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any
from weakref import WeakSet

import sqlalchemy
from sqlalchemy.orm import Session
from sqlalchemy.util import ro_memoized_property  # that of functools takes a lock up to Python 3.11

from mesh_storage.errors import MeshStorageError
from mesh_storage.postgres.connection import DRIVER_ERRORS, Connection
from mesh_storage.repositories import (
    ConsensusLogRepository,
    MeshRepository,
    MessageRepository,
    NodeRepository,
    NodeStateRepository,
    RouteRepository,
    RoutingTableRepository,
    RuntimeConfigRepository,
    StateRepository,
)

logger = logging.getLogger("mesh_storage")


class UnitOfWorkSession(Session):
    """An ORM session that joins a unit of work's transaction when it first needs the database."""

    def __init__(self, connection: Connection, **_: Any) -> None:
        super().__init__(expire_on_commit=False, join_transaction_mode="rollback_only")
        self._connection = connection
        self._written = WeakSet[Any]()
        connection.joined = self

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Flush; when that fails, SQLAlchemy has rolled back, and nothing but a rollback may follow."""
        self._written.update(chain(self.new, self.dirty, self.deleted))
        try:
            super().flush(objects)
        except BaseException as error:
            self._connection.failed(error)
            raise

    def commit(self) -> None:
        """Flush; SQLAlchemy would take for stored what the unit of work may still roll back."""
        self.flush()

    def rollback(self) -> None:
        """Roll back everything, also what the repositories did."""
        self._connection.check_whole()
        self._connection.rollback()

    def undo(self) -> None:
        """Roll back, so that what was written is written again when it is added again."""
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
        """Take what was written for stored."""
        self._written.clear()
        super().commit()

    def leave(self) -> None:
        """Let go of what was only read, so that it stays readable: a rollback makes SQLAlchemy forget all values."""
        self._written.update(chain(self.dirty, self.deleted))
        for read in set(self.identity_map.values()).difference(self._written):
            self.expunge(read)

    def get_bind(self, *_arguments: Any, **_keywords: Any) -> sqlalchemy.Connection:
        """Return the connection of the unit of work; SQLAlchemy asks before each statement."""
        return self._connection.for_session()


class UnitOfWork:
    """The repositories over one transaction, which is rolled back unless `commit()` was called.

    It belongs to one thread. After `commit()` or `rollback()` it goes on with a new transaction. Aggregates that were
    read stay readable when it ends; to change one of the infrastructure, change it and `update()` it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._session: Session | None = None

    @ro_memoized_property
    def meshes(self) -> MeshRepository:
        """The meshes."""
        return MeshRepository(self._connection)

    @ro_memoized_property
    def nodes(self) -> NodeRepository:
        """The nodes."""
        return NodeRepository(self._connection)

    @ro_memoized_property
    def routes(self) -> RouteRepository:
        """The configured routes between nodes."""
        return RouteRepository(self._connection)

    @ro_memoized_property
    def messages(self) -> MessageRepository:
        """The messages."""
        return MessageRepository(self._connection)

    @ro_memoized_property
    def state(self) -> StateRepository:
        """The shared state."""
        return StateRepository(self._connection)

    @ro_memoized_property
    def node_states(self) -> NodeStateRepository:
        """The runtime states of the nodes."""
        return NodeStateRepository(self._connection)

    @ro_memoized_property
    def consensus_log(self) -> ConsensusLogRepository:
        """The consensus log."""
        return ConsensusLogRepository(self._connection)

    @ro_memoized_property
    def routing_table(self) -> RoutingTableRepository:
        """The routing table."""
        return RoutingTableRepository(self._connection)

    @ro_memoized_property
    def runtime_config(self) -> RuntimeConfigRepository:
        """The runtime configuration."""
        return RuntimeConfigRepository(self._connection)

    @property
    def session(self) -> Session:
        """The SQLAlchemy session of this transaction, for what the repositories do not offer.

        `commit()` of the unit of work flushes it; its own `commit()` only flushes, and its `rollback()` rolls back
        everything. Inside of the block its errors are SQLAlchemy's; one that leaves the block is translated.
        """
        if self._session is None:
            self._session = UnitOfWorkSession(self._connection)
        return self._session

    def use_session(self, session: Session) -> None:
        """Let a session that was made elsewhere, as the async side does, be the one of this transaction."""
        self._session = session

    def commit(self) -> None:
        """Make everything since the last commit permanent, all of it or nothing.

        Raises:
            MeshStorageError: A call failed before and its error was caught; everything was rolled back.
            UnavailableError: The connection was lost; if that was during the commit, it may have been made or not.
        """
        self._connection.check_whole()
        if self._session is not None and not self._connection.has_failed:
            self._flush(self._session)
            _release_savepoints(self._session)
        self._connection.commit()

    def rollback(self) -> None:
        """Undo everything since the last commit."""
        self._connection.check_whole()
        self._connection.rollback()

    @contextmanager
    def savepoint(self) -> Generator[None]:
        """Undo only what the block did if it raises, so that the unit of work can go on after the error is caught."""
        self._flush_if_used()
        # SQLAlchemy restores the objects as they were here, also those of a session that is first used in the block; it
        # joins the transaction before, or it would join the savepoint and end with that.
        session = self.session
        session.connection()
        with self._connection.savepoint(), ExitStack() as nested:
            nested.enter_context(session.begin_nested())
            try:
                yield
                self._flush(session)
            except BaseException:
                self._connection.writes.undo()  # Before SQLAlchemy forgets the values of what was changed.
                raise
            finally:
                if self._connection.inherited:  # To leave it in a forked child would end it for the parent.
                    nested.pop_all()

    def _flush_if_used(self) -> None:
        if self._session is not None:
            self._flush(self._session)

    def _flush(self, session: Session) -> None:
        try:
            session.flush()
        except MeshStorageError:
            raise
        except Exception as error:
            raise self._connection.failed(error) from error


def _release_savepoints(session: Session) -> None:
    """Release those that the caller left open, so that what was written in them counts for the whole."""
    while (nested := session.get_nested_transaction()) is not None and nested.is_active:
        nested.commit()

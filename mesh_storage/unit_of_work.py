"""The unit of work: all repositories in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import sqlalchemy
from sqlalchemy.orm import Session

from mesh_storage.connection import DRIVER_ERRORS, Connection
from mesh_storage.errors import MeshStorageError
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

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Flush; when that fails, SQLAlchemy has rolled back, and nothing but a rollback may follow."""
        try:
            super().flush(objects)
        except BaseException as error:
            self._connection.failed(error)
            raise

    def rollback(self) -> None:
        """Roll back everything, also what the repositories did."""
        self._connection.check_whole()
        try:
            super().rollback()
        except DRIVER_ERRORS as error:
            # The server undoes the work of a connection that it lost.
            logger.debug("rollback failed", exc_info=error)
        self._connection.rollback()

    def get_bind(self, *_arguments: Any, **_keywords: Any) -> sqlalchemy.Connection:
        """Give the connection of the unit of work; SQLAlchemy asks before each statement."""
        return self._connection.for_session()


class UnitOfWork:
    """The repositories over one transaction, which is rolled back unless `commit()` was called.

    It belongs to one thread. After `commit()` or `rollback()` it goes on with a new transaction. Aggregates that were
    read stay readable when it ends; to change one of the infrastructure, change it and `update()` it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._session: Session | None = None

    @cached_property
    def meshes(self) -> MeshRepository:
        """The meshes."""
        return MeshRepository(self._connection)

    @cached_property
    def nodes(self) -> NodeRepository:
        """The nodes."""
        return NodeRepository(self._connection)

    @cached_property
    def routes(self) -> RouteRepository:
        """The configured routes between nodes."""
        return RouteRepository(self._connection)

    @cached_property
    def messages(self) -> MessageRepository:
        """The messages."""
        return MessageRepository(self._connection)

    @cached_property
    def state(self) -> StateRepository:
        """The shared state."""
        return StateRepository(self._connection)

    @cached_property
    def node_states(self) -> NodeStateRepository:
        """The runtime states of the nodes."""
        return NodeStateRepository(self._connection)

    @cached_property
    def consensus_log(self) -> ConsensusLogRepository:
        """The consensus log."""
        return ConsensusLogRepository(self._connection)

    @cached_property
    def routing_table(self) -> RoutingTableRepository:
        """The routing table."""
        return RoutingTableRepository(self._connection)

    @cached_property
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
        self._flush_if_used()
        self._connection.commit()

    def rollback(self) -> None:
        """Undo everything since the last commit."""
        self._connection.check_whole()
        if self._session is not None:
            self._session.rollback()
        self._connection.rollback()

    @contextmanager
    def savepoint(self) -> Generator[None]:
        """Undo only what the block did if it raises, so that the unit of work can go on after the error is caught."""
        self._flush_if_used()
        try:
            with self._connection.savepoint():
                if self._session is None:
                    yield
                    self._flush_if_used()
                else:  # Its failure must end at the savepoint, not at the transaction that it joined.
                    with self._session.begin_nested():
                        yield
                        self._flush(self._session)
        except BaseException:
            if self._session is not None:
                self._session.expunge_all()
            raise

    def close(self) -> None:
        """Let the session go; the connection rolls back when its own block ends."""
        if self._session is not None:
            self._session.close()

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

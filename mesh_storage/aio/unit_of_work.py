"""The unit of work of the asyncio side."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import ro_memoized_property

from mesh_storage.aio import greenlets
from mesh_storage.aio.bridge import BridgedDriver
from mesh_storage.aio.repositories import (
    AsyncConsensusLogRepository,
    AsyncMeshRepository,
    AsyncMessageRepository,
    AsyncNodeRepository,
    AsyncNodeStateRepository,
    AsyncRouteRepository,
    AsyncRoutingTableRepository,
    AsyncRuntimeConfigRepository,
    AsyncStateRepository,
)
from mesh_storage.postgres.connection import Connection
from mesh_storage.unit_of_work import UnitOfWork, UnitOfWorkSession


class AsyncUnitOfWork:
    """The repositories over one transaction, which is rolled back unless `commit()` was called.

    It belongs to one task. All else is as in `mesh_storage.UnitOfWork`.
    """

    def __init__(self, connection: Connection, driver: BridgedDriver) -> None:
        self._uow = UnitOfWork(connection)
        self._connection = connection
        self._driver = driver

    @ro_memoized_property
    def meshes(self) -> AsyncMeshRepository:
        """The meshes."""
        return AsyncMeshRepository(self._uow.meshes)

    @ro_memoized_property
    def nodes(self) -> AsyncNodeRepository:
        """The nodes."""
        return AsyncNodeRepository(self._uow.nodes)

    @ro_memoized_property
    def routes(self) -> AsyncRouteRepository:
        """The configured routes between nodes."""
        return AsyncRouteRepository(self._uow.routes)

    @ro_memoized_property
    def messages(self) -> AsyncMessageRepository:
        """The messages."""
        return AsyncMessageRepository(self._uow.messages)

    @ro_memoized_property
    def state(self) -> AsyncStateRepository:
        """The shared state."""
        return AsyncStateRepository(self._uow.state)

    @ro_memoized_property
    def node_states(self) -> AsyncNodeStateRepository:
        """The runtime states of the nodes."""
        return AsyncNodeStateRepository(self._uow.node_states)

    @ro_memoized_property
    def consensus_log(self) -> AsyncConsensusLogRepository:
        """The consensus log."""
        return AsyncConsensusLogRepository(self._uow.consensus_log)

    @ro_memoized_property
    def routing_table(self) -> AsyncRoutingTableRepository:
        """The routing table."""
        return AsyncRoutingTableRepository(self._uow.routing_table)

    @ro_memoized_property
    def runtime_config(self) -> AsyncRuntimeConfigRepository:
        """The runtime configuration."""
        return AsyncRuntimeConfigRepository(self._uow.runtime_config)

    @ro_memoized_property
    def session(self) -> AsyncSession:
        """The SQLAlchemy session of this transaction, for what the repositories do not offer.

        `commit()` of the unit of work flushes it; its own `commit()` only flushes, and its `rollback()` rolls back
        everything. Inside of the block its errors are SQLAlchemy's; one that leaves the block is translated.
        """
        session = AsyncSession(sync_session_class=UnitOfWorkSession, connection=self._connection)
        self._uow.use_session(session.sync_session)
        return session

    async def commit(self) -> None:
        """Make everything since the last commit permanent, all of it or nothing.

        Raises:
            MeshStorageError: A call failed before and its error was caught; everything was rolled back.
            UnavailableError: The connection was lost; if that was during the commit, it may have been made or not.
        """
        untimed = self._connection.characteristics.timeout is None
        if untimed and self._connection.settled() and "session" not in vars(self):
            self._uow.commit()  # There is nothing to send, so the bridge need not be crossed.
        else:
            await greenlets.run(self._uow.commit)

    async def rollback(self) -> None:
        """Undo everything since the last commit."""
        await self._driver.finish(greenlets.run(self._uow.rollback))

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Undo only what the block did if it raises, so that the unit of work can go on after the error is caught."""
        self._uow.use_session(self.session.sync_session)
        savepoint = self._uow.savepoint()
        await greenlets.run(savepoint.__enter__)
        try:
            yield
        except BaseException as error:
            await self._driver.finish(greenlets.run(_leave, savepoint, error))
            raise
        await greenlets.run(savepoint.__exit__, None, None, None)


def _leave(savepoint: AbstractContextManager[None], error: BaseException) -> None:
    savepoint.__exit__(type(error), error, error.__traceback__)

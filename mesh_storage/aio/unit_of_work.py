"""The unit of work: all repositories in one transaction, and its context manager."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import ParamSpec, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, AsyncTransaction
from sqlalchemy.util import ro_memoized_property  # functools.cached_property takes a lock up to Python 3.11

from mesh_storage.aio.postgres.concurrency import open_async_session, uninterrupted
from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.postgres.replicas import AsyncReading
from mesh_storage.aio.repositories import (
    AsyncChangeRepository,
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
from mesh_storage.aio.repositories.maintenance import AsyncMaintenance
from mesh_storage.errors import MeshStorageError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.failure import DRIVER_ERRORS
from mesh_storage.postgres.retry import Retry, log_if_slow

P = ParamSpec("P")
T = TypeVar("T")


class AsyncUnitOfWork:
    """All repositories in one transaction, which is rolled back unless `commit()` is called.

    Not safe for concurrent use: it belongs to one thread or task. After `commit()` or `rollback()`, a new transaction
    begins. Loaded aggregates stay readable after it ends; to change an infrastructure aggregate, modify it and call
    `update()`.
    """

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        self._connection = connection

    @ro_memoized_property
    def meshes(self) -> AsyncMeshRepository:
        """The repository of meshes."""
        return AsyncMeshRepository(self._connection)

    @ro_memoized_property
    def nodes(self) -> AsyncNodeRepository:
        """The repository of nodes."""
        return AsyncNodeRepository(self._connection)

    @ro_memoized_property
    def routes(self) -> AsyncRouteRepository:
        """The repository of configured routes between nodes."""
        return AsyncRouteRepository(self._connection)

    @ro_memoized_property
    def messages(self) -> AsyncMessageRepository:
        """The repository of messages."""
        return AsyncMessageRepository(self._connection)

    @ro_memoized_property
    def state(self) -> AsyncStateRepository:
        """The repository of the shared state."""
        return AsyncStateRepository(self._connection)

    @ro_memoized_property
    def node_states(self) -> AsyncNodeStateRepository:
        """The repository of the runtime states of nodes."""
        return AsyncNodeStateRepository(self._connection)

    @ro_memoized_property
    def consensus_log(self) -> AsyncConsensusLogRepository:
        """The repository of the consensus log."""
        return AsyncConsensusLogRepository(self._connection)

    @ro_memoized_property
    def routing_table(self) -> AsyncRoutingTableRepository:
        """The repository of the routing table."""
        return AsyncRoutingTableRepository(self._connection)

    @ro_memoized_property
    def runtime_config(self) -> AsyncRuntimeConfigRepository:
        """The repository of the runtime configuration."""
        return AsyncRuntimeConfigRepository(self._connection)

    @ro_memoized_property
    def changes(self) -> AsyncChangeRepository:
        """What changed since a cursor, whoever wrote."""
        return AsyncChangeRepository(self._connection)

    @property
    def session(self) -> AsyncSession:
        """The SQLAlchemy session of this transaction, for anything the repositories do not cover.

        `commit()` of the unit of work flushes it; its own `commit()` only flushes, and its `rollback()` rolls back
        everything. Within the block it raises SQLAlchemy's errors; one that leaves the block is translated.
        Session-level state of the server (SET, advisory locks, temporary tables, LISTEN) is discarded at the end of the
        unit of work.
        """
        self._connection.joined.exposed = True
        return self._session

    @property
    def position(self) -> str:
        """Where the last commit is, for `after` of units of work on replicas, also of other processes.

        Raises:
            MeshStorageError: Nothing was committed, `position=True` was not given, or the connection was lost right
                after the commit; `storage.position()` is after it too.
        """
        if self._connection.position is None:
            raise MeshStorageError("no position is known: it takes position=True, and a commit")
        return self._connection.position

    async def commit(self) -> None:
        """Commit everything since the last commit atomically.

        Raises:
            MeshStorageError: An earlier call failed and its error was caught; everything was rolled back.
            UnavailableError: The connection was lost; if that was during the commit, its outcome is unknown
                (`.committed` is `unknown`).
            StorageTimeoutError: The timeout expired; if `.committed` is `locally`, the synchronous standby may lack the
                transaction.
        """
        self._connection.owner.check()
        self._connection.savepoints.check_none_open()
        if "_session" in vars(self) and not self._connection.has_failed:
            await self._flush()
            while (nested := self._session.get_nested_transaction()) is not None and nested.is_active:
                await self._in_session(nested.commit)  # a savepoint of the caller's session that was left open
        await self._connection.commit()

    async def rollback(self) -> None:
        """Roll back everything since the last commit."""
        self._connection.savepoints.check_none_open()
        await uninterrupted(self._connection.owner, self._connection.rollback)

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None, None]:
        """Roll back only the changes of the block if it raises, so that the unit of work can continue."""
        self._connection.characteristics.check_writable()
        # SQLAlchemy restores the objects to their state at this point, even if the session is first used in the block.
        # The session must join the transaction first, else it would join the savepoint and end with it.
        await self._flush()
        await self._in_session(self._session.connection)
        savepoint = await self._connection.begin_nested()
        try:
            nested = self._session.begin_nested()
            await self._in_session(nested.__aenter__)
        except BaseException:
            await uninterrupted(self._connection.owner, self._connection.roll_back_to, savepoint)
            raise
        try:
            yield
            self._connection.owner.check()  # in a forked child, the savepoint is the parent's
            await self._flush()
            await nested.__aexit__(None, None, None)
        except BaseException as error:
            self._connection.writes.undo()  # before SQLAlchemy expires the changed attributes
            await uninterrupted(self._connection.owner, self._undo, savepoint, nested, error)
            raise
        await self._connection.release(savepoint)

    @ro_memoized_property
    def maintenance(self) -> AsyncMaintenance:
        """The steps of `maintain`."""
        return AsyncMaintenance(self._connection)

    @ro_memoized_property
    def _session(self) -> AsyncSession:
        return open_async_session(self._connection)

    async def _flush(self) -> None:
        await self._in_session(self._session.flush)

    async def _in_session(self, work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the session, and translate its errors."""
        try:
            return await work(*args, **kwargs)
        except MeshStorageError:
            raise
        except Exception as error:
            raise await self._connection.failed(error) from error

    async def _undo(self, savepoint: AsyncTransaction, nested: AsyncSessionTransaction, error: BaseException) -> None:
        if self._connection.owner.inherited:  # ending it in a forked child would end it for the parent
            self._connection.owner.check()
        try:
            await nested.__aexit__(type(error), error, error.__traceback__)
        finally:
            await self._connection.roll_back_to(savepoint)


class AsyncScope(AbstractAsyncContextManager[AsyncUnitOfWork]):
    """The context manager of a unit of work; a class, since generator-based ones cost several times as much."""

    _calls: Mapping[str, int] | None = None
    """How often each method of a repository was called; telemetry counts."""

    def __init__(
        self,
        storage: object,
        pool: AsyncPool | AsyncReading,
        characteristics: Characteristics,
        slow: float,
        *,
        commits: bool,
        beside: bool = False,
        retry: Retry | None = None,
    ) -> None:
        self._storage = storage  # keeps the bundled server running
        self._pool = pool
        self._characteristics = characteristics
        self._slow = slow
        self._commits = commits
        self._beside = beside
        self._retry = retry  # what attempt this is; telemetry reports it
        self._open = False

    async def __aenter__(self) -> AsyncUnitOfWork:
        if self._open:
            raise MeshStorageError(
                "this unit of work is already open; call begin() or unit_of_work() again for another one"
            )
        self._open = True
        self._begun = time.monotonic()
        try:
            self._connection = await self._pool.acquire(self._characteristics, beside=self._beside)
        except BaseException:
            self._open = False
            raise
        self._uow = AsyncUnitOfWork(self._connection)
        return self._uow

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._commits:
                await self._uow.commit()
            elif isinstance(error, DRIVER_ERRORS):  # raised by the session
                raise await self._connection.failed(error) from error
            elif error is not None and not isinstance(error, Exception):  # a cancelled task or KeyboardInterrupt
                await self._connection.hurry()
        finally:
            self._open = False
            await self._pool.release(self._connection)
            log_if_slow(time.monotonic() - self._begun, self._slow, self._uow, self._calls)

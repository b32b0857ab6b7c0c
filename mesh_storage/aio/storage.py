"""AsyncMeshStorage: where an asyncio service opens the storage and its units of work."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from mesh_storage import health, schema
from mesh_storage.aio.postgres.concurrency import in_background, in_greenlet, sync_connection
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.unit_of_work import AsyncScope, AsyncUnitOfWork
from mesh_storage.aio.worker import in_thread
from mesh_storage.errors import (
    ClosedError,
    InvalidInputError,
    MeshStorageError,
)
from mesh_storage.health import Health
from mesh_storage.postgres.characteristics import Characteristics, Durability, Isolation
from mesh_storage.postgres.pool import check_open
from mesh_storage.postgres.retry import Retry
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.settings import Settings
from mesh_storage.storage import choose_settings, describe

if TYPE_CHECKING:  # Who makes no backup need not wait for what it takes.
    from mesh_storage.backup import Report
    from mesh_storage.backup.manifest import Manifest

logger = logging.getLogger("mesh_storage")

T = TypeVar("T")


class Opening:
    """A storage that is about to be opened: `await` it, or enter it with `async with`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._storage: AsyncMeshStorage | None = None

    def __await__(self) -> Generator[object, None, AsyncMeshStorage]:
        """Open the storage; it is the caller's to close."""
        return self._open().__await__()

    async def __aenter__(self) -> AsyncMeshStorage:
        """Open the storage for a block."""
        self._storage = await self._open()
        return self._storage

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        if self._storage is not None:
            await self._storage.close()

    async def _open(self) -> AsyncMeshStorage:
        # To start a server and deploy a schema takes long and blocks, so a thread does it.
        preparation = _Preparation(self._settings)
        try:
            server = await asyncio.to_thread(preparation.run)
        except asyncio.CancelledError:
            asyncio.get_running_loop().run_in_executor(None, preparation.abandon)
            raise
        storage = AsyncMeshStorage(self._settings, server)
        logger.info(
            "storage opened",
            extra={"event": "open", "server": server.kind, "pool_size": self._settings.pool_size},
        )
        return storage


class AsyncMeshStorage:
    """The storage of a mesh: a pool of connections to one database, and the units of work on it.

    One object serves all tasks of one event loop. It works on by itself after the server was away, and in the event
    loop of a forked child.
    """

    def __init__(self, settings: Settings, server: Server) -> None:
        """Use `open` instead, which finds the server and checks its schema."""
        self._settings = settings
        self._server = server
        self._pool = AsyncPool(settings, server)
        self._finalizer = weakref.finalize(self, server.close)

    @classmethod
    def open(cls, url: str | None = None, *, settings: Settings | None = None) -> Opening:
        """Open the storage at a URL, by settings, or by the environment and `.env`; await or `async with` the result.

        On `embedded:` and `memory:` the schema is deployed; on a server it must be there.

        Raises:
            ConfigurationError: A setting is missing or wrong; the message names it.
            SchemaMismatchError: The schema is behind or ahead of this version of mesh_storage.
            UnavailableError: The database cannot be reached.
        """
        return Opening(choose_settings(url, settings))

    def unit_of_work(
        self,
        *,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncUnitOfWork]:
        """Open a unit of work, which is rolled back at the end of the block unless `commit()` was called.

        The arguments and errors are those of `MeshStorage.unit_of_work`.
        """
        characteristics = Characteristics(read_only, isolation, durability, timeout)
        return AsyncScope(self, self._pool, characteristics, self._settings.slow_unit_of_work, commits=False)

    def begin(
        self,
        *,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncUnitOfWork]:
        """Open a unit of work that is committed at the end of the block, and rolled back when the block raises.

        The arguments and errors are those of `MeshStorage.unit_of_work`.
        """
        characteristics = Characteristics(read_only, isolation, durability, timeout)
        return AsyncScope(self, self._pool, characteristics, self._settings.slow_unit_of_work, commits=True)

    async def run(
        self,
        work: Callable[[AsyncUnitOfWork], Awaitable[T]],
        *,
        attempts: int = 5,
        within: float | None = None,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
    ) -> T:
        """Call `work` with a unit of work, commit, and return its result; do it again after a retryable error.

        The arguments, pauses and errors are those of `MeshStorage.run`.
        """
        retry = Retry(work, attempts, within, timeout)
        while True:
            try:
                async with self.begin(
                    read_only=read_only, isolation=isolation, durability=durability, timeout=retry.timeout()
                ) as uow:
                    working = work(uow)
                    if not inspect.isawaitable(working):
                        raise InvalidInputError("work must be a coroutine function (async def)", field="work")
                    result = await working
            except MeshStorageError as error:
                pause = retry.pause(error)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                return result

    async def health(self) -> Health:
        """Check within 2 s that the database answers, takes writes and has the right schema; writes nothing.

        It waits for no connection of the pool: when all are in use, it makes one of its own.

        Raises:
            ClosedError: The storage was closed.
        """
        pool = {"pool_size": self._pool.size, "pool_in_use": self._pool.in_use}
        try:
            connection = await self._pool.acquire(
                Characteristics(read_only=True, timeout=health.TIMEOUT_S), beside=True
            )
            try:
                begun = time.perf_counter()
                row = await connection.fetch_one(health.READ_ONLY)
                round_trip_ms = (time.perf_counter() - begun) * 1000
                database = sync_connection(connection.driver.sqlalchemy)
                revision, unclear = None, None
                try:
                    revision = await connection.perform(in_greenlet, schema.current, database)
                except MeshStorageError as error:
                    unclear = error
            finally:
                await self._pool.release(connection)
            return health.answered(row, revision, unclear, round_trip_ms=round_trip_ms, **pool)
        except ClosedError:
            raise
        except MeshStorageError as error:
            return health.unreachable(error, **pool)

    async def backup(
        self,
        path: str | os.PathLike[str],
        *,
        jobs: int = 4,
        verify: bool = False,
        progress: Report | None = None,
    ) -> Manifest:
        """Write a backup of all tables to a path, as they are at one moment; units of work go on meanwhile.

        A thread does it, and calls `progress` in the event loop. When the task is cancelled, it ends soon and leaves
        nothing behind. The arguments and errors are those of `MeshStorage.backup`.
        """
        check_open(closed=self._pool.closed)
        from mesh_storage import backup

        def work(report: Report) -> Manifest:
            return backup.backup(self._server, path, jobs=jobs, verify=verify, progress=report)

        return await in_thread(work, progress)

    async def restore(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        jobs: int = 4,
        progress: Report | None = None,
    ) -> Manifest:
        """Restore a backup into tables that are empty, or with `overwrite` in place of what they hold: all or nothing.

        A thread does it, and calls `progress` in the event loop. When the task is cancelled, it ends soon, and the
        database is as before or has it all. The arguments and errors are those of `MeshStorage.restore`.
        """
        check_open(closed=self._pool.closed)
        from mesh_storage import backup

        def work(report: Report) -> Manifest:
            return backup.restore(self._server, path, overwrite=overwrite, jobs=jobs, progress=report)

        return await in_thread(work, progress)

    async def close(self) -> None:
        """Close the connections: those in use when their unit of work ends, but a bundled server stops at once."""
        if not self._pool.closed:
            await asyncio.shield(in_background(self._close()))

    def __repr__(self) -> str:
        """Say where it is, how much of the pool is in use, and whether it is closed."""
        pool = self._pool
        return describe(self, self._server, size=pool.size, in_use=pool.in_use, closed=pool.closed)

    async def __aenter__(self) -> Self:
        """Return the storage itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the storage."""
        await self.close()

    async def _close(self) -> None:
        await self._pool.close()
        await asyncio.to_thread(self._finalizer)
        logger.info("storage closed", extra={"event": "close", "server": self._server.kind})


class _Preparation:
    """The blocking part of an opening: a server that is ready, or is closed when nobody waits for it any more."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._abandoned = False
        self._server: Server | None = None

    def run(self) -> Server:
        """Find or start the server, and see to its schema."""
        server = open_server(self._settings)
        try:
            schema.ensure(server)
            self._hand_over(server)
        except BaseException:
            server.close()
            raise
        return server

    def _hand_over(self, server: Server) -> None:
        with self._lock:
            if self._abandoned:
                raise ClosedError("the opening was cancelled")
            self._server = server

    def abandon(self) -> None:
        """Close the server, now or as soon as it is ready."""
        with self._lock:
            self._abandoned = True
            server = self._server
        if server is not None:
            server.close()

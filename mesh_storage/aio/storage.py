"""AsyncMeshStorage: opens the storage and its units of work for asyncio."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from mesh_storage import health, schema
from mesh_storage.aio.cache.cached import AsyncCached
from mesh_storage.aio.consumer import AsyncConsumer
from mesh_storage.aio.lease import AsyncLease
from mesh_storage.aio.parts import AsyncParts
from mesh_storage.aio.postgres.concurrency import in_background, in_greenlet, sync_connection
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.postgres.replicas import AsyncReading
from mesh_storage.aio.unit_of_work import AsyncUnitOfWork
from mesh_storage.aio.worker import in_thread
from mesh_storage.errors import (
    ClosedError,
    InvalidInputError,
    MeshStorageError,
)
from mesh_storage.health import Health
from mesh_storage.postgres.characteristics import Characteristics, Durability, Isolation
from mesh_storage.postgres.pool import check_open
from mesh_storage.postgres.reading import Wanted
from mesh_storage.postgres.retry import Retry
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.postgres.tenure import now
from mesh_storage.postgres.wal import STANDING, Standing, standing
from mesh_storage.repositories.changelog import Batch
from mesh_storage.repositories.consuming import Stop, Terms
from mesh_storage.repositories.deliveries import LEASE, Delivery
from mesh_storage.repositories.removal import KEPT, Maintained, check_age
from mesh_storage.settings import Settings
from mesh_storage.storage import check_telemetry, choose_settings, describe
from mesh_storage.telemetry import Telemetry

if TYPE_CHECKING:  # not imported at run time, so that only a backup pays for it
    from mesh_storage.backup import Report
    from mesh_storage.backup.manifest import Manifest

logger = logging.getLogger("mesh_storage")

T = TypeVar("T")


class Opening:
    """A storage to be opened: `await` it, or enter it with `async with`."""

    def __init__(self, settings: Settings, telemetry: Telemetry | None) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._storage: AsyncMeshStorage | None = None

    def __await__(self) -> Generator[object, None, AsyncMeshStorage]:
        """Open the storage; the caller closes it."""
        return self._open().__await__()

    async def __aenter__(self) -> AsyncMeshStorage:
        """Open the storage for the block."""
        self._storage = await self._open()
        return self._storage

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the storage."""
        if self._storage is not None:
            await self._storage.close()

    async def _open(self) -> AsyncMeshStorage:
        # In a thread, since starting a server and deploying a schema block for long.
        preparation = _Preparation(self._settings)
        try:
            server = await asyncio.to_thread(preparation.run)
        except asyncio.CancelledError:
            asyncio.get_running_loop().run_in_executor(None, preparation.abandon)
            raise
        storage = AsyncMeshStorage(self._settings, server, self._telemetry)
        logger.info(
            "storage opened",
            extra={"event": "open", "server": server.kind, "pool_size": self._settings.pool_size},
        )
        return storage


class AsyncMeshStorage:
    """A connection pool for one database, and the units of work that use it.

    Share one instance among the tasks of an event loop. It reconnects by itself after a server restart and in the event
    loop of a forked child.
    """

    def __init__(self, settings: Settings, server: Server, telemetry: Telemetry | None = None) -> None:
        """Use `open` instead, which locates the server and checks its schema."""
        self._settings = settings
        self._server = server
        parts = AsyncParts()
        if telemetry is not None:
            from mesh_storage.aio.telemetry import measured

            parts = measured(telemetry, server)
        self._pool = parts.pool(settings, server)
        self._scope, self._lease, self._watch, _, self._observed = parts[1:]
        self._replicas = parts.replicas(self._pool, settings, server)
        self._caches: list[AsyncCached] = []
        self._finalizer = weakref.finalize(self, server.close)

    @classmethod
    def open(
        cls, url: str | None = None, *, settings: Settings | None = None, telemetry: Telemetry | None = None
    ) -> Opening:
        """Open the storage at a URL, from settings, or from the environment and `.env`; use `await` or `async with`.

        With `embedded:` and `memory:` the schema is deployed; on a server it must already exist. With `telemetry`,
        OpenTelemetry gets spans and metrics of what the storage does.

        Raises:
            ConfigurationError: A setting is missing or invalid; the message names it.
            SchemaMismatchError: The schema is older or newer than this version of mesh_storage requires.
            UnavailableError: The database cannot be reached.
        """
        check_telemetry(telemetry)
        return Opening(choose_settings(url, settings), telemetry)

    def unit_of_work(
        self,
        *,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
        replica: bool = False,
        after: str | None = None,
        max_lag: timedelta | None = None,
        position: bool = False,
    ) -> AbstractAsyncContextManager[AsyncUnitOfWork]:
        """Open a unit of work, which is rolled back at the end of the block unless `commit()` was called.

        The arguments and errors are those of `MeshStorage.unit_of_work`.
        """
        characteristics = Characteristics(read_only, isolation, durability, timeout, position)
        pool: AsyncPool | AsyncReading = self._pool
        if replica is not False or after is not None or max_lag is not None:
            pool = AsyncReading(self._replicas, Wanted(replica, after, max_lag))
        return self._scope(self, pool, characteristics, self._settings.slow_unit_of_work, commits=False)

    def begin(
        self,
        *,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
        replica: bool = False,
        after: str | None = None,
        max_lag: timedelta | None = None,
        position: bool = False,
    ) -> AbstractAsyncContextManager[AsyncUnitOfWork]:
        """Open a unit of work that is committed at the end of the block, or rolled back if the block raises.

        The arguments and errors are those of `MeshStorage.unit_of_work`.
        """
        characteristics = Characteristics(read_only, isolation, durability, timeout, position)
        pool: AsyncPool | AsyncReading = self._pool
        if replica is not False or after is not None or max_lag is not None:
            pool = AsyncReading(self._replicas, Wanted(replica, after, max_lag))
        return self._scope(self, pool, characteristics, self._settings.slow_unit_of_work, commits=True)

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
        replica: bool = False,
        after: str | None = None,
        max_lag: timedelta | None = None,
    ) -> T:
        """Call `work` with a unit of work, commit, and return its result; retry after a retryable error.

        The arguments, delays and errors are those of `MeshStorage.run`.
        """
        retry = Retry(work, attempts, within, timeout)
        pool: AsyncPool | AsyncReading = self._pool
        while True:
            if replica is not False or after is not None or max_lag is not None:
                pool = AsyncReading(self._replicas, Wanted(replica, after, max_lag), failed_before=retry.made > 0)
            try:
                async with self._scope(
                    self,
                    pool,
                    Characteristics(read_only, isolation, durability, retry.timeout()),
                    self._settings.slow_unit_of_work,
                    commits=True,
                    retry=retry,
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

    async def position(self) -> str:
        """Return where the primary stands: everything that is visible there by now comes before it.

        The errors are those of `MeshStorage.position`.
        """
        return await self._replicas.position()

    def lease(self, name: str, holder: bytes, *, ttl: timedelta, wait: float | None = None) -> AsyncLease:
        """Return the lease of a name, acquired by `async with` and renewed by a task; the event loop must not block.

        The arguments and errors are those of `MeshStorage.lease`.
        """
        return self._lease(self, self._pool, name, holder, ttl=ttl, wait=wait)

    def watch(
        self, *aggregates: str, prefix: str = "", after: str | None = None, poll: float = 0.25
    ) -> AsyncGenerator[Batch, None]:
        """Yield what changes in some repositories, in batches, until the storage is closed or the caller stops.

        The batches, arguments and errors are those of `MeshStorage.watch`.
        """
        check_open(closed=self._pool.closed)
        return self._watch(self, self._pool, aggregates, prefix=prefix, after=after, poll=poll).batches()

    def cached(self, redis_url: str, *, max_age: float = 60.0, poll: float = 0.25) -> AsyncCached:
        """Return repositories that are read through a cache in Redis, for reads only; docs/caching.md says more.

        The arguments and errors are those of `MeshStorage.cached`.
        """
        check_open(closed=self._pool.closed)
        made = AsyncCached(self, self._pool, self._observed, redis_url, max_age=max_age, poll=poll)
        self._caches = [*(cache for cache in self._caches if not cache.closed), made]
        return made

    async def consume(
        self,
        receiver: str,
        handle: Callable[[AsyncUnitOfWork, Delivery], Awaitable[object]],
        *,
        batch: int = 1,
        lease: timedelta = LEASE,
        poll: float = 0.25,
        max_attempts: int = 10,
        stop: Stop | None = None,
    ) -> None:
        """Handle the deliveries of a receiver as they come, until `stop` is set or the storage is closed.

        If this task is cancelled, it ends after the delivery in hand, as by `stop`; a second cancellation reaches
        `handle`. Leases are extended by a task, so the event loop must not block. The arguments and errors are those of
        `MeshStorage.consume`.
        """
        check_open(closed=self._pool.closed)
        terms = Terms(receiver, batch, lease, poll, max_attempts, stop)
        if not inspect.iscoroutinefunction(handle) and not inspect.iscoroutinefunction(
            getattr(handle, "__call__", None)  # noqa: B004 - what is called, not whether it can be
        ):
            raise InvalidInputError("handle must be a coroutine function (async def)", field="handle")
        await AsyncConsumer(
            self,
            self._pool,
            handle,
            terms,
            scope=self._scope,
            observed=self._observed,
            slow=self._settings.slow_unit_of_work,
        ).run()

    async def health(self) -> Health:
        """Check that the database responds, accepts writes and has the current schema; takes at most 2 s.

        It waits for no connection of the pool: when all are in use, it makes one of its own.

        Raises:
            ClosedError: The storage was closed.
        """
        replicas = list(self._replicas)
        asked = asyncio.gather(*(each.check(health.TIMEOUT_S) for each in replicas))
        (found, primary), answers = await asyncio.gather(self._check_primary(), asked)
        checked = [
            health.of_replica(each.address, answer, primary) for each, answer in zip(replicas, answers, strict=True)
        ]
        return replace(found, replicas=tuple(checked)) if checked else found

    async def _check_primary(self) -> tuple[Health, Standing | None]:
        pool = {"pool_size": self._pool.size, "pool_in_use": self._pool.in_use}
        primary: Standing | None = None
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
                missing: tuple[str, ...] = ()
                silent: tuple[str, ...] = ()
                try:
                    if len(self._replicas):
                        primary = standing(await connection.ask(STANDING), now())
                    revision, missing = await connection.perform(in_greenlet, schema.examine, database)
                    if row is not None and row[1]:
                        silent = tuple(name for (name,) in await connection.fetch_all(health.WORKERS))
                except MeshStorageError as error:
                    unclear = error
            finally:
                await self._pool.release(connection)
            return (
                health.answered(row, revision, missing, unclear, silent, round_trip_ms=round_trip_ms, **pool),
                primary,
            )
        except ClosedError:
            raise
        except MeshStorageError as error:
            return health.unreachable(error, **pool), None

    async def maintain(
        self, *, changes_older_than: timedelta = KEPT, messages_older_than: timedelta | None = None
    ) -> Maintained:
        """Remove what has expired and what is no longer kept, in short transactions, and return how much it was.

        Several processes may do it at once; call it regularly, for example every minute.

        The arguments and errors are those of `MeshStorage.maintain`.
        """
        check_age("changes_older_than", changes_older_than)
        if messages_older_than is not None:
            check_age("messages_older_than", messages_older_than)
        made = Maintained()
        while True:
            async with self.begin() as uow:
                removed = await uow.maintenance.step(changes_older_than, messages_older_than)
            made += removed
            if not removed:
                return made

    async def backup(
        self,
        path: str | os.PathLike[str],
        *,
        jobs: int = 4,
        verify: bool = False,
        progress: Report | None = None,
    ) -> Manifest:
        """Write a consistent backup of all tables to a path, without blocking units of work.

        It runs in a thread and calls `progress` in the event loop. If the task is cancelled, the backup stops soon and
        removes its files. The arguments and errors are those of `MeshStorage.backup`.
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
        """Restore a backup in one transaction, into empty tables or, with `overwrite`, replacing their rows.

        It runs in a thread and calls `progress` in the event loop. If the task is cancelled, the restore stops soon,
        with the database either unchanged or fully restored. The arguments and errors are those of
        `MeshStorage.restore`.
        """
        check_open(closed=self._pool.closed)
        from mesh_storage import backup

        def work(report: Report) -> Manifest:
            return backup.restore(self._server, path, overwrite=overwrite, jobs=jobs, progress=report)

        try:
            return await in_thread(work, progress)
        finally:
            self._pool.commits.note()

    async def close(self) -> None:
        """Close the connections, those in use when their unit of work ends; a bundled server stops immediately."""
        if not self._pool.closed:
            await asyncio.shield(in_background(self._close()))

    def __repr__(self) -> str:
        """Say where it is, how much of the pool is in use, and whether it is closed."""
        pool = self._pool
        return describe(self, self._server, size=pool.size, in_use=pool.in_use, closed=pool.closed)

    async def __aenter__(self) -> Self:
        """Return the storage."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the storage."""
        await self.close()

    async def _close(self) -> None:
        for cache in self._caches:
            await cache.close()
        await self._pool.close()
        await self._replicas.close()
        await asyncio.to_thread(self._finalizer)
        logger.info("storage closed", extra={"event": "close", "server": self._server.kind})


class _Preparation:
    """The blocking part of opening a storage: a server that is ready, or closed if the opening was cancelled."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._abandoned = False
        self._server: Server | None = None

    def run(self) -> Server:
        """Locate or start the server, and check or deploy its schema."""
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

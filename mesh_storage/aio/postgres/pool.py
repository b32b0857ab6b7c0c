"""The connection pool for asyncio.

See `mesh_storage/postgres/pool.py` for why the pool is our own. This one is also written by hand rather than shared:
threads and tasks wait for different things, and a task may be cancelled while its connection is being established.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
import sqlalchemy.exc
from sqlalchemy.ext.asyncio import create_async_engine

from mesh_storage.aio.postgres.concurrency import finished, in_background, sync_connection
from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.postgres.driver import AsyncDriver
from mesh_storage.aio.postgres.timed import AsyncTimedConnection
from mesh_storage.errors import MeshStorageError, StorageTimeoutError, UnavailableError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.commits import Commits
from mesh_storage.postgres.engine import closing_half_open, connect_before, engine_arguments, share_time
from mesh_storage.postgres.events import Events
from mesh_storage.postgres.pool import (
    check_open,
    exhausted,
    keep_for_parent,
    renew_after_fork,
    response_timeout,
    unreachable,
    wait_limit,
)
from mesh_storage.postgres.server import Server
from mesh_storage.postgres.transaction_pooling import Pooling
from mesh_storage.settings import Settings

T = TypeVar("T")


class AsyncPool:
    """The connections of one storage to one database, for all tasks of one event loop."""

    lends: type[AsyncUnitOfWorkConnection] = AsyncUnitOfWorkConnection
    """What a unit of work gets."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.closed = False
        self.commits = Commits()
        self._timeout = settings.pool_timeout
        self._response_timeout = response_timeout(settings, server)
        self._pooling = Pooling.of(settings, server.local_parameters)
        self._server = server
        connect = server.connect | {"async_creator_fn": _connect}
        self._engine = create_async_engine(**engine_arguments(connect))
        self._idle: deque[AsyncDriver] = deque()
        self._lent: set[AsyncUnitOfWorkConnection] = set()
        self._free = asyncio.Semaphore(self.size)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting: set[asyncio.Task[Any]] = set()
        self._condemned = 0.0
        renew_after_fork(self)

    @property
    def in_use(self) -> int:
        """The number of connections in use."""
        return len(self._lent)

    @property
    def idle(self) -> int:
        """The number of connections that wait for a unit of work."""
        return len(self._idle)

    async def acquire(
        self, characteristics: Characteristics, *, beside: bool = False, until: float | None = None
    ) -> AsyncUnitOfWorkConnection:
        """Acquire a connection, to be returned by `release`.

        With `beside` it waits for none: when all are in use, it makes one more, which `release` discards. With `until`
        it gives up at that moment, by `time.monotonic()`.

        Raises:
            ClosedError: The pool is closed.
            MeshStorageError: The storage belongs to another event loop.
            UnavailableError: No connection became available in time, or the server cannot be reached.
            StorageTimeoutError: The timeout of the unit of work expired.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        check_open(closed=self.closed)
        self._check_loop()
        placed = not (beside and self._free.locked())
        if placed and self._free.locked():
            await self._wait(characteristics.timeout, until)
        elif placed:
            await self._free.acquire()
        if self.closed:  # it may have been closed in the meantime
            self._free.release()
            check_open(closed=True)
        driver = self._idle_driver() if placed else None
        # In its own task, since a half-open connection would leak if cancelled.
        connecting = None if driver else self._keep_running(self._connect(until or deadline))
        try:
            if connecting is not None:
                driver = await asyncio.shield(connecting)
            assert driver is not None, "either idle or just connected"
            connection = self.lends(driver, characteristics, deadline, self._pooling, self.commits)
            await connection.prepare()
        except BaseException:
            self._keep_running(self._give_up(driver, connecting, placed=placed))
            raise
        if placed:
            self._lent.add(connection)
        return connection

    async def release(self, connection: AsyncUnitOfWorkConnection) -> None:
        """Release a connection, rolling back uncommitted changes, even if this task is cancelled meanwhile."""
        if connection.owner.inherited:
            keep_for_parent(connection)
        elif not connection.joined.is_used and connection.settled() and not self.closed and connection in self._lent:
            await connection.close()
            self._put_back(connection)
        else:
            await asyncio.shield(in_background(self._clean(connection)))

    async def close(self) -> None:
        """Close the idle connections; those in use are closed on release."""
        self.closed = True
        # Wakes one waiter with `ClosedError`, which in turn wakes the next.
        self._free.release()
        await self._close_idle()
        while self._connecting:  # their waiters are gone
            await asyncio.wait(self._connecting)

    def after_fork(self) -> None:
        """Start with no connections in a forked child, leaving the parent's open."""
        keep_for_parent((self._idle, self._connecting))
        self._idle = deque()
        self._connecting = set()
        self._free = asyncio.Semaphore(self.size)
        self._loop = None
        self._lent = set()
        if self._server.embedded is not None and not self.closed:
            self._server.embedded.after_fork()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise MeshStorageError(
                "this storage belongs to another event loop; open one per event loop, in the loop that uses it"
            )

    async def _wait(self, timeout: float | None, until: float | None) -> None:
        limit = wait_limit(self._timeout, timeout)
        if until is not None:
            limit = min(limit, max(0.0, until - time.monotonic()))
        try:
            async with asyncio.timeout(limit):
                await self._free.acquire()
        except TimeoutError:
            raise self._exhausted(timeout) from None

    def _exhausted(self, timeout: float | None) -> UnavailableError | StorageTimeoutError:
        return exhausted(self.size, self._timeout, timeout)

    async def _clean(self, connection: AsyncUnitOfWorkConnection) -> None:
        try:
            await finished(connection.owner)  # a rollback whose task was cancelled twice
            await connection.close()
            if connection.is_lost:
                self._condemned = time.monotonic()
                await self._close_idle()
            driver, placed = connection.driver, connection in self._lent
            if self.closed or not placed or not connection.reusable() or driver.liveness.born <= self._condemned:
                await driver.discard()
        finally:
            self._put_back(connection)

    def _put_back(self, connection: AsyncUnitOfWorkConnection) -> None:
        if connection.reusable():
            self._idle.append(connection.driver)
        if connection in self._lent:
            self._lent.discard(connection)
            self._free.release()

    async def _close_idle(self) -> None:
        while self._idle:
            await self._idle.pop().discard()

    def _idle_driver(self) -> AsyncDriver | None:
        """Return the most recently used idle connection that is still usable, if any."""
        while self._idle:
            driver = self._idle.pop()
            if driver.liveness.usable() and driver.liveness.born > self._condemned:
                return driver
            self._keep_running(driver.discard())
        return None

    async def _connect(self, deadline: float | None) -> AsyncDriver:
        try:
            with connect_before(deadline):
                made = await self._engine.connect()
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            refused, cause = unreachable(error, deadline)
        else:
            connection: Any = sync_connection(made).connection.driver_connection
            connection.response_timeout = self._response_timeout
            return AsyncDriver(made, connection, Events(sync_connection(made)))
        raise refused from cause

    def _keep_running(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._connecting.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._connecting.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it

    async def _give_up(
        self, driver: AsyncDriver | None, connecting: asyncio.Task[AsyncDriver] | None, *, placed: bool
    ) -> None:
        """Discard a connection whose waiter is gone; its slot is released only afterwards."""
        try:
            if driver is None and connecting is not None:
                with suppress(MeshStorageError):
                    driver = await connecting
            if driver is not None:
                await driver.discard()
        finally:
            if placed:
                self._free.release()


async def _connect(*_conninfo: str, **parameters: Any) -> AsyncTimedConnection:
    """Connect within the time limit for all hosts together, which holds for SQLAlchemy's first statements as well."""
    seconds = share_time(parameters)
    end = None if seconds is None else time.monotonic() + seconds
    try:
        async with asyncio.timeout(seconds):
            with closing_half_open():
                made = await AsyncTimedConnection.connect(**parameters)
    except TimeoutError:
        raise psycopg.errors.ConnectionTimeout(f"no server responded within {seconds:g} s") from None
    made.deadline = end
    return made

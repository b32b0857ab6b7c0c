"""The pool of the asyncio side: connections to one database, lent to one unit of work each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from contextlib import suppress

import psycopg
import sqlalchemy.exc
from sqlalchemy.ext.asyncio import create_async_engine

from mesh_storage.aio import greenlets
from mesh_storage.aio.bridge import BridgedDriver, in_background
from mesh_storage.errors import MeshStorageError
from mesh_storage.postgres import environment
from mesh_storage.postgres.connection import Characteristics, Connection
from mesh_storage.postgres.engine import connect_before, engine_arguments, limit_connecting
from mesh_storage.postgres.pool import check_open, exhausted, keep_for_parent, renew_after_fork, unreachable, wait_limit
from mesh_storage.postgres.server import Server
from mesh_storage.settings import Settings


class AsyncPool:
    """The connections of one storage, for all tasks of one event loop."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.in_use = 0
        """Connections that are lent at this moment."""
        self.closed = False
        self._timeout = settings.pool_timeout
        self._server = server
        self._engine = create_async_engine(**engine_arguments(server.connect))
        limit_connecting(self._engine.sync_engine)
        environment.keep_out(self._engine.sync_engine)
        self._idle: deque[BridgedDriver] = deque()
        self._free = asyncio.Semaphore(self.size)
        renew_after_fork(self)

    async def take(self, characteristics: Characteristics) -> tuple[Connection, BridgedDriver]:
        """Lend a connection, and the driver that is the bridge to it; `give_back` must follow.

        Raises:
            ClosedError: The pool was closed.
            UnavailableError: None is free in time, or the server cannot be reached.
            StorageTimeoutError: The caller's time is over.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        check_open(closed=self.closed)
        if self._free.locked():
            await self._wait(characteristics.timeout)
        else:
            await self._free.acquire()
        if self.closed:  # It was closed while we waited.
            self._free.release()
            check_open(closed=True)
        driver = self._idle_driver()
        # A task of its own, since a connection that is half made when it is cancelled would stay open.
        connecting = None if driver else asyncio.create_task(self._connect(deadline))
        try:
            if driver is None and connecting is not None:
                driver = await asyncio.shield(connecting)
            assert driver is not None, "it was idle, or was just made"
            mode = characteristics.mode(self._server.local_parameters)
            if driver.mode != mode:
                await greenlets.run(driver.switch, mode)
            connection = Connection(driver, characteristics, deadline, self._timeout)
        except BaseException:
            in_background(self._give_up(driver, connecting))
            raise
        self.in_use += 1
        return connection, driver

    async def give_back(self, connection: Connection, driver: BridgedDriver) -> None:
        """Take a connection back; what was not committed is rolled back, also when this task is cancelled meanwhile."""
        if connection.inherited:
            keep_for_parent((connection, driver))
        elif connection.settled() and not self.closed:
            connection.close()
            self._keep(connection, driver)
        else:
            await driver.finish(self._clean(connection, driver, driver.unfinished()))

    async def close(self) -> None:
        """Close the connections that are not lent; the others are closed when they come back."""
        self.closed = True
        # Who waits for a connection learns of it at once: this wakes one, and each wakes the next.
        self._free.release()
        await self._close_idle()

    def after_fork(self) -> None:
        """In a forked child, begin with no connections and leave the parent's alone."""
        keep_for_parent(self._idle)
        self._idle = deque()
        self._free = asyncio.Semaphore(self.size)
        self.in_use = 0
        if self._server.embedded is not None and not self.closed:
            self._server.embedded.after_fork()

    async def _wait(self, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(wait_limit(self._timeout, timeout)):
                await self._free.acquire()
        except TimeoutError:
            raise exhausted(self.size, self._timeout, timeout) from None

    async def _clean(
        self, connection: Connection, driver: BridgedDriver, unfinished: Collection[asyncio.Task[None]]
    ) -> None:
        try:
            if unfinished:  # A savepoint or rollback whose task was cancelled a second time.
                await asyncio.wait(unfinished)
            await greenlets.run(connection.close)
            if self.closed or not connection.reusable():
                await greenlets.run(driver.discard)
            if connection.prepared_in_vain:
                await self._close_idle()
        finally:
            self._keep(connection, driver)

    def _keep(self, connection: Connection, driver: BridgedDriver) -> None:
        if connection.reusable():
            self._idle.append(driver)
        self.in_use -= 1
        self._free.release()

    async def _close_idle(self) -> None:
        while self._idle:
            driver = self._idle.pop()
            await greenlets.run(driver.discard)

    def _idle_driver(self) -> BridgedDriver | None:
        """Take the idle connection that was used last, if there is one that still works."""
        while self._idle:
            driver = self._idle.pop()
            if driver.liveness.usable():
                return driver
            in_background(greenlets.run(driver.discard))
        return None

    async def _connect(self, deadline: float | None) -> BridgedDriver:
        try:
            with connect_before(deadline):
                return BridgedDriver(await self._engine.connect())
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            refused, cause = unreachable(error, deadline)
        raise refused from cause

    async def _give_up(self, driver: BridgedDriver | None, connecting: asyncio.Task[BridgedDriver] | None) -> None:
        """Let go of a connection that nobody waits for any more; only then may another be made."""
        try:
            if driver is None and connecting is not None:
                with suppress(MeshStorageError):
                    driver = await connecting
            if driver is not None:
                await greenlets.run(driver.discard)
        finally:
            self._free.release()

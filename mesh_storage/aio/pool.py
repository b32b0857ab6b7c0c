"""The pool of the asyncio side: connections to one database, lent to one unit of work each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

import psycopg
import sqlalchemy.exc
from sqlalchemy.ext.asyncio import create_async_engine

from mesh_storage.aio.bridge import BridgedDriver
from mesh_storage.connection import Characteristics, Connection
from mesh_storage.engine import connect_before, engine_arguments, limit_connecting
from mesh_storage.errors import ClosedError
from mesh_storage.pool import exhausted, unreachable, wait_limit
from mesh_storage.server import Server
from mesh_storage.settings import Settings


class AsyncPool:
    """The connections of one storage, for all tasks of one event loop."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.in_use = 0
        """Connections that are lent at this moment."""
        self.closed = False
        self._timeout = settings.pool_timeout
        self._engine = create_async_engine(**engine_arguments(server.connect))
        limit_connecting(self._engine.sync_engine)
        self._idle: deque[BridgedDriver] = deque()
        self._free = asyncio.Semaphore(self.size)

    async def take(self, characteristics: Characteristics) -> tuple[Connection, BridgedDriver]:
        """Lend a connection, and the driver that is the bridge to it; `give_back` must follow.

        Raises:
            ClosedError: The pool was closed.
            UnavailableError: None is free in time, or the server cannot be reached.
            StorageTimeoutError: The caller's time is over.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        if self.closed:
            raise ClosedError("this storage is closed; open another one")
        await self._wait(characteristics.timeout)
        driver = None
        try:
            driver = await self._driver(deadline)
            if driver.mode != characteristics.mode:
                await driver.call(driver.switch, characteristics.mode)
        except BaseException:
            if driver is not None:
                await finish(driver.call(driver.discard))
            self._free.release()
            raise
        self.in_use += 1
        return Connection(driver, characteristics, deadline), driver

    async def give_back(self, connection: Connection, driver: BridgedDriver) -> None:
        """Take a connection back; what was not committed is rolled back, also when this task is cancelled meanwhile."""
        if connection.settled() and not self.closed:
            connection.close()
            self._keep(connection, driver)
        else:
            await finish(self._clean(connection, driver))

    async def close(self) -> None:
        """Close the connections that are not lent; the others are closed when they come back."""
        self.closed = True
        while self._idle:
            driver = self._idle.pop()
            await driver.call(driver.discard)

    async def _wait(self, timeout: float | None) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        try:
            async with asyncio.timeout(wait_limit(self._timeout, timeout)):
                await self._free.acquire()
        except TimeoutError:
            raise exhausted(self.size, self._timeout, timeout) from None

    async def _clean(self, connection: Connection, driver: BridgedDriver) -> None:
        try:
            await driver.call(connection.close)
            if self.closed or not connection.reusable():
                await driver.call(driver.discard)
        finally:
            self._keep(connection, driver)

    def _keep(self, connection: Connection, driver: BridgedDriver) -> None:
        if connection.reusable():
            self._idle.append(driver)
        self.in_use -= 1
        self._free.release()

    async def _driver(self, deadline: float | None) -> BridgedDriver:
        """Take the idle connection that was used last, or make one."""
        while self._idle:
            driver = self._idle.pop()
            if driver.liveness.usable():
                return driver
            await driver.call(driver.discard)
        try:
            with connect_before(deadline):
                return BridgedDriver(await self._engine.connect())
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            refused, cause = unreachable(error, deadline)
        raise refused from cause


_finishing: set[asyncio.Task[None]] = set()


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to its end what must not be left half done, also when this task is cancelled meanwhile."""
    task = asyncio.create_task(work)
    _finishing.add(task)
    task.add_done_callback(_finishing.discard)
    await asyncio.shield(task)

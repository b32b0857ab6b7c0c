"""The pool of the asyncio side: connections to one database, lent to one unit of work each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from mesh_storage.aio.bridge import Bridge, executor
from mesh_storage.connection import Characteristics, Connection
from mesh_storage.engine import connect_before, engine_arguments, watch_connections
from mesh_storage.errors import ClosedError, StorageTimeoutError, translate
from mesh_storage.pool import exhausted
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
        self._engine = create_async_engine(**engine_arguments(settings, server.connect))
        watch_connections(self._engine.sync_engine)
        self._reading_engine = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._free = asyncio.Semaphore(self.size)

    @asynccontextmanager
    async def connection(self, characteristics: Characteristics) -> AsyncGenerator[tuple[Connection, Bridge]]:
        """Lend a connection for a block, and the bridge to it.

        Raises:
            ClosedError: The pool was closed.
            UnavailableError: None is free in time, or the server cannot be reached.
            StorageTimeoutError: The caller's time is over.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        await self._wait_for_one(characteristics.timeout)
        try:
            raw = await self._connect(characteristics, deadline)
        except BaseException:
            self._free.release()
            raise
        self.in_use += 1
        bridge = Bridge(raw)
        connection: Connection | None = None
        try:
            connection = await bridge.call(_lend, raw, characteristics, deadline)
            yield connection, bridge
        finally:
            await finish(self._take_back(raw, connection))

    async def close(self) -> None:
        """Close the connections that are not lent; the others are closed when they come back."""
        self.closed = True
        await self._engine.dispose()

    async def _wait_for_one(self, timeout: float | None) -> None:
        if self.closed:
            raise ClosedError("this storage is closed; open another one")
        wait = self._timeout if timeout is None else min(self._timeout, timeout)
        try:
            async with asyncio.timeout(wait):
                await self._free.acquire()
        except TimeoutError:
            raise exhausted(self.size, self._timeout, timeout) from None

    async def _connect(self, characteristics: Characteristics, deadline: float | None) -> AsyncConnection:
        engine = self._reading_engine if characteristics.autocommit else self._engine
        try:
            with connect_before(deadline):
                return await engine.connect()
        except Exception as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise StorageTimeoutError("the time was over before the server answered") from error
            raise translate(error) from error

    async def _take_back(self, raw: AsyncConnection, connection: Connection | None) -> None:
        try:
            if connection is None:
                await raw.close()
            else:
                await Bridge(raw).call(connection.close, discard=self.closed)
        finally:
            self.in_use -= 1
            self._free.release()


def _lend(raw: AsyncConnection, characteristics: Characteristics, deadline: float | None) -> Connection:
    sync = raw.sync_connection
    assert sync is not None, "the connection was just made"
    return Connection(characteristics.apply(sync), characteristics, deadline=deadline, executor=executor(sync))


_finishing: set[asyncio.Task[None]] = set()


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to its end what must not be left half done, also when this task is cancelled meanwhile."""
    task = asyncio.create_task(work)
    _finishing.add(task)
    task.add_done_callback(_finishing.discard)
    await asyncio.shield(task)

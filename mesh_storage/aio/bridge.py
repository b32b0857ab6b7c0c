"""How sync code runs over an asyncio connection: by greenlets, as in SQLAlchemy, entered once a call.

The repositories and the connection of a unit of work stay sync. Where they would wait for the database, the bridge lets
the event loop go on; that place is the driver, and SQLAlchemy's own statements for sessions and savepoints.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar

import psycopg
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.util import await_

from mesh_storage.aio import greenlets
from mesh_storage.postgres import jsonb, timestamps
from mesh_storage.postgres.alarm import Alarm
from mesh_storage.postgres.driver import GRACE_S, Liveness, Mode, Parameters, Row, shut_down

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

_ROWS_AT_ONCE = 1000
"""How many are copied before the event loop may go on to other tasks."""


class BridgedDriver:
    """The driver over psycopg's asyncio connection; its methods are called on the sync side of the bridge."""

    def __init__(self, connection: AsyncConnection) -> None:
        assert connection.sync_connection is not None, "the connection was just made"
        self.sqlalchemy = connection.sync_connection
        self.mode = Mode()
        self._owner = connection  # which would close the connection when it is no longer referred to
        adapted: Any = self.sqlalchemy.connection.dbapi_connection
        self._connection: psycopg.AsyncConnection[Row] = adapted.driver_connection
        timestamps.register(self._connection)
        self._cursor: psycopg.AsyncCursor[Row] = self._connection.cursor(binary=True)
        jsonb.register(self._cursor)
        self.liveness = Liveness(self.sqlalchemy)
        self._unfinished: set[asyncio.Task[None]] = set()

    async def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run to its end what must not be left half done, also when this task is cancelled meanwhile."""
        task = in_background(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        await asyncio.shield(task)

    def unfinished(self) -> frozenset[asyncio.Task[None]]:
        """Return what goes on although nobody waits for it."""
        return frozenset(self._unfinished)

    def status(self) -> int:
        """Ask for the state of the transaction."""
        # As it comes: the constructor of the enumeration costs as much as the question.
        status: int = self._connection.pgconn.transaction_status
        return status

    def execute(self, sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        """Execute a statement."""
        return await_(self._run(sql, parameters))

    def copy(self, sql: bytes, rows: Iterable[Row], /) -> None:
        """Execute a COPY."""
        await_(self._copy(sql, rows))

    def begin(self, sql: bytes, /) -> None:
        """Execute several statements: not by our cursor, whose binary results PostgreSQL has for single ones only."""
        await_(self._begin(sql))

    def commit(self) -> None:
        """Commit."""
        await_(self._connection.commit())

    def rollback(self) -> None:
        """Roll back."""
        await_(self._connection.rollback())

    def switch(self, mode: Mode) -> None:
        """Change the mode."""
        await_(self._switch(mode))

    def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it, in a thread of its own."""
        return await_(asyncio.to_thread(function, *args, **kwargs))

    def at(self, moment: float, action: Callable[[], None]) -> Alarm:
        """Do something at a moment, in the event loop."""
        return asyncio.get_running_loop().call_later(max(0.0, moment - time.monotonic()), action)

    def cancel(self) -> None:
        """Ask the server to cancel, without waiting for its answer."""
        in_background(self._connection.cancel_safe(timeout=GRACE_S))

    def fileno(self) -> int:
        """Return the file descriptor of the socket."""
        return self._connection.fileno()

    def cut(self) -> None:
        """End the connection, but let its transaction be rolled back as if it were there."""
        if not self.sqlalchemy.closed:
            self.sqlalchemy.invalidate()

    def discard(self) -> None:
        """End the connection."""
        if not self.sqlalchemy.closed:
            self.cut()
            self.sqlalchemy.close()

    async def _begin(self, sql: bytes) -> None:
        async def beginning() -> None:
            await self._connection.execute(sql)

        try:
            await asyncio.shield(in_background(beginning()))
        except asyncio.CancelledError:
            # A pooler cancels nothing for who still waits for a session, and psycopg would wait for it to do so.
            shut_down(self.fileno())
            raise

    async def _run(self, sql: bytes, parameters: Parameters | None) -> tuple[list[Row], int]:
        cursor = self._cursor
        await cursor.execute(sql, parameters)
        if cursor.rownumber is None:
            return [], cursor.rowcount
        try:
            return await cursor.fetchall(), cursor.rowcount
        except psycopg.DataError:
            return timestamps.read_again(cursor), cursor.rowcount

    async def _copy(self, sql: bytes, rows: Iterable[Row]) -> None:
        async with self._cursor.copy(sql) as copy:
            try:
                for number, row in enumerate(rows):
                    await copy.write_row(row)
                    if number % _ROWS_AT_ONCE == 0:
                        await asyncio.sleep(0)  # To write a row is not to wait, so the other tasks would.
            except asyncio.CancelledError:  # To end the COPY is to wait for a server that may wait for others.
                with suppress(psycopg.Error):  # It may be closed already.
                    try:
                        await self._connection.cancel_safe(timeout=GRACE_S)
                    finally:
                        shut_down(self.fileno())
                raise

    async def _switch(self, mode: Mode) -> None:
        await self._connection.set_autocommit(mode.autocommit)
        await self._connection.set_isolation_level(mode.level)
        await self._connection.set_read_only(mode.read_only)
        self.mode = mode


class AsyncRepository(Generic[R]):
    """The asyncio twin of a repository."""

    def __init__(self, repository: R) -> None:
        self._repository = repository

    async def _stream(self, generator: Generator[T], batch_size: int) -> AsyncGenerator[T]:
        """Yield what a sync generator gives, crossing once for each batch of its own."""
        while True:
            batch = await greenlets.run(_take, generator, batch_size)
            for item in batch:
                yield item
            if len(batch) < batch_size:
                return


_background: set[asyncio.Task[None]] = set()


def in_background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run to its end what nobody may have the time to wait for."""
    task = asyncio.create_task(work)
    _background.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[None]) -> None:
    _background.discard(task)
    if not task.cancelled():
        task.exception()  # Whoever waited has it; when nobody did, a rollback failed, and the connection is given up.


def _take(generator: Generator[T], size: int) -> list[T]:
    return list(islice(generator, size))

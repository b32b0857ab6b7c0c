"""A psycopg connection: statements, transaction and session state.

The cursor, and the SQLAlchemy connection around it, are created once and reused by many units of work: checking a
connection out of SQLAlchemy's pool and creating its result objects takes twice the CPU of a read and half as much again
for a write (docs/performance.md). SQLAlchemy's own execution could replace this if it offered prepared statements
without a result object per call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import cast

import psycopg
from psycopg import capabilities
from psycopg.errors import Diagnostic
from psycopg.pq import TransactionStatus
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh_storage.aio.postgres.concurrency import sync_connection
from mesh_storage.aio.postgres.timed import AsyncTimedConnection
from mesh_storage.postgres import jsonb, timestamps
from mesh_storage.postgres.characteristics import Mode
from mesh_storage.postgres.deadline import SessionLimits
from mesh_storage.postgres.events import Events
from mesh_storage.postgres.floors import Floors, Removed
from mesh_storage.postgres.liveness import Liveness
from mesh_storage.postgres.statement import Parameters, Row
from mesh_storage.postgres.wal import Standing

_LIMITS = """
    SELECT extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) * 1000,
        extract(epoch FROM current_setting('transaction_timeout', true)::interval) * 1000
"""


# The steps of DISCARD ALL (PostgreSQL manual), except for the prepared statements, which psycopg manages.
_RESET = b"""
    CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_advisory_unlock_all();
    DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES
"""


class AsyncDriver:
    """A connection to the server, reused by one unit of work after another."""

    def __init__(self, sqlalchemy: AsyncConnection, connection: AsyncTimedConnection, events: Events) -> None:
        self.sqlalchemy = sqlalchemy
        self.connection = connection
        self.mode = Mode()
        """The current mode."""
        self.liveness = Liveness(connection)
        self.unreplicated = False
        """Whether the server warned that a commit did not wait for a synchronous standby."""
        self.floors = Floors()
        self.removed = Removed()
        self.standing: Standing | None = None
        """Where the server stood when it was asked last; only units of work that read from replicas ask."""
        self._events = events
        self._limits: SessionLimits | None = None
        timestamps.register(connection)
        self._pgconn = connection.pgconn
        self._cursor = connection.cursor(binary=True)
        jsonb.register(self._cursor)
        connection.add_notice_handler(self._notice)

    def status(self) -> int:
        """Return the `TransactionStatus`; UNKNOWN means that the connection is lost."""
        # The bare int: constructing the enum would double the cost of this call.
        status: int = self._pgconn.transaction_status
        return status

    async def execute(self, sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        """Execute a statement; return its rows, and the number of rows selected or affected."""
        cursor = self._cursor
        if self._events.listened:
            sql, parameters = self._events.before(cursor, sql, parameters)
            await cursor.execute(sql, parameters)
            self._events.after(cursor, sql, parameters)
        else:
            await cursor.execute(sql, parameters)
        # rownumber is set if there are rows; cursor.description would have to be built.
        if cursor.rownumber is None:
            return [], cursor.rowcount
        try:
            return await cursor.fetchall(), cursor.rowcount
        except psycopg.DataError:
            return timestamps.read_again(cursor), cursor.rowcount

    async def copy(self, sql: bytes, rows: Iterable[Row], /) -> None:
        """Execute a COPY FROM STDIN; rows are consumed while the server processes the previous ones."""
        async with self._cursor.copy(sql) as copy:
            try:
                for row in rows:
                    await copy.write_row(row)
            except Exception:
                raise
            except BaseException:  # ending the COPY would wait for the server
                await self.connection.hurry()
                raise

    async def stream(
        self, sql: bytes, parameters: Parameters | None, take: Callable[[list[Row]], None], size: int, /
    ) -> None:
        """Execute a query; its rows are taken in parts of a size while the server goes on with the next ones."""
        if self._events.listened:
            sql, parameters = self._events.before(self._cursor, sql, parameters)
        at_once = size if capabilities.has_stream_chunked() else 1  # before libpq 17
        stream = self._cursor.stream(sql, parameters, binary=True, size=at_once)
        async with aclosing(cast(AsyncGenerator[Row, None], stream)) as rows:
            try:
                part: list[Row] = []
                async for row in rows:
                    part.append(row)
                    if len(part) == size:
                        take(part)
                        part = []
            except BaseException:  # the rest of the rows would have to be received
                if self.status() == TransactionStatus.ACTIVE:
                    await self.connection.hurry()
                raise
        if part:
            take(part)
        if self._events.listened:
            self._events.after(self._cursor, sql, parameters)

    async def execute_script(self, sql: bytes, /) -> None:
        """Execute several statements without parameters or results, in one round trip."""
        # Not on our cursor: its binary results require the extended protocol, which takes single statements only.
        await self.connection.execute(sql, prepare=False)

    async def commit(self) -> None:
        """Commit the transaction."""
        await self.connection.commit()

    async def rollback(self) -> None:
        """Roll back the transaction."""
        await self.connection.rollback()

    async def switch(self, mode: Mode) -> None:
        """Change the mode, between transactions; takes no round trip."""
        if mode != self.mode:
            await self.connection.set_autocommit(mode.autocommit)
            await self.connection.set_isolation_level(mode.level)
            await self.connection.set_read_only(mode.read_only)
            self.mode = mode

    async def session_limits(self) -> SessionLimits:
        """Return the session's own limits on transactions; queried once per connection."""
        if self._limits is None:
            cursor = await self.connection.execute(_LIMITS)
            row = await cursor.fetchone()
            assert row is not None, "the statement always returns one row"
            self._limits = SessionLimits(int(row[0]), None if row[1] is None else int(row[1]))
        return self._limits

    async def reset(self) -> None:
        """Reset session-level state, or end the connection if execution options of SQLAlchemy were set on it."""
        connection = sync_connection(self.sqlalchemy)
        if connection.get_execution_options() != connection.engine.get_execution_options():
            await self.discard()
            return
        await self.switch(Mode(autocommit=True))
        await self.execute_script(_RESET)

    async def cut(self) -> None:
        """Close a lost connection, while its transaction can still be rolled back on this side."""
        if not self.sqlalchemy.closed:
            await self.sqlalchemy.invalidate()

    async def discard(self) -> None:
        """Close a connection that is lost, in an unknown state, or no longer needed."""
        if not self.sqlalchemy.closed:
            await self.cut()
            await self.sqlalchemy.close()

    def _notice(self, diagnostic: Diagnostic) -> None:
        # Recognized by the server function: its SQLSTATE is that of any warning (PostgreSQL's syncrep.c).
        self.unreplicated = self.unreplicated or diagnostic.source_function == "SyncRepWaitForLSN"

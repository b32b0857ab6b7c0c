"""One connection to the server as psycopg has it: statements, transaction and state.

The cursor, and the SQLAlchemy connection around it, are made once and serve many units of work: checking a connection
out of SQLAlchemy's pool and making its result objects costs twice the CPU of a read and half as much again for a write
(docs/performance.md). SQLAlchemy's own execution could replace this if it offered a prepared statement without a result
object for each call.
"""

from __future__ import annotations

from collections.abc import Iterable

import psycopg
from psycopg.errors import Diagnostic
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh_storage.aio.postgres.timed import AsyncTimedConnection
from mesh_storage.postgres import jsonb, timestamps
from mesh_storage.postgres.characteristics import Mode, SessionLimits
from mesh_storage.postgres.events import Events
from mesh_storage.postgres.liveness import Liveness
from mesh_storage.postgres.statement import Parameters, Row

_LIMITS = """
    SELECT extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) * 1000,
        extract(epoch FROM current_setting('transaction_timeout', true)::interval) * 1000
"""


# What DISCARD ALL does (PostgreSQL manual), but for the prepared statements, which are psycopg's.
_RESET = b"""
    CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_advisory_unlock_all();
    DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES
"""


class AsyncDriver:
    """A connection to the server that units of work use one after the other."""

    def __init__(self, sqlalchemy: AsyncConnection, connection: AsyncTimedConnection, events: Events) -> None:
        self.sqlalchemy = sqlalchemy
        self.connection = connection
        self.mode = Mode()
        """The mode that it is in."""
        self.liveness = Liveness(connection)
        self.unreplicated = False
        """Whether the server said of a commit that it did not wait for a synchronous standby."""
        self._events = events
        self._limits: SessionLimits | None = None
        timestamps.register(connection)
        self._pgconn = connection.pgconn
        self._cursor = connection.cursor(binary=True)
        jsonb.register(self._cursor)
        connection.add_notice_handler(self._notice)

    def status(self) -> int:
        """Return the state of the transaction, a `TransactionStatus`; UNKNOWN means that the connection is lost."""
        # As it comes: the constructor of the enumeration costs as much as the question.
        status: int = self._pgconn.transaction_status
        return status

    async def execute(self, sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        """Execute a statement; return its rows, and how many it found or changed."""
        cursor = self._cursor
        if self._events.listened:
            sql, parameters = self._events.before(cursor, sql, parameters)
            await cursor.execute(sql, parameters)
            self._events.after(cursor, sql, parameters)
        else:
            await cursor.execute(sql, parameters)
        # A row number is there when rows are; the description would have to be made.
        if cursor.rownumber is None:
            return [], cursor.rowcount
        try:
            return await cursor.fetchall(), cursor.rowcount
        except psycopg.DataError:
            return timestamps.read_again(cursor), cursor.rowcount

    async def copy(self, sql: bytes, rows: Iterable[Row], /) -> None:
        """Execute a COPY FROM STDIN; the rows are asked for while the server works on those before."""
        async with self._cursor.copy(sql) as copy:
            try:
                for row in rows:
                    await copy.write_row(row)
            except Exception:
                raise
            except BaseException:  # To end the COPY is to wait for a server that may wait for others.
                await self.connection.hurry()
                raise

    async def execute_script(self, sql: bytes, /) -> None:
        """Execute several statements without parameters or rows, in one round trip."""
        # Not by our cursor, whose binary results PostgreSQL has for single statements only.
        await self.connection.execute(sql, prepare=False)

    async def commit(self) -> None:
        """Commit the transaction."""
        self.unreplicated = False
        await self.connection.commit()

    async def rollback(self) -> None:
        """Roll the transaction back."""
        await self.connection.rollback()

    async def switch(self, mode: Mode) -> None:
        """Change the mode, between transactions; costs no round trip."""
        if mode != self.mode:
            await self.connection.set_autocommit(mode.autocommit)
            await self.connection.set_isolation_level(mode.level)
            await self.connection.set_read_only(mode.read_only)
            self.mode = mode

    async def session_limits(self) -> SessionLimits:
        """Return the server's limits for whole transactions that the session has; asked once a connection."""
        if self._limits is None:
            cursor = await self.connection.execute(_LIMITS)
            row = await cursor.fetchone()
            assert row is not None, "the statement has one row always"
            self._limits = SessionLimits(int(row[0]), None if row[1] is None else int(row[1]))
        return self._limits

    async def reset(self) -> None:
        """Bring the session back to where it began: what a caller has set, locked, listened to or kept aside goes."""
        await self.switch(Mode(autocommit=True))
        await self.execute_script(_RESET)

    async def cut(self) -> None:
        """End the connection, which is lost, but let its transaction be rolled back as if it were there."""
        if not self.sqlalchemy.closed:
            await self.sqlalchemy.invalidate()

    async def discard(self) -> None:
        """End the connection, which is lost, in doubt, or no longer needed."""
        if not self.sqlalchemy.closed:
            await self.cut()
            await self.sqlalchemy.close()

    def _notice(self, diagnostic: Diagnostic) -> None:
        # By the function of the server, since its SQLSTATE is that of any warning (syncrep.c).
        self.unreplicated = self.unreplicated or diagnostic.source_function == "SyncRepWaitForLSN"

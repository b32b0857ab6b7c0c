"""The transaction of one unit of work: how it begins, for repositories and for a session, and how it ends.

Usually psycopg begins it with the first statement, and its state is asked of psycopg, not kept a second time. An
explicit BEGIN takes its place where parameters must be set for each transaction: behind a pooler that leaves no session
to keep them, and where a timeout has to end the transaction of a caller who does not come back.
"""

from __future__ import annotations

import time

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

from mesh_storage.aio.postgres.driver import AsyncDriver
from mesh_storage.errors import StorageTimeoutError, UnavailableError
from mesh_storage.postgres.characteristics import Characteristics, Deadline, Mode
from mesh_storage.postgres.pooling import Pooling

_SHORTEST_WAIT_S = 2.0
"""For a session of a pooler; as libpq has it for connections, since a busy machine may be late with its answer."""


class AsyncUnitOfWorkTransaction:
    """Begins, commits and rolls back on one connection; the only one that knows how a pooler is dealt with."""

    def __init__(
        self, driver: AsyncDriver, characteristics: Characteristics, deadline: Deadline | None, pooling: Pooling | None
    ) -> None:
        self._driver = driver
        self._characteristics = characteristics
        self._deadline = deadline
        self._pooling = pooling
        self.begins_explicitly = pooling is not None or (deadline is not None and characteristics.needs_transaction)

    @property
    def open(self) -> bool:
        """Whether it has begun, on the server or for a session or savepoint."""
        return self._driver.status() != TransactionStatus.IDLE or self._driver.sqlalchemy.in_transaction()

    async def prepare(self) -> None:
        """Bring the connection into the mode of this transaction."""
        await self._driver.switch(self._characteristics.mode(explicit=self.begins_explicitly))

    async def begin(self) -> None:
        """Begin by an explicit BEGIN, unless psycopg does so or it has begun."""
        if self.begins_explicitly and self._driver.status() == TransactionStatus.IDLE:
            await self._begin(self._characteristics)

    async def begin_for_session(self) -> None:
        """Begin for SQLAlchemy; a transaction that is to be read-only is so on the server."""
        self.check_connected()
        connection = self._driver.sqlalchemy
        if connection.in_transaction():
            return
        if self.begins_explicitly:
            await self.begin()
        elif not self._characteristics.needs_transaction:
            if self._deadline is None:
                await self._driver.switch(Mode(read_only=True))
            else:
                await self._begin(self._characteristics)
        await connection.begin()

    async def begin_nested(self) -> AsyncTransaction:
        """Set a savepoint."""
        self.check_connected()
        await self.begin()
        return await self._driver.sqlalchemy.begin_nested()

    async def commit(self) -> None:
        """Commit it, if it has begun."""
        if self._driver.status() == TransactionStatus.IDLE:
            return
        if self._characteristics.durability == "relaxed":
            await self._driver.execute(b"SET LOCAL synchronous_commit = off")
        transaction = self._driver.sqlalchemy.get_transaction()
        if transaction is None:
            await self._driver.commit()
        else:
            self._driver.unreplicated = False
            await transaction.commit()

    async def rollback(self) -> None:
        """Roll it back, if it has begun; the connection may be lost."""
        transaction = self._driver.sqlalchemy.get_transaction()
        if transaction is not None:
            await transaction.rollback()
        elif self._driver.status() not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            await self._driver.rollback()

    def check_connected(self) -> None:
        """Refuse to let SQLAlchemy connect anew: the new connection would not be that of the driver."""
        if self._driver.sqlalchemy.invalidated:
            raise UnavailableError

    def connection(self) -> AsyncConnection:
        """Return SQLAlchemy's connection, on which a session works."""
        return self._driver.sqlalchemy

    async def _begin(self, characteristics: Characteristics) -> None:
        parameters = [] if self._pooling is None else [self._pooling.parameters]
        if self._deadline is not None:
            session = await self._driver.session_limits() if self._pooling is None else self._pooling.limits
            parameters += self._deadline.limits(session)
        sql = characteristics.begin(*parameters)
        if self._pooling is None:
            await self._driver.execute_script(sql)
        else:
            await self._await_session(sql, self._pooling)

    async def _await_session(self, sql: bytes, pooling: Pooling) -> None:
        """Begin behind a pooler, which lets us wait for a session of the server, where no limit is set yet."""
        limit = max(_SHORTEST_WAIT_S, pooling.timeout)
        connection = self._driver.connection
        before = connection.deadline, connection.response_timeout
        connection.response_timeout = limit
        begun = time.monotonic()
        try:
            await self._driver.execute_script(sql)
        except psycopg.OperationalError as error:
            if not connection.silent:
                raise
            if self._deadline is not None and time.monotonic() - begun < limit:
                raise StorageTimeoutError("the time was over before the pooler gave a session of the server") from error
            raise UnavailableError(
                f"the pooler gave no session of the server for {limit:g} s (pool_timeout); end units of work sooner, "
                "or let the pooler have more sessions"
            ) from error
        finally:
            connection.deadline, connection.response_timeout = before

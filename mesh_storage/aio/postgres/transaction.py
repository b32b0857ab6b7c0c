"""The transaction of a unit of work: how it begins, for repositories and for a session, and how it ends.

Usually psycopg begins it with the first statement, and psycopg's transaction status is the only record of its state. An
explicit BEGIN is used instead if each transaction must set its own parameters: with a pooler in transaction mode, and
to have the server end the transaction of an unresponsive caller.
"""

from __future__ import annotations

import time

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy.ext.asyncio import AsyncTransaction

from mesh_storage.aio.postgres.driver import AsyncDriver
from mesh_storage.errors import StorageTimeoutError, UnavailableError
from mesh_storage.postgres.characteristics import Characteristics, Mode
from mesh_storage.postgres.deadline import Deadline
from mesh_storage.postgres.transaction_pooling import Pooling

_SHORTEST_WAIT_S = 2.0
"""Minimum wait for a pooler's server connection, the same as libpq's for connections, since a busy machine may respond
late."""


class AsyncUnitOfWorkTransaction:
    """Begins, commits and rolls back transactions of one connection; the only class that handles poolers."""

    def __init__(
        self, driver: AsyncDriver, characteristics: Characteristics, deadline: Deadline, pooling: Pooling | None
    ) -> None:
        self._driver = driver
        self._characteristics = characteristics
        self._deadline = deadline
        self._pooling = pooling
        self.begins_explicitly = pooling is not None or (deadline.is_set and characteristics.needs_transaction)

    @property
    def open(self) -> bool:
        """Whether the transaction has begun, on the server or in a session or savepoint."""
        return self._driver.status() != TransactionStatus.IDLE or self._driver.sqlalchemy.in_transaction()

    async def prepare(self) -> None:
        """Switch the connection to the mode of this transaction."""
        await self._driver.switch(self._characteristics.mode(explicit=self.begins_explicitly))

    async def begin(self) -> None:
        """Begin by an explicit BEGIN if one is needed and the transaction has not begun."""
        if self.begins_explicitly and self._driver.status() == TransactionStatus.IDLE:
            await self._begin(self._characteristics)

    async def begin_for_session(self) -> None:
        """Begin for SQLAlchemy; a read-only transaction is declared READ ONLY on the server."""
        self.check_connected()
        connection = self._driver.sqlalchemy
        if connection.in_transaction():
            return
        if self.begins_explicitly:
            await self.begin()
        elif not self._characteristics.needs_transaction:
            if not self._deadline.is_set:
                await self._driver.switch(Mode(read_only=True))
            else:
                await self._begin(self._characteristics)
        await connection.begin()

    async def begin_nested(self) -> AsyncTransaction:
        """Create a savepoint."""
        self.check_connected()
        await self.begin()
        return await self._driver.sqlalchemy.begin_nested()

    async def relax(self) -> None:
        """Let the commit wait for neither disk nor standby, if there is something to commit."""
        if self._driver.status() != TransactionStatus.IDLE:
            await self._driver.execute(b"SET LOCAL synchronous_commit = off")

    async def commit(self) -> None:
        """Commit, if a transaction is open."""
        if self._driver.status() == TransactionStatus.IDLE:
            return
        transaction = self._driver.sqlalchemy.get_transaction()
        if transaction is None:
            await self._driver.commit()
        else:
            await transaction.commit()

    async def rollback(self) -> None:
        """Roll back the transaction, if it has begun; the connection may be lost."""
        transaction = self._driver.sqlalchemy.get_transaction()
        if transaction is not None:
            await transaction.rollback()
        elif self._driver.status() not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            await self._driver.rollback()

    def check_connected(self) -> None:
        """Raise if disconnected, since SQLAlchemy would reconnect without the driver."""
        if self._driver.sqlalchemy.invalidated:
            raise UnavailableError

    async def _begin(self, characteristics: Characteristics) -> None:
        parameters = [] if self._pooling is None else [self._pooling.parameters]
        if self._deadline.is_set:
            session = await self._driver.session_limits() if self._pooling is None else self._pooling.limits
            parameters += self._deadline.limits(session)
        sql = characteristics.begin(*parameters)
        if self._pooling is None:
            await self._driver.execute_script(sql)
        else:
            await self._await_session(sql, self._pooling)

    async def _await_session(self, sql: bytes, pooling: Pooling) -> None:
        """Begin through a pooler, which may make us wait for a server connection on which no limit is set yet."""
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
            if self._deadline.is_set and time.monotonic() - begun < limit:
                raise StorageTimeoutError(
                    "the deadline passed before the pooler assigned a server connection"
                ) from error
            raise UnavailableError(
                f"the pooler assigned no server connection within {limit:g} s (pool_timeout); end units of work "
                "sooner, or raise the pooler's pool size"
            ) from error
        finally:
            connection.deadline, connection.response_timeout = before

"""The connection of one unit of work: the only place where statements are executed and errors translated."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg.pq import TransactionStatus
from sqlalchemy.ext.asyncio import AsyncTransaction

from mesh_storage.aio.postgres.concurrency import in_greenlet, sync_connection
from mesh_storage.aio.postgres.driver import AsyncDriver
from mesh_storage.aio.postgres.transaction import AsyncUnitOfWorkTransaction
from mesh_storage.errors import InvalidInputError, MeshStorageError, UnavailableError
from mesh_storage.models.base import Writes
from mesh_storage.postgres.characteristics import Characteristics, Deadline
from mesh_storage.postgres.failure import committed_locally, failed_before, judge, not_committed
from mesh_storage.postgres.liveness import GRACE_S
from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.pooling import Pooling
from mesh_storage.postgres.session import UnitOfWorkSession
from mesh_storage.postgres.statement import Parameters, Row, Statement

logger = logging.getLogger("mesh_storage")

P = ParamSpec("P")
T = TypeVar("T")


class AsyncUnitOfWorkConnection:
    """Executes the statements of one unit of work, one at a time.

    After a statement failed, nothing but a rollback goes, as in PostgreSQL itself; a savepoint limits that to what came
    after it.
    """

    def __init__(
        self, driver: AsyncDriver, characteristics: Characteristics, deadline: Deadline | None, pooling: Pooling | None
    ) -> None:
        self.driver = driver
        self.characteristics = characteristics
        self.owner = Ownership()
        self.joined: UnitOfWorkSession | None = None
        """The ORM session, if there is one."""
        self.is_lost = False
        """Whether the connection turned out to be of no use; those that are as old may not be either."""
        self.exposed = False
        """Whether a caller has had the session in hand, and so may have changed what outlives the transaction."""
        self._deadline = deadline
        self._transaction = AsyncUnitOfWorkTransaction(driver, characteristics, deadline, pooling)
        self._failure: MeshStorageError | None = None
        self._savepoints: list[Writes] = []
        self._writes: Writes | None = None
        self._pooled = pooling is not None

    async def prepare(self) -> None:
        """Bring the connection into the state that the unit of work needs; costs no round trip."""
        self._limit_to(self._deadline)
        await self._transaction.prepare()

    @property
    def has_failed(self) -> bool:
        """Whether a call failed before, so that there is only a rollback."""
        return self._failure is not None or self.driver.status() == TransactionStatus.INERROR

    @property
    def writes(self) -> Writes:
        """Whether what was stored since the last commit, rollback or beginning of a savepoint stands."""
        if self._writes is None:
            self._writes = Writes()
        return self._writes

    @property
    def has_snapshot(self) -> bool:
        """Whether it sees the database as of its first statement, not as it is now."""
        return self.characteristics.has_snapshot

    async def fetch_all(self, statement: Statement, parameters: Parameters | None = None) -> list[Row]:
        """Execute a statement and return all its rows."""
        return (await self._run(statement, parameters))[0]

    async def fetch_one(self, statement: Statement, parameters: Parameters | None = None) -> Row | None:
        """Execute a statement of at most one row and return that row."""
        rows = (await self._run(statement, parameters))[0]
        return rows[0] if rows else None

    async def execute(self, statement: Statement, parameters: Parameters | None = None) -> int:
        """Execute a statement and return the number of rows it found or changed."""
        return (await self._run(statement, parameters))[1]

    async def copy(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Store rows by a COPY, each made while the server works on those before."""
        self.check_writable()
        await self.perform(self._copy, f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode(), rows)

    async def perform(self, action: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that goes to the database: one caller at a time, within the timeout.

        An error is translated, and remembered as what ended the transaction.
        """
        self.owner.acquire()
        try:
            self.owner.check()
            if self._failure is not None:
                raise failed_before(self._failure) from self._failure
            try:
                if self._deadline is not None:
                    self._deadline.check()
                return await action(*args, **kwargs)
            except BaseException as error:
                failure = await self.failed(error)
                if failure is error:
                    raise
                raise failure from error
        finally:
            self.owner.release()

    def fail(self, error: MeshStorageError) -> MeshStorageError:
        """Allow nothing but a rollback from now on, because a call left something half done; return the error."""
        self._failure = error
        return error

    async def failed(self, error: BaseException) -> BaseException:
        """Remember why the transaction ended; return the error to raise."""
        if not isinstance(error, Exception):  # An interrupt or a cancelled task: the statement may be half done.
            self._failure = UnavailableError("a statement was interrupted")
            return error
        failure = judge(
            error,
            read_only=self.characteristics.read_only,
            connected=self.driver.status() != TransactionStatus.UNKNOWN,
            silent=self.driver.connection.silent,
            timed_out=self._deadline is not None and self._deadline.remaining() <= 0,
        )
        self._failure = failure.error
        if failure.is_lost and not self.is_lost:  # An error of the session comes by more than once.
            logger.warning("connection lost", extra={"event": "connection_lost", "sqlstate": failure.error.sqlstate})
            self.is_lost = True
            await self.driver.cut()
        return failure.error

    def check_writable(self) -> None:
        """Refuse to write in a unit of work that is read-only.

        Raises:
            InvalidInputError: It is.
        """
        if self.characteristics.read_only:
            raise InvalidInputError("this unit of work is read-only", field="read_only")

    def check_sees_present(self) -> None:
        """Refuse what must see what is committed now, after others have been locked out.

        Raises:
            InvalidInputError: There is a snapshot already.
        """
        self.check_writable()
        if self.has_snapshot and self.driver.status() != TransactionStatus.IDLE:
            raise InvalidInputError(
                "in a 'repeatable read' or 'serializable' unit of work, this must be the first call", field="isolation"
            )

    def check_whole(self) -> None:
        """Refuse to end the whole transaction inside of a savepoint.

        Raises:
            MeshStorageError: There is one.
        """
        if self._savepoints:
            raise MeshStorageError(
                "a unit of work cannot be committed or rolled back inside of its savepoint(); leave that block first"
            )

    async def join(self) -> sqlalchemy.Connection:
        """Begin the transaction for an ORM session; return the connection that it works on."""
        await self.perform(self._transaction.begin_for_session)
        return sync_connection(self.driver.sqlalchemy)

    async def begin_nested(self) -> AsyncTransaction:
        """Set a savepoint, which `release` or `roll_back_to` must end."""
        self.check_writable()
        savepoint = await self.perform(self._transaction.begin_nested)
        self._savepoints.append(self.writes)
        self._writes = Writes(self.writes)
        return savepoint

    async def release(self, savepoint: AsyncTransaction) -> None:
        """Keep what was done since a savepoint."""
        self._writes = self._savepoints.pop()
        await self.perform(savepoint.commit)

    async def roll_back_to(self, savepoint: AsyncTransaction) -> None:
        """Undo what was done since a savepoint, so that the transaction can go on."""
        self._writes = self._savepoints.pop()
        if self.driver.status() != TransactionStatus.UNKNOWN and not self.owner.closed:
            self._failure = None
            deadline = self._deadline
            self._extend_for_undoing()
            try:
                if savepoint.is_active:
                    await self.perform(savepoint.rollback)
            finally:
                self._limit_to(deadline)

    async def commit(self) -> None:
        """Commit what was done since the last commit or rollback.

        Raises:
            MeshStorageError: A statement failed before, so there is only a rollback; the failure is its cause.
            StorageTimeoutError: It is committed on this server alone; see `.committed`.
        """
        if self.has_failed:
            failure = self._failure or MeshStorageError("a statement of the session failed")
            await self.rollback()
            raise not_committed(failure) from failure
        try:
            await self.perform(self._transaction.commit)
        except MeshStorageError as error:
            if self.driver.unreplicated:
                raise committed_locally(error) from error
            if self.driver.status() == TransactionStatus.UNKNOWN:
                error.committed = "unknown"
            raise
        self._writes = None
        if self.joined is not None:
            await in_greenlet(self.joined.settle)
        if self.driver.unreplicated:
            raise committed_locally(None)

    async def rollback(self) -> None:
        """Undo what was done since the last commit or rollback."""
        if self.owner.inherited or self.owner.closed:
            return
        self.owner.acquire()
        try:
            await self._rollback()
        finally:
            self.owner.release()

    async def close(self) -> None:
        """Roll back what was not committed; the connection is free for the next unit of work then, or discarded."""
        try:
            if not self.owner.closed and not self.owner.in_use and (self.joined is not None or not self.settled()):
                if self.joined is not None:
                    await in_greenlet(self.joined.leave)
                await self._rollback()
        finally:
            self.owner.closed = True
            self._limit_to(None)
            if self.joined is not None:
                await in_greenlet(self.joined.close)
        if self.exposed and not self._pooled and self.reusable():
            await self._reset()

    def settled(self) -> bool:
        """Whether there is nothing to roll back: no transaction is open, and no session or savepoint has one."""
        return self.reusable() and not self._transaction.open

    def reusable(self) -> bool:
        """Whether the connection can serve another unit of work: it is there, and nothing is under way on it."""
        return (
            self.driver.status() == TransactionStatus.IDLE
            and not self.driver.connection.cancelled
            and not self.owner.in_use  # by another thread or task, which must not
        )

    async def _run(self, statement: Statement, parameters: Parameters | None) -> tuple[list[Row], int]:
        if statement.writes:
            self.check_writable()
        if self._transaction.begins_explicitly:
            return await self.perform(self._execute_in_transaction, statement.sql, parameters)
        return await self.perform(self.driver.execute, statement.sql, parameters)

    async def _execute_in_transaction(self, sql: bytes, parameters: Parameters | None) -> tuple[list[Row], int]:
        await self._transaction.begin()
        return await self.driver.execute(sql, parameters)

    async def _copy(self, sql: bytes, rows: Iterable[Row]) -> None:
        await self._transaction.begin()
        await self.driver.copy(sql, rows)

    def _limit_to(self, deadline: Deadline | None) -> None:
        self._deadline = deadline
        self.driver.connection.deadline = None if deadline is None else deadline.moment

    def _extend_for_undoing(self) -> None:
        """Allow a moment more: the time may be over, but undoing is always allowed."""
        if self._deadline is not None:
            self._limit_to(Deadline(max(self._deadline.moment, time.monotonic()) + GRACE_S))

    async def _rollback(self) -> None:
        self._failure = None
        if self._writes is not None:
            self._writes.undo()
            self._writes = None
        deadline = self._deadline
        self._extend_for_undoing()
        try:
            if self.joined is not None:
                await in_greenlet(self.joined.undo)
            await self._transaction.rollback()
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            # The server undoes the work of a connection that it lost; what is left is to drop our end of it.
            logger.debug("rollback failed", exc_info=error)
            await self.driver.cut()
        finally:
            self._limit_to(deadline)

    async def _reset(self) -> None:
        """Bring the session back to where it began, after a caller had it in hand."""
        try:
            await self.driver.reset()
        except psycopg.Error as error:
            logger.debug("reset failed", exc_info=error)
            await self.driver.cut()

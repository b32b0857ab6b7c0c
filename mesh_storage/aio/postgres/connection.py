"""The connection of a unit of work: the only place where statements are executed and errors translated."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg.pq import TransactionStatus
from sqlalchemy.ext.asyncio import AsyncTransaction

from mesh_storage.aio.postgres.concurrency import sync_connection
from mesh_storage.aio.postgres.driver import AsyncDriver
from mesh_storage.aio.postgres.joined import AsyncJoinedSession
from mesh_storage.aio.postgres.transaction import AsyncUnitOfWorkTransaction
from mesh_storage.errors import InvalidInputError, MeshStorageError, UnavailableError
from mesh_storage.models.base import Writes
from mesh_storage.postgres.characteristics import AUTOCOMMIT, Characteristics
from mesh_storage.postgres.commits import Commits
from mesh_storage.postgres.deadline import Deadline
from mesh_storage.postgres.failure import committed_locally, failed_before, judge, not_committed
from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.savepoints import Savepoints
from mesh_storage.postgres.statement import Parameters, Row, Statement
from mesh_storage.postgres.tenure import now
from mesh_storage.postgres.transaction_pooling import Pooling
from mesh_storage.postgres.wal import STANDING, standing

logger = logging.getLogger("mesh_storage")

P = ParamSpec("P")
T = TypeVar("T")


class AsyncUnitOfWorkConnection:
    """Executes the statements of one unit of work, one at a time.

    After a failed statement, only a rollback is possible, as in PostgreSQL itself, either of the transaction or to a
    savepoint.
    """

    position: str | None = None
    """Where the last commit is in the write-ahead log, if that was asked for."""

    def __init__(
        self,
        driver: AsyncDriver,
        characteristics: Characteristics,
        deadline: float | None,
        pooling: Pooling | None,
        commits: Commits,
    ) -> None:
        self.driver = driver
        self.characteristics = characteristics
        self.owner = Ownership()
        self.joined = AsyncJoinedSession()
        self.savepoints = Savepoints()
        self.is_lost = False
        """Whether the connection is lost; connections of the same age or older may be lost too."""
        self._deadline = Deadline(driver.connection, deadline)
        self._transaction = AsyncUnitOfWorkTransaction(driver, characteristics, self._deadline, pooling)
        self._failure: MeshStorageError | None = None
        self._pooled = pooling is not None
        self._commits = commits
        self._changes_versions = False
        """Whether rows that have a version may have been written since the last commit."""

    async def prepare(self) -> None:
        """Set up the connection for the unit of work, without a round trip."""
        await self._transaction.prepare()

    async def ask(self, sql: bytes, until: float | None = None) -> Row:
        """Execute a statement that returns one row, between transactions, until a moment by `time.monotonic()`.

        It has a snapshot of its own, which is older than that of every later statement.
        """
        timed = self.driver.connection
        deadline = timed.deadline
        await self.driver.switch(AUTOCOMMIT)
        if until is not None:
            timed.deadline = until if deadline is None else min(until, deadline)
        try:
            rows, _ = await self.perform(self.driver.execute, sql)
        finally:
            timed.deadline = deadline
        await self._transaction.prepare()
        return rows[0]

    @property
    def has_failed(self) -> bool:
        """Whether a statement failed, so that only a rollback is possible."""
        return self._failure is not None or self.driver.status() == TransactionStatus.INERROR

    @property
    def writes(self) -> Writes:
        """The writes since the last commit, rollback or savepoint."""
        return self.savepoints.writes

    @property
    def has_snapshot(self) -> bool:
        """Whether all statements see the snapshot taken by the first one."""
        return self.characteristics.has_snapshot

    async def fetch_all(self, statement: Statement, parameters: Parameters | None = None) -> list[Row]:
        """Execute a statement and return all its rows."""
        return (await self._run(statement, parameters))[0]

    async def fetch_one(self, statement: Statement, parameters: Parameters | None = None) -> Row | None:
        """Execute a statement that returns at most one row, and return that row."""
        rows = (await self._run(statement, parameters))[0]
        return rows[0] if rows else None

    async def execute(self, statement: Statement, parameters: Parameters | None = None) -> int:
        """Execute a statement and return the number of rows selected or affected."""
        return (await self._run(statement, parameters))[1]

    async def stream(
        self, statement: Statement, parameters: Parameters, take: Callable[[list[Row]], None], size: int
    ) -> None:
        """Execute a query and hand its rows over in parts of a size, without ever having all of them in memory.

        Their times must be within the range of Python's datetime.
        """
        await self.perform(self._stream, statement.sql, parameters, take, size)

    async def copy(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Insert rows by COPY, encoding each while the server processes the previous ones."""
        self.characteristics.check_writable()
        self._changes_versions = True
        await self.perform(self._copy, f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode(), rows)

    async def perform(self, action: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run an action on the database, one at a time and within the timeout.

        An error is translated, and recorded as the failure of the transaction.
        """
        self.owner.acquire()
        try:
            self.owner.check()
            if self._failure is not None:
                raise failed_before(self._failure) from self._failure
            try:
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
        """Mark the transaction as failed, because a call was only partly carried out, and return the error to raise."""
        self._failure = error
        return error

    async def failed(self, error: BaseException) -> BaseException:
        """Record why the transaction failed, and return the error to raise."""
        if not isinstance(error, Exception):  # KeyboardInterrupt or a cancelled task
            self._failure = UnavailableError("a statement was interrupted")
            return error
        failure = judge(
            error,
            read_only=self.characteristics.read_only,
            connected=self.driver.status() != TransactionStatus.UNKNOWN,
            silent=self.driver.connection.silent,
            timed_out=self._deadline.has_passed,
        )
        self._failure = failure.error
        if failure.is_lost and not self.is_lost:  # a session's error is seen more than once
            logger.warning("connection lost", extra={"event": "connection_lost", "sqlstate": failure.error.sqlstate})
            self.is_lost = True
            await self.driver.cut()
        return failure.error

    def check_sees_present(self) -> None:
        """Raise if the next statement would use a snapshot taken before concurrent transactions were locked out.

        Raises:
            InvalidInputError: A snapshot was already taken.
        """
        self.characteristics.check_writable()
        if self.has_snapshot and self.driver.status() != TransactionStatus.IDLE:
            raise InvalidInputError(
                "in a 'repeatable read' or 'serializable' unit of work, this must be the first call", field="isolation"
            )

    async def join(self) -> sqlalchemy.Connection:
        """Begin the transaction for an ORM session, and return its connection."""
        self._changes_versions = True
        await self.perform(self._transaction.begin_for_session)
        return sync_connection(self.driver.sqlalchemy)

    async def begin_nested(self) -> AsyncTransaction:
        """Create a savepoint, to be ended by `release` or `roll_back_to`."""
        self.characteristics.check_writable()
        savepoint = await self.perform(self._transaction.begin_nested)
        self.savepoints.push()
        return savepoint

    async def release(self, savepoint: AsyncTransaction) -> None:
        """Release a savepoint."""
        self.savepoints.pop()
        await self.perform(savepoint.commit)

    async def roll_back_to(self, savepoint: AsyncTransaction) -> None:
        """Roll back to a savepoint, after which the transaction can continue."""
        self.savepoints.pop()
        self.driver.removed.forget()
        if self.driver.status() != TransactionStatus.UNKNOWN and not self.owner.closed:
            self._failure = None
            with self._deadline.extended():
                if savepoint.is_active:
                    await self.perform(savepoint.rollback)

    async def commit(self) -> None:
        """Commit everything since the last commit or rollback.

        Raises:
            MeshStorageError: A statement failed, so the transaction was rolled back; the failure is the cause.
            StorageTimeoutError: It was committed on this server only; see `.committed`.
        """
        if self.has_failed:
            failure = self._failure or MeshStorageError("a statement of the session failed")
            await self.rollback()
            if failure.committed != "no":  # an earlier COMMIT failed, and its error was caught
                raise failure
            raise not_committed(failure) from failure
        if self.characteristics.durability == "relaxed":
            await self.perform(self._transaction.relax)
        self.driver.unreplicated = False
        try:
            await self.perform(self._transaction.commit)
        except BaseException as error:
            if self._failure is None:  # COMMIT was not sent
                raise
            self._failure = self._outcome(error)
            self.driver.removed.forget()
            if self._failure is error or not isinstance(error, MeshStorageError):
                raise
            raise self._failure from error
        finally:
            if self._changes_versions:
                self._commits.note()  # also if it failed, since its outcome may be unknown
        self._changes_versions = self.joined.is_used
        self.savepoints.committed()
        await self.joined.settle()
        if self.characteristics.position:
            await self._note_position()
        if self.driver.unreplicated:
            raise committed_locally(None)

    async def _note_position(self) -> None:
        self.position = None
        asked = now()
        try:
            found = standing(await self.ask(STANDING), asked)
        except MeshStorageError as error:  # it is committed all the same
            logger.debug("no position", exc_info=error)
        else:
            waited = (
                self.characteristics.durability == "strict" and not self.joined.is_used
            )  # it may have said SET LOCAL
            self.position = str(found.committed if waited else found.position)

    async def rollback(self) -> None:
        """Roll back everything since the last commit or rollback."""
        if self.owner.inherited or self.owner.closed:
            return
        self.owner.acquire()
        try:
            await self._rollback()
        finally:
            self.owner.release()

    async def close(self) -> None:
        """Roll back uncommitted changes; afterwards the connection is reusable, or discarded."""
        with self._deadline.extended():
            try:
                if not self.owner.closed and not self.owner.in_use and (self.joined.is_used or not self.settled()):
                    await self.joined.leave()
                    await self._rollback()
            finally:
                self.owner.closed = True
                await self.joined.close()
            if self.joined.exposed and not self._pooled and self.reusable():
                await self._reset()
        self._deadline.lift()

    async def hurry(self) -> None:
        """Limit what is left to do to the grace period, since the caller has been interrupted.

        If a statement was interrupted, the connection is not used again, so the server may as well roll back by itself.
        """
        self._deadline.hurry()
        if self.driver.connection.cancelled and not self.owner.in_use:
            await self.driver.cut()

    def settled(self) -> bool:
        """Whether there is nothing to roll back: no transaction is open, nor is a session or savepoint."""
        return self.reusable() and not self._transaction.open

    def reusable(self) -> bool:
        """Whether the connection can serve another unit of work: it is open and idle."""
        return (
            self.driver.status() == TransactionStatus.IDLE
            and not self.driver.connection.cancelled
            and not self.owner.in_use  # by another thread or task, incorrectly
        )

    def _outcome(self, error: BaseException) -> MeshStorageError:
        """Return the failure of a COMMIT, which tells whether the transaction was committed all the same."""
        if isinstance(error, MeshStorageError) and self.driver.unreplicated:
            return committed_locally(error)
        failure = error if isinstance(error, MeshStorageError) else UnavailableError("the commit was interrupted")
        if self.driver.status() == TransactionStatus.UNKNOWN or failure is not error:
            failure.committed = "unknown"
        return failure

    async def _run(self, statement: Statement, parameters: Parameters | None) -> tuple[list[Row], int]:
        if statement.writes:
            self.characteristics.check_writable()
            self._changes_versions |= statement.changes_versions
        if self._transaction.begins_explicitly:
            return await self.perform(self._execute_in_transaction, statement.sql, parameters)
        return await self.perform(self.driver.execute, statement.sql, parameters)

    async def _execute_in_transaction(self, sql: bytes, parameters: Parameters | None) -> tuple[list[Row], int]:
        await self._transaction.begin()
        return await self.driver.execute(sql, parameters)

    async def _stream(self, sql: bytes, parameters: Parameters, take: Callable[[list[Row]], None], size: int) -> None:
        await self._transaction.begin()
        await self.driver.stream(sql, parameters, take, size)

    async def _copy(self, sql: bytes, rows: Iterable[Row]) -> None:
        await self._transaction.begin()
        await self.driver.copy(sql, rows)

    async def _rollback(self) -> None:
        self._failure = None
        self.savepoints.rolled_back()
        self.driver.removed.forget()
        with self._deadline.extended():
            try:
                await self.joined.undo()
                await self._transaction.rollback()
            except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
                # The server rolls back the transaction of a lost connection; only our end is left to close.
                logger.debug("rollback failed", exc_info=error)
                await self.driver.cut()

    async def _reset(self) -> None:
        """Reset the session, after a caller had access to it."""
        try:
            await self.driver.reset()
        except psycopg.Error as error:
            logger.debug("reset failed", exc_info=error)
            await self.driver.cut()

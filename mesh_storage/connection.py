"""The connection of one unit of work: the only place where statements are executed and errors translated.

It is a SQLAlchemy connection from the pool whose psycopg cursor runs SQL that was compiled once. Building and
compiling a statement, or making a result object for it, would cost more than the statement itself.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg.pq import TransactionStatus
from sqlalchemy.engine import make_url
from sqlalchemy.sql import Executable
from sqlalchemy.sql.elements import CompilerElement

from mesh_storage.errors import (
    ClosedError,
    InvalidInputError,
    MeshStorageError,
    StorageTimeoutError,
    UnavailableError,
    translate,
)

logger = logging.getLogger("mesh_storage")

Isolation = Literal["read committed", "repeatable read", "serializable"]
Durability = Literal["strict", "relaxed"]
Row = tuple[Any, ...]
Parameters = Mapping[str, Any]


class Executor(Protocol):
    """What sends one statement over the driver's connection."""

    def __call__(self, sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        """Give the statement's rows, and how many it found or changed."""
        ...


_READ_ONLY_SQL_TRANSACTION = "25006"
# Closing a connection of the parent process from a child would end it for both, so they are kept for ever.
_inherited_by_fork: list[object] = []


class Characteristics(NamedTuple):
    """What kind of transaction a unit of work runs in (PostgreSQL manual, SET TRANSACTION)."""

    read_only: bool = False
    isolation: Isolation | None = None
    durability: Durability = "strict"
    timeout: float | None = None
    """Seconds for the whole of it."""

    def check(self) -> None:
        """Refuse what PostgreSQL does not have.

        Raises:
            InvalidInputError: Names the parameter.
        """
        if self.isolation not in (None, "read committed", "repeatable read", "serializable"):
            raise InvalidInputError("isolation must be 'repeatable read' or 'serializable'", field="isolation")
        if self.durability not in ("strict", "relaxed"):
            raise InvalidInputError("durability must be 'strict' or 'relaxed'", field="durability")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise InvalidInputError("timeout must be a positive number of seconds", field="timeout")

    def deadline(self) -> float | None:
        """Give the moment of `time.monotonic()` at which the time will be over, when it begins now."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    @property
    def autocommit(self) -> bool:
        """Whether each statement may run alone: at READ COMMITTED each has its own snapshot anyway."""
        return self.read_only and self.isolation in (None, "read committed") and self.timeout is None

    def apply(self, connection: sqlalchemy.Connection) -> sqlalchemy.Connection:
        """Set a connection up for a transaction of this kind; the pool sets it back. Costs no round trip."""
        if self.autocommit or (self.isolation is None and not self.read_only):
            return connection
        level: Any = (self.isolation or "read committed").upper()
        return connection.execution_options(isolation_level=level, postgresql_readonly=self.read_only)


class Statement:
    """A SQL statement made of SQLAlchemy's Core elements, compiled at its first use."""

    def __init__(self, element: Executable, *, writes: bool | None = None) -> None:
        """Take the elements; whether they write is seen from their kind, but for a select with a writing CTE."""
        self._element = element
        self.writes = not isinstance(element, sqlalchemy.SelectBase) if writes is None else writes

    @cached_property
    def sql(self) -> bytes:
        """The SQL in psycopg's form, its parameters by name."""
        assert isinstance(self._element, CompilerElement)
        compiled = self._element.compile(dialect=make_url("postgresql+psycopg://").get_dialect()())
        fixed = [name for name, value in (compiled.params or {}).items() if value is not None]
        assert not fixed, f"make {fixed} a named parameter or a literal of the statement"
        return str(compiled).encode()


class Connection:
    """The database connection of one unit of work; its transaction begins with the first statement.

    Used by one thread or task at a time. After a statement failed, nothing but a rollback goes, as in PostgreSQL
    itself; a savepoint limits that to what came after it.
    """

    def __init__(
        self,
        connection: sqlalchemy.Connection,
        characteristics: Characteristics,
        *,
        deadline: float | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.characteristics = characteristics
        self.sqlalchemy = connection
        self._execute = executor or _blocking_executor(connection)
        self._autocommit = characteristics.autocommit
        self._deadline = deadline
        self._transaction: sqlalchemy.RootTransaction | None = None
        self._failure: MeshStorageError | None = None
        self._in_use = threading.Lock()
        self._process = os.getpid()
        self._closed = False

    def fetch_all(self, statement: Statement, parameters: Parameters | None = None) -> list[Row]:
        """Execute a statement and give all its rows."""
        return self._run(statement, parameters)[0]

    def fetch_one(self, statement: Statement, parameters: Parameters | None = None) -> Row | None:
        """Execute a statement of at most one row and give that row."""
        rows = self._run(statement, parameters)[0]
        return rows[0] if rows else None

    def execute(self, statement: Statement, parameters: Parameters | None = None) -> int:
        """Execute a statement and give the number of rows it found or changed."""
        return self._run(statement, parameters)[1]

    def fail(self, error: MeshStorageError) -> MeshStorageError:
        """Let nothing but a rollback follow, because a call left something half done; give the error back."""
        self._failure = error
        return error

    def begin(self) -> None:
        """Begin the transaction if it has not begun; it does so by itself before the first statement."""
        if self._transaction is None and not self._autocommit:
            self._transaction = self.sqlalchemy.begin()

    def for_session(self) -> sqlalchemy.Connection:
        """Give the connection to an ORM session, in a transaction; one that is to be read-only is so on the server."""
        if self._autocommit:
            self._autocommit = False
            self.sqlalchemy.execution_options(isolation_level="READ COMMITTED", postgresql_readonly=True)
        with self.guarded():
            return self.sqlalchemy

    @contextmanager
    def guarded(self, *, writes: bool = False) -> Generator[None]:
        """Run what goes to the database: one caller at a time, in an open transaction, within the time limit.

        An error is translated, and remembered as what ended the transaction.
        """
        with self._alone():
            self._check_open(writes=writes)
            with self.translated():
                self.begin()
                self._limit_time()
                yield

    @contextmanager
    def translated(self) -> Generator[None]:
        """Translate an error of the block, and remember it as what ended the transaction."""
        try:
            yield
        except Exception as error:
            self._failure = self._meaning(error)
            if self._failure is error:
                raise
            raise self._failure from error
        except BaseException:  # An interrupt or a cancelled task: the statement may be half done.
            self._failure = UnavailableError("a statement was interrupted")
            raise

    @contextmanager
    def savepoint(self) -> Generator[None]:
        """Roll back to here when the block raises, so that the transaction can go on."""
        with self.guarded(writes=True):
            savepoint = self.sqlalchemy.begin_nested()
        try:
            yield
        except BaseException:
            if not self.sqlalchemy.invalidated and not self._closed:
                with self._alone(), self.translated():
                    savepoint.rollback()
                self._failure = None
            raise
        with self.guarded():
            savepoint.commit()

    def commit(self) -> None:
        """Commit what was done since the last commit or rollback.

        Raises:
            MeshStorageError: A statement failed before, so there is only a rollback; the failure is its cause.
        """
        if self._failure is not None:
            failure = self._failure
            self.rollback()
            raise MeshStorageError(
                "rolled back, not committed: a call in this unit of work failed before; let its error leave the unit "
                "of work, or catch it outside of a savepoint()",
                sqlstate=failure.sqlstate,
                constraint=failure.constraint,
                retryable=failure.retryable,
            ) from failure
        self._check_open(writes=False)
        if self._transaction is not None:
            with self.guarded():
                if self._driver_status() == TransactionStatus.INERROR:
                    raise MeshStorageError("a statement of the session failed before, so there is only a rollback")
                if self.characteristics.durability == "relaxed":
                    self._execute(b"SET LOCAL synchronous_commit = off")
                self._transaction.commit()
            self._transaction = None

    def rollback(self) -> None:
        """Undo what was done since the last commit or rollback."""
        transaction, self._transaction, self._failure = self._transaction, None, None
        if transaction is not None and self._process == os.getpid():
            try:
                transaction.rollback()
            except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
                # The server undoes the work of a connection that it lost; what is left is to drop our end of it.
                self.sqlalchemy.invalidate(error)

    def close(self, *, discard: bool = False) -> None:
        """Roll back what was not committed and give the connection back to the pool, or end it."""
        if self._closed:
            return
        self._closed = True
        if self._process != os.getpid():
            _inherited_by_fork.append(self.sqlalchemy)
            return
        self.rollback()
        if discard and not self.sqlalchemy.invalidated:
            self.sqlalchemy.invalidate()
        self.sqlalchemy.close()

    @contextmanager
    def _alone(self) -> Generator[None]:
        if not self._in_use.acquire(blocking=False):
            raise MeshStorageError("two threads or tasks use one unit of work at once; give each its own")
        try:
            yield
        finally:
            self._in_use.release()

    def _run(self, statement: Statement, parameters: Parameters | None) -> tuple[list[Row], int]:
        sql = statement.sql
        with self.guarded(writes=statement.writes):
            return self._execute(sql, parameters)

    def _check_open(self, *, writes: bool) -> None:
        if self._closed:
            raise ClosedError("this unit of work has ended; open another one")
        if self._process != os.getpid():
            raise ClosedError("this unit of work belongs to the parent process; open another one")
        if self._failure is not None:
            raise MeshStorageError(
                "a call in this unit of work failed before, so PostgreSQL takes no more statements; roll back, or use "
                "a savepoint() around what may fail",
                retryable=self._failure.retryable,
            ) from self._failure
        if writes and self.characteristics.read_only:
            raise InvalidInputError("this unit of work is read-only", field="read_only")

    def _limit_time(self) -> None:
        if self._deadline is None:
            return
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise StorageTimeoutError("the unit of work took longer than its timeout")
        milliseconds = str(math.ceil(remaining * 1000))
        self._execute(_LIMIT_TIME, {"statement": milliseconds, "idle": milliseconds})

    def _meaning(self, error: Exception) -> MeshStorageError:
        translated = translate(error)
        if translated.sqlstate == _READ_ONLY_SQL_TRANSACTION and not self.characteristics.read_only:
            translated = UnavailableError(
                "the server is read-only: a standby, or a primary that was demoted", sqlstate=translated.sqlstate
            )
            self._drop(translated)
        elif self._lost():
            self._drop(translated)
            if not isinstance(translated, (UnavailableError, StorageTimeoutError)):
                translated = UnavailableError(sqlstate=translated.sqlstate)
        return translated

    def _lost(self) -> bool:
        if self.sqlalchemy.invalidated or self.sqlalchemy.closed:
            return True
        return self._driver_status() == TransactionStatus.UNKNOWN

    def _driver_status(self) -> TransactionStatus:
        driver: psycopg.Connection[Row] | Any = self.sqlalchemy.connection.driver_connection
        return TransactionStatus(driver.pgconn.transaction_status)

    def _drop(self, error: MeshStorageError) -> None:
        logger.warning("connection lost", extra={"event": "connection_lost", "sqlstate": error.sqlstate})
        if not self.sqlalchemy.invalidated:
            self.sqlalchemy.invalidate()


# set_config() is SET LOCAL with parameters. A transaction that waits for its caller is ended as well, so that it
# holds no lock for longer.
_LIMIT_TIME = (
    b"SELECT set_config('statement_timeout', %(statement)s, true),"
    b" set_config('idle_in_transaction_session_timeout', %(idle)s, true)"
)


def _blocking_executor(connection: sqlalchemy.Connection) -> Executor:
    """Make the executor of psycopg's blocking connection, with one cursor for all statements."""
    driver: psycopg.Connection[Row] | Any = connection.connection.driver_connection
    cursor: psycopg.Cursor[Row] = driver.cursor(binary=True)

    def execute(sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        cursor.execute(sql, parameters)
        return (cursor.fetchall() if cursor.description else []), cursor.rowcount

    return execute

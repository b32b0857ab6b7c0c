"""The connection of one unit of work: the only place where statements are executed and errors translated.

It is a SQLAlchemy connection from the pool whose psycopg cursor runs SQL that was compiled once, since SQLAlchemy's own
result objects would cost more than the statement. The transaction is the driver's: it begins with the first statement,
and its state is asked of the driver, not kept a second time.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, ParamSpec, Protocol, TypeVar

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg.pq import TransactionStatus

from mesh_storage.errors import (
    ClosedError,
    InvalidInputError,
    MeshStorageError,
    StorageTimeoutError,
    UnavailableError,
    prepared_in_vain,
    translate,
)
from mesh_storage.models.base import Writes
from mesh_storage.postgres.driver import GRACE_S, Driver, Isolation, Mode, Parameters, Row, TimeLimit
from mesh_storage.postgres.statement import Statement

logger = logging.getLogger("mesh_storage")

P = ParamSpec("P")
T = TypeVar("T")
Durability = Literal["strict", "relaxed"]

DRIVER_ERRORS = (sqlalchemy.exc.DBAPIError, psycopg.Error)

_READ_ONLY_SQL_TRANSACTION = "25006"
_LONGEST_TIMEOUT_S = 365 * 86_400
_LONGEST_LIMIT_MS = 2**31 - 1
"""About 24 days: PostgreSQL has its timeouts in 32 bits of milliseconds."""
_SHORTEST_WAIT_S = 2.0
"""For a session of a pooler; as libpq has it for connections, since a busy machine may be late with its answer."""


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
        if self.timeout is not None:
            if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool):
                raise InvalidInputError(
                    f"timeout must be a number of seconds, not {type(self.timeout).__name__}", field="timeout"
                )
            if not 0 < self.timeout <= _LONGEST_TIMEOUT_S:  # NaN is not either.
                raise InvalidInputError(
                    f"timeout must be more than 0 and at most {_LONGEST_TIMEOUT_S} seconds (a year)", field="timeout"
                )

    def deadline(self) -> float | None:
        """Return the moment of `time.monotonic()` at which the time will be over, when it begins now."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    def mode(self, local_parameters: str | None) -> Mode:
        """Say how its transaction begins; reading at READ COMMITTED needs none, as each statement has its own snapshot.

        Where there are `local_parameters`, every statement needs a transaction that sets them. SET takes no snapshot,
        so what must be first in a transaction with one still is.
        """
        if local_parameters is not None:
            level = f" ISOLATION LEVEL {self.isolation}" if self.isolation else ""
            access = " READ ONLY" if self.read_only else ""
            return Mode(autocommit=True, begin=f"BEGIN{level}{access}; {local_parameters}".encode())
        if not self.read_only:
            return _WRITING if self.isolation is None else Mode(isolation=self.isolation)
        if self.isolation in (None, "read committed") and self.timeout is None:
            return _READING
        return Mode(isolation=self.isolation, read_only=True)


_WRITING = Mode()
_READING = Mode(autocommit=True)


class Joined(Protocol):
    """What keeps a picture of the rows it wrote, which must become that of the database when the transaction ends."""

    def undo(self) -> None:
        """Follow a rollback, which it makes where it is in the transaction."""
        ...

    def settle(self) -> None:
        """Follow a commit."""
        ...

    def leave(self) -> None:
        """Let go of what a rollback would not change, because this was the last transaction."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class Connection:
    """The database connection of one unit of work.

    Used by one thread or task at a time. After a statement failed, nothing but a rollback goes, as in PostgreSQL
    itself; a savepoint limits that to what came after it.
    """

    def __init__(
        self, driver: Driver, characteristics: Characteristics, deadline: float | None, pool_timeout: float
    ) -> None:
        self.driver = driver
        self.characteristics = characteristics
        self._pool_timeout = pool_timeout
        self._execute = driver.execute if driver.mode.begin is None else self._execute_in_transaction
        self._deadline = deadline
        self._failure: MeshStorageError | None = None
        self._in_use = threading.Lock()
        self._process = os.getpid()
        self._closed = False
        self._doubtful = False
        self._lost = False
        self._savepoints = 0
        self._writes: Writes | None = None
        self.joined: Joined | None = None
        """The ORM session, if there is one."""
        self._limit = None if deadline is None else TimeLimit(driver, deadline + GRACE_S)
        self.prepared_in_vain = False
        """Whether its prepared statements were of no use any more; those of older connections are not either."""

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child, and the connection belongs to its parent."""
        return self._process != os.getpid()  # Asked each time: not every fork runs the hooks of Python.

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

    def copy(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Store rows by a COPY, each made while the server works on those before."""
        self._check_writable()
        self.perform(self._copy, f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode(), rows)

    def perform(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that goes to the database: one caller at a time, within the time limit.

        An error is translated, and remembered as what ended the transaction.
        """
        self._use()
        try:
            self._check_open()
            try:
                if self._deadline is not None:
                    self._limit_time(self._deadline)
                return action(*args, **kwargs)
            except BaseException as error:
                failure = self.failed(error)
                if failure is error:
                    raise
                raise failure from error
        finally:
            self._in_use.release()

    def fail(self, error: MeshStorageError) -> MeshStorageError:
        """Let nothing but a rollback follow, because a call left something half done; give the error back."""
        self._failure = error
        return error

    @property
    def has_snapshot(self) -> bool:
        """Whether it sees the database as it was when its transaction began (manual, 13.2.2), not as it is now."""
        return self.characteristics.isolation in ("repeatable read", "serializable")

    def check_sees_present(self) -> None:
        """Refuse what must see what is committed now, after others have been locked out.

        Raises:
            InvalidInputError: There is a snapshot already.
        """
        self._check_writable()
        if self.has_snapshot and (self.driver.status() != TransactionStatus.IDLE or self._deadline is not None):
            raise InvalidInputError(
                "in a 'repeatable read' or 'serializable' unit of work without a timeout, this must be the first call",
                field="isolation",
            )

    def for_session(self) -> sqlalchemy.Connection:
        """Return the connection for an ORM session, in a transaction that is read-only on the server if it is to be."""
        return self.perform(self._begin_for_session)

    @contextmanager
    def savepoint(self) -> Generator[None]:
        """Roll back to here when the block raises, so that the transaction can go on."""
        self._check_writable()
        savepoint = self.perform(self._begin_nested)
        self._savepoints += 1
        outer = self.writes
        self._writes = Writes(outer)
        try:
            yield
        except BaseException:
            if self.driver.status() != TransactionStatus.UNKNOWN and not self._closed:
                self._failure = None
                # The time may be over, but to undo is always allowed.
                deadline, self._deadline = self._deadline, None
                try:
                    if savepoint.is_active:
                        self.perform(savepoint.rollback)
                finally:
                    self._deadline = deadline
            raise
        finally:
            self._savepoints -= 1
            self._writes = outer
        self.perform(savepoint.commit)

    def check_whole(self) -> None:
        """Refuse to end the whole transaction inside of a savepoint.

        Raises:
            MeshStorageError: There is one.
        """
        if self._savepoints:
            raise MeshStorageError(
                "a unit of work cannot be committed or rolled back inside of its savepoint(); leave that block first"
            )

    def commit(self) -> None:
        """Commit what was done since the last commit or rollback.

        Raises:
            MeshStorageError: A statement failed before, so there is only a rollback; the failure is its cause.
        """
        if not self.has_failed:
            self.perform(self._commit)
            self._writes = None
            if self.joined is not None:
                self.joined.settle()
            return
        failure = self._failure or MeshStorageError("a statement of the session failed")
        self.rollback()
        raise MeshStorageError(
            "rolled back, not committed: a call in this unit of work failed before; let its error leave the unit of "
            "work, or catch it outside of a savepoint()",
            sqlstate=failure.sqlstate,
            constraint=failure.constraint,
            retryable=failure.retryable,
        ) from failure

    def rollback(self) -> None:
        """Undo what was done since the last commit or rollback."""
        if self.inherited or self._closed:
            return
        self._use()
        try:
            self._rollback()
        finally:
            self._in_use.release()

    def _rollback(self) -> None:
        self._failure = None
        if self._writes is not None:
            self._writes.undo()
            self._writes = None
        try:
            if self.joined is not None:
                self.joined.undo()
            transaction = self.driver.sqlalchemy.get_transaction()
            if transaction is not None:
                transaction.rollback()
            elif self.driver.status() not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
                self.driver.rollback()
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            # The server undoes the work of a connection that it lost; what is left is to drop our end of it.
            logger.debug("rollback failed", exc_info=error)
            self._discard()

    def close(self) -> None:
        """Roll back what was not committed; the driver is free for the next unit of work then."""
        try:
            if self._in_use.locked():
                self._doubtful = True  # Another thread or task still uses it, which it must not.
            elif self.joined is not None or not self.settled():
                self._leave()
        finally:
            self._lift_limit()
            self._closed = True
            if self.joined is not None:
                self.joined.close()

    def _leave(self) -> None:
        if self.inherited or self._closed:
            return
        if self.joined is not None:
            self.joined.leave()
        self._rollback()

    def settled(self) -> bool:
        """Whether there is nothing to roll back: no transaction is open, and no session or savepoint has one."""
        return self.reusable() and not self.driver.sqlalchemy.in_transaction()

    def reusable(self) -> bool:
        """Whether the driver can serve another unit of work: it is connected, and no transaction is open."""
        return self.driver.status() == TransactionStatus.IDLE and not self._doubtful

    def _run(self, statement: Statement, parameters: Parameters | None) -> tuple[list[Row], int]:
        if statement.writes:
            self._check_writable()
        return self.perform(self._execute, statement.sql, parameters)

    def _check_writable(self) -> None:
        if self.characteristics.read_only:
            raise InvalidInputError("this unit of work is read-only", field="read_only")

    def _begin(self) -> None:
        """Begin the transaction if psycopg does not: a pooler lets it wait for a session, where no limit is set yet."""
        begin = self.driver.mode.begin
        if begin is None or self.driver.status() != TransactionStatus.IDLE:
            return
        limit = max(_SHORTEST_WAIT_S, self._pool_timeout)
        remaining = limit if self._deadline is None else self._deadline - time.monotonic()
        waiting = TimeLimit(self.driver, time.monotonic() + min(limit, remaining))
        try:
            self.driver.begin(begin)
        except psycopg.OperationalError as error:
            if not waiting.reached:
                raise
            if remaining < limit:
                raise StorageTimeoutError("the time was over before the pooler gave a session of the server") from error
            raise UnavailableError(
                f"the pooler gave no session of the server for {limit:g} s (pool_timeout); end units of work sooner, "
                "or let the pooler have more sessions"
            ) from error
        finally:
            waiting.lift()

    def _execute_in_transaction(self, sql: bytes, parameters: Parameters | None = None) -> tuple[list[Row], int]:
        self._begin()
        return self.driver.execute(sql, parameters)

    def _copy(self, sql: bytes, rows: Iterable[Row]) -> None:
        self._begin()
        self.driver.copy(sql, rows)

    def _begin_nested(self) -> sqlalchemy.NestedTransaction:
        self._check_connected()
        self._begin()
        return self.driver.sqlalchemy.begin_nested()

    def _check_connected(self) -> None:
        """Refuse to let SQLAlchemy connect anew: the new connection would not be that of the driver."""
        if self.driver.sqlalchemy.invalidated:
            raise UnavailableError

    def _begin_for_session(self) -> sqlalchemy.Connection:
        self._check_connected()
        self._begin()
        connection = self.driver.sqlalchemy
        if not connection.in_transaction():
            if self.driver.mode == _READING:
                self.driver.switch(Mode(read_only=True))
            connection.begin()
        return connection

    def _commit(self) -> None:
        if self.driver.status() == TransactionStatus.IDLE:
            return
        if self.characteristics.durability == "relaxed":
            self._execute(b"SET LOCAL synchronous_commit = off")
        transaction = self.driver.sqlalchemy.get_transaction()
        with self._cancelled_in_time():
            if transaction is None:
                self.driver.commit()
            else:
                transaction.commit()

    @contextmanager
    def _cancelled_in_time(self) -> Generator[None]:
        """Cancel what the server does when the time is over: a commit is not under its statement_timeout."""
        if self._deadline is None:
            yield
            return

        def cancel() -> None:
            self._doubtful = True  # The request may arrive late and hit what comes next on this connection.
            self.driver.cancel()

        alarm = self.driver.at(self._deadline, cancel)
        try:
            yield
        finally:
            alarm.cancel()

    def _use(self) -> None:
        if not self._in_use.acquire(blocking=False):
            raise MeshStorageError("two threads or tasks use one unit of work at once; give each its own")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this unit of work has ended; open another one")
        if self.inherited:
            raise ClosedError("this unit of work belongs to the parent process; open another one")
        if self._failure is not None:
            raise MeshStorageError(
                "a call in this unit of work failed before, so PostgreSQL takes no more statements; roll back, or use "
                "a savepoint() around what may fail",
                retryable=self._failure.retryable,
            ) from self._failure

    def _limit_time(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise StorageTimeoutError("the unit of work took longer than its timeout")
        milliseconds = math.ceil(remaining * 1000)
        limits = {
            "statement": str(min(milliseconds, _LONGEST_LIMIT_MS)),
            "idle": str(min(milliseconds + _IDLE_GRACE_MS, _LONGEST_LIMIT_MS)),
        }
        self._execute(_LIMIT_TIME, limits)

    def failed(self, error: BaseException) -> BaseException:
        """Remember why the transaction ended; give the error to raise."""
        if not isinstance(error, Exception):  # An interrupt or a cancelled task: the statement may be half done.
            # psycopg asked to cancel it; a pooler answers that out of turn when it comes too late or too early.
            self._doubtful = self._doubtful or self.driver.mode.begin is not None
            self._failure = UnavailableError("a statement was interrupted")
            return error
        translated = translate(error)
        if translated.sqlstate == _READ_ONLY_SQL_TRANSACTION and not self.characteristics.read_only:
            translated = UnavailableError(
                "the server is read-only: a standby, or a primary that was demoted", sqlstate=translated.sqlstate
            )
            self._drop(translated)
        elif prepared_in_vain(translated):
            self.prepared_in_vain = True
            self._drop(translated)
        elif self.driver.status() == TransactionStatus.UNKNOWN:
            self._drop(translated)
            if self._limit is not None and self._limit.reached:
                translated = StorageTimeoutError("the server did not answer within the timeout of the unit of work")
            elif not isinstance(translated, (UnavailableError, StorageTimeoutError)):
                translated = UnavailableError(sqlstate=translated.sqlstate)
        self._failure = translated
        return translated

    def _drop(self, error: MeshStorageError) -> None:
        if self._lost:
            return  # An error of the session comes by more than once.
        logger.warning("connection lost", extra={"event": "connection_lost", "sqlstate": error.sqlstate})
        self._discard()

    def _discard(self) -> None:
        self._lost = True
        self._lift_limit()
        self.driver.cut()

    def _lift_limit(self) -> None:
        if self._limit is not None:
            self._limit.lift()


# set_config() is SET LOCAL with parameters. A transaction that waits for its caller is ended as well, so that it
# holds no lock for longer; but a little later, so that a caller who comes back learns that the time is over.
_IDLE_GRACE_MS = 1000
# What the operator limits stays limited. As the time that is left only falls, what an earlier call has set is no less
# than what this one asks for, unless the session's own limit was smaller; 0 is no limit.
_SMALLER = (
    "set_config('{name}', least(%({limit})s::int, "
    "nullif(extract(epoch FROM current_setting('{name}')::interval) * 1000, 0))::int::text, true)"
)
_LIMIT_TIME = (
    f"SELECT {_SMALLER.format(name='statement_timeout', limit='statement')}, "
    f"{_SMALLER.format(name='idle_in_transaction_session_timeout', limit='idle')}"
).encode()

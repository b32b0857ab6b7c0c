"""One connection to the server as psycopg has it: statements, transaction and state.

The cursor, and the SQLAlchemy connection around it, are made once and serve many units of work: to check a connection
out of SQLAlchemy's pool and to make its result objects costs more than most statements.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, ParamSpec, Protocol, TypeVar

import psycopg
import sqlalchemy
from psycopg import IsolationLevel

from mesh_storage.errors import UnavailableError
from mesh_storage.postgres import alarm, jsonb, timestamps
from mesh_storage.postgres.alarm import Alarm

P = ParamSpec("P")
T = TypeVar("T")

Row = tuple[Any, ...]
Parameters = Mapping[str, Any]
Isolation = Literal["read committed", "repeatable read", "serializable"]

_LEVELS: dict[Isolation | None, IsolationLevel | None] = {
    None: None,
    "read committed": IsolationLevel.READ_COMMITTED,
    "repeatable read": IsolationLevel.REPEATABLE_READ,
    "serializable": IsolationLevel.SERIALIZABLE,
}

GRACE_S = 0.5
"""Seconds that the server has, when a time is over, to say so itself or to answer a request to cancel."""


class Mode(NamedTuple):
    """How psycopg begins the next transaction, if it does."""

    autocommit: bool = False
    isolation: Isolation | None = None
    read_only: bool | None = None
    begin: bytes | None = None
    """What begins it in psycopg's place, in autocommit: a BEGIN and what belongs to each transaction."""

    @property
    def level(self) -> IsolationLevel | None:
        """The isolation level as psycopg has it."""
        return _LEVELS[self.isolation]


class Liveness:
    """Whether a connection may be used again after nobody used it for a while.

    Nothing is under way on such a connection, so a socket that is readable holds the server's last words or the end of
    the stream. An old one is replaced, so that a failover or a new address is found in the end.
    """

    _LONGEST_LIFE_S = 1800

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        driver: Any = connection.connection.driver_connection
        self._driver = driver
        self._born = time.monotonic()
        self._poll = select.poll()
        self._poll.register(driver.fileno(), select.POLLIN)

    def usable(self) -> bool:
        """Look at the socket, without a round trip."""
        return not (self._driver.closed or self._poll.poll(0) or time.monotonic() - self._born > self._LONGEST_LIFE_S)


def shut_down(fileno: int) -> None:
    """End the traffic of a socket that another thread may wait for, and which stays open for that."""
    with suppress(OSError), socket.socket(fileno=os.dup(fileno)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


class Driver(Protocol):
    """What a unit of work needs of a connection; the asyncio side has its own."""

    sqlalchemy: sqlalchemy.Connection
    """The SQLAlchemy connection over the same connection to the server."""
    mode: Mode
    """The mode that it is in."""
    liveness: Liveness

    def status(self) -> int:
        """Ask for the state of the transaction, a `TransactionStatus`; UNKNOWN means that the connection is lost."""
        ...

    def execute(self, sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        """Execute a statement; give its rows, and how many it found or changed."""
        ...

    def copy(self, sql: bytes, rows: Iterable[Row], /) -> None:
        """Execute a COPY FROM STDIN; the rows are asked for while the server works on those before."""
        ...

    def begin(self, sql: bytes, /) -> None:
        """Execute several statements without parameters or rows, in one round trip."""
        ...

    def commit(self) -> None:
        """Commit the transaction."""
        ...

    def rollback(self) -> None:
        """Roll the transaction back."""
        ...

    def switch(self, mode: Mode) -> None:
        """Change the mode, between transactions; costs no round trip."""
        ...

    def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what needs the processor for long, without keeping an event loop from its other tasks."""
        ...

    def at(self, moment: float, action: Callable[[], None]) -> Alarm:
        """Do something quick at a moment of `time.monotonic()`, also while the caller waits for the server."""
        ...

    def cancel(self) -> None:
        """Ask the server to cancel what it does, without waiting for its answer; may be called from another thread."""
        ...

    def fileno(self) -> int:
        """Return the file descriptor of the socket."""
        ...

    def cut(self) -> None:
        """End the connection, which is lost, but let its transaction be rolled back as if it were there."""
        ...

    def discard(self) -> None:
        """End the connection, which is lost or in doubt."""
        ...


class TimeLimit:
    """Cuts the line to the server at a moment: a server that stands still ends nothing itself, and answers nothing."""

    def __init__(self, driver: Driver, moment: float) -> None:
        self.reached = False
        try:
            # A descriptor of our own, since the number of the driver's may be another file's when the moment comes.
            self._line = socket.socket(fileno=os.dup(driver.fileno()))
        except OSError as error:
            raise UnavailableError(f"the time cannot be limited: {error.strerror}") from error
        self._alarm = driver.at(moment, self._cut)

    def _cut(self) -> None:
        self.reached = True
        with suppress(OSError):  # The server was faster.
            self._line.shutdown(socket.SHUT_RDWR)

    def lift(self) -> None:
        """Leave the line alone from now on."""
        self._alarm.cancel()
        self._line.close()


class BlockingDriver:
    """The driver over psycopg's blocking connection."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self.sqlalchemy = connection
        self.mode = Mode()
        driver: Any = connection.connection.driver_connection
        self._connection: psycopg.Connection[Row] = driver
        timestamps.register(self._connection)
        self._pgconn = self._connection.pgconn
        self._cursor: psycopg.Cursor[Row] = self._connection.cursor(binary=True)
        jsonb.register(self._cursor)
        self.liveness = Liveness(connection)
        self._cancelling: threading.Thread | None = None

    def status(self) -> int:
        """Ask for the state of the transaction."""
        # As it comes: the constructor of the enumeration costs as much as the question.
        status: int = self._pgconn.transaction_status
        return status

    def execute(self, sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        """Execute a statement."""
        cursor = self._cursor
        cursor.execute(sql, parameters)
        # A row number is there when rows are; the description would have to be made.
        if cursor.rownumber is None:
            return [], cursor.rowcount
        try:
            return cursor.fetchall(), cursor.rowcount
        except psycopg.DataError:
            return timestamps.read_again(cursor), cursor.rowcount

    def copy(self, sql: bytes, rows: Iterable[Row], /) -> None:
        """Execute a COPY."""
        with self._cursor.copy(sql) as copy:
            try:
                for row in rows:
                    copy.write_row(row)
            except Exception:
                raise
            except BaseException:  # An interrupt. To end the COPY is to wait for a server that may wait for others.
                self._cancel()
                with suppress(psycopg.Error):  # It may be closed already.
                    shut_down(self.fileno())
                raise

    def begin(self, sql: bytes, /) -> None:
        """Execute several statements: not by our cursor, whose binary results PostgreSQL has for single ones only."""
        self._connection.execute(sql)

    def commit(self) -> None:
        """Commit."""
        self._connection.commit()

    def rollback(self) -> None:
        """Roll back."""
        self._connection.rollback()

    def switch(self, mode: Mode) -> None:
        """Change the mode."""
        self._connection.autocommit = mode.autocommit
        self._connection.isolation_level = mode.level
        self._connection.read_only = mode.read_only
        self.mode = mode

    def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it, in this thread."""
        return function(*args, **kwargs)

    def at(self, moment: float, action: Callable[[], None]) -> Alarm:
        """Do something at a moment, in another thread."""
        return alarm.at(moment, action)

    def cancel(self) -> None:
        """Ask the server to cancel."""
        self._cancelling = threading.Thread(target=self._cancel, name="mesh_storage cancel", daemon=True)
        self._cancelling.start()

    def _cancel(self) -> None:
        with suppress(psycopg.Error):  # It does not answer: its line will be cut.
            self._connection.cancel_safe(timeout=GRACE_S)

    def fileno(self) -> int:
        """Return the file descriptor of the socket."""
        return self._connection.fileno()

    def cut(self) -> None:
        """End the connection, but let its transaction be rolled back as if it were there."""
        if self._cancelling is not None:
            self._cancelling.join(GRACE_S)  # It works on the connection.
        if not self.sqlalchemy.closed:
            self.sqlalchemy.invalidate()

    def discard(self) -> None:
        """End the connection."""
        if not self.sqlalchemy.closed:
            self.cut()
            self.sqlalchemy.close()

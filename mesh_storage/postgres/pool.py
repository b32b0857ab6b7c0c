"""The pool: connections to one database, lent to one unit of work each, within the limits of the settings.

The pool is ours because of what others lack: a limit of its own for each wait, an order among those who wait, an error
at once (not after the whole wait) when the server is down, and recovery at once when it is back. psycopg_pool costs
1.04 to 1.35 of its CPU a call, needs 4 to 9 s to recover, and loses a connection for good to a Ctrl-C; SQLAlchemy's
pools cost 1.46 to 1.63 (docs/performance.md). When psycopg_pool fails fast and takes a limit for each wait, it could
take this module's place. SQLAlchemy's engine makes the connections.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from typing import Any, Protocol

import psycopg
import sqlalchemy.exc

from mesh_storage.errors import ClosedError, MeshStorageError, StorageTimeoutError, UnavailableError, connection_refused
from mesh_storage.postgres.characteristics import Characteristics, Deadline
from mesh_storage.postgres.connection import UnitOfWorkConnection
from mesh_storage.postgres.driver import Driver
from mesh_storage.postgres.engine import connect_before, create_engine
from mesh_storage.postgres.events import Events
from mesh_storage.postgres.pooling import Pooling
from mesh_storage.postgres.server import Server
from mesh_storage.settings import Settings


class Slots:
    """The places for connections in use, given to threads in the order in which they came.

    A semaphore of the standard library gives a place to whoever asks next, which is the thread that just gave one back:
    with more threads than places, some would wait until they give up. It holds a lock as well, on which a signal
    handler or a finalizer would wait for the very thread that it interrupted; here every step is one of a deque's,
    which nothing interrupts.
    """

    def __init__(self, number: int) -> None:
        self._free = deque[None]([None] * number)
        self._waiting = deque[threading.Lock]()

    def acquire(self, timeout: float) -> bool:
        """Wait for a place; return whether there was one in time."""
        if not self._waiting:
            try:
                self._free.pop()
            except IndexError:
                pass
            else:
                return True
        turn = threading.Lock()
        turn.acquire()
        self._waiting.append(turn)
        self._hand_over()  # A place may have become free in between.
        try:
            if turn.acquire(timeout=timeout):
                return True
        except BaseException:  # An interrupt.
            if not self._withdraw(turn):
                self.release()
            raise
        return not self._withdraw(turn)

    def release(self) -> None:
        """Give a place back, to the thread that waits longest."""
        self._free.append(None)
        self._hand_over()

    def _hand_over(self) -> None:
        while self._free and self._waiting:
            try:
                self._free.pop()
            except IndexError:  # Another thread was faster.
                continue
            try:
                turn = self._waiting.popleft()
            except IndexError:  # Whoever waited has given up.
                self._free.append(None)
            else:
                turn.release()

    def _withdraw(self, turn: threading.Lock) -> bool:
        """Wait no longer, unless the place came in the last moment."""
        try:
            self._waiting.remove(turn)
        except ValueError:
            return False
        return True


class Pool:
    """The connections of one storage, for all its threads."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.closed = False
        self._timeout = settings.pool_timeout
        self._response_timeout = response_timeout(settings)
        self._pooling = Pooling.of(settings, server.local_parameters)
        self._server = server
        self._engine = create_engine(server.connect)
        self._idle: deque[Driver] = deque()
        self._lent: set[UnitOfWorkConnection] = set()
        self._free = Slots(self.size)
        self._condemned = 0.0
        renew_after_fork(self)

    @property
    def in_use(self) -> int:
        """The number of connections that are lent at this moment."""
        return len(self._lent)

    def acquire(self, characteristics: Characteristics, *, beside: bool = False) -> UnitOfWorkConnection:
        """Lend a connection; `release` must follow.

        With `beside` it waits for none: when all are in use, it makes one more, which `release` discards.

        Raises:
            ClosedError: The pool was closed.
            UnavailableError: None is free in time, or the server cannot be reached.
            StorageTimeoutError: The caller's time is over.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        check_open(closed=self.closed)
        wait = 0.0 if beside else wait_limit(self._timeout, characteristics.timeout)
        placed = self._free.acquire(timeout=wait)
        if not placed and not beside:
            raise exhausted(self.size, self._timeout, characteristics.timeout)
        driver = None
        try:
            check_open(closed=self.closed)  # It may have been closed while we waited.
            driver = (self._idle_driver() if placed else None) or self._connect(deadline)
            limit = None if deadline is None else Deadline(deadline)
            connection = UnitOfWorkConnection(driver, characteristics, limit, self._pooling)
            connection.prepare()
        except BaseException:
            if driver is not None:
                driver.discard()
            if placed:
                self._free.release()
            raise
        if placed:
            self._lent.add(connection)
        return connection

    def release(self, connection: UnitOfWorkConnection) -> None:
        """Take a connection back; what was not committed is rolled back."""
        if connection.owner.inherited:
            keep_for_parent(connection)
            return
        driver, placed = connection.driver, connection in self._lent
        try:
            connection.close()
            if connection.is_lost:
                self._condemned = time.monotonic()
            if placed and connection.reusable() and driver.liveness.born > self._condemned:
                self._idle.append(driver)
            else:
                driver.discard()
        except BaseException:
            driver.discard()
            raise
        finally:
            if placed:
                self._lent.discard(connection)
                self._free.release()
            if self.closed or connection.is_lost:
                self._close_idle()

    def close(self) -> None:
        """Close the connections that are not lent; the others are closed when they come back."""
        self.closed = True
        # Who waits for a connection learns of it at once: this wakes one, and each wakes the next.
        self._free.release()
        self._close_idle()

    def after_fork(self) -> None:
        """In a forked child, begin with no connections and leave the parent's alone."""
        keep_for_parent(self._idle)
        self._idle = deque()
        self._free = Slots(self.size)
        self._lent = set()
        if self._server.embedded is not None and not self.closed:
            self._server.embedded.after_fork()

    def _close_idle(self) -> None:
        while True:
            try:
                self._idle.pop().discard()
            except IndexError:  # Another thread may have taken the last one.
                return

    def _idle_driver(self) -> Driver | None:
        """Return the idle connection that was used last, if there is one that still works."""
        while self._idle:
            try:
                driver = self._idle.pop()
            except IndexError:  # Another thread was faster.
                break
            if driver.liveness.usable():
                return driver
            driver.discard()
        return None

    def _connect(self, deadline: float | None) -> Driver:
        try:
            with connect_before(deadline):
                made = self._engine.connect()
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            refused, cause = unreachable(error, deadline)
        else:
            connection: Any = made.connection.driver_connection
            connection.response_timeout = self._response_timeout
            return Driver(made, connection, Events(made))
        raise refused from cause


_RESPONSE_GRACE_S = 5.0


def response_timeout(settings: Settings) -> float | None:
    """Return the seconds after which a silent server is given up: more than it has to end a statement itself."""
    return settings.statement_timeout + _RESPONSE_GRACE_S if settings.statement_timeout else None


def check_open(*, closed: bool) -> None:
    """Refuse to work on what is closed.

    Raises:
        ClosedError: It is.
    """
    if closed:
        raise ClosedError("this storage is closed; open another one")


def wait_limit(pool_timeout: float, timeout: float | None) -> float:
    """Return the seconds to wait for a connection: the pool's limit or the caller's, whichever is shorter."""
    return pool_timeout if timeout is None else min(pool_timeout, timeout)


def exhausted(size: int, pool_timeout: float, timeout: float | None) -> UnavailableError | StorageTimeoutError:
    """Return the error for a wait that was in vain: the caller's own limit, or that of the pool."""
    if timeout is not None and timeout < pool_timeout:
        return StorageTimeoutError("timed out waiting for a pooled connection: the unit of work's own timeout is over")
    return UnavailableError(
        f"timed out waiting for a pooled connection: all {size} are in use for {pool_timeout:g} s (pool_timeout); "
        "end units of work sooner, or raise pool_size"
    )


def unreachable(error: Exception, deadline: float | None) -> tuple[MeshStorageError, Exception | None]:
    """Return the error for a connection that could not be made, and its cause."""
    refused, cause = connection_refused(error)
    if deadline is not None and time.monotonic() >= deadline:
        return StorageTimeoutError("the time was over before the server answered"), cause
    return refused, cause


class Forked(Protocol):
    """What a forked child must not go on with as it is."""

    def after_fork(self) -> None:
        """Begin anew, and leave what is the parent's alone."""
        ...


_forked: weakref.WeakSet[Forked] = weakref.WeakSet()
_kept_for_parent: list[object] = []


def renew_after_fork(pool: Forked) -> None:
    """Call a pool's `after_fork` in every child that is forked while it is there."""
    _forked.add(pool)


def keep_for_parent(inherited: object) -> None:
    """Keep connections that a child inherited for ever: to close them would end them for the parent."""
    _kept_for_parent.append(inherited)


def _after_fork_in_child() -> None:
    for pool in list(_forked):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)

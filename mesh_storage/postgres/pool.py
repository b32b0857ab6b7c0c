"""The connection pool: each connection is used by one unit of work at a time, within the limits of the settings.

The pool is our own because others lack a separate limit for each wait, first-come first-served waiting, an immediate
error (not after the full wait) when the server is down, and immediate recovery when it is back. psycopg_pool uses 1.04
to 1.35 times its CPU per call, needs 4 to 9 s to recover, and permanently loses a connection to Ctrl-C; SQLAlchemy's
pools use 1.46 to 1.63 times (docs/performance.md). Once psycopg_pool fails fast and accepts a limit per wait, it could
replace this module. SQLAlchemy's engine creates the connections.
"""

from __future__ import annotations

import os
import re
import threading
import time
import weakref
from collections import deque
from typing import Any, Protocol

import psycopg
import sqlalchemy.exc

from mesh_storage.errors import ClosedError, MeshStorageError, StorageTimeoutError, UnavailableError, connection_refused
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.commits import Commits
from mesh_storage.postgres.connection import UnitOfWorkConnection
from mesh_storage.postgres.driver import Driver
from mesh_storage.postgres.engine import connect_before, create_engine
from mesh_storage.postgres.events import Events
from mesh_storage.postgres.server import Server
from mesh_storage.postgres.transaction_pooling import Pooling
from mesh_storage.settings import Settings


class Slots:
    """A fair semaphore for the connections in use: threads acquire slots in the order of their requests.

    A semaphore of the standard library lets the releasing thread acquire again ahead of waiting ones: with more threads
    than slots, some would wait until they time out. It also holds a lock, on which a signal handler or finalizer would
    deadlock with the thread it interrupted; here every step is an atomic deque operation.
    """

    def __init__(self, number: int) -> None:
        self._free = deque[None]([None] * number)
        self._waiting = deque[threading.Lock]()

    def acquire(self, timeout: float) -> bool:
        """Acquire a slot; return whether one became free in time."""
        if not self._waiting:
            try:
                self._free.pop()
            except IndexError:
                pass
            else:
                return True
        turn = threading.Lock()
        turn.acquire()
        queued = False
        try:
            self._waiting.append(turn)
            queued = True
            self._hand_over()  # a slot may have been released in between
            if turn.acquire(timeout=timeout):
                return True
        except BaseException:  # KeyboardInterrupt
            if not self._withdraw(turn) and queued:
                self.release()
            raise
        return not self._withdraw(turn)

    def release(self) -> None:
        """Release a slot to the thread that has waited longest."""
        self._free.append(None)
        self._hand_over()

    def _hand_over(self) -> None:
        while self._free and self._waiting:
            try:
                self._free.pop()
            except IndexError:  # another thread was faster
                continue
            try:
                turn = self._waiting.popleft()
            except IndexError:  # the waiter timed out
                self._free.append(None)
            else:
                turn.release()

    def _withdraw(self, turn: threading.Lock) -> bool:
        """Stop waiting, unless a slot was assigned at the last moment."""
        try:
            self._waiting.remove(turn)
        except ValueError:
            return False
        return True


class Pool:
    """The connections of one storage to one database, for all threads."""

    lends: type[UnitOfWorkConnection] = UnitOfWorkConnection
    """What a unit of work gets."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.closed = False
        self.commits = Commits()
        self._timeout = settings.pool_timeout
        self._response_timeout = response_timeout(settings, server)
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
        """The number of connections in use."""
        return len(self._lent)

    @property
    def idle(self) -> int:
        """The number of connections that wait for a unit of work."""
        return len(self._idle)

    def acquire(
        self, characteristics: Characteristics, *, beside: bool = False, until: float | None = None
    ) -> UnitOfWorkConnection:
        """Acquire a connection, to be returned by `release`.

        With `beside` it waits for none: when all are in use, it makes one more, which `release` discards. With `until`
        it gives up at that moment, by `time.monotonic()`.

        Raises:
            ClosedError: The pool is closed.
            UnavailableError: No connection became available in time, or the server cannot be reached.
            StorageTimeoutError: The timeout of the unit of work expired.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        check_open(closed=self.closed)
        wait = 0.0 if beside else wait_limit(self._timeout, characteristics.timeout)
        if until is not None:
            wait = min(wait, max(0.0, until - time.monotonic()))
        placed = self._free.acquire(timeout=wait)
        if not placed and not beside:
            raise self._exhausted(characteristics.timeout)
        driver = None
        try:
            check_open(closed=self.closed)  # it may have been closed in the meantime
            driver = (self._idle_driver() if placed else None) or self._connect(until or deadline)
            connection = self.lends(driver, characteristics, deadline, self._pooling, self.commits)
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
        """Release a connection, rolling back uncommitted changes."""
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
        """Close the idle connections; those in use are closed on release."""
        self.closed = True
        # Wakes one waiter with `ClosedError`, which in turn wakes the next.
        self._free.release()
        self._close_idle()

    def after_fork(self) -> None:
        """Start with no connections in a forked child, leaving the parent's open."""
        keep_for_parent(self._idle)
        self._idle = deque()
        self._free = Slots(self.size)
        self._lent = set()
        if self._server.embedded is not None and not self.closed:
            self._server.embedded.after_fork()

    def _exhausted(self, timeout: float | None) -> UnavailableError | StorageTimeoutError:
        return exhausted(self.size, self._timeout, timeout)

    def _close_idle(self) -> None:
        while True:
            try:
                self._idle.pop().discard()
            except IndexError:  # another thread may have taken the last one
                return

    def _idle_driver(self) -> Driver | None:
        """Return the most recently used idle connection that is still usable, if any."""
        while self._idle:
            try:
                driver = self._idle.pop()
            except IndexError:  # another thread was faster
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
_OPTION = re.compile(r"(?:-c\s*|--)([A-Za-z_.-]+)\s*=\s*((?:\\.|\S)*)")
_DURATION = re.compile(r"(\d+)(us|ms|s|min|h|d)?")
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


def response_timeout(settings: Settings, server: Server) -> float | None:
    """Return the seconds after which a silent server is given up: more than it has to end a statement itself.

    What counts is the `statement_timeout` that connections begin with, wherever it was set. There is no limit if it is
    0, or written in a way that is not read here.
    """
    seconds = settings.statement_timeout
    if server.local_parameters is None:
        options = {
            name.replace("-", "_").casefold(): value for name, value in _OPTION.findall(server.connect["options"])
        }
        read = _DURATION.fullmatch(options.get("statement_timeout", "").replace("\\ ", ""))
        seconds = float(read[1]) * _UNITS_S[read[2] or "ms"] if read else 0.0
    return seconds + _RESPONSE_GRACE_S if seconds else None


def check_open(*, closed: bool) -> None:
    """Raise if the storage is closed.

    Raises:
        ClosedError: It is closed.
    """
    if closed:
        raise ClosedError("this storage is closed; open another one")


def wait_limit(pool_timeout: float, timeout: float | None) -> float:
    """Return the seconds to wait for a connection: the pool's limit or the caller's, whichever is shorter."""
    return pool_timeout if timeout is None else min(pool_timeout, timeout)


def exhausted(size: int, pool_timeout: float, timeout: float | None) -> UnavailableError | StorageTimeoutError:
    """Return the error for a timed-out wait: by the unit of work's own timeout, or the pool's."""
    if timeout is not None and timeout < pool_timeout:
        return StorageTimeoutError("timed out waiting for a pooled connection: the timeout of the unit of work expired")
    return UnavailableError(
        f"timed out waiting for a pooled connection: all {size} were in use for {pool_timeout:g} s (pool_timeout); "
        "end units of work sooner, or raise pool_size"
    )


def unreachable(error: Exception, deadline: float | None) -> tuple[MeshStorageError, Exception | None]:
    """Return the error for a failed connection attempt, and its cause."""
    refused, cause = connection_refused(error)
    if deadline is not None and time.monotonic() >= deadline:
        return StorageTimeoutError("the deadline passed before the server responded", retryable=True), cause
    return refused, cause


class Forked(Protocol):
    """An object that must be reset in a forked child."""

    def after_fork(self) -> None:
        """Start afresh, leaving the parent's resources alone."""
        ...


_forked: weakref.WeakSet[Forked] = weakref.WeakSet()
_kept_for_parent: list[object] = []


def renew_after_fork(pool: Forked) -> None:
    """Call a pool's `after_fork` in every forked child, as long as the pool exists."""
    _forked.add(pool)


def keep_for_parent(inherited: object) -> None:
    """Keep inherited connections alive forever: closing them would end them for the parent."""
    _kept_for_parent.append(inherited)


def _after_fork_in_child() -> None:
    for pool in list(_forked):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)

"""The pool: connections to one database, lent to one unit of work each, within the limits of the settings.

The pool is ours, since a unit of work may have a time limit of its own for the wait, and since checking a connection
out of SQLAlchemy's costs more than a statement; SQLAlchemy's engine makes the connections.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from typing import Protocol

import psycopg
import sqlalchemy.exc

from mesh_storage.errors import ClosedError, MeshStorageError, StorageTimeoutError, UnavailableError, connection_refused
from mesh_storage.postgres.connection import Characteristics, Connection
from mesh_storage.postgres.driver import BlockingDriver
from mesh_storage.postgres.engine import connect_before, create_engine
from mesh_storage.postgres.server import Server
from mesh_storage.settings import Settings


class Slots:
    """The places for connections in use, given to threads in the order in which they came.

    A semaphore of the standard library gives a place to whoever asks next, which is the thread that just gave one back:
    with more threads than places, some would wait until they give up.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._waiting: deque[threading.Lock] = deque()
        self._lock = threading.Lock()

    def acquire(self, timeout: float) -> bool:
        """Wait for a place, and say whether there was one in time."""
        with self._lock:
            if self._number > 0 and not self._waiting:
                self._number -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            if turn.acquire(timeout=timeout):
                return True
        except BaseException:  # An interrupt.
            if not self._withdraw(turn):
                self.release()
            raise
        return not self._withdraw(turn)

    def _withdraw(self, turn: threading.Lock) -> bool:
        """Wait no longer, unless the place came in the last moment."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True

    def release(self) -> None:
        """Return a place back, to the thread that waits longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._number += 1


class Pool:
    """The connections of one storage, for all its threads."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.closed = False
        self._timeout = settings.pool_timeout
        self._server = server
        self._engine = create_engine(server.connect)
        self._idle: deque[BlockingDriver] = deque()
        self._lent: set[Connection] = set()
        self._free = Slots(self.size)
        renew_after_fork(self)

    @property
    def in_use(self) -> int:
        """How many connections are lent at this moment."""
        return len(self._lent)

    def take(self, characteristics: Characteristics) -> Connection:
        """Lend a connection; `give_back` must follow.

        Raises:
            ClosedError: The pool was closed.
            UnavailableError: None is free in time, or the server cannot be reached.
            StorageTimeoutError: The caller's time is over.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        check_open(closed=self.closed)
        if not self._free.acquire(timeout=wait_limit(self._timeout, characteristics.timeout)):
            raise exhausted(self.size, self._timeout, characteristics.timeout)
        driver = None
        try:
            check_open(closed=self.closed)  # It may have been closed while we waited.
            driver = self._driver(deadline)
            mode = characteristics.mode(self._server.local_parameters)
            if driver.mode != mode:
                driver.switch(mode)
            connection = Connection(driver, characteristics, deadline, self._timeout)
        except BaseException:
            if driver is not None:
                driver.discard()
            self._free.release()
            raise
        self._lent.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """Take a connection back; what was not committed is rolled back."""
        if connection.inherited:
            keep_for_parent(connection)
            return
        driver = connection.driver
        try:
            connection.close()
            if connection.reusable() and isinstance(driver, BlockingDriver):
                self._idle.append(driver)
            else:
                driver.discard()
        except BaseException:
            driver.discard()
            raise
        finally:
            self._lent.discard(connection)
            self._free.release()
            if self.closed or connection.prepared_in_vain:
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

    def _driver(self, deadline: float | None) -> BlockingDriver:
        """Take the idle connection that was used last, or make one."""
        while self._idle:
            try:
                driver = self._idle.pop()
            except IndexError:  # Another thread was faster.
                break
            if driver.liveness.usable():
                return driver
            driver.discard()
        try:
            with connect_before(deadline):
                return BlockingDriver(self._engine.connect())
        except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
            refused, cause = unreachable(error, deadline)
        raise refused from cause


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
    """Make the error for a wait that was in vain: the caller's own limit, or that of the pool."""
    if timeout is not None and timeout < pool_timeout:
        return StorageTimeoutError("the time was over before a connection of the pool was free")
    return UnavailableError(
        f"all {size} connections of the pool are in use for {pool_timeout:g} s (pool_timeout); "
        "end units of work sooner, or raise pool_size"
    )


def unreachable(error: Exception, deadline: float | None) -> tuple[MeshStorageError, Exception | None]:
    """Make the error for a connection that could not be made, and its cause."""
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
    """Let a pool begin anew in every child that is forked while it is there."""
    _forked.add(pool)


def keep_for_parent(inherited: object) -> None:
    """Keep connections that a child inherited for ever: to close them would end them for the parent."""
    _kept_for_parent.append(inherited)


def _after_fork_in_child() -> None:
    for pool in list(_forked):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)

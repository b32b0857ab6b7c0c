"""The pool: connections to one database, lent to one unit of work each, within the limits of the settings."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Generator
from contextlib import contextmanager

from mesh_storage.connection import Characteristics, Connection
from mesh_storage.engine import connect_before, create_engine
from mesh_storage.errors import ClosedError, StorageTimeoutError, UnavailableError, translate
from mesh_storage.server import Server
from mesh_storage.settings import Settings

# A pool that a forked child inherits is kept for ever: to close its connections would end them for the parent.
_inherited_by_fork: list[object] = []


class Pool:
    """The connections of one storage, for all its threads."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.size = settings.pool_size
        self.in_use = 0
        """Connections that are lent at this moment."""
        self.closed = False
        self._timeout = settings.pool_timeout
        self._server = server
        self._engine = create_engine(settings, server.connect)
        # The same connections, without transactions, for what only reads.
        self._reading_engine = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        # SQLAlchemy's pool knows one time limit for all; with this before it, it always has a connection free.
        self._free = threading.BoundedSemaphore(self.size)
        _pools.add(self)

    @contextmanager
    def connection(self, characteristics: Characteristics) -> Generator[Connection]:
        """Lend a connection for a block.

        Raises:
            ClosedError: The pool was closed.
            UnavailableError: None is free in time, or the server cannot be reached.
            StorageTimeoutError: The caller's time is over.
        """
        characteristics.check()
        deadline = characteristics.deadline()
        free = self._free
        self._wait_for(free, characteristics.timeout)
        try:
            connection = self._connect(characteristics, deadline)
            self.in_use += 1
            try:
                yield connection
            finally:
                self.in_use -= 1
                connection.close(discard=self.closed)
        finally:
            free.release()

    def close(self) -> None:
        """Close the connections that are not lent; the others are closed when they come back."""
        self.closed = True
        self._engine.dispose()

    def after_fork(self) -> None:
        """In a forked child, begin with no connections and leave the parent's alone."""
        _inherited_by_fork.append(self._engine.pool)
        self._engine.dispose(close=False)
        self._free = threading.BoundedSemaphore(self.size)
        self.in_use = 0
        if self._server.embedded is not None and not self.closed:
            self._server.embedded.after_fork()

    def _wait_for(self, free: threading.BoundedSemaphore, timeout: float | None) -> None:
        if self.closed:
            raise ClosedError("this storage is closed; open another one")
        wait = self._timeout if timeout is None else min(self._timeout, timeout)
        if not free.acquire(timeout=wait):
            raise exhausted(self.size, self._timeout, timeout)

    def _connect(self, characteristics: Characteristics, deadline: float | None) -> Connection:
        engine = self._reading_engine if characteristics.autocommit else self._engine
        try:
            with connect_before(deadline):
                connection = engine.connect()
        except Exception as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise StorageTimeoutError("the time was over before the server answered") from error
            raise translate(error) from error
        return Connection(characteristics.apply(connection), characteristics, deadline=deadline)


def exhausted(size: int, pool_timeout: float, timeout: float | None) -> UnavailableError | StorageTimeoutError:
    """Make the error for a wait that was in vain: the caller's own limit, or that of the pool."""
    if timeout is not None and timeout < pool_timeout:
        return StorageTimeoutError("the time was over before a connection of the pool was free")
    return UnavailableError(
        f"all {size} connections of the pool are in use for {pool_timeout:g} s (pool_timeout); "
        "end units of work sooner, or raise pool_size"
    )


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)

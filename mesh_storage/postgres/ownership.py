"""Ownership of a connection: one thread or task at a time, in the process that opened it, until it is closed."""

from __future__ import annotations

import os
import threading

from mesh_storage.errors import ClosedError, MeshStorageError


class Ownership:
    """The exclusive use of a connection by one unit of work."""

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._process = os.getpid()
        self.closed = False
        """Whether the unit of work has ended."""

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child and the connection belongs to its parent."""
        return self._process != os.getpid()  # not cached: not every fork runs Python's hooks

    @property
    def in_use(self) -> bool:
        """Whether a call is in progress."""
        return self._in_use.locked()

    def acquire(self) -> None:
        """Start a call, to be ended by `release`.

        Raises:
            MeshStorageError: Another call is in progress.
        """
        if not self._in_use.acquire(blocking=False):
            raise MeshStorageError("a unit of work is used by two threads or tasks at once; open one for each")

    def release(self) -> None:
        """End a call."""
        self._in_use.release()

    def check(self) -> None:
        """Raise if the unit of work cannot be used.

        Raises:
            ClosedError: It has ended, or belongs to the parent process.
        """
        if self.closed:
            raise ClosedError("this unit of work has ended; open another one")
        if self.inherited:
            raise ClosedError("this unit of work belongs to the parent process; open another one")

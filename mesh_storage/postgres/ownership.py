"""Who may use a connection: one thread or task at a time, in the process that opened it, until it is closed."""

from __future__ import annotations

import os
import threading

from mesh_storage.errors import ClosedError, MeshStorageError


class Ownership:
    """The right of one unit of work to a connection."""

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._process = os.getpid()
        self.closed = False
        """Whether the unit of work has ended."""

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child, and the connection belongs to its parent."""
        return self._process != os.getpid()  # Asked each time: not every fork runs the hooks of Python.

    @property
    def in_use(self) -> bool:
        """Whether a call is under way."""
        return self._in_use.locked()

    def acquire(self) -> None:
        """Begin a call; `release` must follow.

        Raises:
            MeshStorageError: Another call is under way.
        """
        if not self._in_use.acquire(blocking=False):
            raise MeshStorageError("two threads or tasks use one unit of work at once; give each its own")

    def release(self) -> None:
        """End a call."""
        self._in_use.release()

    def check(self) -> None:
        """Refuse to use what has ended, or is the parent's.

        Raises:
            ClosedError: It is.
        """
        if self.closed:
            raise ClosedError("this unit of work has ended; open another one")
        if self.inherited:
            raise ClosedError("this unit of work belongs to the parent process; open another one")

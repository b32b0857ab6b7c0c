"""Direct calls on the sync side, in place of the functions of `mesh_storage/aio/postgres/concurrency.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from weakref import WeakMethod

import sqlalchemy
from sqlalchemy.orm import Session

from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.session import Joinable, UnitOfWorkSession

P = ParamSpec("P")
T = TypeVar("T")


def at_once(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that asyncio runs in a greenlet or a thread, or apart from the task."""
    return function(*args, **kwargs)


def undisturbed(_owner: Ownership, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that asyncio runs to completion even if the task is cancelled."""
    return work(*args, **kwargs)


def straight(work: Callable[[], T], _ending: Callable[[], None]) -> T:
    """Call a function that asyncio awaits to its end even if the task is cancelled."""
    return work()


def itself(connection: sqlalchemy.Connection) -> sqlalchemy.Connection:
    """Return the connection, for a session."""
    return connection


def open_session(connection: Joinable) -> Session:
    """Return an ORM session on the connection of a unit of work."""
    return UnitOfWorkSession(connection, wait=lambda result: result)


class Repeated:
    """Calls a method in a thread, after the seconds that its call before returned, until that is None or it is gone."""

    def __init__(self, method: WeakMethod[Callable[[], float | None]], pause: float) -> None:
        self._stopped = threading.Event()
        # A daemon, so that it does not keep the process alive.
        self._thread = threading.Thread(
            target=self._repeat, args=(method, pause, self._stopped), name="mesh_storage renewal", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End it, after a call that is in progress."""
        self._stopped.set()
        self._thread.join()

    @staticmethod
    def _repeat(method: WeakMethod[Callable[[], float | None]], pause: float, stopped: threading.Event) -> None:
        following: float | None = pause
        while following is not None and not stopped.wait(following):
            call = method()
            following = None if call is None else call()
            del call  # or the object would live as long as the thread

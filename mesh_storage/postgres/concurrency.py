"""Direct calls on the sync side, in place of the functions of `mesh_storage/aio/postgres/concurrency.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import sqlalchemy
from sqlalchemy.orm import Session

from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.session import Joinable, UnitOfWorkSession

P = ParamSpec("P")
T = TypeVar("T")


def at_once(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that asyncio runs in a greenlet or a thread."""
    return function(*args, **kwargs)


def undisturbed(_owner: Ownership, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that asyncio runs to completion even if the task is cancelled."""
    return work(*args, **kwargs)


def itself(connection: sqlalchemy.Connection) -> sqlalchemy.Connection:
    """Return the connection, for a session."""
    return connection


def open_session(connection: Joinable) -> Session:
    """Return an ORM session on the connection of a unit of work."""
    return UnitOfWorkSession(connection, wait=lambda result: result)

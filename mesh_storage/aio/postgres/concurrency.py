"""How asyncio does what a blocking caller does at once: in greenlets, threads and tasks of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.util import await_only, greenlet_spawn

from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.session import Joinable, UnitOfWorkSession

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def in_greenlet(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call a sync function of SQLAlchemy's that may wait for the server, in a greenlet of SQLAlchemy's."""
    return await greenlet_spawn(function, *args)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call what needs the processor for long, without keeping the event loop from its other tasks."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def uninterrupted(
    owner: Ownership, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run to its end what must not be left half done, also when this task is cancelled meanwhile.

    `finished` waits for what goes on for an owner although nobody waits for it any more.
    """
    task = in_background(work(*args, **kwargs))
    unfinished = _unfinished.setdefault(owner, set())
    unfinished.add(task)
    task.add_done_callback(unfinished.discard)
    return await asyncio.shield(task)


async def finished(owner: Ownership) -> None:
    """Wait until all that was to be uninterrupted for an owner has come to its end."""
    if unfinished := _unfinished.get(owner):
        await asyncio.wait(unfinished)


def sync_connection(connection: AsyncConnection) -> sqlalchemy.Connection:
    """Return the sync connection inside of an asyncio one, which a session works on."""
    assert connection.sync_connection is not None, "it was started"
    return connection.sync_connection


def open_async_session(connection: Joinable) -> AsyncSession:
    """Return an ORM session on the connection of a unit of work."""
    return AsyncSession(sync_session_class=UnitOfWorkSession, connection=connection, wait=await_only)


_background: set[asyncio.Task[Any]] = set()
_unfinished = WeakKeyDictionary[Ownership, set[asyncio.Task[Any]]]()


def in_background(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run to its end what nobody may have the time to wait for."""
    task = asyncio.create_task(work)
    _background.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[Any]) -> None:
    _background.discard(task)
    if not task.cancelled():
        task.exception()  # Whoever waited has it; when nobody did, a rollback failed, and the connection is given up.

"""Greenlets, threads and background tasks for the asyncio side, where the sync side makes a direct call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent import futures
from typing import Any, ParamSpec, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary, WeakMethod

import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.util import await_only, greenlet_spawn

from mesh_storage.postgres.liveness import GRACE_S
from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.session import Joinable, UnitOfWorkSession

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def in_greenlet(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call a sync function of SQLAlchemy that may wait for the server, in SQLAlchemy's greenlet."""
    return await greenlet_spawn(function, *args)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a CPU-bound function in a thread, without blocking the event loop."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def uninterrupted(
    owner: Ownership, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a coroutine to completion even if this task is cancelled, which leaves it a grace period.

    `finished` waits for the coroutines of an owner that are still running after such a cancellation.
    """
    task = in_background(work(*args, **kwargs))
    unfinished = _unfinished.setdefault(owner, set())
    unfinished.add(task)
    task.add_done_callback(unfinished.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        asyncio.get_running_loop().call_later(GRACE_S, task.cancel)
        raise


async def to_the_end(work: Callable[[], Coroutine[Any, Any, T]], ending: Callable[[], None]) -> T:
    """Await a coroutine to its end, also if this task is cancelled: then it is told to end soon.

    A second cancellation reaches the coroutine.
    """
    task = in_background(work())
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            if cancellation is not None:
                task.cancel()
            cancellation = error
            ending()
    if cancellation is not None:
        raise cancellation
    return task.result()


async def apart(function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a coroutine function; if what it awaits was cancelled, and not this task, that is an error like another.

    Raises:
        concurrent.futures.CancelledError: Something that it awaits was cancelled.
    """
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    before = task.cancelling()
    try:
        return await function(*args, **kwargs)
    except asyncio.CancelledError as error:
        if task.cancelling() > before:
            raise
        raise futures.CancelledError("what was awaited was cancelled") from error


async def finished(owner: Ownership) -> None:
    """Wait until all uninterrupted coroutines of an owner have completed."""
    if unfinished := _unfinished.get(owner):
        await asyncio.wait(unfinished)


def sync_connection(connection: AsyncConnection) -> sqlalchemy.Connection:
    """Return the sync connection wrapped by an asyncio one, for a session."""
    assert connection.sync_connection is not None, "the connection is started"
    return connection.sync_connection


def open_async_session(connection: Joinable) -> AsyncSession:
    """Return an ORM session on the connection of a unit of work."""
    return AsyncSession(sync_session_class=UnitOfWorkSession, connection=connection, wait=await_only)


class AsyncRepeated:
    """Calls a method in a task, after the seconds that its call before returned, until that is None or it is gone."""

    def __init__(self, method: WeakMethod[Callable[[], Coroutine[Any, Any, float | None]]], pause: float) -> None:
        self._task = in_background(self._repeat(method, pause))

    async def stop(self) -> None:
        """End it, also in the middle of a call."""
        self._task.cancel()
        await asyncio.wait([self._task])

    @staticmethod
    async def _repeat(method: WeakMethod[Callable[[], Coroutine[Any, Any, float | None]]], pause: float) -> None:
        following: float | None = pause
        while following is not None:
            await asyncio.sleep(following)
            call = method()
            following = None if call is None else await call()
            del call  # or the object would live as long as the task


_background: set[asyncio.Task[Any]] = set()
_unfinished = WeakKeyDictionary[Ownership, set[asyncio.Task[Any]]]()


def in_background(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run a coroutine in a task to completion, whether or not anyone awaits it."""
    task = asyncio.create_task(work)
    _background.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[Any]) -> None:
    _background.discard(task)
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not log it; the awaiter has raised it

"""Greenlets, in which sync code waits for what is awaited outside of them: SQLAlchemy's way, but used again.

SQLAlchemy's own `greenlet_spawn` makes a greenlet for each call. The interpreter allocates a stack with each, which
costs more than all the rest of a call. Those here go on to the next call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

P = ParamSpec("P")
T = TypeVar("T")


_ENDED = object()


class _Greenlet(greenlet):
    """Runs one call after the other; whoever switches to it gets what to await for it, or that it has ended."""

    __sqlalchemy_greenlet_provider__ = True  # by which SQLAlchemy knows where `await_` may be called

    def __init__(self) -> None:
        super().__init__(self._serve)
        self.call: tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]] | None = None
        """The function that it runs, and its arguments; None when that has ended."""
        self.result: Any = None
        self.failure: BaseException | None = None

    def _serve(self) -> None:
        while self.call is not None:
            try:
                self.result = self.call[0](*self.call[1], **self.call[2])
            except GreenletExit:  # Nobody needs it any more.
                raise
            except BaseException as error:  # noqa: BLE001 - `run` raises it
                self.failure = error
            self.call = None
            assert self.parent is not None, "only the main greenlet has none"
            self.parent.switch(_ENDED)


class _Greenlets(list[_Greenlet]):
    """Greenlets that have nothing to do, and end with their thread: nobody else can end them then."""

    def __del__(self) -> None:
        for each in self:
            each.throw(GreenletExit())


class _Idle(threading.local):
    """Those of each thread, since a greenlet belongs to its thread."""

    def __init__(self) -> None:
        self.greenlets = _Greenlets()


_idle = _Idle()


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a sync function that may wait by SQLAlchemy's `await_`."""
    # The list is kept in no variable: an error, whose traceback has this frame, may outlive the thread.
    worker = _idle.greenlets.pop() if _idle.greenlets else _Greenlet()
    worker.parent = current = getcurrent()
    worker.gr_context = current.gr_context
    worker.call = function, args, kwargs
    awaited = worker.switch()
    while awaited is not _ENDED:
        try:
            value = await awaited
        except BaseException as error:  # noqa: BLE001 - the function decides what to do about it
            awaited = worker.throw(error)
        else:
            awaited = worker.switch(value)
    _idle.greenlets.append(worker)
    result: T = worker.result
    failure = worker.failure
    worker.result = worker.failure = worker.gr_context = None
    if failure is None:
        return result
    try:
        raise failure
    finally:
        del failure  # which refers to this frame

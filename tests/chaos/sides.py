"""The blocking side behind the names of the asyncio side, so that threads do what is written once, for tasks."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_OPENING = ("begin", "unit_of_work", "savepoint")


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("it waits for an event loop")


class Call(Awaitable[Any]):
    """A call that is made when it is awaited."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._call = function, args, kwargs

    def __await__(self) -> Generator[Any, None, Any]:
        function, args, kwargs = self._call
        return function(*args, **kwargs)
        yield  # never reached: it makes this a generator


class Entering:
    """A context manager whose steps are awaited."""

    def __init__(self, manager: AbstractContextManager[Any]) -> None:
        self._manager = manager

    async def __aenter__(self) -> Any:
        entered = self._manager.__enter__()
        return None if entered is None else InThread(entered)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._manager.__exit__(kind, error, traceback)


class InThread:
    """A storage, or what it gives, whose calls are awaited."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if name in _OPENING:
            return lambda **given: Entering(value(**given))
        return (lambda *args, **kwargs: Call(value, *args, **kwargs)) if callable(value) else InThread(value)

    def run(self, work: Callable[[Any], Coroutine[Any, Any, T]], **given: Any) -> Call:
        """Make the work of a task that of a thread."""
        return Call(self._wrapped.run, lambda uow: finish(work(InThread(uow))), **given)


def sleep_in_thread(seconds: float) -> Call:
    """Sleep when it is awaited."""
    return Call(time.sleep, seconds)

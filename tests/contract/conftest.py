"""Opens either API behind the names of the sync one, so that one test body runs over both unchanged."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import pytest
import uvloop
from pydantic import SecretStr

from mesh_storage import Delivery, MeshStorage, Settings, UnitOfWork
from mesh_storage.aio import AsyncLease, AsyncMeshStorage
from mesh_storage.aio.unit_of_work import AsyncScope
from tests import roles
from tests.pgbouncer import pgbouncer

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop] | None] = {"asyncio": None, "uvloop": uvloop.new_event_loop}


class Open(Protocol):
    """Opens a storage for a block."""

    def __call__(self, url: str, **settings: Any) -> AbstractContextManager[MeshStorage]:
        """Take the settings beside the URL."""
        ...


class Blocking:
    """Something of the async side for blocking code: what is to be awaited is awaited on a loop in another thread."""

    def __init__(self, wrapped: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._wrapped, self._loop = wrapped, loop

    def __getattr__(self, name: str) -> Any:
        return self._adapt(getattr(self._wrapped, name))

    def run(self, work: Callable[[UnitOfWork], Any], **given: Any) -> Any:
        """Call blocking work in a thread, from where it may wait for the loop in its turn."""
        return self._wait(self._wrapped.run(lambda uow: asyncio.to_thread(work, self._adapt(uow)), **given))

    def consume(self, receiver: str, handle: Callable[[UnitOfWork, Delivery], Any], **given: Any) -> None:
        """Consume with a blocking handler, which runs in a thread."""

        async def handle_in_thread(uow: Any, delivery: Delivery) -> None:
            await asyncio.to_thread(handle, self._adapt(uow), delivery)

        self._wait(self._wrapped.consume(receiver, handle_in_thread, **given))

    def _adapt(self, value: Any) -> Any:
        if isinstance(value, (AsyncScope, AsyncLease)):
            return self._enter(value)
        if type(value).__name__.startswith("Async"):
            return Blocking(value, self._loop)
        if inspect.iscoroutine(value):
            return self._adapt(self._wait(value))
        if inspect.isasyncgen(value):
            return self._iterate(value)
        if isinstance(value, AbstractAsyncContextManager):
            return self._enter(value)
        if callable(value):
            return lambda *args, **kwargs: self._adapt(value(*args, **kwargs))
        return value

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _iterate(self, items: AsyncGenerator[Any]) -> Generator[Any]:
        async def following() -> Any:
            return await anext(items, self)

        try:
            while (item := self._wait(following())) is not self:
                yield item
        finally:
            self._wait(items.aclose())

    @contextmanager
    def _enter(self, manager: AbstractAsyncContextManager[Any]) -> Generator[Any]:
        async def leave(error: BaseException | None) -> bool | None:
            return await manager.__aexit__(type(error) if error else None, error, error and error.__traceback__)

        async def enter() -> Any:
            return await manager.__aenter__()

        made = self._wait(enter())
        entered = Blocking(made, self._loop) if made is manager else self._adapt(made)
        try:
            yield entered
        except BaseException as error:
            if not self._wait(leave(error)):
                raise
        else:
            self._wait(leave(None))


@contextmanager
def loop_in_a_thread(factory: Callable[[], asyncio.AbstractEventLoop] | None) -> Generator[asyncio.AbstractEventLoop]:
    """Run an event loop for a block."""
    with asyncio.Runner(loop_factory=factory) as runner, ThreadPoolExecutor(1) as thread:
        loop, ended = runner.get_loop(), asyncio.Event()
        running = thread.submit(runner.run, ended.wait())
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(ended.set)
            running.result()


@pytest.fixture(
    params=[
        "sync",
        "asyncio",
        *(
            pytest.param(other, marks=pytest.mark.slow)
            for other in ("uvloop", "sync behind PgBouncer", "asyncio behind PgBouncer")
        ),
    ]
)
def open_storage(request: pytest.FixtureRequest, mesh_storage_url: str, service: roles.Service) -> Iterator[Open]:
    """Yield what opens a storage: of the sync API, or of the async one behind the same names; both also by a pooler.

    The sync API is used by the role of a service, which may do no more than it needs.
    """
    api, _, pooled = request.param.partition(" behind ")
    with opener(api) as opens:
        if not pooled:
            as_service = api == "sync" or roles.AS_SERVICE
            urls = {mesh_storage_url: service.url(mesh_storage_url)} if as_service else {}
            yield lambda url, **settings: opens(urls.get(url, url), **settings)
            return
        with pgbouncer(mesh_storage_url, sessions=20) as pooled_url:
            urls = {mesh_storage_url: pooled_url}
            yield lambda url, **settings: opens(urls.get(url, url), transaction_pooling=True, **settings)


@contextmanager
def opener(api: str) -> Generator[Open]:
    """Yield what opens a storage of an API."""
    if api == "sync":
        yield lambda url, **settings: MeshStorage.open(settings=Settings(url=SecretStr(url), **settings))
        return
    with loop_in_a_thread(LOOPS[api]) as loop:

        @contextmanager
        def open_async(url: str, **settings: Any) -> Generator[MeshStorage]:
            opening = AsyncMeshStorage.open(settings=Settings(url=SecretStr(url), **settings))
            manager: Any = Blocking(None, loop)._enter(opening)
            with manager as storage:
                yield cast("MeshStorage", storage)

        yield open_async


@pytest.fixture
def storage(open_storage: Open, mesh_storage_url: str) -> Iterator[MeshStorage]:
    """Yield a storage that is open on a fresh database."""
    with open_storage(mesh_storage_url) as opened:
        yield opened


@pytest.fixture
def uow(storage: MeshStorage) -> Iterator[UnitOfWork]:
    """Yield an open unit of work that nobody commits."""
    with storage.unit_of_work() as unit:
        yield unit

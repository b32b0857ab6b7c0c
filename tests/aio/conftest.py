"""Runs coroutines on both event loops, and watches the server from outside of the library."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar

import psycopg
import pytest
import uvloop
from pydantic import SecretStr

from mesh_storage import Settings
from mesh_storage.aio import AsyncMeshStorage

T = TypeVar("T")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop] | None] = {"asyncio": None, "uvloop": uvloop.new_event_loop}


class Run(Protocol):
    """Runs a coroutine on one of the event loops."""

    def __call__(self, main: Coroutine[Any, Any, T]) -> T:
        """Return what it returns."""
        ...


@pytest.fixture(params=["asyncio", pytest.param("uvloop", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest) -> Run:
    """Return what runs a coroutine; nothing may be left for the loop to report."""

    def run_with_care(main: Coroutine[Any, Any, T]) -> T:
        complaints: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.get_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
            result = runner.run(main)
        assert complaints == []
        return result

    return run_with_care


class Watch:
    """Two connections that are none of the library's: one sees all that goes on, the other gets in its way."""

    def __init__(self, connection: psycopg.Connection[Any], other: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.other = other
        self._ours = [connection.info.backend_pid, other.info.backend_pid]

    @contextmanager
    def locked(self, table: str) -> Generator[None]:
        """Let the library wait for a table."""
        with self.other.transaction():
            self.other.execute(f"LOCK TABLE {table}")
            yield

    def take(self, lock: int) -> None:
        """Take an advisory lock."""
        self.other.execute("SELECT pg_advisory_lock(%s)", [lock])

    def release(self) -> None:
        """Release the advisory locks."""
        self.other.execute("SELECT pg_advisory_unlock_all()")

    def busy(self) -> list[tuple[Any, ...]]:
        """Return the other connections that are in a transaction or execute a statement."""
        query = (
            "SELECT pid, state, query FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> ALL(%s) AND state <> 'idle'"
        )
        return self.connection.execute(query, [self._ours]).fetchall()

    def waiting(self) -> int:
        """Count the others that wait for a lock."""
        query = (
            "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE NOT granted AND datname = current_database()"
        )
        row = self.connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])

    def keys(self) -> list[str]:
        """Return the keys of the shared state that are committed."""
        return [row[0] for row in self.connection.execute('SELECT key FROM mesh_state ORDER BY key COLLATE "C"')]

    def connections(self) -> int:
        """Count the other connections."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> ALL(%s)"
        row = self.connection.execute(query, [self._ours]).fetchone()
        assert row is not None
        return int(row[0])


@pytest.fixture
def watch(mesh_storage_url: str) -> Iterator[Watch]:
    """Yield a view of the server."""
    with (
        psycopg.connect(mesh_storage_url, autocommit=True) as connection,
        psycopg.connect(mesh_storage_url, autocommit=True) as other,
    ):
        yield Watch(connection, other)


async def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        await asyncio.sleep(0.002)


def opened(url: str, **settings: Any) -> Any:
    """Open a storage with some settings."""
    return AsyncMeshStorage.open(settings=Settings(url=SecretStr(url), **settings))


@asynccontextmanager
async def storage_at_rest(url: str, watch: Watch, **settings: Any) -> AsyncGenerator[AsyncMeshStorage]:
    """Yield a storage for a block, after which nothing of it may be left: it is as good as new at once."""
    async with opened(url, **settings) as storage:
        yield storage
        await assert_at_rest(storage, watch)
    await eventually(lambda: watch.connections() == 0)


async def assert_at_rest(storage: AsyncMeshStorage, watch: Watch) -> None:
    """Check that no transaction is open, no connection is lent, and every one may be had at once."""
    await eventually(lambda: not watch.busy())
    size = (await storage.health()).pool_size

    async def nothing_lent() -> bool:
        return (await storage.health()).pool_in_use == 0

    deadline = time.monotonic() + 10
    while not await nothing_lent():
        assert time.monotonic() < deadline, "connections are still lent"
    async with AsyncExitStack() as stack:
        for number in range(size):
            uow = await stack.enter_async_context(storage.unit_of_work(timeout=10))
            await uow.state.put(f"at rest {number}", b"")
    await eventually(lambda: not watch.busy() and watch.connections() <= size)

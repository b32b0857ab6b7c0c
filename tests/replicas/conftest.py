"""A primary and two standbys, and storages of either side that read from them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from mesh_storage import MeshStorage, Settings, schema
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.testing import Databases
from tests.chaos.sides import InThread, finish
from tests.servers import PostgresServer, Replication, execute, new_replication
from tools.test_matrix import find

PATIENCE_S = 30.0
"""For a replica that is to catch up, on a busy machine."""


@pytest.fixture(scope="session")
def programs(mesh_storage_databases: Databases) -> Path:
    """Return the programs of the version that is tested."""
    with mesh_storage_databases.fresh(with_schema=False) as url, psycopg.connect(url) as connection:
        found = find(str(connection.info.server_version // 10_000))
    assert found is not None
    return found


@contextmanager
def deployed(programs: Path, *options: str, standbys: int = 2) -> Generator[Replication]:
    """Yield servers with the schema."""
    with new_replication(programs, *options, standbys=standbys) as replication:
        schema.upgrade(replication.url())
        replication.await_replay()
        yield replication


@pytest.fixture(scope="session")
def lasting(programs: Path) -> Iterator[Replication]:
    """Yield servers that all tests share which leave them as they are."""
    with deployed(programs) as replication:
        yield replication


@pytest.fixture
def servers(lasting: Replication) -> Iterator[Replication]:
    """Yield the servers that are shared, and let paused standbys go on."""
    yield lasting
    resume(*lasting.standbys)
    lasting.await_replay()


@pytest.fixture
def own_servers(programs: Path) -> Iterator[Replication]:
    """Yield servers of the test's own."""
    with deployed(programs) as replication:
        yield replication


def pause(*standbys: PostgresServer) -> None:
    """Let standbys replay nothing more."""
    for standby in standbys:
        execute(standby, "SELECT pg_wal_replay_pause()")
        while execute(standby, "SELECT pg_get_wal_replay_pause_state()") != [("paused",)]:
            pass


def resume(*standbys: PostgresServer) -> None:
    """Let standbys go on."""
    for standby in standbys:
        execute(standby, "SELECT pg_wal_replay_resume()")


def settings_of(servers: Replication, **given: Any) -> Settings:
    """Return settings for the primary and all standbys."""
    replicas = SecretStr(servers.url(*servers.standbys))
    return Settings(
        **{"url": SecretStr(servers.url()), "replica_url": replicas, "replica_timeout": PATIENCE_S, **given}
    )


class Side:
    """The blocking or the asyncio side, used by tests that are written once."""

    def __init__(self, *, blocking: bool) -> None:
        self.blocking = blocking

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Run a test."""
        if self.blocking:
            finish(main)
        else:
            asyncio.run(main)

    @asynccontextmanager
    async def open(self, servers: Replication | Settings, **given: Any) -> Any:
        """Open a storage."""
        telemetry = given.pop("telemetry", None)
        settings = servers if isinstance(servers, Settings) else settings_of(servers, **given)
        if self.blocking:
            with MeshStorage.open(settings=settings, telemetry=telemetry) as storage:
                yield InThread(storage)
        else:
            async with AsyncMeshStorage.open(settings=settings, telemetry=telemetry) as storage:
                yield storage

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        if self.blocking:
            import time

            time.sleep(seconds)  # noqa: ASYNC251 - the blocking side
        else:
            await asyncio.sleep(seconds)


@pytest.fixture(params=["blocking", "asyncio"])
def side(request: pytest.FixtureRequest) -> Side:
    """Return each side."""
    return Side(blocking=request.param == "blocking")


def position_of(uow: Any) -> str:
    """Return the position of a unit of work of either side."""
    position: str = getattr(uow, "_wrapped", uow).position
    return position


async def put(storage: Any, value: bytes, key: str = "k") -> str:
    """Store a value, and return the position of its commit."""
    async with storage.begin(position=True) as uow:
        await uow.state.put(key, value)
    return position_of(uow)


async def read(storage: Any, key: str = "k", **given: Any) -> tuple[bytes | None, int]:
    """Return a value as a replica has it, and the port of the server that answered."""
    async with storage.begin(read_only=True, replica=True, **given) as uow:
        found = await uow.state.find(key)
        port = await port_of(uow)
    return None if found is None else found.value, port


async def port_of(uow: Any) -> int:
    """Return the port of the server that a unit of work is on."""
    result = await uow.session.execute(text("SELECT current_setting('port')::int"))
    port: int = result.scalar_one()
    return port


async def until(storage: Any, side: Side, condition: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    """Wait until something comes true."""
    del storage
    for _ in range(int(seconds / 0.05)):
        if await condition():
            return
        await side.sleep(0.05)
    raise AssertionError("it did not come true in time")


def ports(*servers: PostgresServer) -> set[int]:
    """Return the ports of servers."""
    return {server.port for server in servers}


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return why the primary has answered in place of a replica, as logged."""
    return [
        record.__dict__["reason"]
        for record in caplog.records
        if record.levelno == logging.WARNING and record.__dict__.get("event") == "replica"
    ]

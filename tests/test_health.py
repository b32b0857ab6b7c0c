"""Health: each fact by itself."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import (
    Health,
    MeshStorage,
    SchemaMismatchError,
    Settings,
    StorageTimeoutError,
    UnavailableError,
    schema,
)
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.postgres.server import open_server

TOLERANCE_S = 0.5
"""For a busy machine, on top of the 2 s."""


def test_all_is_well(storage: MeshStorage) -> None:
    health = storage.health()
    assert health.ok
    assert (health.connected, health.writable, health.revision, health.head) == (
        True,
        True,
        schema.head(),
        schema.head(),
    )
    assert health.round_trip_ms is not None
    assert health.round_trip_ms > 0


def test_a_server_that_takes_no_writes_is_seen(mesh_storage_url: str) -> None:
    with MeshStorage.open(mesh_storage_url) as storage, storage.begin() as uow:
        name = uow.session.execute(text("SELECT current_database()")).scalar_one()
        uow.session.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    with MeshStorage.open(mesh_storage_url) as storage:
        health = storage.health()
        assert (health.ok, health.connected, health.writable) == (False, True, False)
        with pytest.raises(UnavailableError), storage.begin() as uow:
            uow.state.put("k", b"v")


def test_a_server_that_is_away_is_seen(tmp_path: Path) -> None:
    with MeshStorage.open(f"embedded:{tmp_path / 'mesh'}") as storage:
        embedded = storage._server.embedded
        assert embedded is not None
        embedded.close()
        health = storage.health()
        assert (health.ok, health.connected, health.writable, health.revision) == (False, False, False, None)
        assert isinstance(health.error, UnavailableError)


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("0001", "out of date.*mesh-storage upgrade"),
        ("9999", "too new.*newer"),
        (None, "no mesh_storage schema.*mesh-storage upgrade"),
    ],
)
def test_another_schema_is_seen_and_not_opened(mesh_storage_url: str, revision: str | None, words: str) -> None:
    with MeshStorage.open(mesh_storage_url) as storage:
        with storage.begin() as uow:
            change = (
                "DELETE FROM mesh_alembic_version"
                if revision is None
                else f"UPDATE mesh_alembic_version SET version_num = '{revision}'"
            )
            uow.session.execute(text(change))
        health = storage.health()
        assert (health.ok, health.connected, health.writable, health.revision) == (False, True, True, revision)
    with pytest.raises(SchemaMismatchError, match=words):
        MeshStorage.open(mesh_storage_url)


def sessions(url: str) -> int:
    with psycopg.connect(url) as connection:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )
        row = connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])


def await_sessions(url: str, number: int) -> None:
    """Wait for the server, which notices a little later that a connection was closed."""
    deadline = time.monotonic() + 10
    while sessions(url) != number:
        assert time.monotonic() < deadline, f"{sessions(url)} instead of {number}"
        time.sleep(0.02)


def busy(size: int) -> tuple[bool, bool, bool, str, int, int]:
    return True, True, True, schema.head(), size, size


def facts(health: Health) -> tuple[bool, bool, bool, str | None, int, int]:
    return health.ok, health.connected, health.writable, health.revision, health.pool_size, health.pool_in_use


def test_a_busy_pool_is_connected(mesh_storage_url: str) -> None:
    with MeshStorage.open(settings=Settings(url=mesh_storage_url, pool_size=2, pool_timeout=0)) as storage:
        with storage.begin() as one, storage.begin() as other:
            one.state.put("one", b"")
            other.state.put("other", b"")
            begun = time.monotonic()
            assert [facts(storage.health()) for _ in range(3)] == [busy(2)] * 3
            assert time.monotonic() - begun < 1, "it waits for nobody"
            await_sessions(mesh_storage_url, 2)
            with pytest.raises(UnavailableError), storage.begin():
                pass
        with storage.begin() as one, storage.begin() as other:
            assert (one.state.count(), other.state.count()) == (2, 2)
            with pytest.raises(UnavailableError), storage.begin():
                pass
        assert storage.health().pool_in_use == 0
    await_sessions(mesh_storage_url, 0)


def test_a_busy_pool_is_connected_on_the_asyncio_side(mesh_storage_url: str) -> None:
    async def main() -> None:
        settings = Settings(url=mesh_storage_url, pool_size=2, pool_timeout=0)
        async with AsyncMeshStorage.open(settings=settings) as storage:
            async with storage.begin() as one, storage.begin() as other:
                await one.state.put("one", b"")
                await other.state.put("other", b"")
                begun = time.monotonic()
                assert [facts(await storage.health()) for _ in range(3)] == [busy(2)] * 3
                assert time.monotonic() - begun < 1, "it waits for nobody"
                await asyncio.to_thread(await_sessions, mesh_storage_url, 2)
                with pytest.raises(UnavailableError):
                    await storage.begin().__aenter__()
            async with storage.begin() as one, storage.begin() as other:
                assert (await one.state.count(), await other.state.count()) == (2, 2)
                with pytest.raises(UnavailableError):
                    await storage.begin().__aenter__()
            assert (await storage.health()).pool_in_use == 0
        await asyncio.to_thread(await_sessions, mesh_storage_url, 0)

    asyncio.run(main())


def test_three_silent_hosts_keep_it_no_longer_than_two_seconds() -> None:
    """The sockets take connections, and nobody ever answers."""
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        settings = Settings(url="postgresql://u@" + ",".join(f"127.0.0.1:{port}" for port in ports) + "/mesh")

        async def ask() -> Health:
            async with AsyncMeshStorage(settings, open_server(settings)) as storage:
                begun = time.monotonic()
                health = await storage.health()
                took.append(time.monotonic() - begun)
                return health

        took: list[float] = []
        with MeshStorage(settings, open_server(settings)) as storage:
            begun = time.monotonic()
            answers = [storage.health()]
            took.append(time.monotonic() - begun)
        answers.append(asyncio.run(ask()))
    for health in answers:
        assert (health.ok, health.connected, type(health.error)) == (False, False, StorageTimeoutError)
    assert max(took) < 2 + TOLERANCE_S


def test_a_revision_that_cannot_be_read_in_time_leaves_the_other_facts(mesh_storage_url: str) -> None:
    async def ask() -> Health:
        async with AsyncMeshStorage(settings, open_server(settings)) as storage:
            return await storage.health()

    settings = Settings(url=mesh_storage_url)
    with (
        MeshStorage.open(mesh_storage_url) as storage,
        psycopg.connect(mesh_storage_url) as other,
    ):
        other.execute("LOCK TABLE mesh_alembic_version")
        begun = time.monotonic()
        answers = [storage.health()]
        assert time.monotonic() - begun < 2 + TOLERANCE_S
        answers.append(asyncio.run(ask()))
        other.rollback()
        assert storage.health().ok
    for health in answers:
        assert (health.ok, health.connected, health.writable, health.revision) == (False, True, True, None)
        assert isinstance(health.error, StorageTimeoutError)

"""PgBouncer in transaction mode, a real one: more clients than sessions, limits that hold and leak nowhere, refusals.

That everything else goes as without it is shown by tests/contract, all of which runs behind PgBouncer too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from mesh_storage import (
    ConfigurationError,
    Mesh,
    MeshStorage,
    Message,
    Node,
    Route,
    Settings,
    StorageTimeoutError,
    UnavailableError,
    UnitOfWork,
    cli,
    schema,
)
from mesh_storage.aio import AsyncMeshStorage
from tests.aio.conftest import eventually
from tests.contract.conftest import Open, opener
from tests.pgbouncer import pgbouncer

CLIENTS, ROUNDS = 8, 10


@pytest.fixture(params=["sync", "asyncio", pytest.param("uvloop", marks=pytest.mark.slow)])
def opens(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Yield what opens a storage of the sync API, or of the async one behind the same names."""
    with opener(request.param) as given:
        yield lambda url, **settings: given(url, **{"transaction_pooling": True} | settings)


@pytest.fixture
def pooled(mesh_storage_url: str) -> Iterator[str]:
    """Yield the URL of a database by a pooler that has two sessions for it."""
    with pgbouncer(mesh_storage_url, sessions=2) as url:
        yield url


@pytest.fixture
def server(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that goes by no pooler."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def asked(uow: UnitOfWork, *names: str) -> list[str]:
    columns = ", ".join(f"current_setting('{name}')" for name in names)
    return list(uow.session.execute(text(f"SELECT {columns}")).one())


def write_everywhere(uow: UnitOfWork, name: str, number: int, *, leads: bool) -> None:
    here, there = (uow.nodes.add(Node(name=f"{name}-{end}", ip_address="10.0.0.1")) for end in "ab")
    uow.routes.add(Route(source_node_id=here.id, target_node_id=there.id))
    mesh = uow.meshes.add(Mesh(name=name))
    mesh.description = "changed"
    uow.meshes.update(mesh)
    uow.messages.store(Message(id=name, from_node=here.name, to_node=there.name, content=b"1"))
    with uow.savepoint():
        uow.state.put(name, b"1")
        uow.node_states.put_many({here.id: {"n": number}, there.id: {}})
        uow.node_states.merge(here.id, {"m": number})
    uow.routing_table.put(name, {"n": number})
    uow.runtime_config.put(name, number)
    if leads:
        uow.consensus_log.append(1, number + 1, name)


def read_everywhere(uow: UnitOfWork, name: str, number: int) -> None:
    here, there = (uow.nodes.get_by_name(f"{name}-{end}") for end in "ab")
    assert len(uow.routes.between(here.id, there.id)) == 1
    assert uow.meshes.get_by_name(name).description == "changed"
    assert [message.id for message in uow.messages.stream(from_node=here.name)] == [name]
    assert uow.state.get(name).value == b"1"
    assert uow.node_states.get(here.id).state == {"n": number, "m": number}
    assert uow.routing_table.get(name).route == {"n": number}
    assert uow.runtime_config.value(name) == number
    assert uow.consensus_log.first_index() <= uow.consensus_log.last_index()
    assert uow.node_states.stale(timedelta(days=1)) == []


def test_all_repositories_work_for_more_clients_than_sessions(
    opens: Open, pooled: str, server: psycopg.Connection[Any]
) -> None:
    together = threading.Barrier(CLIENTS)
    with opens(pooled, pool_size=CLIENTS) as storage:

        def work(client: int) -> None:
            together.wait(60)
            for number in range(ROUNDS):
                name = f"{client}-{number}"
                with storage.begin() as uow:
                    write_everywhere(uow, name, number, leads=client == 0)
                with storage.begin(read_only=True) as uow:
                    read_everywhere(uow, name, number)

        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(work, range(CLIENTS)))
        with storage.begin(read_only=True, isolation="repeatable read") as uow:
            written = CLIENTS * ROUNDS
            assert uow.nodes.count() == uow.node_states.count() == 2 * written
            assert uow.consensus_log.last_index() == uow.consensus_log.count() == ROUNDS
            assert uow.messages.count() == uow.state.count() == uow.routing_table.count() == written
    sessions = server.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    ).fetchone()
    assert sessions == (2,)


def test_without_the_setting_pgbouncer_refuses_the_connection(opens: Open, pooled: str) -> None:
    with (
        pytest.raises(UnavailableError, match="unsupported startup parameter: options"),
        opens(pooled, transaction_pooling=False),
    ):
        pass


def test_in_session_mode_the_setting_is_needed_as_well(opens: Open, mesh_storage_url: str) -> None:
    with pgbouncer(mesh_storage_url, sessions=2, more="pool_mode = session") as url:
        with (
            pytest.raises(UnavailableError, match="unsupported startup parameter: options"),
            opens(url, transaction_pooling=False),
        ):
            pass
        with opens(url, statement_timeout=7) as storage, storage.begin() as uow:
            uow.state.put("k", b"v")
            assert asked(uow, "statement_timeout", "TimeZone") == ["7s", "UTC"]


def test_in_session_mode_options_that_are_ignored_set_no_limits(opens: Open, mesh_storage_url: str) -> None:
    more = "pool_mode = session\nignore_startup_parameters = options"
    with (
        pgbouncer(mesh_storage_url, sessions=2, more=more) as url,
        opens(url, transaction_pooling=False, statement_timeout=7) as storage,
        storage.begin() as uow,
    ):
        uow.state.put("k", b"v")
        assert asked(uow, "statement_timeout", "idle_in_transaction_session_timeout") == ["0", "0"]


def test_without_the_setting_prepared_statements_collide(opens: Open, mesh_storage_url: str) -> None:
    def read(storage: MeshStorage) -> None:
        for _ in range(10):  # psycopg prepares what was executed five times.
            with storage.begin(read_only=True) as uow:
                uow.state.find("k")

    with pgbouncer(mesh_storage_url, sessions=1, more="ignore_startup_parameters = options") as url:
        with opens(url) as one, opens(url) as other:
            read(one)
            read(other)
        with (
            opens(url, transaction_pooling=False) as one,
            opens(url, transaction_pooling=False) as other,
            pytest.raises(ConfigurationError, match="transaction_pooling") as error,
        ):
            read(one)
            read(other)
        assert error.value.sqlstate == "42P05"  # duplicate_prepared_statement


def test_limits_and_the_time_zone_are_of_each_transaction_and_of_no_session(
    opens: Open, mesh_storage_url: str, server: psycopg.Connection[Any]
) -> None:
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "TimeZone")
    more = (*names, "transaction_read_only", "transaction_isolation", "synchronous_commit")
    server.execute(f"ALTER DATABASE {server.info.dbname} SET timezone = 'Asia/Tokyo'")
    server.execute(f"ALTER DATABASE {server.info.dbname} SET synchronous_commit = on")
    with (
        pgbouncer(mesh_storage_url, sessions=1) as url,
        psycopg.connect(url, autocommit=True, prepare_threshold=None) as plain,
        opens(url) as usual,
        opens(url, statement_timeout=7, lock_timeout=0, idle_in_transaction_timeout=9) as other,
    ):

        def leaked() -> tuple[Any, ...]:
            row = plain.execute(f"SELECT {', '.join(f'current_setting({name!r})' for name in more)}").fetchone()
            assert row is not None
            return row

        clean = leaked()
        assert clean == ("0", "0", "0", "Asia/Tokyo", "off", "read committed", "on")
        for _ in range(3):
            with usual.begin() as uow:
                assert asked(uow, *more) == ["30s", "10s", "1min", "UTC", "off", "read committed", "on"]
            assert leaked() == clean
            with other.begin(read_only=True, isolation="serializable") as uow:
                assert uow.state.find("k") is None
                assert asked(uow, *more) == ["7s", "0", "9s", "UTC", "on", "serializable", "on"]
            assert leaked() == clean
            with usual.begin(durability="relaxed") as uow:
                stored = uow.state.put("relaxed", b"")
                assert stored.updated_at is not None
                assert stored.updated_at.utcoffset() == timedelta(0)
            assert leaked() == clean
            with usual.unit_of_work(read_only=True) as uow:
                uow.state.get("relaxed")
                uow.rollback()
                assert asked(uow, *names) == ["30s", "10s", "1min", "UTC"]
            with pytest.raises(ZeroDivisionError), other.begin(timeout=5) as uow, uow.savepoint():
                uow.state.delete("relaxed")
                raise ZeroDivisionError
            assert leaked() == clean


def test_a_statement_and_a_lock_are_limited_also_where_one_reads(
    opens: Open, pooled: str, server: psycopg.Connection[Any]
) -> None:
    with opens(pooled, lock_timeout=0.1, statement_timeout=0.1) as storage:
        with pytest.raises(StorageTimeoutError) as error, storage.begin(read_only=True) as uow:
            uow.session.execute(text("SELECT pg_sleep(30)"))
        assert error.value.sqlstate == "57014"
    with opens(pooled, lock_timeout=0.1) as storage, server.transaction():
        server.execute("LOCK TABLE mesh_state, mesh_alembic_version")
        with pytest.raises(StorageTimeoutError) as error, storage.begin(read_only=True) as uow:
            uow.state.find("k")
        assert error.value.sqlstate == "55P03"
        with pytest.raises(StorageTimeoutError), opens(pooled, lock_timeout=0.1):
            pass


def test_a_wait_for_a_session_is_limited_by_the_timeout_and_by_the_pools(opens: Open, mesh_storage_url: str) -> None:
    with pgbouncer(mesh_storage_url, sessions=1) as url, opens(url, pool_timeout=0.1) as storage:
        with storage.begin() as holder:
            holder.state.put("k", b"held")
            with pytest.raises(StorageTimeoutError, match="pooler"), storage.begin(timeout=0.2) as uow:
                uow.state.put("k", b"late")
            with pytest.raises(UnavailableError, match="pool_timeout") as error, storage.begin() as uow:
                uow.state.put("k", b"late")
            assert error.value.retryable
            assert isinstance(storage.health().error, StorageTimeoutError)
        for _ in range(3):
            with storage.begin() as uow:
                assert uow.state.get("k").value == b"held"
        assert storage.health().ok


def test_what_became_of_connections_and_sessions_is_noticed(
    opens: Open, pooled: str, server: psycopg.Connection[Any]
) -> None:
    def put(uow: UnitOfWork) -> None:
        uow.state.put("k", b"v")
        deaths.pop()()

    def kill_sessions() -> None:
        server.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    def kill_clients() -> None:
        with psycopg.connect(pooled, dbname="pgbouncer", autocommit=True) as console:
            for command in ("KILL", "RESUME"):
                console.execute(f"{command} {server.info.dbname}".encode())

    with opens(pooled) as storage:
        for death in (kill_sessions, kill_clients):
            deaths: list[Callable[[], None]] = [lambda: None, death]
            storage.run(put)
            assert deaths == []
            with storage.begin() as uow:
                uow.state.get("k")
            death()  # Nobody uses them at this moment.
            with storage.begin() as uow:
                uow.state.delete("k")


@pytest.mark.parametrize("waits_for", ["session", "lock"])
def test_a_cancelled_task_frees_its_session_and_takes_none(
    mesh_storage_url: str, server: psycopg.Connection[Any], waits_for: str
) -> None:
    async def main(url: str) -> None:
        settings = Settings(url=SecretStr(url), transaction_pooling=True)
        async with AsyncMeshStorage.open(settings=settings) as storage:
            begun = asyncio.Event()

            async def work() -> None:
                async with storage.begin() as uow:
                    begun.set()
                    await uow.state.put("k", b"late")

            async with storage.begin() as holder:
                await holder.state.put("k", b"held")
                task = asyncio.create_task(work())
                await begun.wait()
                await eventually(waiting)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task  # The holder goes on: it is not for its session or its lock that this waits.
                assert (await holder.state.get("k")).value == b"held"
            async with asyncio.TaskGroup() as tasks:
                for number in range(10):
                    tasks.create_task(storage.run(lambda uow, key=str(number): uow.state.put(key, b"")))
            async with storage.begin(read_only=True) as uow:
                assert await uow.state.count() == 11
                assert (await uow.state.get("k")).value == b"held"

    def waiting() -> bool:
        if waits_for == "lock":
            row = server.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
            return row is not None and row[0] > 0
        with psycopg.connect(console, dbname="pgbouncer", autocommit=True) as connection:
            cursor = connection.execute("SHOW POOLS")
            assert cursor.description is not None
            position = [column.name for column in cursor.description].index("cl_waiting")
            return any(int(row[position]) for row in cursor)

    with pgbouncer(mesh_storage_url, sessions=1 if waits_for == "session" else 2) as console:
        asyncio.run(main(console))


def test_what_needs_a_session_is_refused(
    opens: Open, mesh_storage_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    refused = pytest.raises(ConfigurationError, match="transaction_pooling to false")
    with opens(mesh_storage_url) as storage:
        with refused:
            storage.backup(tmp_path / "backup")
        storage_direct: MeshStorage
        with opens(mesh_storage_url, transaction_pooling=False) as storage_direct:
            storage_direct.backup(tmp_path / "backup")
        with refused:
            storage.restore(tmp_path / "backup", overwrite=True)
    monkeypatch.setenv("MESH_STORAGE_TRANSACTION_POOLING", "true")
    with refused:
        schema.upgrade(mesh_storage_url)
    assert cli.main(["upgrade", "--url", mesh_storage_url]) == cli.Exit.CONFIGURATION
    assert "transaction_pooling" in capsys.readouterr().err
    assert cli.main(["schema", "--url", mesh_storage_url]) == cli.Exit.OK


def test_options_of_a_session_are_refused_and_those_of_the_environment_left_out(
    opens: Open, pooled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="options"), opens(f"{pooled}&options=-c%20search_path%3Dx"):
        pass
    monkeypatch.setenv("PGOPTIONS", "-c search_path=nowhere")
    with opens(pooled) as storage:
        assert storage.health().ok


def test_a_bundled_server_has_no_pooler(opens: Open) -> None:
    with opens("memory:") as storage, storage.begin(read_only=True) as uow:
        assert asked(uow, "statement_timeout", "TimeZone") == ["30s", "UTC"]

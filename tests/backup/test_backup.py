"""What a backup holds, and how it is made while others work."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backup_help import contents, fill, server_of, shape

from mesh_storage import (
    ClosedError,
    ConfigurationError,
    MeshStorage,
    Message,
    SchemaMismatchError,
    Settings,
    StorageTimeoutError,
    backup,
    schema,
)
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.backup import Progress, catalog, client_tools
from mesh_storage.backup.manifest import Manifest
from mesh_storage.models import Base
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server
from mesh_storage.testing import Databases
from tests.servers import PASSWORD


def spy_on_pg_dump(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], object] = lambda: None
) -> list[tuple[list[str], dict[str, str]]]:
    """Note the arguments and environment that pg_dump gets, and do something before it starts."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    real = client_tools.run

    def run(arguments: Any, *, environment: dict[str, str], **rest: Any) -> None:
        calls.append(([str(argument) for argument in arguments], environment))
        before()
        real(arguments, environment=environment, **rest)

    monkeypatch.setattr(client_tools, "run", run)
    return calls


def test_a_round_trip_gives_every_row_index_and_constraint_back(
    storage: MeshStorage, server: Server, bare: Server, tmp_path: Path
) -> None:
    fill(storage)
    storage.backup(tmp_path / "backup")
    backup.restore(bare, tmp_path / "backup")
    assert contents(bare) == contents(server)
    assert all(contents(server).values())
    assert shape(bare) == shape(server)


def test_a_deployed_database_without_rows_counts_as_empty(
    storage: MeshStorage, server: Server, mesh_storage_databases: Databases, tmp_path: Path
) -> None:
    fill(storage)
    storage.backup(tmp_path / "backup")
    with mesh_storage_databases.fresh() as url, MeshStorage.open(url) as other:
        assert other.restore(tmp_path / "backup").revision == schema.head()
        assert other.health().ok
        assert contents(server_of(url)) == contents(server)


@pytest.mark.parametrize(("source", "target"), [("15", "15"), ("15", "16"), ("15", "18"), ("16", "18"), ("18", "15")])
def test_a_backup_goes_from_one_server_version_to_another(
    databases_of: Callable[[str], Databases], source: str, target: str, tmp_path: Path
) -> None:
    with databases_of(source).fresh() as old, databases_of(target).fresh(with_schema=False) as new:
        with MeshStorage.open(old) as storage:
            fill(storage)
            made = storage.backup(tmp_path / "backup")
        assert made.server_version.split(".")[0] == source
        backup.restore(server_of(new), tmp_path / "backup")
        assert contents(server_of(new)) == contents(server_of(old))


def test_only_the_tables_of_this_library_and_its_revision_are_in_it(
    storage: MeshStorage, server: Server, bare: Server, tmp_path: Path
) -> None:
    with engine.connect(server.connect) as connection:
        connection.execute("CREATE TABLE foreign_matter (id int)")
    made = storage.backup(tmp_path / "backup")
    assert set(made.rows) == {*Base.metadata.tables, "mesh_consensus_log_stale", "mesh_alembic_version"}
    backup.restore(bare, tmp_path / "backup")
    with engine.connect(bare.connect) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        assert {name for (name,) in tables} == {*made.rows, "mesh_changes", "mesh_changes_epoch"}
        assert catalog.revision(connection, "public") == schema.head()


def test_it_is_a_directory_of_pg_dump_and_a_manifest(storage: MeshStorage, server: Server, tmp_path: Path) -> None:
    fill(storage)
    made = storage.backup(tmp_path / "backup")
    files = {str(path.relative_to(tmp_path / "backup")) for path in (tmp_path / "backup").rglob("*") if path.is_file()}
    assert files == {"manifest.json", *made.files}
    assert "dump/toc.dat" in files
    for name, checksum in made.files.items():
        assert hashlib.sha256((tmp_path / "backup" / name).read_bytes()).hexdigest() == checksum
    said = json.loads((tmp_path / "backup" / "manifest.json").read_text())
    assert said["format"] == 1
    assert said["revision"] == schema.head()
    assert said["tool_version"].split(".")[0] >= said["server_version"].split(".")[0]
    assert said["rows"] == {table: len(rows) for table, rows in contents(server).items()}
    assert Manifest.read(tmp_path / "backup") == made
    listing = subprocess.run(
        [client_tools.find(made.tool_major).directory / "pg_restore", "--list", tmp_path / "backup" / "dump"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Format: DIRECTORY" in listing
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0


def test_what_is_written_after_the_snapshot_is_not_in_it(
    storage: MeshStorage, server: Server, bare: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(storage)
    before = contents(server)

    def write() -> None:
        with storage.begin() as uow:
            uow.messages.store(Message(id="late", from_node="a", to_node="b", content=b""))
            uow.state.put("late", b"")

    spy_on_pg_dump(monkeypatch, write)
    made = storage.backup(tmp_path / "backup")
    assert made.rows == {table: len(rows) for table, rows in before.items()}
    assert contents(server) != before
    backup.restore(bare, tmp_path / "backup")
    assert contents(bare) == before


def test_it_is_consistent_over_all_tables_while_writers_run(storage: MeshStorage, bare: Server, tmp_path: Path) -> None:
    """Every commit of the writers keeps as many messages as entries of the state."""
    stop = threading.Event()

    def write(writer: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with storage.begin(durability="relaxed") as uow:
                uow.messages.store(Message(id=f"m-{writer}-{number}", from_node="a", to_node="b", content=b"x" * 99))
                uow.state.put(f"s-{writer}-{number}", b"")

    threads = [threading.Thread(target=write, args=[writer]) for writer in range(3)]
    for thread in threads:
        thread.start()
    try:
        made = storage.backup(tmp_path / "backup", jobs=3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    backup.restore(bare, tmp_path / "backup")
    rows = {table: len(rows) for table, rows in contents(bare).items()}
    assert rows == made.rows
    assert rows["mesh_messages"] == rows["mesh_state"] > 0
    with storage.begin(read_only=True) as uow:
        assert uow.messages.count() > made.rows["mesh_messages"]


def test_a_table_that_is_locked_for_too_long_is_a_timeout(
    mesh_storage_url: str, server: Server, tmp_path: Path
) -> None:
    with (
        MeshStorage.open(settings=Settings(url=mesh_storage_url, lock_timeout=0.2)) as storage,
        engine.connect(server.connect) as connection,
        connection.transaction(),
    ):
        connection.execute("LOCK TABLE mesh_state")
        with pytest.raises(StorageTimeoutError):
            storage.backup(tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


def test_jobs_read_tables_in_parallel(storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy_on_pg_dump(monkeypatch)
    storage.backup(tmp_path / "backup", jobs=3)
    assert "--jobs=3" in calls[0][0]
    assert "--format=directory" in calls[0][0]


def test_progress_goes_through_all_steps_up_to_their_ends(storage: MeshStorage, tmp_path: Path) -> None:
    fill(storage)
    seen: list[Progress] = []
    made = storage.backup(tmp_path / "backup", progress=seen.append, verify=True)
    assert list(dict.fromkeys(progress.step for progress in seen)) == ["dump", "sum", "check", "load", "index"]
    for step in ("dump", "sum", "check", "load", "index"):
        of_step = [progress for progress in seen if progress.step == step]
        done = [progress.done for progress in of_step]
        assert done == sorted(done)
        assert of_step[-1].done == of_step[-1].total
    assert next(progress.total for progress in seen if progress.step == "load") == sum(made.rows.values())


def test_progress_tells_the_rows_while_pg_dump_reads(
    storage: MeshStorage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.connect(server.connect) as connection:
        connection.execute(
            "INSERT INTO mesh_messages (id, from_node, to_node, content) SELECT n::text, 'a', 'b',"
            " decode(repeat(md5(n::text), 64), 'hex') FROM generate_series(1, 30000) AS n"
        )
    monkeypatch.setattr(client_tools, "_TICK_S", 0.01)
    seen: list[Progress] = []
    storage.backup(tmp_path / "backup", progress=seen.append)
    assert any(0 < progress.done < progress.total for progress in seen)


def test_what_progress_raises_ends_it_and_leaves_nothing(storage: MeshStorage, tmp_path: Path) -> None:
    def stop(_: Progress) -> None:
        raise BrokenPipeError("nobody reads this")

    with pytest.raises(BrokenPipeError):
        storage.backup(tmp_path / "backup", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_password_goes_by_the_environment(
    databases_of: Callable[[str], Databases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy_on_pg_dump(monkeypatch)
    with databases_of("15").fresh() as url, MeshStorage.open(url) as storage:
        for name, value in {"PGPASSWORD": "another", "PGHOST": "nowhere.invalid", "PGSSLMODE": "verify-full"}.items():
            monkeypatch.setenv(name, value)
        storage.backup(tmp_path / "backup")
        for name in ("PGPASSWORD", "PGHOST", "PGSSLMODE"):
            monkeypatch.delenv(name)
    ((arguments, environment),) = calls
    assert environment["PGPASSWORD"] == PASSWORD
    assert not any(PASSWORD in argument for argument in arguments)
    assert PASSWORD not in (tmp_path / "backup" / "manifest.json").read_text()


def test_of_several_hosts_pg_dump_gets_the_one_of_the_snapshot(server: Server, tmp_path: Path) -> None:
    host, port = server.connect["host"], server.connect["port"]
    several = Server({**server.connect, "host": f"/nowhere,{host}", "port": f"1,{port}", "target_session_attrs": "any"})
    assert backup.backup(several, tmp_path / "backup").revision == schema.head()


def test_a_secret_that_has_no_safe_way_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sslpassword"):
        backup.backup(Server({**server.connect, "sslpassword": "hush"}), tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_the_schema_has_nothing_to_back_up(bare: Server, tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatchError, match="no mesh_storage schema"):
        backup.backup(bare, tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


def test_a_database_of_a_newer_schema_is_not_backed_up_in_part(server: Server, tmp_path: Path) -> None:
    with engine.connect(server.connect) as connection:
        connection.execute("UPDATE mesh_alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaMismatchError, match="9999"):
        backup.backup(server, tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


def test_a_user_who_may_not_read_gets_a_clear_error(server: Server, tmp_path: Path) -> None:
    role = f"reader_{os.getpid()}"
    with engine.connect(server.connect) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}'".encode())
        try:
            with pytest.raises(ConfigurationError, match="denied"):
                backup.backup(Server({**server.connect, "user": role, "password": PASSWORD}), tmp_path / "backup")
        finally:
            connection.execute(f"DROP ROLE {role}".encode())
    assert list(tmp_path.iterdir()) == []


def test_verify_restores_it_into_a_throw_away_server(storage: MeshStorage, tmp_path: Path) -> None:
    fill(storage)
    made = storage.backup(tmp_path / "backup")
    assert backup.verify(tmp_path / "backup").rows == made.rows


def test_a_backup_that_does_not_verify_is_none(
    storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(catalog, "count", lambda *_: next(numbers))
    with pytest.raises(backup.InvalidInputError, match="does not match its manifest"):
        storage.backup(tmp_path / "backup", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verify_asks_for_twice_the_room(storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = storage.backup(tmp_path / "backup")
    asked: list[int] = []
    real = backup.open_server

    def note(settings: Settings, *, space: int) -> Server:
        asked.append(space)
        return real(settings, space=space)

    monkeypatch.setattr(backup, "open_server", note)
    backup.verify(tmp_path / "backup")
    assert asked == [2 * made.size]


def test_tables_in_a_schema_of_their_own(storage: MeshStorage, bare: Server, tmp_path: Path) -> None:
    del storage
    elsewhere = catalog.with_namespace(bare, "My mesh\\")
    schema.upgrade_server(elsewhere)
    with engine.connect(elsewhere.connect) as connection:
        connection.execute("INSERT INTO mesh_state (key, value) VALUES ('k', 'v')")
    before = contents(elsewhere)
    made = backup.backup(elsewhere, tmp_path / "backup", verify=True)
    assert made.namespace == "My mesh\\"
    backup.restore(elsewhere, tmp_path / "backup", overwrite=True)
    assert contents(elsewhere) == before
    with pytest.raises(ConfigurationError, match="search_path"):
        backup.restore(bare, tmp_path / "backup")


def test_after_close_there_is_neither(mesh_storage_url: str, tmp_path: Path) -> None:
    storage = MeshStorage.open(mesh_storage_url)
    storage.close()
    with pytest.raises(ClosedError):
        storage.backup(tmp_path / "backup")
    with pytest.raises(ClosedError):
        storage.restore(tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["backup", "restore"])
def test_the_async_side_has_the_same_signatures(name: str) -> None:
    sync, other = getattr(MeshStorage, name), getattr(AsyncMeshStorage, name)
    assert inspect.signature(sync) == inspect.signature(other)
    assert inspect.iscoroutinefunction(other)


async def _round_trip(source: str, target: str, path: Path) -> list[Progress]:
    seen: list[Progress] = []
    thread = threading.get_ident()

    def note(progress: Progress) -> None:
        assert threading.get_ident() == thread
        seen.append(progress)

    async with AsyncMeshStorage.open(source) as storage:
        await storage.backup(path, progress=note)
    async with AsyncMeshStorage.open(target) as storage:
        await storage.restore(path, progress=note)
    for call in (storage.backup, storage.restore):
        with pytest.raises(ClosedError):
            await call(path)
    return seen


def test_the_async_side_does_the_same(
    storage: MeshStorage, mesh_storage_url: str, mesh_storage_databases: Databases, tmp_path: Path
) -> None:
    fill(storage)
    with mesh_storage_databases.fresh() as target:
        seen = asyncio.run(_round_trip(mesh_storage_url, target, tmp_path / "backup"))
        assert {progress.step for progress in seen} == {"dump", "sum", "check", "load", "index"}
        assert contents(server_of(target)) == contents(server_of(mesh_storage_url))


async def _cancel(url: str, path: Path) -> None:
    loop = asyncio.get_running_loop()

    def cancel_twice(_: Progress) -> None:
        task.cancel()
        loop.call_soon(lambda: loop.call_soon(task.cancel))

    async with AsyncMeshStorage.open(url) as storage:
        task = asyncio.create_task(storage.backup(path, progress=cancel_twice))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(path.parent.iterdir()) == []


def test_a_cancelled_one_leaves_nothing(mesh_storage_url: str, tmp_path: Path) -> None:
    asyncio.run(_cancel(mesh_storage_url, tmp_path / "backup"))


async def _fail(url: str, path: Path) -> None:
    def fail(_: Progress) -> None:
        raise LookupError("the caller's own")

    async with AsyncMeshStorage.open(url) as storage:
        await storage.backup(path, progress=fail)


def test_what_progress_raises_ends_the_async_one(mesh_storage_url: str, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="the caller's own"):
        asyncio.run(_fail(mesh_storage_url, tmp_path / "backup"))
    assert list(tmp_path.iterdir()) == []

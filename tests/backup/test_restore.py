"""A restore gives all of it, or leaves the database as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from backup_help import contents, fill, run, shape

from mesh_storage import (
    ConflictError,
    InvalidInputError,
    MeshStorage,
    MeshStorageError,
    Message,
    MissingReferenceError,
    NotFoundError,
    SchemaMismatchError,
    Settings,
    StorageTimeoutError,
    backup,
    schema,
)
from mesh_storage.backup import Progress, archive
from mesh_storage.backup.manifest import Manifest, _own_checksum
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server
from mesh_storage.testing import Databases


@pytest.fixture
def made(storage: MeshStorage, tmp_path: Path) -> Path:
    """Return a backup of a database that has changed since."""
    fill(storage)
    storage.backup(tmp_path / "backup")
    with storage.begin() as uow:
        uow.messages.store(Message(id="later", from_node="a", to_node="b", content=b"later"))
        uow.state.put("later", b"")
    return tmp_path / "backup"


def test_over_rows_it_must_be_said(storage: MeshStorage, server: Server, made: Path) -> None:
    before = contents(server)
    with pytest.raises(ConflictError, match="overwrite"):
        storage.restore(made)
    assert contents(server) == before


def test_with_overwrite_it_replaces_everything(storage: MeshStorage, server: Server, bare: Server, made: Path) -> None:
    backup.restore(bare, made)
    form = shape(server)
    with storage.begin() as uow:
        uow.nodes.count()  # the pool has a connection that knows the old tables
    storage.restore(made, overwrite=True)
    assert contents(server) == contents(bare)
    assert shape(server) == form
    with storage.begin() as uow:
        assert uow.messages.find("later") is None
        uow.messages.store(Message(id="after", from_node="a", to_node="b", content=b""))


@pytest.mark.parametrize("step", ["load", "index"])
def test_what_ends_it_half_way_leaves_the_database_as_before(
    storage: MeshStorage, server: Server, bare: Server, made: Path, step: str
) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == step and progress.done > 1:
            raise KeyboardInterrupt

    before, form = contents(server), shape(server)
    with pytest.raises(KeyboardInterrupt):
        storage.restore(made, overwrite=True, progress=stop)
    assert (contents(server), shape(server)) == (before, form)
    with pytest.raises(KeyboardInterrupt):
        backup.restore(bare, made, progress=stop)
    assert (contents(bare), shape(bare)) == ({}, [])


def test_killed_half_way_it_leaves_the_database_as_before(server: Server, mesh_storage_url: str, made: Path) -> None:
    before = contents(server)
    script = """
        import sys, time
        from mesh_storage import MeshStorage
        def wait(progress):
            if progress.step == "index":
                print("half way", flush=True)
                time.sleep(60)
        MeshStorage.open(sys.argv[1]).restore(sys.argv[2], overwrite=True, progress=wait)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), mesh_storage_url, str(made)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    assert contents(server) == before


def test_readers_see_all_or_what_was_before(storage: MeshStorage, server: Server, made: Path) -> None:
    seen: list[int] = []

    def look(progress: Progress) -> None:
        if progress.step == "load":
            # On a lock, as any reader would wait; only the wait is short here.
            with engine.connect({**server.connect, "options": "-c lock_timeout=50"}) as connection:
                try:
                    row = connection.execute("SELECT count(*) FROM mesh_messages").fetchone()
                    seen.append(row[0] if row else -1)
                except engine.psycopg.errors.LockNotAvailable:
                    pass

    storage.restore(made, overwrite=True, progress=look)
    assert seen == []


def test_tables_in_use_are_a_timeout(mesh_storage_url: str, server: Server, made: Path) -> None:
    before = contents(server)
    with MeshStorage.open(settings=Settings(url=mesh_storage_url, lock_timeout=0.2)) as storage, storage.begin() as uow:
        uow.messages.count()
        uow.state.put("x", b"")
        with pytest.raises(StorageTimeoutError):
            storage.restore(made, overwrite=True)
        uow.state.delete("x")
    assert contents(server) == before


def test_jobs_are_processes_of_the_server(storage: MeshStorage, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    real = archive.load

    def load(connection: engine.psycopg.Connection[tuple[str]], *rest: object) -> None:
        for name in ("max_parallel_maintenance_workers", "maintenance_work_mem"):
            row = connection.execute(f"SHOW {name}".encode()).fetchone()
            shown.append(row[0] if row else "")
        real(connection, *rest)

    monkeypatch.setattr(archive, "load", load)
    storage.restore(made, overwrite=True, jobs=3)
    assert shown == ["2", "192MB"]


@pytest.mark.parametrize("jobs", [0, 65])
def test_an_impossible_number_of_jobs(storage: MeshStorage, made: Path, jobs: int) -> None:
    for call in (storage.backup, storage.restore):
        with pytest.raises(InvalidInputError) as error:
            call(made, jobs=jobs)
        assert error.value.field == "jobs"


def test_where_there_is_no_backup(storage: MeshStorage, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError):
            storage.restore(path)


def _truncate(path: Path) -> None:
    file = max((path / "dump").glob("*.dat.gz"), key=lambda found: found.stat().st_size)
    file.write_bytes(file.read_bytes()[:-20])


def _flip(path: Path) -> None:
    words = bytearray((path / "dump" / "toc.dat").read_bytes())
    words[len(words) // 2] ^= 1
    (path / "dump" / "toc.dat").write_bytes(words)


def _edit(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"namespace": "public"', '"namespace": "publik"'))


HARM: dict[str, Callable[[Path], object]] = {
    "a truncated file": _truncate,
    "an altered file": _flip,
    "a missing file": lambda path: next((path / "dump").glob("*.dat.gz")).unlink(),
    "a file too many": lambda path: (path / "dump" / "1.dat.gz").write_bytes(b""),
    "an altered manifest": _edit,
    "a truncated manifest": lambda path: (path / "manifest.json").write_bytes(
        (path / "manifest.json").read_bytes()[:-30]
    ),
    "a manifest of something else": lambda path: (path / "manifest.json").write_text("[]"),
    "a manifest that is no text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
    "a manifest of a newer format": lambda path: (path / "manifest.json").write_text('{"format": 2}'),
    "a manifest that is a directory": lambda path: (
        (path / "manifest.json").unlink(),
        (path / "manifest.json").mkdir(),
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_backup_is_refused_before_anything_is_changed(
    storage: MeshStorage, server: Server, made: Path, harm: str
) -> None:
    HARM[harm](made)
    before = contents(server)
    with pytest.raises(InvalidInputError, match="cannot be used") as error:
        storage.restore(made, overwrite=True)
    assert error.value.field == "path"
    assert contents(server) == before
    with pytest.raises(InvalidInputError):
        backup.verify(made)


def rewrite(path: Path, **changes: object) -> None:
    manifest = Manifest.read(path).model_copy(update=changes)
    complete = manifest.model_copy(update={"sha256": _own_checksum(manifest)})
    (path / "manifest.json").write_text(complete.model_dump_json())


def test_rows_are_counted_before_the_commit(storage: MeshStorage, server: Server, made: Path) -> None:
    rewrite(made, rows=Manifest.read(made).rows | {"mesh_state": 77})
    before = contents(server)
    with pytest.raises(InvalidInputError, match="nothing was restored"):
        storage.restore(made, overwrite=True)
    assert contents(server) == before


def test_the_revision_is_compared_before_the_commit(storage: MeshStorage, server: Server, tmp_path: Path) -> None:
    fill(storage)
    command.downgrade(schema.alembic_config(server.connect), "0011")
    backup.backup(server, tmp_path / "backup")
    rewrite(tmp_path / "backup", revision="0010")  # which has the same columns
    before = contents(server)
    with pytest.raises(InvalidInputError, match="nothing was restored"):
        backup.restore(server, tmp_path / "backup", overwrite=True)
    assert contents(server) == before


def test_a_backup_of_a_newer_schema_is_refused(storage: MeshStorage, server: Server, made: Path) -> None:
    rewrite(made, revision="9999")
    before = contents(server)
    with pytest.raises(SchemaMismatchError, match="newer mesh_storage"):
        storage.restore(made, overwrite=True)
    assert contents(server) == before


def test_a_database_of_a_newer_schema_is_left_alone(server: Server, made: Path) -> None:
    run(server, "UPDATE mesh_alembic_version SET version_num = '9999'")
    before = contents(server)
    with pytest.raises(SchemaMismatchError, match="9999"):
        backup.restore(server, made, overwrite=True)
    assert contents(server) == before


@pytest.mark.parametrize("revision", ["0001", "0005"])
def test_a_backup_of_an_older_schema_is_upgraded(
    server: Server, bare: Server, storage: MeshStorage, tmp_path: Path, revision: str
) -> None:
    fill(storage)
    command.downgrade(schema.alembic_config(server.connect), revision)
    old = backup.backup(server, tmp_path / "old")
    assert old.revision == revision
    backup.restore(bare, tmp_path / "old")
    schema.upgrade_server(server)
    assert contents(bare) == contents(server)
    assert shape(bare) == shape(server)
    # In place of a newer schema too.
    backup.restore(server, tmp_path / "old", overwrite=True)
    assert contents(server) == contents(bare)
    assert storage.health().ok


ATTACHED = (
    (
        "CREATE TRIGGER theirs BEFORE UPDATE ON mesh_state"
        " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    ),
    "CREATE RULE theirs AS ON DELETE TO mesh_state DO ALSO NOTHING",
    "CREATE POLICY theirs ON mesh_state USING (true)",
)


def test_what_other_systems_put_onto_the_tables_is_not_in_a_backup(
    storage: MeshStorage, server: Server, bare: Server, tmp_path: Path
) -> None:
    run(server, *ATTACHED)
    fill(storage)
    storage.backup(tmp_path / "backup", verify=True)
    backup.restore(bare, tmp_path / "backup")
    assert contents(bare) == contents(server)


def test_owners_and_grants_stay(storage: MeshStorage, server: Server, made: Path) -> None:
    run(
        server,
        "DROP ROLE IF EXISTS \"the 'owner'\"",
        "CREATE ROLE \"the 'owner'\"",
        "ALTER TABLE mesh_state OWNER TO \"the 'owner'\"",
        "GRANT SELECT, INSERT ON mesh_messages TO \"the 'owner'\" WITH GRANT OPTION",
        "GRANT SELECT ON mesh_messages TO PUBLIC",
    )
    rights = (
        "SELECT relname, relowner, relacl::text FROM pg_class WHERE relname LIKE 'mesh%' AND relkind = 'r' ORDER BY 1"
    )
    try:
        with engine.connect(server.connect) as connection:
            before = connection.execute(rights).fetchall()
            storage.restore(made, overwrite=True)
            assert connection.execute(rights).fetchall() == before
    finally:
        run(server, "DROP OWNED BY \"the 'owner'\"", "DROP ROLE \"the 'owner'\"")


ADOPTED = (
    (
        "CREATE FUNCTION generate_ulid(prefix text) RETURNS text LANGUAGE sql AS"
        " $$ SELECT prefix || '_' || translate(substr(md5(gen_salt('x')), 1, 26), 'abcdef', '012345') $$"
    ),
    "CREATE DOMAIN ulid AS text CHECK (VALUE ~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$')",
    "CREATE TABLE regions (region_id ulid PRIMARY KEY)",
    (
        "ALTER TABLE nodes ALTER node_id TYPE ulid, ALTER node_id SET DEFAULT generate_ulid('node'),"
        " ALTER region_id TYPE ulid"
    ),
    "ALTER TABLE routes ALTER source_node_id TYPE ulid, ALTER target_node_id TYPE ulid, ALTER route_id TYPE ulid",
    "ALTER TABLE nodes ADD CONSTRAINT nodes_region_id_fkey FOREIGN KEY (region_id) REFERENCES regions (region_id)",
)


@pytest.fixture
def adopted(storage: MeshStorage, server: Server) -> Server:
    """Return a database as the earlier service left it: ids of its own domain, a reference to a foreign table."""
    fill(storage)
    run(server, "SET check_function_bodies = off; " + ADOPTED[0], *ADOPTED[1:])
    run(
        server,
        "INSERT INTO regions SELECT replace(node_id, 'node_', 'region_') FROM nodes",
        "UPDATE nodes SET region_id = replace(node_id, 'node_', 'region_')",
    )
    return server


def test_an_adopted_database_goes_into_an_empty_one(adopted: Server, bare: Server, tmp_path: Path) -> None:
    made = backup.backup(adopted, tmp_path / "backup", verify=True)
    assert set(made.definitions) == {"public.ulid", "public.generate_ulid(text)"}
    assert made.references == {"nodes_region_id_fkey": "public.regions"}
    backup.restore(bare, tmp_path / "backup")
    assert contents(bare) == contents(adopted)
    types = ("node_id", "generate_ulid('node'::text)")
    with engine.connect(bare.connect) as connection:
        found = connection.execute(
            "SELECT column_name, column_default FROM information_schema.columns"
            " WHERE table_name = 'nodes' AND domain_name = 'ulid' AND column_default IS NOT NULL"
        ).fetchall()
        assert found == [types]
    backup.restore(bare, tmp_path / "backup", overwrite=True)
    assert contents(bare) == contents(adopted)


def test_an_adopted_database_comes_back_with_its_foreign_key(adopted: Server, tmp_path: Path) -> None:
    backup.backup(adopted, tmp_path / "backup")
    before, form = contents(adopted), shape(adopted)
    backup.restore(adopted, tmp_path / "backup", overwrite=True)
    assert (contents(adopted), shape(adopted)) == (before, form)


def test_a_row_that_another_system_no_longer_knows_is_an_error(adopted: Server, tmp_path: Path) -> None:
    backup.backup(adopted, tmp_path / "backup")
    run(adopted, "UPDATE nodes SET region_id = NULL", "DELETE FROM regions")
    before = contents(adopted)
    with pytest.raises(MissingReferenceError) as error:
        backup.restore(adopted, tmp_path / "backup", overwrite=True)
    assert error.value.constraint == "nodes_region_id_fkey"
    assert contents(adopted) == before


def test_an_error_of_the_server_says_no_stored_value(adopted: Server, tmp_path: Path) -> None:
    backup.backup(adopted, tmp_path / "backup")
    run(adopted, "UPDATE nodes SET region_id = NULL", "DELETE FROM regions")
    with pytest.raises(MeshStorageError) as error:
        backup.restore(adopted, tmp_path / "backup", overwrite=True)
    assert "region_01" not in str(error.value)


def test_many_restore_at_once_and_one_wins(
    storage: MeshStorage, bare: Server, made: Path, mesh_storage_databases: Databases
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    del storage, mesh_storage_databases
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(backup.restore, bare, made) for _ in range(3)]
    errors = [result.exception() for result in results]
    assert sum(error is None for error in errors) == 1
    assert all(error is None or isinstance(error, ConflictError) for error in errors)
    assert {table: len(rows) for table, rows in contents(bare).items()} == Manifest.read(made).rows


def test_planner_statistics_are_there_at_once(bare: Server, made: Path) -> None:
    backup.restore(bare, made)
    with engine.connect(bare.connect) as connection:
        row = connection.execute("SELECT reltuples FROM pg_class WHERE relname = 'mesh_messages'").fetchone()
        assert row == (50.0,)

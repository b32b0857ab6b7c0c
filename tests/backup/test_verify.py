"""What a verification says: that a backup is good, that it is broken, or that it could not be verified here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backup_help import contents, fill, run, server_of

from mesh_storage import (
    ConfigurationError,
    InvalidInputError,
    MeshStorage,
    SchemaMismatchError,
    UnavailableError,
    backup,
)
from mesh_storage.backup import Progress
from mesh_storage.backup.manifest import Manifest, _own_checksum
from mesh_storage.cli import Exit, main
from mesh_storage.postgres.server import Server
from mesh_storage.testing import Databases
from tests.servers import PASSWORD

pytestmark = pytest.mark.slow


@pytest.fixture
def of_debian(databases_of: Callable[[str], Databases]) -> Iterator[Server]:
    """Yield a database on a server that has more than the bundled one: lz4, ICU, extensions."""
    with databases_of("15").fresh() as url:
        with MeshStorage.open(url) as storage:
            fill(storage)
        yield server_of(url)


VERIFIED = {
    "lz4": """
        ALTER TABLE mesh_messages ALTER content SET COMPRESSION lz4;
        ALTER TABLE nodes ALTER status SET COMPRESSION pglz
    """,
    "a tablespace": "ALTER TABLE mesh_messages SET TABLESPACE theirs",
    "roles": """
        CREATE ROLE theirs; ALTER TABLE mesh_state OWNER TO theirs; GRANT SELECT ON nodes TO theirs;
        CREATE POLICY theirs ON nodes TO theirs
    """,
    "a trigger": """
        CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
        CREATE TRIGGER theirs BEFORE INSERT ON mesh_state FOR EACH ROW EXECUTE FUNCTION theirs()
    """,
    "a foreign key": """
        CREATE TABLE theirs (name text PRIMARY KEY); INSERT INTO theirs SELECT DISTINCT status FROM nodes;
        ALTER TABLE nodes ADD CONSTRAINT theirs FOREIGN KEY (status) REFERENCES theirs
    """,
}
PREPARING = {"a tablespace": ["SET allow_in_place_tablespaces = on", "CREATE TABLESPACE theirs LOCATION ''"]}
CLEANING = {
    "a tablespace": ["ALTER TABLE mesh_messages SET TABLESPACE pg_default", "DROP TABLESPACE theirs"],
    "roles": [
        "DROP POLICY theirs ON nodes",
        "REASSIGN OWNED BY theirs TO CURRENT_USER; DROP OWNED BY theirs; DROP ROLE theirs",
    ],
}
LACKING = {
    "an extension": "CREATE EXTENSION pg_trgm; CREATE INDEX theirs ON nodes USING gin (node_name gin_trgm_ops)",
    "a type": "CREATE EXTENSION citext; ALTER TABLE nodes ADD COLUMN theirs citext",
    "a type of theirs": "CREATE TYPE theirs AS ENUM ('a'); ALTER TABLE nodes ADD COLUMN theirs theirs DEFAULT 'a'",
    "a collation": 'CREATE INDEX theirs ON nodes (node_name COLLATE "de-x-icu")',
    "a function": """
        CREATE FUNCTION theirs(text) RETURNS boolean LANGUAGE sql IMMUTABLE RETURN true;
        ALTER TABLE nodes ADD CONSTRAINT theirs CHECK (theirs(node_name))
    """,
    "a schema": "CREATE SCHEMA t; CREATE DOMAIN t.name AS text; ALTER TABLE nodes ADD COLUMN theirs t.name",
    "a table": "CREATE TABLE theirs (key varchar(255) NOT NULL); ALTER TABLE mesh_state INHERIT theirs",
}  # fmt: skip


@pytest.mark.parametrize("what", VERIFIED)
def test_it_is_good(of_debian: Server, tmp_path: Path, what: str) -> None:
    run(of_debian, *PREPARING.get(what, []), VERIFIED[what])
    try:
        backup.backup(of_debian, tmp_path / "backup", verify=True)
        before = contents(of_debian)
        backup.restore(of_debian, tmp_path / "backup", overwrite=True)
        assert contents(of_debian) == before
    finally:
        run(of_debian, *CLEANING.get(what, []))


@pytest.mark.parametrize("what", LACKING)
def test_it_could_not_be_verified_here(
    of_debian: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """And it may be restored where there is what it needs."""
    run(of_debian, LACKING[what])
    before = contents(of_debian)
    backup.backup(of_debian, tmp_path / "backup")
    with pytest.raises(ConfigurationError, match=r"could not be verified here, .*: this server lacks"):
        backup.verify(tmp_path / "backup")
    assert main(["verify", str(tmp_path / "backup")]) == Exit.CONFIGURATION == 5
    assert "could not be verified here" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="could not be verified here"):
        backup.backup(of_debian, tmp_path / "other", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]
    backup.restore(of_debian, tmp_path / "backup", overwrite=True)
    assert contents(of_debian) == before
    tables = "mesh, nodes, routes, mesh_state"
    run(of_debian, f"DROP TABLE {tables}")
    backup.restore(of_debian, tmp_path / "backup", overwrite=True)
    assert contents(of_debian) == before


def rewrite(path: Path, **changes: object) -> None:
    manifest = Manifest.read(path).model_copy(update=changes)
    complete = manifest.model_copy(update={"sha256": _own_checksum(manifest)})
    (path / "manifest.json").write_text(complete.model_dump_json())


def test_it_is_broken(storage: MeshStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = storage.backup(tmp_path / "backup")
    rewrite(tmp_path / "backup", rows=made.rows | {"mesh_state": 7})
    with pytest.raises(InvalidInputError, match="does not match its manifest"):
        backup.verify(tmp_path / "backup")
    (tmp_path / "backup" / "dump" / "toc.dat").write_bytes(b"")
    assert main(["verify", str(tmp_path / "backup"), "--json"]) == Exit.FAILED == 1
    assert "InvalidInputError" in capsys.readouterr().out


def test_a_newer_backup_could_not_be_verified_here(storage: MeshStorage, tmp_path: Path) -> None:
    storage.backup(tmp_path / "backup")
    rewrite(tmp_path / "backup", revision="9999")
    with pytest.raises(SchemaMismatchError, match="could not be verified here"):
        backup.verify(tmp_path / "backup")


def test_without_a_server_it_could_not_be_verified_here(
    storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.backup(tmp_path / "backup")

    def fail(*_: object, **__: object) -> None:
        raise UnavailableError("no room")

    monkeypatch.setattr(backup, "open_server", fail)
    with pytest.raises(UnavailableError, match=r"could not be verified here, .*no room"):
        backup.verify(tmp_path / "backup")


def test_the_command_needs_no_database(
    storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.backup(tmp_path / "backup")
    monkeypatch.setenv("MESH_STORAGE_URL", "postgresql://127.0.0.1:1/none")
    assert main(["verify", str(tmp_path / "backup"), "--jobs", "1"]) == Exit.OK
    assert capsys.readouterr().out.startswith("verified: ")


def test_a_limit_on_connections_is_no_failure_of_another_kind(server: Server, tmp_path: Path) -> None:
    role = f"limited_{os.getpid()}"
    password = PASSWORD.replace("'", "''")
    run(
        server,
        f"CREATE ROLE {role} LOGIN PASSWORD '{password}' CONNECTION LIMIT 2",
        f"GRANT pg_read_all_data TO {role}",
    )
    limited = Server({**server.connect, "user": role, "password": PASSWORD})
    try:
        with pytest.raises(UnavailableError, match="fewer jobs"):
            backup.backup(limited, tmp_path / "backup")
        assert list(tmp_path.iterdir()) == []
    finally:
        run(server, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_row_that_is_too_long_as_text_is_refused_by_name(
    storage: MeshStorage, server: Server, tmp_path: Path
) -> None:
    """A value may have nearly 1 GB, but as text bytes take twice as much."""
    del storage
    longest = (1 << 29) - 1000
    run(
        server,
        "ALTER TABLE mesh_state DROP CONSTRAINT IF EXISTS mesh_state_value_check",
        "INSERT INTO mesh_state (key, value)"
        f" VALUES ('the key', decode(repeat('00', {longest}), 'hex') || '\\x{'00' * 2000}')",
    )
    with pytest.raises(InvalidInputError) as error:
        backup.backup(server, tmp_path / "backup")
    assert "mesh_state with the key the key" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_verification_does_not_say_that_a_database_was_restored(
    storage: MeshStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(storage)
    caplog.set_level(logging.INFO, "mesh_storage")
    storage.backup(tmp_path / "made", verify=True)
    events = [vars(record).get("event") for record in caplog.records]
    assert "backup" in events
    assert "restore" not in events


def test_verify_reports_its_progress(storage: MeshStorage, tmp_path: Path) -> None:
    with storage.begin() as uow:
        for number in range(10):
            uow.state.put(f"{number}", bytes(1 << 20))
    made = storage.backup(tmp_path / "backup")
    seen: list[Progress] = []
    backup.verify(tmp_path / "backup", progress=seen.append)
    assert list(dict.fromkeys(progress.step for progress in seen)) == ["check", "load", "index"]
    loaded = [progress.done for progress in seen if progress.step == "load"]
    assert loaded == sorted(loaded)
    assert loaded[-1] == sum(made.rows.values())
    assert len(set(loaded)) > 5, "also within a table, not only after each"

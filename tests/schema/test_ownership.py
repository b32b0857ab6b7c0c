"""Which tables are ours and where they are: one answer for the upgrade, the check, health, backup and restore."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from sqlalchemy import Column, ForeignKey, Table, Text

from mesh_storage import (
    ConfigurationError,
    InvalidInputError,
    MeshStorage,
    Message,
    SchemaMismatchError,
    Settings,
    backup,
    schema,
)
from mesh_storage.backup.manifest import Manifest, _own_checksum
from mesh_storage.models import Base
from mesh_storage.postgres.server import open_server
from mesh_storage.schema import changes, tables
from mesh_storage.testing import Databases
from tests.processes import start_alembic
from tests.schema import legacy


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of an empty database."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


def leading(url: str, path: str) -> str:
    """Return the URL for connections with this search_path."""
    return f"{url}{'&' if '?' in url else '?'}options={quote('-csearch_path=' + path.replace(' ', ''))}"


def run(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def places(url: str) -> dict[str, set[str]]:
    """Return the tables of each schema."""
    with psycopg.connect(url) as connection:
        found: dict[str, set[str]] = {}
        for namespace, table in connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema)'"
        ):
            found.setdefault(namespace, set()).add(table)
        return found


def check(url: str) -> str:
    process = start_alembic(url, "check")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    return out


def test_the_names_are_those_of_a_fresh_database_and_of_the_models(mesh_storage_url: str) -> None:
    assert places(mesh_storage_url) == {"public": {*tables.TABLES}}
    assert {*Base.metadata.tables} == {*tables.SINCE} - {"mesh_consensus_log_stale"}


@pytest.mark.parametrize("revision", schema.revisions())
def test_each_revision_makes_what_is_said_of_it(url: str, revision: str) -> None:
    schema.upgrade(url, revision)
    expected = {name for name, since in tables.SINCE.items() if since <= revision}
    expected |= {*tables.LOG_TABLES} if revision >= changes.SINCE else set()
    assert places(url) == {"public": expected | {tables.VERSION_TABLE}}


def test_tables_of_the_go_service_behind_another_schema_are_adopted_whole(legacy_url: str, tmp_path: Path) -> None:
    run(legacy_url, "CREATE SCHEMA own")
    behind = leading(legacy_url, "own, public")
    schema.upgrade(behind)
    assert places(legacy_url) == {"public": {*tables.TABLES, *legacy.OTHER_TABLES}}
    assert "No new upgrade operations" in check(behind)
    with MeshStorage.open(behind) as storage:
        assert storage.health().ok
        made = storage.backup(tmp_path / "backup", verify=True)
        with storage.begin() as uow:
            uow.messages.delete("msg-1")
        assert made.rows["mesh_messages"] == 203
        assert made.namespace == "public"
    # What refers to the tables keeps a restore from replacing them.
    run(legacy_url, "DROP TABLE billing, inventory; DROP VIEW node_names; DROP TRIGGER touch_mesh ON mesh")
    with MeshStorage.open(behind) as storage:
        storage.restore(tmp_path / "backup", overwrite=True)
        with storage.unit_of_work() as uow:
            assert uow.messages.count() == 203


def test_a_schema_of_its_own_is_not_mistaken_for_that_of_another(url: str) -> None:
    run(url, "CREATE SCHEMA one", "CREATE SCHEMA two")
    former, head = schema.revisions()[-2:]
    schema.upgrade(leading(url, "one"), head)
    schema.upgrade(leading(url, "two"), former)
    assert places(url)["one"] == {*tables.TABLES}
    assert places(url)["two"] == {*tables.TABLES} - {name for name, since in tables.SINCE.items() if since == head}
    with MeshStorage.open(leading(url, "one, two")) as storage, storage.begin() as uow:
        uow.state.put("k", b"one")
    # Both are on the path, and the first counts: it is the one that unqualified names lead to.
    with pytest.raises(SchemaMismatchError, match="out of date"):
        MeshStorage.open(leading(url, "two, one"))
    schema.upgrade(leading(url, "two, one"))
    with MeshStorage.open(leading(url, "two")) as storage, storage.unit_of_work() as uow:
        assert uow.state.find("k") is None


AMBIGUOUS = {
    "a part of the tables behind another schema": (
        "CREATE SCHEMA own; CREATE TABLE public.nodes (id int)",
        "public.nodes.*would be created in own",
    ),
    "tables in two schemas": (
        "CREATE SCHEMA own; CREATE TABLE own.mesh (id int); CREATE TABLE public.nodes (id int)",
        "own.mesh, public.nodes",
    ),
    "a view of that name before the tables": (
        "CREATE SCHEMA own; CREATE VIEW own.mesh_state AS SELECT 1; CREATE TABLE public.nodes (id int)",
        "own.mesh_state",
    ),
    "no schema at all": ("DROP SCHEMA public", "no existing schema"),
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_what_is_ambiguous_is_refused_by_name_everywhere(url: str, tmp_path: Path, what: str) -> None:
    setup, words = AMBIGUOUS[what]
    run(url, setup)
    before = places(url)
    ambiguous = leading(url, "own, public")
    server = open_server(Settings(url=ambiguous))
    for call in (
        lambda: schema.upgrade(ambiguous),
        lambda: MeshStorage.open(ambiguous),
        lambda: backup.backup(server, tmp_path / "backup"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            call()
    with MeshStorage(Settings(), server) as storage:
        health = storage.health()
    assert (health.ok, health.connected, health.revision) == (False, True, None)
    assert isinstance(health.error, ConfigurationError)
    assert places(url) == before
    process = start_alembic(ambiguous, "check")
    assert "search_path" in process.communicate(timeout=60)[1]
    assert process.returncode != 0


def test_a_table_that_stands_before_ours_is_refused_by_name(mesh_storage_url: str) -> None:
    run(mesh_storage_url, "CREATE SCHEMA own", "CREATE TABLE own.nodes (id int)")
    hidden = leading(mesh_storage_url, "own, public")
    for call in (schema.upgrade, MeshStorage.open):
        with pytest.raises(ConfigurationError, match=r"deployed in schema public, .* finds own\.nodes"):
            call(hidden)
    assert MeshStorage.open(mesh_storage_url).close() is None


def test_a_table_that_is_gone_is_not_looked_for_in_another_schema(mesh_storage_url: str) -> None:
    run(mesh_storage_url, "CREATE SCHEMA own", "CREATE TABLE own.routes (id int)", "DROP TABLE public.routes")
    with pytest.raises(ConfigurationError, match=r"own\.routes"):
        MeshStorage.open(leading(mesh_storage_url, "public, own"))


@pytest.fixture
def model_of_a_service() -> Iterator[Table]:
    """Yield a table that a service declares on our Base."""
    theirs = Table("alerts", Base.metadata, Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True))
    yield theirs
    Base.metadata.remove(theirs)


def test_a_model_of_a_service_is_not_ours(mesh_storage_url: str, model_of_a_service: Table, tmp_path: Path) -> None:
    from alembic import command

    create = "CREATE TABLE alerts (node_id text PRIMARY KEY)"
    run(mesh_storage_url, create, "INSERT INTO alerts VALUES ('node')")
    server = open_server(Settings(url=mesh_storage_url))
    command.check(schema.alembic_config(server.connect))  # which raises where it finds something
    made = backup.backup(server, tmp_path / "backup")
    assert model_of_a_service.name not in made.rows
    backup.restore(server, tmp_path / "backup", overwrite=True)
    with psycopg.connect(mesh_storage_url) as connection:
        assert connection.execute("SELECT node_id FROM alerts").fetchall() == [("node",)]


@pytest.mark.parametrize("table", tables.SINCE)
def test_a_database_that_lacks_one_of_our_tables_is_not_backed_up(
    mesh_storage_url: str, tmp_path: Path, table: str
) -> None:
    run(mesh_storage_url, f"DROP TABLE {table} CASCADE")
    with pytest.raises(SchemaMismatchError, match=f"lacks the tables {table} in schema public"):
        backup.backup(open_server(Settings(url=mesh_storage_url)), tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", [*tables.SINCE, tables.VERSION_TABLE])
def test_a_backup_that_lacks_one_of_our_tables_is_neither_verified_nor_restored(
    mesh_storage_url: str, url: str, tmp_path: Path, table: str
) -> None:
    backup.backup(open_server(Settings(url=mesh_storage_url)), tmp_path / "backup")
    manifest = Manifest.read(tmp_path / "backup")
    manifest = manifest.model_copy(update={"rows": {k: v for k, v in manifest.rows.items() if k != table}})
    manifest = manifest.model_copy(update={"sha256": _own_checksum(manifest)})
    (tmp_path / "backup" / "manifest.json").write_text(manifest.model_dump_json())
    for call in (backup.verify, functools.partial(backup.restore, open_server(Settings(url=url)))):
        with pytest.raises(InvalidInputError, match=f"lacks the tables {table};"):
            call(tmp_path / "backup")
    assert places(url) == {}


def test_a_backup_of_an_old_revision_lacks_nothing(url: str, tmp_path: Path) -> None:
    schema.upgrade(url, "0005")
    made = backup.backup(open_server(Settings(url=url)), tmp_path / "backup", verify=True)
    assert "mesh_consensus_log_stale" not in made.rows


INDEXES_OF_THE_GO_SERVICE = (
    "CREATE INDEX idx_nodes_region_id ON nodes (region_id)",
    "CREATE INDEX idx_routes_source_node ON routes (source_node_id)",
    "CREATE INDEX idx_routes_target_node ON routes (target_node_id)",
    "CREATE INDEX idx_routes_bidirectional ON routes (route_bidirectional)",
)
OF_OTHERS = (
    "CREATE UNIQUE INDEX theirs_unique ON mesh_messages (created_at, id)",
    "CREATE INDEX theirs_partial ON mesh_state (updated_at) WHERE key LIKE 'a%'",
    "CREATE INDEX theirs_expression ON nodes (lower(node_name))",
    "CREATE INDEX theirs_json ON mesh_node_state USING gin (state)",
    "ALTER TABLE nodes ADD COLUMN rack text, ADD CONSTRAINT theirs_check CHECK (rack <> '')",
    "ALTER TABLE nodes ADD CONSTRAINT theirs_key UNIQUE (rack), ADD COLUMN zone text REFERENCES mesh (mesh_name)",
)


def test_what_others_have_put_onto_our_tables_is_theirs(legacy_url: str, connection: legacy.Connection) -> None:
    for statement in (*INDEXES_OF_THE_GO_SERVICE, *OF_OTHERS):
        connection.execute(statement.encode())
    names = {row[2] for row in legacy.structure(connection)}
    schema.upgrade(legacy_url)
    assert "No new upgrade operations" in check(legacy_url)
    kept = {row[2] for row in legacy.structure(connection)}
    assert names - kept == {name for name in names if name.startswith("idx_mesh_")}


def test_what_is_missing_on_our_tables_is_still_found(mesh_storage_url: str) -> None:
    for change, words in (
        ("DROP INDEX nodes_status_node_id_idx", "nodes_status_node_id_idx"),
        ("ALTER TABLE mesh DROP COLUMN mesh_public_key", "mesh_public_key"),
        ("ALTER TABLE mesh_messages ALTER from_node DROP NOT NULL", "from_node"),
    ):
        run(mesh_storage_url, change)
        process = start_alembic(mesh_storage_url, "check")
        assert words in process.communicate(timeout=60)[1]
        assert process.returncode != 0


def test_a_fresh_database_holds_nothing_beyond_the_models(mesh_storage_url: str) -> None:
    """What `alembic check` takes for others' on a database of others would be a mistake of ours here."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from mesh_storage.schema import migration

    engine = migration.create_engine(open_server(Settings(url=mesh_storage_url)).connect)
    with engine.connect() as connection:
        found: list[Any] = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    # Tables without a model, and indexes by an expression, which are not compared.
    assert {item.name for _, item in found} == {
        tables.VERSION_TABLE,
        "mesh_consensus_log_stale",
        *tables.LOG_TABLES,
        "mesh_state_key_c_idx",
        "mesh_runtime_config_key_c_idx",
    }


def test_the_session_of_a_service_is_of_the_tables_that_were_found(mesh_storage_url: str) -> None:
    run(mesh_storage_url, "CREATE SCHEMA app")
    with MeshStorage.open(leading(mesh_storage_url, "app, public")) as storage:
        with storage.begin() as uow:
            uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b""))
        assert storage.health().ok
    with MeshStorage.open(mesh_storage_url) as storage, storage.unit_of_work() as uow:
        assert uow.messages.count() == 1


def test_several_revisions_are_an_error_that_lists_them(mesh_storage_url: str) -> None:
    run(mesh_storage_url, f"INSERT INTO {tables.VERSION_TABLE} VALUES ('abc')")
    for call in (schema.upgrade, MeshStorage.open):
        with pytest.raises(
            SchemaMismatchError, match=rf"public\.mesh_alembic_version .*: {schema.head()}, abc; delete"
        ):
            call(mesh_storage_url)

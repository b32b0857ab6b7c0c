"""A database of the Go service ends at head: every row equal, others' things untouched, the old statements working."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from alembic import command

from mesh_storage import MeshStorage, Message, schema
from mesh_storage.models import Base
from mesh_storage.postgres.server import open_server
from mesh_storage.settings import Settings
from tests.schema import legacy
from tests.schema.conftest import Alembic


def files(connection: legacy.Connection) -> list[tuple[Any, ...]]:
    """Return the files of the tables and of what they keep elsewhere: another one means that all was written anew."""
    return connection.execute(
        "SELECT oid::regclass::text, relfilenode, reltoastrelid FROM pg_class WHERE relkind = 'r' "
        "AND oid::regclass::text = ANY(%s) ORDER BY 1",
        [[*legacy.TABLES, *legacy.OTHER_TABLES]],
    ).fetchall()


def test_it_ends_at_head_with_every_row_and_nothing_of_others_changed(
    legacy_url: str, connection: legacy.Connection, alembic: Alembic
) -> None:
    before = legacy.rows(connection), legacy.others(connection), files(connection)
    assert all(before[0].values())
    upgrade = alembic(legacy_url, "upgrade", "head")
    assert upgrade.wait(60) == 0, upgrade.communicate()
    assert (legacy.rows(connection), legacy.others(connection), files(connection)) == before
    check = alembic(legacy_url, "check")
    assert "No new upgrade operations" in check.communicate(timeout=60)[0]
    assert check.returncode == 0
    stale = connection.execute("SELECT term, index FROM mesh_consensus_log_stale ORDER BY index, term").fetchall()
    assert stale == legacy.STALE
    kept = connection.execute("SELECT term, index FROM mesh_consensus_log ORDER BY index").fetchall()
    assert kept == [(1, 1), (1, 2), (7, 3), (2, 4), (3, 5), (7, 9), (2**63 - 1, 2**63 - 1)]


def test_it_has_what_a_new_database_has(legacy_url: str, connection: legacy.Connection, mesh_storage_url: str) -> None:
    schema.upgrade(legacy_url)

    def keys(database: legacy.Connection) -> set[tuple[str, ...]]:
        # The check of an id has a cast where the id is of a domain.
        return {
            tuple(re.sub(r"::text|[() ]", "", str(value)) for value in row)
            for row in legacy.structure(database)
            if row[0] != "column"
        }

    with psycopg.connect(mesh_storage_url) as other:
        new = keys(other)
    adopted = keys(connection)
    assert new - adopted == set()
    assert {row[2] for row in adopted - new if row[1] in Base.metadata.tables} == {"nodes_region_id_fkey"}


def test_the_go_services_statements_work_at_head_and_at_every_revision(
    legacy_url: str, connection: legacy.Connection
) -> None:
    for number, revision in enumerate(schema.revisions()):
        schema.upgrade(legacy_url, revision)
        for position in range(len(legacy.STATEMENTS)):
            sql, parameters = legacy.statement(position, number)
            cursor = connection.execute(sql.encode(), parameters)
            if "not-there" not in str(parameters):
                assert cursor.rowcount > 0, (revision, sql)
            if "ON CONFLICT" in sql:
                assert connection.execute(sql.encode(), parameters).rowcount == 1
    assert connection.execute("SELECT count(*) FROM nodes WHERE node_id ~ '^node_0'").fetchone() != (0,)


def test_times_without_a_zone_are_utc_whatever_the_zone_of_the_database(
    legacy_url: str, connection: legacy.Connection
) -> None:
    name = connection.info.dbname
    connection.execute(f"ALTER DATABASE \"{name}\" SET timezone TO 'Asia/Tokyo'".encode())
    separator = "&" if "?" in legacy_url else "?"
    schema.upgrade(f"{legacy_url}{separator}options=-c%20timezone%3DAmerica/New_York")
    with MeshStorage.open(legacy_url) as storage, storage.unit_of_work() as uow:
        mesh = uow.meshes.get(legacy.ulid("mesh", 1))
    assert mesh.created == datetime(2024, 10, 27, 2, 30, 0, 123456, tzinfo=UTC)
    assert mesh.updated == mesh.created


def test_the_library_works_on_it(legacy_url: str) -> None:
    schema.upgrade(legacy_url)
    with MeshStorage.open(legacy_url) as storage:
        assert storage.health().ok
        with storage.begin() as uow:
            assert uow.messages.count() == 203
            assert uow.messages.get("\t").content == b"\0" * 100_000
            uow.messages.store(Message(id="new", from_node="a", to_node="b", content=b""))
            assert uow.consensus_log.get(3).term == 7
            node = uow.nodes.get_by_name("by the defaults")
            assert node.port == 8443
            uow.nodes.delete(node.id)


def test_the_way_back_gives_the_database_of_the_go_service(legacy_url: str, connection: legacy.Connection) -> None:
    before = legacy.rows(connection), legacy.others(connection), legacy.structure(connection)
    schema.upgrade(legacy_url)
    server = open_server(Settings(url=legacy_url))
    command.downgrade(schema.alembic_config(server.connect), "base")
    after = legacy.structure(connection)
    assert [row for row in after if row[1] != "mesh_alembic_version"] == before[2]
    assert (legacy.rows(connection), legacy.others(connection)) == before[:2]
    schema.upgrade(legacy_url)
    assert legacy.rows(connection) == before[0]


@pytest.mark.parametrize(
    ("table", "old", "new"),
    [
        ("mesh", "mesh_pkey", "primary"),
        ("mesh", "mesh_mesh_name_key", "uq_mesh_name"),
        ("nodes", "nodes_node_name_key", "Unique Name"),
        ("routes", "routes_source_node_id_fkey", "fk_source"),
        ("mesh_consensus_log", "mesh_consensus_log_pkey", "pk_log"),
        ("mesh_messages", "mesh_messages_pkey", "pk_messages"),
    ],
)
def test_a_key_of_another_name_gets_ours(
    legacy_url: str, connection: legacy.Connection, table: str, old: str, new: str
) -> None:
    connection.execute(f'ALTER TABLE {table} RENAME CONSTRAINT {old} TO "{new}"'.encode())
    schema.upgrade(legacy_url)
    names = {row[2] for row in legacy.structure(connection) if row[0] == "constraint" and row[1] == table}
    assert old in names
    assert new not in names


def test_an_index_that_is_missing_is_not_made_where_it_would_block_writers(
    legacy_url: str, connection: legacy.Connection
) -> None:
    connection.execute("DROP INDEX idx_mesh_messages_timestamp")
    with psycopg.connect(legacy_url) as writer:
        writer.execute("INSERT INTO mesh_messages VALUES ('open', 'a', 'b', '', 1)")
        schema.upgrade(legacy_url, "0001")  # beside the writer's open transaction
        writer.commit()
    schema.upgrade(legacy_url)
    assert not [row for row in legacy.structure(connection) if row[2].startswith("idx_")]


def test_a_part_of_the_tables_is_adopted_too(legacy_url: str, connection: legacy.Connection, alembic: Alembic) -> None:
    connection.execute("DROP TABLE mesh_runtime_config, mesh_state, routes")
    messages = "SELECT id, from_node, to_node, content, timestamp, created_at FROM mesh_messages ORDER BY id"
    before = connection.execute(messages).fetchall()
    schema.upgrade(legacy_url)
    check = alembic(legacy_url, "check")
    assert "No new upgrade operations" in check.communicate(timeout=60)[0]
    assert connection.execute(messages).fetchall() == before


def test_parameters_of_autovacuum_that_the_owner_has_set_stay(legacy_url: str, connection: legacy.Connection) -> None:
    def options() -> list[str]:
        (found,) = connection.execute(
            "SELECT reloptions FROM pg_class WHERE oid = 'mesh_messages'::regclass"
        ).fetchone()
        return sorted(found or [])

    connection.execute("ALTER TABLE mesh_messages SET (autovacuum_vacuum_scale_factor = 0.3, fillfactor = 95)")
    schema.upgrade(legacy_url)
    theirs = ["autovacuum_vacuum_scale_factor=0.3", "fillfactor=95"]
    assert options() == sorted([*theirs, "autovacuum_vacuum_threshold=1000"])
    command.downgrade(schema.alembic_config(open_server(Settings(url=legacy_url)).connect), "0013")
    assert options() == theirs

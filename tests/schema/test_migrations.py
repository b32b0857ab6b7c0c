"""The migrations: by the command line with nothing but MESH_STORAGE_URL, up and down, with data, by many at once."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psycopg
import pytest

from mesh_storage import MeshStorage, schema
from mesh_storage.models import Base
from mesh_storage.schema import tables
from mesh_storage.testing import (
    ConfigEntryFactory,
    Databases,
    LogEntryFactory,
    MeshFactory,
    MessageFactory,
    NodeStateFactory,
    RouteFactory,
    RoutingEntryFactory,
    StateEntryFactory,
)
from tests.processes import start_alembic

pytestmark = pytest.mark.slow

TABLES = sorted(name for name in Base.metadata.tables if tables.SINCE[name] == "0001")


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of an empty database."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


def alembic(url: str, *arguments: str) -> str:
    process = start_alembic(url, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def structure(url: str) -> list[tuple[object, ...]]:
    """Return all columns, constraints, indexes and storage parameters of a database."""
    with psycopg.connect(url) as connection:
        return connection.execute(
            """
            SELECT 'column', table_name, column_name, data_type, is_nullable, column_default,
                   character_maximum_length::text
            FROM information_schema.columns WHERE table_schema = 'public'
            UNION ALL
            SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated::text,
                   NULL, NULL
            FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
            UNION ALL
            SELECT 'index', tablename, indexname, indexdef, NULL, NULL, NULL FROM pg_indexes WHERE schemaname = 'public'
            UNION ALL
            SELECT 'storage', relname, reloptions::text, NULL, NULL, NULL, NULL
            FROM pg_class WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL
            ORDER BY 1, 2, 3
            """
        ).fetchall()


def fill(url: str) -> None:
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        mesh = MeshFactory.create(uow=uow)
        uow.meshes.set_join_key(mesh.id, "key")
        RouteFactory.create_batch(3, uow=uow)
        MessageFactory.create_batch(5, uow=uow)
        StateEntryFactory.create_batch(3, uow=uow)
        NodeStateFactory.create_batch(3, uow=uow)
        LogEntryFactory.create_batch(4, uow=uow)
        RoutingEntryFactory.create_batch(3, uow=uow)
        ConfigEntryFactory.create_batch(3, uow=uow)


def rows(url: str) -> dict[str, list[tuple[object, ...]]]:
    """Return what is in the columns that every revision has."""
    keys = {
        "mesh": "mesh_id, mesh_name, created",
        "nodes": "node_id, node_name, created",
        "routes": "route_id, created",
        "mesh_messages": "id, from_node, to_node, content, timestamp, created_at",
        "mesh_state": "key, value, created_at, updated_at",
        "mesh_runtime_config": "key, value, created_at, updated_at",
        "mesh_routing_table": "destination, route, created_at, updated_at",
    }
    with psycopg.connect(url, options="-c timezone=UTC") as connection:
        return {
            table: [
                tuple(value.replace(tzinfo=None) if hasattr(value, "tzinfo") else value for value in row)
                for row in connection.execute(f"SELECT {keys.get(table, '*')} FROM {table} ORDER BY 1, 2").fetchall()
            ]
            for table in TABLES
        }


def test_the_commands_need_nothing_but_the_url(url: str) -> None:
    alembic(url, "upgrade", "head")
    assert "No new upgrade operations" in alembic(url, "check")
    assert schema.head() in alembic(url, "current")
    alembic(url, "downgrade", "base")
    assert [row for row in structure(url) if row[1] != "mesh_alembic_version"] == []
    alembic(url, "upgrade", "head")


def test_the_written_sql_makes_the_same_schema(url: str, mesh_storage_url: str) -> None:
    script = alembic(url, "upgrade", "head", "--sql")
    with psycopg.connect(url, autocommit=True) as connection:
        for block in re.split(r"^(?:BEGIN|COMMIT);$", script, flags=re.MULTILINE):
            # What runs beside the traffic must be alone, as psql has it.
            parts = block.split(";\n") if "CONCURRENTLY" in block else [block]
            for part in parts:
                connection.execute(part.encode())
    assert structure(url) == structure(mesh_storage_url)
    assert "DROP TABLE" in alembic(url, "downgrade", "head:base", "--sql")


def test_every_step_up_and_down_keeps_the_data(url: str) -> None:
    alembic(url, "upgrade", "head")
    fill(url)
    before, made = rows(url), structure(url)
    for revision in reversed(schema.revisions()[:-1]):
        alembic(url, "downgrade", revision)
        assert rows(url) == before, revision
    for revision in schema.revisions()[1:]:
        alembic(url, "upgrade", revision)
        assert rows(url) == before, revision
    # A column that was dropped and added again is another one, so the order may differ, but not what is there.
    assert sorted(map(str, structure(url))) == sorted(map(str, made))


def test_many_at_once_all_succeed(url: str) -> None:
    processes = [start_alembic(url, "upgrade", "head") for _ in range(4)]
    results = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, code in results] == [0] * 4, results
    ran = [err.count("Running upgrade") for (_, err), _ in results]
    assert sorted(ran) == [0, 0, 0, len(schema.revisions())]


def test_threads_each_migrate_their_own_database(mesh_storage_databases: Databases, mesh_storage_url: str) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(4) as threads:
        urls = [stack.enter_context(mesh_storage_databases.fresh(with_schema=False)) for _ in range(4)]
        together = threading.Barrier(4)

        def upgrade(url: str) -> None:
            together.wait(60)
            schema.upgrade(url)

        list(threads.map(upgrade, urls))
        assert [structure(url) for url in urls] == [structure(mesh_storage_url)] * 4


def test_from_python_it_is_the_same(url: str, mesh_storage_url: str) -> None:
    schema.upgrade(url)
    schema.upgrade(url)
    assert structure(url) == structure(mesh_storage_url)


def test_revisions_are_in_the_order_of_their_files() -> None:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(schema.script_location()))
    assert script.get_heads() == [schema.head()]
    assert [each.revision for each in script.walk_revisions()] == list(reversed(schema.revisions()))


def test_names_follow_the_convention_and_nothing_is_redundant(mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url) as connection:
        constraints = connection.execute(
            "SELECT conrelid::regclass::text, conname, contype FROM pg_constraint "
            "WHERE connamespace = 'public'::regnamespace AND contype IN ('p', 'u', 'f', 'c')"
        ).fetchall()
        indexes = connection.execute(
            "SELECT indrelid::regclass::text, indexrelid::regclass::text, indkey::text, indcollation::text, indisvalid "
            "FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = 'public'::regnamespace"
        ).fetchall()
        naive = connection.execute(
            "SELECT table_name, column_name FROM information_schema.columns "
            "WHERE table_schema = 'public' AND data_type = 'timestamp without time zone'"
        ).fetchall()
    endings = {"p": "_pkey", "u": "_key", "f": "_fkey", "c": "_check"}
    wrong = [
        name
        for table, name, kind in constraints
        if name != "mesh_alembic_version_pkc"
        and not (name.startswith(table) and name.endswith(endings[kind.decode() if isinstance(kind, bytes) else kind]))
    ]
    assert wrong == []
    assert naive == []
    assert all(valid for *_, valid in indexes)
    columns = {name: (table, f"{key} ", collation) for table, name, key, collation, _ in indexes}
    redundant = [
        (one, other)
        for one, (table, key, collation) in columns.items()
        for other, (other_table, other_key, other_collation) in columns.items()
        if one != other and table == other_table and other_key.startswith(key) and other_collation.startswith(collation)
    ]
    assert redundant == []

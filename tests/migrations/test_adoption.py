"""A database that the earlier Go service made and still writes is adopted without losing a row, and given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mesh_storage import InvalidInputError, MeshStorage, MeshStorageError, schema
from mesh_storage.models import Base
from mesh_storage.testing import Databases

ROOT = Path(__file__).parent.parent.parent
TABLES = sorted(Base.metadata.tables)

# What the service makes its tables with, but for generate_ulid(), which takes the place of the one that needs pgcrypto.
MADE_BY_THE_GO_SERVICE = """
    CREATE DOMAIN ulid AS text CHECK (VALUE ~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$');
    CREATE FUNCTION generate_ulid(prefix text) RETURNS text LANGUAGE sql VOLATILE AS
        $$ SELECT prefix || '_' || upper(translate(left(md5(random()::text), 26), 'abcdef', 'ABCDEF')) $$;
    CREATE TABLE regions (region_id ulid PRIMARY KEY DEFAULT generate_ulid('region'));
    CREATE TABLE mesh (
        mesh_id ulid PRIMARY KEY DEFAULT generate_ulid('mesh'),
        mesh_name varchar(255) UNIQUE NOT NULL,
        mesh_description text DEFAULT '',
        allow_join boolean DEFAULT false,
        status varchar(255) DEFAULT 'STATUS_PENDING',
        created timestamp DEFAULT CURRENT_TIMESTAMP,
        updated timestamp DEFAULT CURRENT_TIMESTAMP
    );
    CREATE TABLE nodes (
        node_id ulid PRIMARY KEY DEFAULT generate_ulid('node'),
        node_name varchar(255) UNIQUE NOT NULL,
        node_description text DEFAULT '',
        node_platform varchar(255) DEFAULT 'linux-amd64',
        node_version varchar(255) DEFAULT '1.0.0',
        region_id ulid REFERENCES regions (region_id),
        node_public_key text DEFAULT '',
        ip_address varchar(255) NOT NULL,
        port int DEFAULT 8443,
        status varchar(255) DEFAULT 'STATUS_PENDING',
        created timestamp DEFAULT CURRENT_TIMESTAMP,
        updated timestamp DEFAULT CURRENT_TIMESTAMP
    );
    CREATE TABLE routes (
        route_id ulid PRIMARY KEY DEFAULT generate_ulid('route'),
        source_node_id ulid NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE,
        target_node_id ulid NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE,
        route_bidirectional boolean DEFAULT false,
        route_latency decimal DEFAULT 0,
        route_bandwidth decimal DEFAULT 0,
        route_cost int DEFAULT 100,
        status varchar(255) DEFAULT 'STATUS_PENDING',
        created timestamp DEFAULT CURRENT_TIMESTAMP,
        updated timestamp DEFAULT CURRENT_TIMESTAMP
    );
    CREATE TABLE connectors (connector_id ulid PRIMARY KEY, node_id ulid NOT NULL REFERENCES nodes (node_id));
    CREATE TABLE mesh_messages (
        id varchar(64) PRIMARY KEY,
        from_node varchar(64) NOT NULL,
        to_node varchar(64) NOT NULL,
        content bytea NOT NULL,
        timestamp bigint NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_mesh_messages_timestamp ON mesh_messages (timestamp);
    CREATE INDEX idx_mesh_messages_from_node ON mesh_messages (from_node);
    CREATE INDEX idx_mesh_messages_to_node ON mesh_messages (to_node);
    CREATE INDEX idx_mesh_messages_from_to ON mesh_messages (from_node, to_node);
    CREATE TABLE mesh_state (
        key varchar(255) PRIMARY KEY,
        value bytea NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_mesh_state_key ON mesh_state (key);
    CREATE TABLE mesh_node_state (
        node_id varchar(64) PRIMARY KEY,
        state jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_mesh_node_state_node_id ON mesh_node_state (node_id);
    CREATE TABLE mesh_consensus_log (
        term bigint NOT NULL,
        index bigint NOT NULL,
        entry jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        PRIMARY KEY (term, index)
    );
    CREATE INDEX idx_mesh_consensus_log_term ON mesh_consensus_log (term);
    CREATE INDEX idx_mesh_consensus_log_index ON mesh_consensus_log (index);
    CREATE INDEX idx_mesh_consensus_log_term_index ON mesh_consensus_log (term, index);
    CREATE TABLE mesh_routing_table (
        destination varchar(255) PRIMARY KEY,
        route jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_mesh_routing_table_destination ON mesh_routing_table (destination);
    CREATE TABLE mesh_runtime_config (
        key varchar(255) PRIMARY KEY,
        value jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    );
    CREATE INDEX idx_mesh_runtime_config_key ON mesh_runtime_config (key);
"""

INFRASTRUCTURE = """
    INSERT INTO regions DEFAULT VALUES;
    INSERT INTO mesh (mesh_name, allow_join, status, created) VALUES
        ('full', true, 'STATUS_CONNECTED', '2024-02-29 23:59:59.123456'), ('empty', NULL, NULL, NULL);
    INSERT INTO nodes (node_name, ip_address, region_id) SELECT 'a', '10.0.0.1', region_id FROM regions;
    INSERT INTO nodes (node_name, ip_address, port, status, created) VALUES ('b', 'host.example', NULL, NULL, NULL);
    INSERT INTO routes (source_node_id, target_node_id, route_latency, route_bandwidth)
        SELECT a.node_id, b.node_id, 0.1, 99999999999999999999.5 FROM nodes a, nodes b
        WHERE (a.node_name, b.node_name) = ('a', 'b');
    INSERT INTO connectors SELECT generate_ulid('connector'), node_id FROM nodes;
"""

# The statements that the service goes on to send while it is being replaced.
WRITTEN_BY_THE_GO_SERVICE = """
    INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp) VALUES ('m-{n}', 'a', 'b', '\\x00ff', {n})
        ON CONFLICT (id) DO UPDATE SET content = EXCLUDED.content;
    INSERT INTO mesh_state (key, value) VALUES ('k-{n}', '\\x01')
        ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, updated_at = CURRENT_TIMESTAMP;
    INSERT INTO mesh_node_state (node_id, state) VALUES ('n-{n}', '{{"up": true}}')
        ON CONFLICT (node_id) DO UPDATE SET state = EXCLUDED.state, updated_at = CURRENT_TIMESTAMP;
    INSERT INTO mesh_consensus_log (term, index, entry) VALUES (2, {n}, '{{"n": {n}}}');
    INSERT INTO mesh_routing_table (destination, route) VALUES ('d-{n}', '[]')
        ON CONFLICT (destination) DO UPDATE SET route = EXCLUDED.route, updated_at = CURRENT_TIMESTAMP;
    INSERT INTO mesh_runtime_config (key, value) VALUES ('c-{n}', 'null')
        ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, updated_at = CURRENT_TIMESTAMP;
"""
STALE_ENTRIES = """
    INSERT INTO mesh_consensus_log (term, index, entry, created_at) VALUES
        (0, 1, '{"stale": "twice"}', '2024-01-01 00:00+00'), (1, 1, '{"stale": "once"}', NULL)
"""


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Give the URL of an empty database."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


@pytest.fixture
def go(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Give a connection of the Go service, to the tables that it has made and filled."""
    with psycopg.connect(url, autocommit=True, options="-c timezone=Asia/Tokyo") as connection:
        connection.execute(MADE_BY_THE_GO_SERVICE.encode())
        connection.execute(INFRASTRUCTURE.encode())
        for n in (1, 2, 3):
            connection.execute(WRITTEN_BY_THE_GO_SERVICE.format(n=n).encode())
        yield connection


def alembic(url: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=environment | {"MESH_STORAGE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(url: str, *arguments: str) -> str:
    process = alembic(url, *arguments)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def rows(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """Give every row as text, by the columns that the Go service's tables have."""
    columns = {
        "mesh": "mesh_id, mesh_name, mesh_description, allow_join, status, created, updated",
        "mesh_messages": "id, from_node, to_node, content, timestamp, created_at",
    }
    with connection.transaction():
        connection.execute("SET LOCAL timezone TO 'UTC'")
        return {
            table: [
                # A time with a zone reads as one without when the zone is UTC.
                row[0].replace("+00", "")
                for row in connection.execute(
                    f"SELECT row_to_json(found)::text FROM (SELECT {columns.get(table, '*')} FROM {table}) found "
                    "ORDER BY 1".encode()
                )
            ]
            for table in [*TABLES, "regions", "connectors"]
        }


def normal(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {table: sorted(line.replace(':00"', '"') for line in lines) for table, lines in found.items()}


def test_it_is_adopted_worked_with_and_given_back_with_every_row(url: str, go: psycopg.Connection[Any]) -> None:
    before = normal(rows(go))
    run(url, "upgrade", "head")
    assert normal(rows(go)) == before
    assert "No new upgrade operations" in run(url, "check")
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert storage.health().ok
        full = uow.meshes.get_by_name("full")
        assert full.created is not None
        assert full.created.isoformat() == "2024-02-29T23:59:59.123456+00:00"
        empty = uow.meshes.get_by_name("empty")
        assert (empty.allow_join, empty.status, empty.created, empty.public_key, empty.join_key_hash) == (
            None,
            None,
            None,
            "",
            None,
        )
        assert [node.name for node in uow.nodes.stream(region_id=uow.nodes.get_by_name("a").region_id)] == ["a"]
        assert [str(route.bandwidth_mbps) for route in uow.routes.stream()] == ["99999999999999999999.5"]
        assert [entry.entry["n"] for entry in uow.consensus_log.range(1, 9)] == [1, 2, 3]
        assert uow.messages.get("m-1").content == b"\x00\xff"
    # The service goes on: its inserts, its upserts and its defaults.
    for n in (3, 4):
        go.execute(WRITTEN_BY_THE_GO_SERVICE.format(n=n).replace("(2, 3,", "(2, 5,").encode())
    go.execute("INSERT INTO mesh (mesh_name) VALUES ('made after')")
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert (uow.messages.count(), uow.state.count(), uow.consensus_log.last_index()) == (4, 4, 5)
        assert uow.meshes.get_by_name("made after").id.startswith("mesh_")
    before = normal(rows(go))
    run(url, "downgrade", "base")
    assert normal(rows(go)) == before
    go.execute("INSERT INTO nodes (node_name, ip_address) VALUES ('c', 'h')")
    run(url, "upgrade", "head")
    assert "No new upgrade operations" in run(url, "check")


def test_stale_entries_of_the_log_are_set_aside_and_brought_back(url: str, go: psycopg.Connection[Any]) -> None:
    go.execute(STALE_ENTRIES.encode())
    everything = "SELECT term, index, entry, created_at FROM mesh_consensus_log ORDER BY 1, 2"
    before = go.execute(everything.encode()).fetchall()
    assert len(before) == 5
    run(url, "upgrade", "head")
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert [(entry.term, entry.index) for entry in uow.consensus_log.range(1, 9)] == [(2, 1), (2, 2), (2, 3)]
    aside = go.execute("SELECT term, index, entry FROM mesh_consensus_log_stale ORDER BY 1, 2").fetchall()
    assert aside == [(0, 1, {"stale": "twice"}), (1, 1, {"stale": "once"})]
    run(url, "downgrade", "base")
    assert go.execute(everything.encode()).fetchall() == before


def test_stale_entries_that_come_while_it_is_adopted_do_not_stop_it(url: str, go: psycopg.Connection[Any]) -> None:
    run(url, "upgrade", "0006")
    go.execute(STALE_ENTRIES.encode())
    run(url, "upgrade", "head")
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert [(entry.term, entry.index) for entry in uow.consensus_log.range(1, 9)] == [(2, 1), (2, 2), (2, 3)]
    assert len(go.execute("SELECT FROM mesh_consensus_log_stale").fetchall()) == 2


def test_a_row_that_breaks_a_rule_is_named_and_the_rest_follows_when_it_is_gone(
    url: str, go: psycopg.Connection[Any]
) -> None:
    go.execute("INSERT INTO mesh_state (key, value) VALUES ('', '')")
    with pytest.raises(InvalidInputError) as error:
        schema.upgrade(url)
    assert (error.value.sqlstate, error.value.constraint) == ("23514", "mesh_state_key_check")
    assert go.execute("SELECT version_num FROM alembic_version").fetchall() == [("0004",)]
    go.execute("DELETE FROM mesh_state WHERE key = ''")
    schema.upgrade(url)
    assert "No new upgrade operations" in run(url, "check")


def invalid_indexes(connection: psycopg.Connection[Any]) -> list[str]:
    found = connection.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
    return [name for (name,) in found]


def test_a_migrator_that_is_killed_half_way_is_followed_by_one_that_finishes(
    url: str, go: psycopg.Connection[Any]
) -> None:
    run(url, "upgrade", "0006")
    with psycopg.connect(url) as holder:
        holder.execute("INSERT INTO mesh_state (key, value) VALUES ('held', '')")  # The concurrent index waits for it.
        migrator = alembic(url, "upgrade", "head")
        deadline = time.monotonic() + 60
        while "mesh_state_key_c_idx" not in invalid_indexes(go):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        migrator.send_signal(signal.SIGKILL)
        migrator.communicate()
        assert migrator.returncode == -signal.SIGKILL
    run(url, "upgrade", "head")
    assert invalid_indexes(go) == []
    assert "No new upgrade operations" in run(url, "check")
    assert go.execute("SELECT count(*) FROM mesh_state").fetchone() == (4,)


def test_a_migration_lets_the_traffic_go_on_while_it_waits_for_a_lock(url: str, go: psycopg.Connection[Any]) -> None:
    run(url, "upgrade", "0002")
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as traffic:
        holder.execute("SELECT * FROM mesh")
        migrator = alembic(url, "upgrade", "head")
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'mesh'::regclass"
        deadline = time.monotonic() + 60
        while go.execute(waiting.encode()).fetchone() == (0,):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        begun = time.monotonic()
        traffic.execute("SELECT * FROM mesh")  # Queues behind the migration, which gives up and tries again.
        assert time.monotonic() - begun < 10
        holder.commit()
    said, _ = migrator.communicate(timeout=120)
    assert migrator.returncode == 0, said


def test_a_revision_that_does_not_exist_is_an_error_of_ours(url: str) -> None:
    with pytest.raises(MeshStorageError):
        schema.upgrade(url, "no such revision")

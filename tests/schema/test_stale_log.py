"""Two entries of the consensus log with one index: that of the lower term is set aside, whenever it comes."""

from __future__ import annotations

import threading
import time

import psycopg
from psycopg.types.json import Jsonb

from mesh_storage import MeshStorage, schema
from tests.schema import legacy

ADD = "INSERT INTO mesh_consensus_log (term, index, entry) VALUES (%s, %s, %s)"


def test_one_that_comes_while_the_unique_index_is_built_is_set_aside_too(
    legacy_url: str, connection: legacy.Connection
) -> None:
    schema.upgrade(legacy_url, "0006")
    before = legacy.rows(connection)["mesh_consensus_log"]
    migrating = threading.Thread(target=schema.upgrade, args=[legacy_url], daemon=True)
    with psycopg.connect(legacy_url) as writer:
        # Not to be seen by what sets entries aside, but there when the index is built.
        writer.execute(ADD, [1, 9, Jsonb("came late")])
        writer.execute(ADD, [8, 4, Jsonb("of a later term")])
        migrating.start()
        deadline = time.monotonic() + 30
        while not connection.execute(
            "SELECT 1 FROM pg_stat_progress_create_index WHERE relid = 'mesh_consensus_log'::regclass "
            "AND phase = 'waiting for writers before build' AND datname = current_database()"
        ).fetchone():
            assert time.monotonic() < deadline
            assert migrating.is_alive()
            time.sleep(0.01)
        writer.commit()
    migrating.join(60)
    assert not migrating.is_alive()
    stale = connection.execute("SELECT index, term FROM mesh_consensus_log_stale ORDER BY 1, 2").fetchall()
    assert stale == sorted([(index, term) for term, index in legacy.STALE] + [(9, 1), (4, 2)])
    after = legacy.rows(connection)["mesh_consensus_log"]
    assert len(after) == len(before) + 2
    assert set(before) < set(after)
    with MeshStorage.open(legacy_url) as storage, storage.unit_of_work() as uow:
        assert uow.consensus_log.get(4).entry == "of a later term"
        assert uow.consensus_log.get(9).term == 7


def test_one_that_comes_again_is_set_aside_again_and_nothing_is_lost(
    legacy_url: str, connection: legacy.Connection
) -> None:
    schema.upgrade(legacy_url, "0009")
    connection.execute("DROP INDEX mesh_consensus_log_index_key")
    connection.execute("UPDATE mesh_alembic_version SET version_num = '0006'")
    connection.execute(ADD, [1, 3, Jsonb("again")])
    schema.upgrade(legacy_url)
    stale = connection.execute(
        "SELECT entry FROM mesh_consensus_log_stale WHERE term = 1 AND index = 3 ORDER BY set_aside_at"
    ).fetchall()
    assert stale == [({"term": 1, "index": 3},), ("again",)]

"""The statistics of the server: one cheap query for each collection, or none at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import MeshStorage, schema
from mesh_storage.embedded.server import programs
from mesh_storage.postgres.timed import TimedConnection
from mesh_storage.telemetry.statistics import QUERY
from mesh_storage.testing import MessageFactory
from tests.processes import eventually
from tests.servers import PASSWORD, PostgresServer, new_server, unused_port
from tests.telemetry.recorder import Recorder

TABLE = "db.collection.name"
NAMES = {
    "mesh_storage.changes.length",
    "mesh_storage.delivery.backlog",
    "mesh_storage.delivery.oldest_age",
    "mesh_storage.table.dead_rows",
    "mesh_storage.table.hot_ratio",
    "mesh_storage.transaction.oldest_age",
    "mesh_storage.replication.lag",
}


@pytest.fixture
def observed(mesh_storage_url: str, recorder: Recorder) -> Iterator[MeshStorage]:
    """Yield a storage that reads statistics."""
    with MeshStorage.open(mesh_storage_url, telemetry=recorder.telemetry(statistics=True)) as storage:
        yield storage


@pytest.fixture
def raw(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(mesh_storage_url, autocommit=True, application_name="raw") as connection:
        yield connection


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the queries that read statistics, as they are executed."""
    seen: list[bytes] = []
    execute = TimedConnection.execute

    def counted(self: TimedConnection, query: Any, *args: Any, **kwargs: Any) -> Any:
        if query == QUERY:
            seen.append(query)
        return execute(self, query, *args, **kwargs)

    monkeypatch.setattr(TimedConnection, "execute", counted)
    return seen


def flush(raw: psycopg.Connection[Any]) -> None:
    """Let the statistics of this session be seen at once."""
    raw.execute("SELECT pg_stat_force_next_flush()")


def test_they_are_what_the_server_says(observed: MeshStorage, recorder: Recorder, raw: psycopg.Connection[Any]) -> None:
    del observed
    raw.execute("INSERT INTO mesh_state (key, value) VALUES ('k', '')")
    raw.execute("ALTER TABLE mesh_state SET (autovacuum_enabled = off)")
    for _ in range(4):
        raw.execute("UPDATE mesh_state SET value = 'x'")
    flush(raw)
    assert recorder.by("mesh_storage.changes.length")[()] == 5
    assert recorder.by("mesh_storage.table.dead_rows", TABLE) == {
        "mesh_state": 4, "mesh_node_state": 0, "mesh_routing_table": 0, "mesh_runtime_config": 0,
    }  # fmt: skip
    # A share of nothing is none.
    assert recorder.by("mesh_storage.table.hot_ratio", TABLE) == {"mesh_state": 1.0}
    assert recorder.by("mesh_storage.replication.lag") == {}
    units = {name: metric.unit for name, metric in recorder.metrics().items() if name in NAMES}
    assert units == {
        "mesh_storage.changes.length": "{change}",
        "mesh_storage.delivery.backlog": "{delivery}",
        "mesh_storage.delivery.oldest_age": "s",
        "mesh_storage.table.dead_rows": "{row}",
        "mesh_storage.table.hot_ratio": "1",
        "mesh_storage.transaction.oldest_age": "s",
    }


def test_the_backlog_of_deliveries_and_the_age_of_the_oldest(
    observed: MeshStorage, recorder: Recorder, raw: psycopg.Connection[Any]
) -> None:
    assert recorder.by("mesh_storage.delivery.oldest_age") == {(): 0}
    with observed.begin() as uow:
        for number, receiver in enumerate(["a", "b", "b", "c"]):
            uow.messages.send(MessageFactory.build(id=f"m{number}", to_node=receiver))
        uow.messages.send(MessageFactory.build(id="later", to_node="0"), delay=timedelta(hours=1))
        uow.session.execute(text("SELECT pg_stat_force_next_flush()"))
    raw.execute("UPDATE mesh_deliveries SET available_at = now() - interval '1 hour' WHERE message_id = 'm2'")
    raw.execute(
        "UPDATE mesh_deliveries SET available_at = now() - interval '2 hours', state = 'dead' WHERE receiver = 'c'"
    )
    raw.execute("SELECT pg_stat_force_next_flush()")
    assert eventually(lambda: recorder.by("mesh_storage.delivery.backlog") == {(): 5})
    assert 3600 <= recorder.by("mesh_storage.delivery.oldest_age")[()] < 7000


def test_a_server_that_refuses_the_gauges_of_tables_is_asked_for_them_once(
    observed: MeshStorage, recorder: Recorder, raw: psycopg.Connection[Any]
) -> None:
    with observed.begin() as uow:
        uow.messages.send(MessageFactory.build(to_node="a"))
    raw.execute("CREATE SEQUENCE refusals")
    raw.execute(
        """
        CREATE FUNCTION refuse() RETURNS SETOF int AS $$ BEGIN
            PERFORM nextval('refusals');
            RAISE EXCEPTION USING ERRCODE = '0A000', MESSAGE = 'as Citus does';
        END $$ LANGUAGE plpgsql
        """
    )
    raw.execute("ALTER TABLE mesh_deliveries RENAME TO distributed")
    raw.execute("CREATE VIEW mesh_deliveries AS SELECT distributed.* FROM refuse() CROSS JOIN distributed")
    for _ in range(3):
        read = recorder.metrics().keys() & NAMES
        assert read == {"mesh_storage.transaction.oldest_age"}
    assert raw.execute("SELECT last_value, is_called FROM refusals").fetchone() == (1, True)


def test_the_oldest_transaction_is_seen_by_its_age(
    observed: MeshStorage, recorder: Recorder, raw: psycopg.Connection[Any], mesh_storage_url: str
) -> None:
    del observed
    assert recorder.by("mesh_storage.transaction.oldest_age") == {(): 0}
    with psycopg.connect(mesh_storage_url) as other:
        other.execute("SELECT 1")
        begun = raw.execute("SELECT extract(epoch FROM clock_timestamp() - xact_start)::float8 FROM pg_stat_activity "
                            "WHERE pid = %s", [other.info.backend_pid]).fetchone()  # fmt: skip
        assert begun is not None
        assert recorder.by("mesh_storage.transaction.oldest_age")[()] > begun[0] > 0


def test_a_collection_takes_one_query_on_a_connection_that_is_kept(
    observed: MeshStorage, recorder: Recorder, raw: psycopg.Connection[Any], queries: list[bytes]
) -> None:
    before = connections(raw)
    for number in range(1, 4):
        recorder.metrics()
        assert len(queries) == number
        assert connections(raw) == before + 1
    observed.close()
    recorder.metrics()
    assert len(queries) == 3
    assert eventually(lambda: connections(raw) == 0)


def connections(raw: psycopg.Connection[Any]) -> int:
    row = raw.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'raw'"
        " AND backend_type = 'client backend'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_they_can_be_switched_off(
    mesh_storage_url: str, recorder: Recorder, raw: psycopg.Connection[Any], queries: list[bytes]
) -> None:
    with MeshStorage.open(mesh_storage_url, telemetry=recorder.telemetry(statistics=False)):
        assert "db.client.connection.count" in recorder.metrics()
        assert NAMES & recorder.metrics().keys() == set()
        assert eventually(lambda: connections(raw) == 0)
    assert queries == []


def test_without_a_server_there_are_none_and_they_come_back(
    observed: MeshStorage, recorder: Recorder, raw: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert NAMES & recorder.metrics().keys()
    raw.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'mesh_storage'"
        " AND datname = current_database()"
    )
    metrics = recorder.metrics()
    assert NAMES & metrics.keys() == set()
    assert "db.client.connection.count" in metrics
    assert NAMES & recorder.metrics().keys()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    del observed


def test_a_forked_child_reads_by_a_connection_of_its_own(observed: MeshStorage, recorder: Recorder) -> None:
    del observed
    assert NAMES & recorder.metrics().keys()
    child = os.fork()
    if not child:
        os._exit(0 if NAMES & recorder.metrics().keys() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert NAMES & recorder.metrics().keys()


@pytest.mark.slow
def test_the_lag_of_a_standby_is_seen_on_both_sides(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)

    def lags() -> dict[str | None, float]:
        return recorder.by("mesh_storage.replication.lag", "mesh_storage.replica")

    def url(server: PostgresServer) -> str:
        return f"postgresql://postgres@/postgres?host={server.connect['host']}&port={server.port}"

    with (
        new_server(programs(), port=unused_port()) as primary,
        new_server(programs(), port=unused_port()) as standby,
    ):
        primary.create()
        primary.start()
        schema.upgrade(url(primary))
        standby.copy(primary, "replica")
        standby.start()
        telemetry = recorder.telemetry(statistics=True)
        with MeshStorage.open(url(primary), telemetry=telemetry) as storage:
            assert eventually(lambda: lags().keys() == {"replica"})
            with psycopg.connect(**standby.connect, autocommit=True) as raw:
                put(storage, "a")
                assert eventually(lambda: replayed(raw, "a"))
                raw.execute("SELECT pg_wal_replay_pause()")
                put(storage, "b")
                with MeshStorage.open(url(standby), telemetry=telemetry):
                    assert eventually(lambda: lags().get(None, 0) > 0)
                    raw.execute("SELECT pg_wal_replay_resume()")
                    assert eventually(lambda: lags().get(None) == 0)
            assert lags().keys() == {"replica"}


def put(storage: MeshStorage, key: str) -> None:
    with storage.begin() as uow:
        uow.state.put(key, b"v")


def replayed(raw: psycopg.Connection[Any], key: str) -> bool:
    return raw.execute("SELECT FROM mesh_state WHERE key = %s", [key]).fetchone() is not None

"""Shows that rows with times that Python cannot hold are read like all others on the sync and the async side."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import DateTime, inspect, select, text

from mesh_storage import LogEntry, MeshStorage, NodeState, StateEntry, UnitOfWork, testing
from mesh_storage.models.base import Base, attribute_names, table_of

FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)

STRANGE = {
    "infinity": LAST,
    "-infinity": FIRST,
    "0044-03-15 12:00:00+00 BC": FIRST,
    "4713-01-01 00:00:00+00 BC": FIRST,
    "10000-01-01 00:00:00+00": LAST,
    "294276-12-31 23:59:59.999999+00": LAST,
}
AT_THE_EDGE = {"0001-01-01 00:00:00+00": FIRST, "9999-12-31 23:59:59.999999+00": LAST}
FACTORIES: dict[str, type[testing.AggregateFactory[Any]]] = {
    "meshes": testing.MeshFactory,
    "nodes": testing.NodeFactory,
    "routes": testing.RouteFactory,
    "messages": testing.MessageFactory,
    "state": testing.StateEntryFactory,
    "node_states": testing.NodeStateFactory,
    "consensus_log": testing.LogEntryFactory,
    "routing_table": testing.RoutingEntryFactory,
    "runtime_config": testing.ConfigEntryFactory,
}


@pytest.fixture
def legacy(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection by which an older service writes what it likes."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def times_of(model: type[Base]) -> dict[str, str]:
    """Return the columns of a model that hold times, by the names of its attributes."""
    names = zip(attribute_names(model), table_of(model).columns, strict=True)
    # An entry that expires at such a time is not there, or is for ever.
    return {name: column.name for name, column in names if isinstance(column.type, DateTime) and name != "expires_at"}


def read(repository: Any, aggregate: Any) -> list[Any]:
    """Read a row in all ways there are."""
    if isinstance(aggregate, LogEntry):
        return [repository.find(aggregate.index), repository.get(aggregate.index), *repository.range(1, 10)]
    key = inspect(type(aggregate)).primary_key_from_instance(aggregate)[0]
    return [repository.find(key), repository.get(key), *repository.stream(), *repository.page().items]


@pytest.mark.parametrize("name", FACTORIES)
def test_a_time_that_python_cannot_hold_breaks_no_reading(
    storage: MeshStorage, mesh_storage: MeshStorage, legacy: psycopg.Connection[Any], name: str
) -> None:
    with mesh_storage.begin() as uow:
        aggregate = FACTORIES[name].create(uow=uow)
    columns = times_of(type(aggregate))
    table = table_of(type(aggregate)).name
    for stored, expected in (STRANGE | AT_THE_EDGE).items():
        for column in columns.values():
            legacy.execute(f"UPDATE {table} SET {column} = %s", [stored])
        with storage.begin(read_only=True) as uow:
            found = read(getattr(uow, name), aggregate)
            assert len(found) >= 3
            assert {getattr(each, column) for each in found for column in columns} <= {expected}
        for column in columns.values():
            row = legacy.execute(f"SELECT {column} = %s FROM {table}", [stored]).fetchone()
            assert row == (True,)


def test_ordinary_rows_beside_such_a_row_are_read_exactly(
    storage: MeshStorage, legacy: psycopg.Connection[Any]
) -> None:
    legacy.execute(
        "INSERT INTO mesh_state (key, value, created_at, updated_at) VALUES"
        " ('a', 'a', now(), 'infinity'), ('b', 'b', '2026-01-02 03:04:05.000006+00', '-infinity'),"
        " ('c', 'c', NULL, '2026-01-02 03:04:05+00')"
    )
    with storage.begin(read_only=True) as uow:
        a, b, c = uow.state.stream(batch_size=1)
        assert [entry.key for entry in uow.state.stream(batch_size=2)] == ["a", "b", "c"]
    assert (a.value, a.updated_at) == (b"a", LAST)
    assert (b.created_at, b.updated_at) == (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), FIRST)
    assert (c.created_at, c.updated_at) == (None, datetime(2026, 1, 2, 3, 4, 5, 0, UTC))


@pytest.mark.parametrize("count", [2, 2000])
def test_a_watch_reads_such_times_too(storage: MeshStorage, legacy: psycopg.Connection[Any], count: int) -> None:
    legacy.execute(
        "INSERT INTO mesh_state (key, value, created_at, updated_at, expires_at)"
        " SELECT n, '', '-infinity', '2026-01-02 03:04:05.000006+00',"
        " (ARRAY['infinity', NULL]::timestamptz[])[n %% 2 + 1]"
        " FROM generate_series(1, %s) n",
        [count],
    )
    entries: list[StateEntry] = []
    for batch in storage.watch("state"):
        entries += [change.entry for change in batch.changes if isinstance(change.entry, StateEntry)]
        if not batch.more:
            break
    assert len(entries) == count
    assert {entry.created_at for entry in entries} == {FIRST}
    assert {entry.updated_at for entry in entries} == {datetime(2026, 1, 2, 3, 4, 5, 6, UTC)}
    assert {entry.expires_at for entry in entries} == {LAST, None}


def test_a_write_that_gives_such_a_time_back_is_made_once(
    storage: MeshStorage, legacy: psycopg.Connection[Any]
) -> None:
    legacy.execute("INSERT INTO mesh_state (key, value, created_at) VALUES ('k', '1', 'infinity')")
    with storage.begin() as uow:
        assert uow.state.put("k", b"2").created_at == LAST
    with storage.begin() as uow:
        assert uow.state.get("k").value == b"2"
    assert legacy.execute("SELECT created_at::text FROM mesh_state").fetchone() == ("infinity",)


def test_a_session_reads_such_times_too(storage: MeshStorage, legacy: psycopg.Connection[Any]) -> None:
    for number, stored in enumerate(STRANGE):
        legacy.execute("INSERT INTO mesh_state (key, value, created_at) VALUES (%s, '', %s)", [str(number), stored])
    with storage.begin() as uow:
        rows = uow.session.execute(select(StateEntry.created_at).order_by(StateEntry.key)).scalars().all()
        assert rows == list(STRANGE.values())
        now = uow.session.execute(text("SELECT now()")).scalar_one()
        assert abs(now - datetime.now(UTC)) < timedelta(minutes=5)


def test_stale_goes_by_what_is_stored(uow: UnitOfWork) -> None:
    for node, stored in (("never", "infinity"), ("always", "-infinity")):
        uow.node_states.put(node, {})
        uow.session.execute(text(f"UPDATE mesh_node_state SET updated_at = '{stored}' WHERE node_id = '{node}'"))
    found: list[NodeState] = list(uow.node_states.stale(timedelta(seconds=0)))
    assert [(state.node_id, state.updated_at) for state in found] == [("always", FIRST)]

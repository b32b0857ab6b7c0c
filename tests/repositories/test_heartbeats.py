"""Shows that what is stored again and again is stored in place (HOT), by a million heartbeats: nothing grows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from mesh_storage import MeshStorage, UnitOfWork
from mesh_storage.testing import Databases
from tools import test_matrix

pytestmark = pytest.mark.slow

NODES, HEARTBEATS, BATCH = 50_000, 1_000_000, 10_000


class Use(NamedTuple):
    """What the server counted of a table, and its size."""

    updates: int
    in_place: int
    table: int
    indexes: int


class Table:
    """A table as the server sees it."""

    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        self._connection = connection
        self._name = name

    def use(self) -> Use:
        row = self._connection.execute(
            "SELECT n_tup_upd, n_tup_hot_upd, pg_relation_size(relid), pg_indexes_size(relid)"
            " FROM pg_stat_user_tables WHERE relname = %s",
            [self._name],
        ).fetchone()
        assert row is not None
        return Use(*row)

    def use_after(self, updates: int) -> Use:
        """Wait until the server has counted so many, which a session tells when it ends."""
        deadline = time.monotonic() + 60
        while (use := self.use()).updates < updates:
            assert time.monotonic() < deadline, use
            time.sleep(0.01)
        return use


@pytest.fixture(scope="module")
def own_databases(mesh_storage_databases: Databases) -> Iterator[Databases]:
    """Yield a server of the same version where nothing else runs.

    A transaction that writes in any database of a server keeps the old versions of rows in all of them.
    """
    with mesh_storage_databases.fresh() as url, psycopg.connect(url) as connection:
        version = connection.info.server_version // 10_000
    programs = test_matrix.find(str(version)) or test_matrix.find("18")
    assert programs is not None
    with test_matrix.server(programs) as url:
        made = Databases(conninfo_to_dict(url))
        yield made
        made.close()


@pytest.fixture
def mesh_storage_url(own_databases: Databases) -> Iterator[str]:
    """Yield the URL of a fresh database on it."""
    with own_databases.fresh() as url:
        yield url


@pytest.fixture
def server(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def heartbeats(ids: list[str], number: int) -> dict[str, Any]:
    return {node_id: {"status": "up", "seq": number} for node_id in ids}


def batches(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def node_ids(count: int) -> list[str]:
    return [f"node_{number:026}" for number in range(count)]


@contextmanager
def held_snapshot(url: str) -> Iterator[None]:
    """Keep all old versions of rows, as a backup does."""
    with psycopg.connect(url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT count(*) FROM mesh_node_state")
        yield


@pytest.mark.timeout(900)  # Half a minute where nothing else runs.
def test_a_million_heartbeats_are_stored_in_place(mesh_storage_url: str, server: psycopg.Connection[Any]) -> None:
    ids, table, chance = node_ids(NODES), Table(server, "mesh_node_state"), random.Random(1)
    with MeshStorage.open(mesh_storage_url) as storage:
        with storage.begin() as uow:
            for batch in batches(ids):
                uow.node_states.put_many(heartbeats(batch, 0))
        before = table.use()
        for number in range(HEARTBEATS // NODES):
            # In the order of their ids, all rows of a page are stored by one statement, which is the worst for it.
            order = ids if number % 2 else chance.sample(ids, NODES)
            for batch in batches(order):
                with storage.begin(durability="relaxed") as uow:
                    uow.node_states.put_many(heartbeats(batch, number))
    after = table.use_after(HEARTBEATS)
    assert after.updates == HEARTBEATS
    assert after.in_place >= 0.95 * HEARTBEATS
    assert after.table <= 1.1 * before.table
    assert after.indexes <= 1.1 * before.indexes


def test_they_are_stored_in_place_while_a_snapshot_keeps_the_old_versions(
    mesh_storage_url: str, server: psycopg.Connection[Any]
) -> None:
    ids, table = node_ids(BATCH), Table(server, "mesh_node_state")
    with MeshStorage.open(mesh_storage_url) as storage:
        for number in range(10):
            with held_snapshot(mesh_storage_url), storage.begin() as uow:
                uow.node_states.put_many(heartbeats(ids, number))
    after = table.use_after(9 * BATCH)
    assert after.in_place >= 0.95 * after.updates


PUTS: dict[str, Callable[[UnitOfWork, str, int], object]] = {
    "mesh_node_state": lambda uow, key, n: (
        uow.node_states.put(key, {"n": n}) if n % 2 else uow.node_states.merge(key, {"n": n})
    ),
    "mesh_state": lambda uow, key, n: uow.state.put(key, b"%d" % n),
    "mesh_routing_table": lambda uow, key, n: uow.routing_table.put(key, {"next_hop": n}),
    "mesh_runtime_config": lambda uow, key, n: uow.runtime_config.put(key, n),
}


@pytest.mark.parametrize("name", PUTS)
def test_what_is_put_one_by_one_is_stored_in_place(
    mesh_storage_url: str, server: psycopg.Connection[Any], name: str
) -> None:
    keys, table = node_ids(200), Table(server, name)
    with MeshStorage.open(mesh_storage_url) as storage:
        for number in range(21):
            for key in keys:
                with storage.begin(durability="relaxed") as uow:
                    PUTS[name](uow, key, number)
    after = table.use_after(4000)
    assert after.updates == 4000
    assert after.in_place >= 0.95 * after.updates


def test_a_routing_table_that_changes_as_a_whole_is_stored_in_place(
    mesh_storage_url: str, server: psycopg.Connection[Any]
) -> None:
    table = Table(server, "mesh_routing_table")
    with MeshStorage.open(mesh_storage_url) as storage:
        for number in range(11):
            routes = {key: {"latency_ms": number} for key in node_ids(2000)}
            with storage.begin() as uow:
                if number % 2:
                    uow.routing_table.put_many(routes)
                else:
                    uow.routing_table.replace_all(routes)
    after = table.use_after(20_000)
    assert after.updates == 20_000
    assert after.in_place >= 0.95 * after.updates


def test_no_index_covers_a_time_that_changes(server: psycopg.Connection[Any]) -> None:
    indexed = server.execute(
        "SELECT indexrelid::regclass FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey)"
        " WHERE attname = 'updated_at' AND indrelid::regclass::text LIKE 'mesh\\_%'"
    ).fetchall()
    assert indexed == []

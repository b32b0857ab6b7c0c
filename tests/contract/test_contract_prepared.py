"""Statements that connections have prepared survive what others do to the tables, on either API and behind a pooler."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import ConfigurationError, MeshStorage, MeshStorageError, Node, UnavailableError, UnitOfWork
from tests.contract.conftest import Open

ROUNDS = 8  # psycopg prepares what was executed five times.
CONNECTIONS = 4


def read(uow: UnitOfWork) -> None:
    assert uow.state.get("k").value == b"v"
    assert [entry.key for entry in uow.state.stream()] == ["k"]
    assert uow.nodes.get_by_name("node").name == "node"
    assert [node.name for node in uow.nodes.page().items] == ["node"]
    assert [node.name for node, _ in uow.nodes.with_state()] == ["node"]
    assert uow.node_states.get("n").state == {}


def write(uow: UnitOfWork) -> None:
    uow.state.put("k", b"v")
    uow.node_states.put("n", {})
    uow.node_states.merge("n", {})
    read(uow)


def warm_up(storage: MeshStorage) -> None:
    """Let all connections prepare everything."""
    with storage.begin() as uow:
        uow.nodes.add(Node(name="node", ip_address="10.0.0.1"))
    for how, work in (({}, write), ({"read_only": True}, read)):
        for _ in range(ROUNDS):
            with ExitStack() as stack:
                units = [stack.enter_context(storage.begin(**how)) for _ in range(CONNECTIONS)]
                for uow in units:
                    uow.state.find("nothing")  # Each has a connection; the locks of the writing come one by one.
                for uow in units:
                    work(uow)
                    if not how:
                        uow.commit()


@pytest.fixture
def other(mesh_storage_url: str) -> Any:
    """Yield a connection that is none of the library's."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def warm(open_storage: Open, mesh_storage_url: str) -> Any:
    """Yield a storage all of whose connections have prepared their statements."""
    with open_storage(mesh_storage_url, pool_size=CONNECTIONS) as storage:
        warm_up(storage)
        yield storage


def test_an_added_or_dropped_column_is_not_noticed(warm: MeshStorage, other: psycopg.Connection[Any]) -> None:
    for change in ("ADD COLUMN extra text DEFAULT 'x'", "ALTER COLUMN extra TYPE varchar(9)", "DROP COLUMN extra"):
        for table in ("mesh_state", "nodes", "mesh_node_state"):
            other.execute(f"ALTER TABLE {table} {change}")
        with warm.begin(read_only=True) as uow:
            read(uow)
        with warm.begin() as uow:
            write(uow)


def test_an_added_column_is_not_noticed_in_the_middle(warm: MeshStorage, other: psycopg.Connection[Any]) -> None:
    with warm.begin(read_only=True) as reading, warm.begin() as writing:
        reading.routing_table.find("to")
        writing.routing_table.put("to", {})
        for table in ("mesh_state", "nodes", "mesh_node_state"):
            other.execute(f"ALTER TABLE {table} ADD COLUMN extra int NOT NULL DEFAULT 1")
        read(reading)
        write(writing)


@pytest.mark.parametrize("how", [{}, {"read_only": True}, {"isolation": "repeatable read"}])
def test_a_column_of_another_type_costs_one_attempt_at_most(
    warm: MeshStorage, other: psycopg.Connection[Any], how: dict[str, Any]
) -> None:
    for kind in ("text", "varchar(300)"):
        other.execute(f"ALTER TABLE mesh_state ALTER key TYPE {kind}")
        other.execute(f"ALTER TABLE nodes ALTER node_name TYPE {kind}")
        warm.run(read, attempts=2, **how)
        for _ in range(CONNECTIONS):
            with ExitStack() as stack:
                for _ in range(CONNECTIONS):
                    read(stack.enter_context(warm.begin(**how)))
    with warm.begin() as uow:
        write(uow)


def test_the_error_for_it_is_retryable(
    open_storage: Open, mesh_storage_url: str, other: psycopg.Connection[Any], request: pytest.FixtureRequest
) -> None:
    if "PgBouncer" in request.node.name:
        pytest.skip("nothing is prepared there")
    with open_storage(mesh_storage_url, pool_size=CONNECTIONS) as storage:
        warm_up(storage)
        other.execute("ALTER TABLE mesh_state ALTER key TYPE text")
        with pytest.raises(UnavailableError) as error, storage.begin() as uow:
            uow.state.get("k")
        assert (error.value.retryable, error.value.sqlstate) == (True, "0A000")
        with pytest.raises(MeshStorageError) as unsupported, storage.begin() as uow:
            uow.session.execute(text("SELECT key FROM mesh_state GROUP BY key FOR UPDATE"))
        assert (type(unsupported.value), unsupported.value.retryable) == (MeshStorageError, False)
        with storage.begin() as uow:
            write(uow)


def test_statements_that_a_pooler_took_away_are_a_setting_that_is_missing(storage: MeshStorage) -> None:
    """As behind a pooler that resets its sessions after each transaction."""
    with storage.begin() as uow:
        uow.state.put("k", b"v")
    with pytest.raises(ConfigurationError, match="transaction_pooling") as error, storage.begin() as uow:
        uow.session.execute(text("EXECUTE taken_away"))
    assert (error.value.sqlstate, error.value.retryable) == ("26000", False)
    with storage.begin(read_only=True) as uow:
        assert uow.state.get("k").value == b"v"

"""One or a few calls per unit of work: the cost of a message or a heartbeat."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from benchmarks import peers, plain
from benchmarks.contest import Contest, Rival, Target, Workload
from benchmarks.database import Database
from benchmarks.samples import CONTENT, LOG_ENTRY, NODE_STATE, encode, new_number
from mesh_storage import Message, UnitOfWork

TERM = 1_000_000
"""Higher than any term in the filled log."""
_WRITE = Target(cpu=2.0, throughput=0.8)
_READ = Target(cpu=3.0)


def new_message() -> Message:
    """Return a message with a new id."""
    return Message(id=f"new-{next(new_number)}", from_node="node-a", to_node="node-b", content=CONTENT)


def next_index(database: Database) -> Callable[[], int]:
    """Return a counter of log indexes from the end of the log on, shared by all contestants."""
    with database.storage.begin(read_only=True) as uow:
        return itertools.count(uow.consensus_log.last_index() + 1).__next__


@contextmanager
def store_message(database: Database) -> Generator[Contest]:
    """Store one message."""

    def ours(calls: int) -> None:
        for _ in range(calls):
            with database.storage.begin() as uow:
                uow.messages.store(new_message())

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for _ in range(calls):
                row = (f"new-{next(new_number)}", "node-a", "node-b", CONTENT)
                assert cursor.execute(plain.STORE_MESSAGE, row).fetchone()
                connection.commit()

        with peers.store_one(database) as others:
            yield Contest(ours, [Rival("psycopg", theirs, _WRITE), *others])


@contextmanager
def put_state(database: Database) -> Generator[Contest]:
    """Put one state, new or replacing another."""

    def ours(calls: int) -> None:
        for key in _random_keys("key", database, calls):
            with database.storage.begin() as uow:
                uow.state.put(key, CONTENT)

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for key in _random_keys("key", database, calls):
                assert cursor.execute(plain.PUT_STATE, (key, CONTENT)).fetchone()
                connection.commit()

        yield Contest(ours, [Rival("psycopg", theirs, _WRITE)])


@contextmanager
def append_entry(database: Database) -> Generator[Contest]:
    """Append one entry to the log."""
    index = next_index(database)

    def ours(calls: int) -> None:
        for _ in range(calls):
            with database.storage.begin() as uow:
                uow.consensus_log.append(TERM, index(), LOG_ENTRY)

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for _ in range(calls):
                assert cursor.execute(plain.APPEND_ENTRY, _appended(index())).fetchone()
                connection.commit()

        yield Contest(ours, [Rival("psycopg", theirs, _WRITE)])


def _reading(prefix: str, sql: str, get: Callable[[UnitOfWork, str], Any]) -> Callable[[Database], Any]:
    """Return the workload that gets one aggregate by key."""

    @contextmanager
    def read(database: Database) -> Generator[Contest]:
        def ours(calls: int) -> None:
            for key in _random_keys(prefix, database, calls):
                with database.storage.unit_of_work(read_only=True) as uow:
                    get(uow, key)

        with database.connection(autocommit=True) as connection, connection.cursor(binary=True) as cursor:

            def theirs(calls: int) -> None:
                for key in _random_keys(prefix, database, calls):
                    assert cursor.execute(sql, (key,)).fetchone()

            with peers.get_one(database, prefix) as others:
                yield Contest(ours, [Rival("psycopg", theirs, _READ), *others])

    return read


@contextmanager
def mixed(database: Database) -> Generator[Contest]:
    """Get a message, put a state and a node state, append to the log and get a route, in one unit of work."""
    index = next_index(database)

    def ours(calls: int) -> None:
        for number in _random_numbers(database, calls):
            with database.storage.begin() as uow:
                uow.messages.get(f"msg-{number}")
                uow.state.put(f"key-{number}", CONTENT)
                uow.node_states.put(f"node-{number}", NODE_STATE)
                uow.consensus_log.append(TERM, index(), LOG_ENTRY)
                uow.routing_table.get(f"dest-{number}")

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for number in _random_numbers(database, calls):
                assert cursor.execute(plain.GET_MESSAGE, (f"msg-{number}",)).fetchone()
                assert cursor.execute(plain.PUT_STATE, (f"key-{number}", CONTENT)).fetchone()
                assert cursor.execute(plain.PUT_NODE_STATE, (f"node-{number}", encode(NODE_STATE))).fetchone()
                assert cursor.execute(plain.APPEND_ENTRY, _appended(index())).fetchone()
                assert cursor.execute(plain.GET_ROUTE, (f"dest-{number}",)).fetchone()
                connection.commit()

        yield Contest(ours, [Rival("psycopg", theirs, Target(cpu=2.0))])


def _appended(index: int) -> tuple[int, int, str, int, int]:
    return TERM, index, encode(LOG_ENTRY), index - 1, TERM


def _random_numbers(database: Database, count: int) -> list[int]:
    return random.choices(range(1, min(database.rows, 1_000_000) + 1), k=count)


def _random_keys(prefix: str, database: Database, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in _random_numbers(database, count)]


get_message = _reading("msg", plain.GET_MESSAGE, lambda uow, key: uow.messages.get(key))
get_state = _reading("key", plain.GET_STATE, lambda uow, key: uow.state.get(key))
get_route = _reading("dest", plain.GET_ROUTE, lambda uow, key: uow.routing_table.get(key))

WORKLOADS = [
    Workload("store one message", store_message, calls=500, quick_calls=20),
    Workload("put one state", put_state, calls=500, quick_calls=20),
    Workload("append one log entry", append_entry, calls=500, quick_calls=20),
    Workload("get one message", get_message, calls=2000, quick_calls=50),
    Workload("get one state", get_state, calls=2000, quick_calls=50),
    Workload("get one route", get_route, calls=2000, quick_calls=50),
    Workload("five calls in one unit of work", mixed, calls=300, quick_calls=10),
]

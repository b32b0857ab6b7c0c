"""Many rows: stored in one statement, streamed, or read by range."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

from benchmarks import peers, plain
from benchmarks.contest import Contest, Rival, Target, Workload
from benchmarks.database import Database
from benchmarks.samples import CONTENT, LOG_ENTRY, NODE_STATE, encode, new_number
from benchmarks.single import TERM, new_message, next_index
from mesh_storage import LogEntry, Node, Route
from mesh_storage.models.base import new_id

MESSAGES_A_CALL = 1000
ENTRIES_A_CALL = 100
NODES_A_CALL = 1000
STREAMED = 200_000
NODES, ROUTES = 10_000, 50_000

_WRITE = Target(cpu=2.0, throughput=0.85)
_READ = Target(throughput=0.7)


@contextmanager
def store_messages(database: Database) -> Generator[Contest]:
    """Store a thousand messages per unit of work, including the creation of the objects, on both sides."""

    def ours(calls: int) -> None:
        for _ in range(calls):
            with database.storage.begin() as uow:
                uow.messages.store_many([new_message() for _ in range(MESSAGES_A_CALL)])

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for _ in range(calls):
                rows = [(f"new-{next(new_number)}", "node-a", "node-b", CONTENT) for _ in range(MESSAGES_A_CALL)]
                cursor.execute(plain.STORE_MESSAGES, [list(column) for column in zip(*rows, strict=True)])
                connection.commit()

        with peers.store_many(database, MESSAGES_A_CALL) as others:
            yield Contest(ours, [Rival("psycopg, arrays", theirs, _WRITE), *others])


@contextmanager
def append_entries(database: Database) -> Generator[Contest]:
    """Append a hundred entries per unit of work."""
    index = next_index(database)

    def ours(calls: int) -> None:
        for _ in range(calls):
            entries = [LogEntry(term=TERM, index=index(), entry=LOG_ENTRY) for _ in range(ENTRIES_A_CALL)]
            with database.storage.begin() as uow:
                uow.consensus_log.append_many(entries)

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for _ in range(calls):
                rows = [(TERM, index(), encode(LOG_ENTRY)) for _ in range(ENTRIES_A_CALL)]
                arrays = [list(column) for column in zip(*rows, strict=True)]
                cursor.execute(plain.APPEND_ENTRIES, [*arrays, rows[0][1] - 1, TERM])
                assert cursor.rowcount == ENTRIES_A_CALL
                connection.commit()

        yield Contest(ours, [Rival("psycopg, arrays", theirs, _WRITE)])


@contextmanager
def put_node_states(database: Database) -> Generator[Contest]:
    """Put the states of a thousand nodes, most of which already exist."""

    def ours(calls: int) -> None:
        for _ in range(calls):
            with database.storage.begin() as uow:
                uow.node_states.put_many({f"node-{number}": NODE_STATE for number in range(NODES_A_CALL)})

    with database.connection() as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for _ in range(calls):
                rows = {f"node-{number}": encode(NODE_STATE) for number in range(NODES_A_CALL)}
                stored = cursor.execute(plain.PUT_NODE_STATES, (list(rows), list(rows.values()))).fetchall()
                assert len(stored) == NODES_A_CALL
                connection.commit()

        yield Contest(ours, [Rival("psycopg, arrays", theirs, _WRITE)])


@contextmanager
def add_topology(database: Database) -> Generator[Contest]:
    """Add ten thousand nodes, each with five routes, including the generation of ids, on both sides."""

    def ours(calls: int) -> None:
        nodes, routes = NODES * calls // 100, ROUTES * calls // 100
        with database.storage.begin() as uow:
            added = uow.nodes.add_many([Node(name=f"n-{n}", ip_address="10.0.0.1", port=8443) for n in range(nodes)])
            uow.routes.add_many(
                [Route(source_node_id=added[a].id, target_node_id=added[b].id, cost=3) for a, b in _ends(routes, nodes)]
            )

    with database.connection() as connection, connection.cursor() as cursor:

        def theirs(calls: int) -> None:
            nodes, routes = NODES * calls // 100, ROUTES * calls // 100
            ids = [new_id("node") for _ in range(nodes)]
            with cursor.copy(plain.COPY_NODES) as copy:
                for number, id_ in enumerate(ids):
                    copy.write_row((id_, f"n-{number}", "10.0.0.1", 8443))
            with cursor.copy(plain.COPY_ROUTES) as copy:
                for a, b in _ends(routes, nodes):
                    copy.write_row((new_id("route"), ids[a], ids[b], 3))
            connection.commit()

        def tidy() -> None:
            cursor.execute("TRUNCATE routes, nodes")
            connection.commit()

        yield Contest(ours, [Rival("psycopg, COPY", theirs, Target(throughput=0.7))], tidy)


def _ends(routes: int, nodes: int) -> Generator[tuple[int, int]]:
    for number in range(routes):
        source = number % nodes
        yield source, (source + 1 + number // nodes) % nodes


@contextmanager
def stream_messages(database: Database) -> Generator[Contest]:
    """Stream all messages in time order."""

    def ours(calls: int) -> None:
        with database.storage.unit_of_work(read_only=True) as uow:
            assert sum(1 for _ in zip(range(calls), uow.messages.stream(), strict=False))

    with database.connection() as connection:

        def theirs(calls: int) -> None:
            with connection.cursor("stream", binary=True) as cursor:
                cursor.itersize = 1000
                assert sum(1 for _ in zip(range(calls), cursor.execute(plain.STREAM_MESSAGES), strict=False))
            connection.commit()

        yield Contest(ours, [Rival("psycopg, server-side cursor", theirs, _READ)])


@contextmanager
def read_log(database: Database) -> Generator[Contest]:
    """Read a thousand entries of the log."""
    last = max(1, min(database.rows, 1_000_000) - 999)

    def ours(calls: int) -> None:
        for _ in range(calls):
            start = random.randint(1, last)
            with database.storage.unit_of_work(read_only=True) as uow:
                assert uow.consensus_log.range(start, start + 999)

    with database.connection(autocommit=True) as connection, connection.cursor(binary=True) as cursor:

        def theirs(calls: int) -> None:
            for _ in range(calls):
                start = random.randint(1, last)
                assert cursor.execute(plain.LOG_RANGE, (start, start + 999)).fetchall()

        yield Contest(ours, [Rival("psycopg", theirs, _READ)])


WORKLOADS = [
    Workload("store 10,000 messages by 1,000", store_messages, calls=10, quick_calls=1, items=MESSAGES_A_CALL),
    Workload("append 10,000 log entries by 100", append_entries, calls=100, quick_calls=2, items=ENTRIES_A_CALL),
    Workload("put 1,000 node states", put_node_states, calls=10, quick_calls=1, items=NODES_A_CALL),
    # A call adds a hundredth of it, so that the quick run uses a small topology.
    Workload(
        "add 10,000 nodes and 50,000 routes", add_topology, calls=100, quick_calls=1, items=(NODES + ROUTES) // 100
    ),
    Workload("stream 200,000 messages", stream_messages, calls=STREAMED, quick_calls=1000),
    Workload("read 1,000 log entries", read_log, calls=50, quick_calls=2, items=1000),
]

"""What versions cost: compare-and-set of one key by eight threads, and puts with and without the triggers."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg

from benchmarks import plain
from benchmarks.contest import Contest, Rival, Target, Workload
from benchmarks.database import Database
from benchmarks.samples import CONTENT, new_number
from benchmarks.threads import THREADS, in_all
from mesh_storage import ConflictError, MeshStorage

_COUNTER = "counter"


@contextmanager
def count_in_threads(database: Database) -> Generator[Contest]:
    """Count one key up by compare-and-set, in eight threads that share the storage or have a connection each."""
    with database.storage.begin() as uow:
        uow.state.put(_COUNTER, b"0")
    with ThreadPoolExecutor(THREADS) as executor, ExitStack() as stack:
        connections = [stack.enter_context(database.connection()) for _ in range(THREADS)]
        cursors = [stack.enter_context(connection.cursor(binary=True)) for connection in connections]

        def ours(calls: int) -> None:
            in_all(executor, lambda _: _count_by_library(database.storage, calls // THREADS))

        def theirs(calls: int) -> None:
            in_all(executor, lambda number: _count_by_psycopg(cursors[number], calls // THREADS))

        yield Contest(ours, [Rival("psycopg, 8 threads", theirs, Target(throughput=0.9))])


def _count_by_library(storage: MeshStorage, calls: int) -> None:
    for _ in range(calls):
        while True:
            with storage.begin(read_only=True) as uow:
                entry = uow.state.get(_COUNTER)
            try:
                with storage.begin() as uow:
                    uow.state.put(_COUNTER, b"%d" % (int(entry.value) + 1), if_version=entry.version)
                break
            except ConflictError:
                pass


def _count_by_psycopg(cursor: psycopg.Cursor[Any], calls: int) -> None:
    for _ in range(calls):
        while True:
            value, version = cursor.execute(plain.GET_STATE_AND_VERSION, [_COUNTER]).fetchone() or (b"", 0)
            cursor.connection.commit()
            put = cursor.execute(plain.PUT_STATE_IF_VERSION, [b"%d" % (int(value) + 1), _COUNTER, version]).fetchone()
            cursor.connection.commit()
            if put is not None:
                break


@contextmanager
def put_beside_triggers(database: Database) -> Generator[Contest]:
    """Put one state of a table with the triggers for versions and changes, against one without them."""
    with ThreadPoolExecutor(THREADS) as executor, database.without_triggers() as bare:

        def put_all(storage: MeshStorage, calls: int) -> None:
            def put(_: int) -> None:
                for _ in range(calls // THREADS):
                    with storage.begin() as uow:
                        uow.state.put(f"put-{next(new_number) % 10_000}", CONTENT)

            in_all(executor, put)

        yield Contest(
            lambda calls: put_all(database.storage, calls),
            [Rival("mesh_storage without triggers", lambda calls: put_all(bare, calls), Target(throughput=0.85))],
        )


WORKLOADS = [
    Workload("compare and set one state, 8 threads", count_in_threads, calls=800, quick_calls=40),
    Workload("put one state with triggers, 8 threads", put_beside_triggers, calls=1600, quick_calls=80),
]

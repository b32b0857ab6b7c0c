"""Eight concurrent threads."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg

from benchmarks import plain
from benchmarks.contest import Contest, Rival, Target, Workload
from benchmarks.database import Database
from benchmarks.samples import CONTENT, new_number
from benchmarks.single import new_message

THREADS = 8


@contextmanager
def store_message_in_threads(database: Database) -> Generator[Contest]:
    """Store one message per unit of work in eight threads that share the storage, or have a connection each."""
    with ThreadPoolExecutor(THREADS) as executor, ExitStack() as stack:
        connections = [stack.enter_context(database.connection()) for _ in range(THREADS)]
        cursors = [stack.enter_context(connection.cursor(binary=True)) for connection in connections]

        def ours(calls: int) -> None:
            in_all(executor, lambda _: store_by_library(database, calls // THREADS))

        def theirs(calls: int) -> None:
            in_all(executor, lambda number: store_by_psycopg(cursors[number], calls // THREADS))

        yield Contest(ours, [Rival("psycopg, 8 threads", theirs, Target(throughput=0.7))])


def in_all(executor: ThreadPoolExecutor, work: Callable[[int], None]) -> None:
    """Run the work in all threads, and wait for them."""
    for _ in executor.map(work, range(THREADS)):
        pass


def store_by_library(database: Database, calls: int) -> None:
    """Store messages, each in a unit of work."""
    for _ in range(calls):
        with database.storage.begin() as uow:
            uow.messages.store(new_message())


def store_by_psycopg(cursor: psycopg.Cursor[Any], calls: int) -> None:
    """Store messages, each in a transaction."""
    for _ in range(calls):
        assert cursor.execute(plain.STORE_MESSAGE, (f"new-{next(new_number)}", "node-a", "node-b", CONTENT)).fetchone()
        cursor.connection.commit()


WORKLOADS = [
    Workload("store one message, 8 threads", store_message_in_threads, calls=1600, quick_calls=80),
]

"""Queues: drained by four processes of the library, of plain psycopg on the same tables, and of its peers."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from statistics import median
from typing import Any

import psycopg

from benchmarks import queues
from benchmarks.contest import NO_TARGET, Contest, Rival, Sample, Target, Workload
from benchmarks.database import Database
from benchmarks.limits import Fact
from benchmarks.single import new_message

WORKERS = 4
_MESSAGES = 20_000
_QUICK_MESSAGES = 200
_QUICK_ROWS = 2_000


@dataclass(frozen=True)
class _Drained:
    """A queue that several processes drain in batches."""

    queue: queues.Queue
    url: str
    connect: dict[str, Any]
    batch: int

    def __call__(self, calls: int) -> Sample:
        """Fill the queue, and measure how long the processes take to empty it."""
        number = max(1, calls // self.queue.part)
        with psycopg.connect(**self.connect, autocommit=True) as connection:
            self.queue.fill(connection, self.url, number)
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
        context = multiprocessing.get_context("spawn")
        ready, results = context.Barrier(WORKERS + 1), context.Queue()
        processes = [context.Process(target=self.work, args=(ready, results)) for _ in range(WORKERS)]
        for process in processes:
            process.start()
        ready.wait(120)
        begun = time.perf_counter()
        done = [results.get(timeout=600) for _ in processes]
        wall = time.perf_counter() - begun
        for process in processes:
            process.join()
        drained = sum(drained for drained, _ in done)
        assert drained == number, f"{drained} of {number} were drained"
        factor = calls / number
        return Sample(sum(cpu for _, cpu in done) * factor, wall * factor)

    def work(self, ready: Barrier, results: Any) -> None:
        """Drain the queue together with the others, and tell how many it were and the CPU seconds."""
        with self.queue.open(self.url, self.connect, self.batch) as drain:
            ready.wait(120)
            begun = time.process_time()
            number = drain()
            results.put((number, time.process_time() - begun))


@contextmanager
def _contest(batch: int, target: float, database: Database) -> Generator[Contest]:
    def round_of(queue: queues.Queue) -> Callable[[int], Sample]:
        return _Drained(queue, database.url, database.connect_arguments, batch)

    rivals = [Rival("plain psycopg", round_of(queues.PLAIN), Target(throughput=target))]
    for peer in queues.PEERS:
        if all(importlib.util.find_spec(module) for module in peer.modules):
            with psycopg.connect(**database.connect_arguments, autocommit=True) as connection:
                peer.install(connection)
            rivals.append(
                Rival(peer.name, round_of(peer), Target(throughput=peer.target) if peer.target else NO_TARGET)
            )
    yield Contest(round_of(queues.OURS), [*rivals, Rival("its own consume", round_of(queues.CONSUMING))])


WORKLOADS = [
    Workload(
        f"queue: claim and acknowledge by {batch}, {WORKERS} processes",
        partial(_contest, batch, target),
        _MESSAGES,
        _QUICK_MESSAGES,
    )
    for batch, target in ((50, 0.8), (1, 0.75))
]


def _claim_ms(database: Database, calls: int) -> float:
    """Return the median time of a claim and an acknowledgement of one delivery in milliseconds."""
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        with database.storage.begin() as uow:
            claimed = uow.messages.claim(queues.RECEIVER)
        with database.storage.begin() as uow:
            uow.messages.ack(claimed)
        times.append((time.perf_counter() - begun) * 1000)
    return median(times)


def _queued(database: Database, number: int) -> None:
    """Queue so many messages by SQL."""
    with database.connection(autocommit=True) as connection:
        connection.execute("TRUNCATE mesh_deliveries, mesh_delivery_lanes")
        connection.execute("DELETE FROM mesh_messages WHERE id LIKE 'queued-%'")
        connection.execute(
            "INSERT INTO mesh_messages (id, from_node, to_node, content, queued) "
            "SELECT 'queued-' || lpad(n::text, 8, '0'), 'a', %s, %s, true FROM generate_series(1, %s) AS n",
            [queues.RECEIVER, b"x" * 128, number],
        )
        connection.execute(
            "INSERT INTO mesh_deliveries (message_id, receiver, available_at) "
            "SELECT 'queued-' || lpad(n::text, 8, '0'), %s, clock_timestamp() FROM generate_series(1, %s) AS n",
            [queues.RECEIVER, number],
        )
        connection.execute("VACUUM ANALYZE mesh_messages, mesh_deliveries")
        connection.execute("CHECKPOINT")


def growth(database: Database) -> Fact:
    """Measure how a claim grows with the queue, from 10,000 to 1,000,000 (in a quick run, a tenth of the rows)."""
    times = []
    for number in (10_000, 1_000_000) if database.rows > _QUICK_ROWS else (200, 2_000):
        _queued(database, number)
        _claim_ms(database, 20)
        times.append(_claim_ms(database, 100 if number < _QUICK_ROWS else 500))
    return Fact("queue: growth of a claim, 1,000,000 queued against 10,000", times[1] / times[0], "x", limit=1.2)


def old_snapshot(database: Database) -> Fact:
    """Measure a claim behind the rows that were acknowledged while an old snapshot is held."""
    dead = 100_000 if database.rows > _QUICK_ROWS else 500
    _queued(database, dead + 1_000)
    _claim_ms(database, 20)
    before = _claim_ms(database, 300 if dead > _QUICK_ROWS else 50)
    with database.connection() as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT count(*) FROM mesh_deliveries")
        done = 0
        while done < dead - 500:
            with database.storage.begin() as uow:
                claimed = uow.messages.claim(queues.RECEIVER, limit=500)
                uow.messages.ack(claimed)
            if not claimed:
                break
            done += len(claimed)
        after = _claim_ms(database, 300 if dead > _QUICK_ROWS else 20)
    return Fact(f"queue: a claim behind {dead:,} dead rows", after / before, "x", limit=1.5)


def send_against_store(database: Database) -> Fact:
    """Measure `send` against `store`."""
    times: dict[str, list[float]] = {"store": [], "send": []}
    for _ in range(400):
        for call, found in times.items():
            begun = time.perf_counter()
            with database.storage.begin() as uow:
                getattr(uow.messages, call)(new_message())
            found.append(time.perf_counter() - begun)
    return Fact("queue: send against store", median(times["send"]) / median(times["store"]), "x", limit=1.5)


def wal(database: Database) -> Fact:
    """Measure the bytes of WAL for a message: its delivery queued, claimed by 50 and acknowledged."""
    number = 5_000 if database.rows > _QUICK_ROWS else 500
    _queued(database, number)
    with database.connection(autocommit=True) as connection:
        (begun,) = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchall()[0]
        while True:
            with database.storage.begin() as uow:
                claimed = uow.messages.claim(queues.RECEIVER, limit=50)
            if not claimed:
                break
            with database.storage.begin() as uow:
                uow.messages.ack(claimed)
        query = "SELECT pg_current_wal_insert_lsn() - %s::pg_lsn"
        (written,) = connection.execute(query, [begun]).fetchall()[0]
    return Fact("queue: WAL to claim and acknowledge a message", float(written) / number, "B", limit=1_000)


FACTS: dict[str, Callable[[Database], Fact]] = {
    "queue: growth": growth,
    "queue: old snapshot": old_snapshot,
    "queue: send": send_against_store,
    "queue: WAL": wal,
}

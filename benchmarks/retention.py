"""Retention under load: whether `mesh-storage maintain` keeps a table of messages small while many are sent.

    python -m benchmarks.retention [--seconds S] [--rate N] [--keep S] [--every S] [--deliveries]
        [--server NAME=VALUE] [--set TABLE:NAME=VALUE] [--json FILE]

Writers send at a steady rate, and the command removes what is too old. With `--deliveries`, the messages are queued,
claimed and acknowledged as well. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks import processes
from benchmarks.database import Database, durable_database
from benchmarks.samples import CONTENT
from mesh_storage import MeshStorage, Message

TABLES = ("mesh_messages", "mesh_deliveries")
_CLAIMED = 500
_LEASE = timedelta(minutes=5)
_MIB = 2**20
_HEAD = """\
| seconds | sent a second | median | 99 % | slowest | overdue | messages | indexes | dead | vacuums | deliveries | all |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
_SIZES = """
    SELECT relname, pg_table_size(relid), pg_indexes_size(relid), n_live_tup, n_dead_tup, autovacuum_count,
        total_autovacuum_time / 1000
    FROM pg_stat_user_tables WHERE relname = ANY(%s)
"""
_OVERDUE = "SELECT count(*) FROM mesh_messages WHERE timestamp < floor(extract(epoch FROM now()))::bigint - %s"


@dataclass(frozen=True)
class Table:
    """A table at some time; sizes in bytes, and rows as the server's statistics estimate them."""

    heap: int
    indexes: int
    live: int
    dead: int
    vacuums: int
    """How often autovacuum has ended since the beginning."""
    vacuum_seconds: float
    """How long it took in total, which only PostgreSQL 18 tells."""


@dataclass(frozen=True)
class Sample:
    """What was seen at some time, and since the last one."""

    seconds: float
    """Since the writers began."""
    sent: float
    """Messages a second."""
    median: float
    """Latency of a unit of work that stores or sends a batch, in seconds; likewise the next two."""
    late: float
    """At the 99th percentile."""
    slowest: float
    overdue: int
    """Messages that are older than what is kept."""
    maintain_memory: int
    """The most that the command has used, in bytes."""
    tables: dict[str, Table]

    @property
    def size(self) -> int:
        """The bytes of all tables and their indexes."""
        return sum(each.heap + each.indexes for each in self.tables.values())


@dataclass(frozen=True)
class Load:
    """What the writers and consumers do."""

    rate: float
    """Messages a second, of all writers."""
    writers: int
    batch: int
    """Messages in a unit of work."""
    deliveries: bool

    def write(self, url: str, number: int, stop: Event, latencies: Any) -> None:
        """Send batches at a steady pace until told to stop, and hand over how long each took; it catches up if late."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        pause = self.batch * self.writers / self.rate
        with MeshStorage.open(url) as storage:
            due = time.monotonic() + pause * number / self.writers
            while not stop.wait(max(0.0, due - time.monotonic())):
                messages = [
                    Message(id=uuid4().hex, from_node=f"node-{number}", to_node=_receiver(number), content=CONTENT)
                    for _ in range(self.batch)
                ]
                begun = time.perf_counter()
                with storage.begin() as uow:
                    if self.deliveries:
                        uow.messages.send_many(messages)
                    else:
                        uow.messages.store_many(messages)
                latencies.put(time.perf_counter() - begun)
                due += pause

    def consume(self, url: str, number: int, stop: Event) -> None:
        """Claim and acknowledge what one of the writers sends, until told to stop."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with MeshStorage.open(url) as storage:
            while not stop.is_set():
                with storage.begin() as uow:
                    claimed = uow.messages.claim(_receiver(number), limit=_CLAIMED, lease=_LEASE)
                if claimed:
                    with storage.begin() as uow:
                        uow.messages.ack(claimed)
                if len(claimed) < _CLAIMED:
                    stop.wait(0.1)


def _receiver(number: int) -> str:
    return f"receiver-{number}"


def measure(
    database: Database,
    load: Load,
    *,
    seconds: float,
    keep: int,
    every: int,
    interval: float,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Sample]:
    """Run writers and the command beside one another, and sample the tables at intervals."""
    latencies = multiprocessing.get_context("spawn").Queue()
    samples = list[Sample]()
    progress(_HEAD)
    with _maintaining(database.url, keep, every) as maintaining, _processes(database.url, load, latencies):
        took = [latencies.get()]
        begun = last = time.monotonic()
        for number in itertools.count(1):
            time.sleep(max(0.0, begun + number * interval - time.monotonic()))
            now = time.monotonic()
            took = sorted([*took, *(latencies.get() for _ in range(latencies.qsize()))])
            tables, overdue = _look(database, keep)
            sample = Sample(
                seconds=now - begun,
                sent=len(took) * load.batch / (now - last),
                median=_quantile(took, 0.5),
                late=_quantile(took, 0.99),
                slowest=_quantile(took, 1),
                overdue=overdue,
                maintain_memory=processes.peak(maintaining.pid),
                tables=tables,
            )
            last, took = now, []
            samples.append(sample)
            progress(_line(sample))
            if now - begun >= seconds:
                return samples
    raise AssertionError("the loop returns")


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[int((len(ordered) - 1) * part)] if ordered else 0.0


@contextmanager
def _maintaining(url: str, keep: int, every: int) -> Generator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mesh_storage", "maintain", "--url", url]
    command += ["--messages-older-than", str(keep), "--every", str(every)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
            assert process.poll() is None, "the command has ended"
        finally:
            process.terminate()


@contextmanager
def _processes(url: str, load: Load, latencies: Any) -> Generator[None]:
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    made = [context.Process(target=load.write, args=(url, each, stop, latencies)) for each in range(load.writers)]
    if load.deliveries:
        made += [context.Process(target=load.consume, args=(url, each, stop)) for each in range(load.writers)]
    with ExitStack() as ending:
        for each in made:
            each.start()
            ending.callback(each.join)
        ending.callback(stop.set)
        yield


def _look(database: Database, keep: int) -> tuple[dict[str, Table], int]:
    with database.connection(autocommit=True) as connection:
        rows = connection.execute(_SIZES, [list(TABLES)]).fetchall()
        ((overdue,),) = connection.execute(_OVERDUE, [keep]).fetchall()
    return {name: Table(*figures) for name, *figures in rows}, int(overdue)


def _line(sample: Sample) -> str:
    messages, deliveries = (sample.tables[name] for name in TABLES)
    columns = [
        f"{sample.seconds:,.0f}",
        f"{sample.sent:,.0f}",
        *(f"{latency * 1e3:,.1f} ms" for latency in (sample.median, sample.late, sample.slowest)),
        f"{sample.overdue:,}",
        f"{messages.heap / _MIB:,.0f} MiB",
        f"{messages.indexes / _MIB:,.0f} MiB",
        f"{messages.dead:,}",
        f"{messages.vacuums} / {messages.vacuum_seconds:,.0f} s",
        f"{(deliveries.heap + deliveries.indexes) / _MIB:,.0f} MiB",
        f"{sample.size / _MIB:,.0f} MiB",
    ]
    return f"| {' | '.join(columns)} |"


def conclusion(samples: Sequence[Sample], settled: float) -> str:
    """Return how the sizes at the end, and the largest of the second half, compare with those once it had settled."""
    first = next((each for each in samples if each.seconds >= settled), samples[-1])
    largest = max(each.size for each in samples[len(samples) // 2 :])
    return (
        f"After {first.seconds:.0f} s {first.size / _MIB:,.0f} MiB; at the end {samples[-1].size / first.size:.2f} "
        f"times that, in the second half {largest / first.size:.2f} times at most; "
        f"`maintain` used {max(each.maintain_memory for each in samples) / _MIB:,.0f} MiB at most."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each sample and a conclusion."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention", description="Retention under load.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (%(default)s)")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between samples (%(default)s)")
    parser.add_argument("--settled", type=float, default=60.0, help="after how long it is to be flat (%(default)s)")
    parser.add_argument("--rate", type=float, default=5_000.0, help="messages a second (%(default)s)")
    parser.add_argument("--writers", type=int, default=4, help="processes that send (%(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="messages in a unit of work (%(default)s)")
    parser.add_argument("--keep", type=int, default=30, help="seconds that messages are kept (%(default)s)")
    parser.add_argument("--every", type=int, default=5, help="seconds between two removals (%(default)s)")
    parser.add_argument("--deliveries", action="store_true", help="also queue, claim and acknowledge them")
    parser.add_argument(
        "--server", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the server; may be repeated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE:NAME=VALUE", help="a storage parameter; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    given = parser.parse_args(arguments)
    load = Load(given.rate, given.writers, given.batch, given.deliveries)
    with durable_database(given.server) as database:
        database.set(given.set)
        samples = measure(
            database,
            load,
            seconds=given.seconds,
            keep=given.keep,
            every=given.every,
            interval=given.interval,
            progress=lambda words: print(words, flush=True),
        )
    print(f"\n{conclusion(samples, given.settled)}")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(sample) for sample in samples], indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Big tables: what filling, listing, purging and backing up messages take as their number grows.

    python -m benchmarks.large [--sizes N,N] [--batch N] [--purge N] [--wait S] [--ordered]
        [--server NAME=VALUE] [--set TABLE:NAME=VALUE] [--json FILE]

The ids are random, as UUIDs are, or in the order of time, as ULIDs are, and 50 nodes write to 47 of them. Client and
server share the machine. It needs about 1 GB of disk for a million messages, in the directory for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

from ulid import ULID

from benchmarks import processes
from benchmarks.database import Database, durable_database
from benchmarks.samples import CONTENT
from mesh_storage import Message

_SENDERS, _RECEIVERS = 50, 47
_NODE = "node-7"
_BEGINNING = 1_700_000_000
_A_SECOND = 100
_PAGES = 50
_MIB = 2**20


@dataclass
class Cost:
    """What some work took."""

    seconds: float = 0.0
    cpu: float = 0.0
    """Seconds of processor time of the client and the whole server, which vary less on a machine that others use."""
    peak: int = 0
    """The most bytes that the client had in memory; for a backup, the command and its children."""


@dataclass(frozen=True)
class Point:
    """What was measured with so many messages; times in seconds, sizes in bytes."""

    messages: int
    part: int
    """How many messages were stored last; their number is that of the smallest size."""
    store: Cost
    """Of these."""
    table: int
    indexes: int
    page_first: float
    """A page of 100 of all messages; likewise the next three."""
    page_deep: float
    page_to_node_first: float
    page_to_node_deep: float
    count: Cost
    stream: Cost
    backup: Cost
    backup_size: int
    purged: int
    purge: Cost
    purge_slowest: float
    """The slowest unit of work, each of one `purge`."""
    page_purged: float
    """The first page, with the rows that were purged before it; likewise the next, some time later."""
    page_later: float


_Shown: TypeAlias = tuple[str, float, Callable[[Point], float]]
_ROWS: dict[str, _Shown] = {
    "store_many, the last part, a message": ("{:.1f} µs", 1e-6, lambda point: point.store.seconds / point.part),
    "store_many, processor time, a message": ("{:.1f} µs", 1e-6, lambda point: point.store.cpu / point.part),
    "store_many, memory of the client": ("{:,.0f} MiB", _MIB, lambda point: point.store.peak),
    "table": ("{:,.0f} MiB", _MIB, lambda point: point.table),
    "its indexes": ("{:,.0f} MiB", _MIB, lambda point: point.indexes),
    "page, the first": ("{:.2f} ms", 1e-3, lambda point: point.page_first),
    "page, after nine tenths": ("{:.2f} ms", 1e-3, lambda point: point.page_deep),
    "page to a node, the first": ("{:.2f} ms", 1e-3, lambda point: point.page_to_node_first),
    "page to a node, after nine tenths": ("{:.2f} ms", 1e-3, lambda point: point.page_to_node_deep),
    "count": ("{:.2f} s", 1, lambda point: point.count.seconds),
    "stream, a message": ("{:.2f} µs", 1e-6, lambda point: point.stream.seconds / point.messages),
    "stream, processor time, a message": ("{:.2f} µs", 1e-6, lambda point: point.stream.cpu / point.messages),
    "stream, memory of the client": ("{:,.0f} MiB", _MIB, lambda point: point.stream.peak),
    "backup": ("{:.1f} s", 1, lambda point: point.backup.seconds),
    "backup, processor time": ("{:.1f} s", 1, lambda point: point.backup.cpu),
    "backup, memory of all its processes": ("{:,.0f} MiB", _MIB, lambda point: point.backup.peak),
    "backup, size": ("{:,.1f} MiB", _MIB, lambda point: point.backup_size),
    "purge, messages": ("{:,.0f}", 1, lambda point: point.purged),
    "purge": ("{:.1f} s", 1, lambda point: point.purge.seconds),
    "purge, processor time": ("{:.1f} s", 1, lambda point: point.purge.cpu),
    "purge, the slowest unit of work": ("{:,.0f} ms", 1e-3, lambda point: point.purge_slowest),
    "purge, memory of the client": ("{:,.0f} MiB", _MIB, lambda point: point.purge.peak),
    "page, the first after the purge": ("{:.2f} ms", 1e-3, lambda point: point.page_purged),
    "page, the first after the wait": ("{:.2f} ms", 1e-3, lambda point: point.page_later),
}
"""How each line of the table is shown: its form, its unit, and its value."""


class Run:
    """A table of messages that grows from size to size, and loses its oldest tenth after each is measured."""

    def __init__(self, database: Database, new_id: Callable[[], str], batch: int, purge: int, wait: float) -> None:
        self._database = database
        self._storage = database.storage
        self._new_id = new_id
        self._batch = batch
        self._purge_by = purge
        self._wait = wait
        self._first = 0
        self._last = 0
        """The messages from the first number up to this one are there."""
        pid_file = Path(database.url.removeprefix("embedded:")) / "data" / "postmaster.pid"
        self._server = int(pid_file.read_text().split()[0])

    def measure(self, size: int, part: int) -> Point:
        """Fill the table up to a size, in parts of which the last is measured, and measure the table."""
        parts = list[Cost]()
        while (missing := size - (self._last - self._first)) > 0:
            number = (missing - 1) % part + 1
            with self._measured() as cost:
                self._store(number)
            parts.append(cost)
            _report(f"{number:,} messages stored: {cost}")
        table, indexes = self._sizes()
        first, deep = self._pages(None)
        node_first, node_deep = self._pages(_NODE)
        with self._measured() as count, self._storage.begin(read_only=True) as uow:
            assert uow.messages.count() == size
        with self._measured() as stream, self._storage.begin(read_only=True) as uow:
            assert sum(1 for _ in uow.messages.stream()) == size
        with self._measured() as backup:
            backup_peak, backup_size = self._backup()
        backup.peak = backup_peak
        with self._measured() as purge:
            purged, slowest = self._purge(size // 10)
        page_purged = self._pages(None)[0]
        time.sleep(self._wait)
        point = Point(
            messages=size,
            part=part,
            store=parts[-1],
            table=table,
            indexes=indexes,
            page_first=first,
            page_deep=deep,
            page_to_node_first=node_first,
            page_to_node_deep=node_deep,
            count=count,
            stream=stream,
            backup=backup,
            backup_size=backup_size,
            purged=purged,
            purge=purge,
            purge_slowest=slowest,
            page_purged=page_purged,
            page_later=self._pages(None)[0],
        )
        _report(json.dumps(asdict(point)))
        return point

    @contextmanager
    def _measured(self) -> Generator[Cost]:
        """Yield what the block costs, complete at its end."""
        cost, begun, cpu = Cost(), time.perf_counter(), self._cpu()
        processes.forget_peak()
        yield cost
        cost.seconds = time.perf_counter() - begun
        cost.cpu = self._cpu() - cpu
        cost.peak = processes.peak()

    def _cpu(self) -> float:
        client = os.times()
        return client.user + client.system + client.children_user + client.children_system + processes.cpu(self._server)

    def _store(self, number: int) -> None:
        end = self._last + number
        for start in range(self._last, end, self._batch):
            with self._storage.begin() as uow:
                numbers = range(start, min(start + self._batch, end))
                uow.messages.store_many(_message(self._new_id(), number) for number in numbers)
        self._last = end

    def _sizes(self) -> tuple[int, int]:
        with self._database.connection(autocommit=True) as connection:
            query = "SELECT pg_table_size('mesh_messages'), pg_indexes_size('mesh_messages')"
            ((table, indexes),) = connection.execute(query).fetchall()
        return int(table), int(indexes)

    def _pages(self, to_node: str | None) -> tuple[float, float]:
        """Return how long the first page takes, and one that begins where nine tenths come before it."""
        since = _timestamp(self._first + (self._last - self._first) * 9 // 10)
        with self._storage.begin(read_only=True) as uow:
            cursor = uow.messages.page(to_node=to_node, since=since, limit=1).next
        times: dict[str | None, list[float]] = {None: [], cursor: []}
        for _ in range(_PAGES):
            for after, took in times.items():
                begun = time.perf_counter()
                with self._storage.begin(read_only=True) as uow:
                    assert uow.messages.page(to_node=to_node, after=after).items
                took.append(time.perf_counter() - begun)
        first, deep = map(statistics.median, times.values())
        return first, deep

    def _backup(self) -> tuple[int, int]:
        """Take a backup by the command; return the most memory of its processes, and the size of the backup."""
        with tempfile.TemporaryDirectory(prefix="mesh_storage-benchmark-") as name:
            path = Path(name) / "backup"
            command = [sys.executable, "-m", "mesh_storage", "backup", "--url", self._database.url, str(path)]
            return processes.run(command), sum(each.stat().st_size for each in path.rglob("*") if each.is_file())

    def _purge(self, number: int) -> tuple[int, float]:
        """Delete the oldest; return how many they were, and how long the slowest unit of work took."""
        before, slowest, purged = _timestamp(self._first + number), 0.0, 0
        while True:
            begun = time.perf_counter()
            with self._storage.begin() as uow:
                now = uow.messages.purge(before, limit=self._purge_by)
            slowest = max(slowest, time.perf_counter() - begun)
            purged += now
            if not now:
                self._first += purged
                return purged, slowest


def _message(key: str, number: int) -> Message:
    return Message(
        id=key,
        from_node=f"node-{number % _SENDERS}",
        to_node=f"node-{number % _RECEIVERS}",
        content=CONTENT,
        timestamp=_timestamp(number),
    )


def _random() -> str:
    return uuid4().hex


def _ordered() -> str:
    return str(ULID())


def _timestamp(number: int) -> int:
    return _BEGINNING + number // _A_SECOND


def _report(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def table(points: Sequence[Point]) -> str:
    """Return the figures as Markdown: a column for each size, and how many times the first the last is."""
    sizes = " | ".join(f"{point.messages:,}" for point in points)
    growth = points[-1].messages / points[0].messages
    lines = [f"| messages | {sizes} | {growth:.2f} |", f"| --- |{' ---: |' * (len(points) + 1)}"]
    for words, (form, unit, of) in _ROWS.items():
        values = [of(point) for point in points]
        shown = " | ".join(form.format(value / unit) for value in values)
        ratio = f"{values[-1] / values[0]:.2f}" if values[0] else ""  # less than a tick of processor time
        lines.append(f"| {words} | {shown} | {ratio} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description="What big tables take.")
    parser.add_argument("--sizes", default="1000000,2000000,5000000,10000000", metavar="N,N", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=5_000, metavar="N", help="messages of a store_many (%(default)s)")
    parser.add_argument("--purge", type=int, default=10_000, metavar="N", help="messages of a purge (%(default)s)")
    parser.add_argument("--wait", type=float, default=150.0, metavar="S", help="seconds after a purge (%(default)s)")
    parser.add_argument("--ordered", action="store_true", help="ids in the order of time, not random ones")
    parser.add_argument(
        "--server", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the server; may be repeated"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE:NAME=VALUE", help="a storage parameter; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    given = parser.parse_args(arguments)
    sizes = sorted(int(size) for size in given.sizes.split(","))
    with durable_database(given.server) as database:
        database.set(given.set)
        run = Run(database, _ordered if given.ordered else _random, given.batch, given.purge, given.wait)
        points = [run.measure(size, sizes[0]) for size in sizes]
    print(table(points))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")


if __name__ == "__main__":
    main()

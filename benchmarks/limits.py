"""What has a limit of its own and no rival: the memory of a stream, and how long it takes to open."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.database import Database
from mesh_storage import MeshStorage

_KIB_OF_MAXRSS = 1 if sys.platform == "linux" else 1024


@dataclass(frozen=True)
class Fact:
    """Something measured, and its limit."""

    name: str
    value: float
    unit: str
    limit: float


def stream_memory(database: Database) -> Fact:
    """Measure by how much a process grows while it goes through all messages, in a pass that nobody times."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        growth = pool.apply(_growth, (database.url,))
    return Fact(f"memory of streaming {database.rows:,} messages", growth, "MiB", limit=16)


def open_memory(_database: Database) -> Fact:
    """Measure the time from opening a throw-away database to its first answer."""
    begun = time.perf_counter()
    with MeshStorage.open("memory:") as storage, storage.unit_of_work(read_only=True) as uow:
        uow.messages.count()
        seconds = time.perf_counter() - begun
    return Fact("open memory: to the first answer", seconds, "s", limit=2.5)


FACTS: dict[str, Callable[[Database], Fact]] = {"memory of streaming": stream_memory, "open memory:": open_memory}


def _growth(url: str) -> float:
    """Give the MiB by which the most memory that this process had grows between the first batches and the end."""
    with MeshStorage.open(url) as storage, storage.unit_of_work(read_only=True) as uow:
        for number, _ in enumerate(uow.messages.stream()):
            if number == 3000:
                before = _most_memory()
        after = _most_memory()
    return max(after - before, 1 / 1024) if number >= 3000 else 1 / 1024


def _most_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_OF_MAXRSS / 1024

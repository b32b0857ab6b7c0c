"""What has a limit of its own and no rival: the memory of a stream, and how long it takes to open."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.database import Database
from mesh_storage import MeshStorage


@dataclass(frozen=True)
class Fact:
    """Something measured, and its limit."""

    name: str
    value: float
    unit: str
    limit: float


def stream_memory(database: Database) -> Fact:
    """Measure the most memory that going through all messages takes, in a pass that nobody times."""
    with database.storage.unit_of_work(read_only=True) as uow:
        tracemalloc.start()
        try:
            for _ in uow.messages.stream():
                pass
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return Fact("memory of streaming all messages", most / 2**20, "MiB", limit=16)


def open_memory(_database: Database) -> Fact:
    """Measure the time from opening a throw-away database to its first answer."""
    begun = time.perf_counter()
    with MeshStorage.open("memory:") as storage, storage.unit_of_work(read_only=True) as uow:
        uow.messages.count()
        seconds = time.perf_counter() - begun
    return Fact("open memory: to the first answer", seconds, "s", limit=2.5)


FACTS: dict[str, Callable[[Database], Fact]] = {"memory of streaming": stream_memory, "open memory:": open_memory}

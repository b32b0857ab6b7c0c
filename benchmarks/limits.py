"""Absolute limits without a rival: the memory of a stream, the time to open, the share of a single module."""

from __future__ import annotations

import cProfile
import pstats
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mesh_storage
from benchmarks.database import Database
from benchmarks.single import new_message
from mesh_storage import MeshStorage

_PROFILED_CALLS = 500


@dataclass(frozen=True)
class Fact:
    """A measured value and its limit."""

    name: str
    value: float
    unit: str
    limit: float


def stream_memory(database: Database) -> Fact:
    """Measure the peak memory of streaming all messages, in a separate, untimed pass."""
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
    """Measure the time from opening a temporary database to its first result."""
    begun = time.perf_counter()
    with MeshStorage.open("memory:") as storage, storage.unit_of_work(read_only=True) as uow:
        uow.messages.count()
        seconds = time.perf_counter() - begun
    return Fact("open memory: to the first answer", seconds, "s", limit=2.5)


def largest_layer(database: Database) -> Fact:
    """Measure the share of the most expensive of our modules in the time of storing a message."""

    def store(calls: int) -> None:
        for _ in range(calls):
            with database.storage.begin() as uow:
                uow.messages.store(new_message())

    store(20)
    profile = cProfile.Profile()
    profile.runcall(store, _PROFILED_CALLS)
    ours = Path(mesh_storage.__file__).parent
    layers: Counter[Path] = Counter()
    statistics: Any = pstats.Stats(profile)
    for (file, _, _), (_, _, own_time, _, _) in statistics.stats.items():
        layers[Path(file)] += own_time
    whole = sum(layers.values())
    name, most = max(
        ((path, time) for path, time in layers.items() if ours in path.parents), key=lambda layer: layer[1]
    )
    return Fact(f"largest layer of storing one message ({name.relative_to(ours)})", 100 * most / whole, "%", limit=15)


FACTS: dict[str, Callable[[Database], Fact]] = {
    "memory of streaming": stream_memory,
    "open memory:": open_memory,
    "largest layer": largest_layer,
}

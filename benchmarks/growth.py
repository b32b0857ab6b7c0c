"""The cost of a call as the tables grow, compared with plain psycopg on the same tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import bulk, single
from benchmarks.contest import Comparison, Workload, compare
from benchmarks.database import MOST_OTHER_ROWS, Database

LIMIT = 1.2
WORKLOADS = [
    *single.WORKLOADS,
    *(workload for workload in bulk.WORKLOADS if workload.items > 1 and "routes" not in workload.name),
]


@dataclass(frozen=True)
class Point:
    """The growth in the time of a workload from the smallest tables to larger ones."""

    workload: str
    rows: int
    ours: float
    """Wall-clock time per item, as a multiple of that on the smallest tables; likewise the next."""
    plain: float
    ratio: float
    """The growth of ours relative to plain psycopg's, from the ratios within each round."""


def measure(
    database: Database,
    sizes: Sequence[int],
    rounds: int,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Measure the workloads on tables of each size, from small to large."""
    smallest: dict[str, Comparison] = {}
    points: list[Point] = []
    for rows in sorted(sizes):
        progress(f"tables of {rows:,} rows")
        database.fill(rows)
        for workload in _on(rows):
            now = compare(workload, database, rounds, quick=quick)[0]
            first = smallest.setdefault(workload.name, now)
            points.append(
                Point(
                    workload.name,
                    rows,
                    ours=now.wall_ours / first.wall_ours,
                    plain=now.wall_rival / first.wall_rival,
                    ratio=first.throughput_ratio / now.throughput_ratio,
                )
            )
    return points


def _on(rows: int) -> list[Workload]:
    return [one for one in WORKLOADS if rows <= MOST_OTHER_ROWS or "message" in one.name]

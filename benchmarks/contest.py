"""A contest: the same work done by the library and its rivals in turn, and its cost for each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from benchmarks.database import Database

WARM_UP_CALLS = 20


class Sample(NamedTuple):
    """The cost of one round."""

    cpu: float
    """CPU seconds of the client; the server is a separate process."""
    wall: float
    """Wall-clock seconds."""


class Target(NamedTuple):
    """The target for the library against a rival: the maximum CPU ratio, the minimum throughput ratio."""

    cpu: float | None = None
    throughput: float | None = None

    def __str__(self) -> str:
        limits = []
        if self.cpu is not None:
            limits.append(f"CPU ≤ {self.cpu:g}")
        if self.throughput is not None:
            limits.append(f"throughput ≥ {self.throughput:g}")
        return ", ".join(limits)


NO_TARGET = Target()

Round = Callable[[int], Sample | None]
"""Does the work the given number of times; returns the cost if this process cannot measure it."""


@dataclass(frozen=True)
class Rival:
    """Another implementation of the same work."""

    name: str
    round: Round
    target: Target = NO_TARGET


@dataclass(frozen=True)
class Contest:
    """The library and its rivals, ready for their rounds; the first rival is plain psycopg."""

    ours: Round
    rivals: list[Rival]
    tidy: Callable[[], object] = lambda: None
    """Cleans up after a round; not measured."""


@dataclass(frozen=True)
class Workload:
    """A kind of work, with the name it is reported under."""

    name: str
    open: Callable[[Database], AbstractContextManager[Contest]]
    calls: int
    """Number of calls per round."""
    quick_calls: int
    items: int = 1
    """Number of items per call."""


@dataclass(frozen=True)
class Comparison:
    """The library compared with one rival."""

    workload: str
    rival: str
    target: Target
    cpu_ours: float
    """Microseconds per item, as the median of the rounds; likewise the next three."""
    cpu_rival: float
    wall_ours: float
    wall_rival: float
    cpu_ratio: float
    """The median of the ratios within each round, which is robust against changes in the speed of the machine."""
    throughput_ratio: float

    @property
    def meets_target(self) -> bool:
        """Whether the ratios meet the target."""
        cpu, throughput = self.target
        return (cpu is None or self.cpu_ratio <= cpu) and (throughput is None or self.throughput_ratio >= throughput)


def compare(workload: Workload, database: Database, rounds: int, *, quick: bool = False) -> list[Comparison]:
    """Run all contestants in turn, in varying order, and compare the library with each rival."""
    calls = workload.quick_calls if quick else workload.calls
    with workload.open(database) as contest:
        sides = [contest.ours, *(rival.round for rival in contest.rivals)]
        samples: list[list[Sample]] = [[] for _ in sides]
        for side in sides:  # warm-up: statements are prepared, caches filled
            side(min(calls, WARM_UP_CALLS))
            contest.tidy()
        for number in range(rounds):
            turns = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
            for turn in turns:
                samples[turn].append(_measure(sides[turn], calls))
                contest.tidy()
    per_item = 1e6 / (calls * workload.items)
    ours = samples[0]
    return [
        Comparison(
            workload.name,
            rival.name,
            rival.target,
            cpu_ours=median(one.cpu for one in ours) * per_item,
            cpu_rival=median(one.cpu for one in theirs) * per_item,
            wall_ours=median(one.wall for one in ours) * per_item,
            wall_rival=median(one.wall for one in theirs) * per_item,
            cpu_ratio=median(one.cpu / other.cpu for one, other in zip(ours, theirs, strict=True)),
            throughput_ratio=median(other.wall / one.wall for one, other in zip(ours, theirs, strict=True)),
        )
        for rival, theirs in zip(contest.rivals, samples[1:], strict=True)
    ]


def _measure(work: Round, calls: int) -> Sample:
    # Start without the garbage of the others; the collector stays on, so that each pays for its own.
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    measured = work(calls)
    sample = Sample(time.process_time() - cpu, time.perf_counter() - wall)
    return measured or sample

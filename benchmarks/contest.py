"""A contest: one piece of work, done by the library and by its rivals in turns, and what it cost each of them."""

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
    """What one round took."""

    cpu: float
    """Seconds of the client's processor; the server is another process."""
    wall: float
    """Seconds on the clock."""


class Target(NamedTuple):
    """What is asked of the library against a rival: a ratio of the CPU at most, of the throughput at least."""

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
"""Does the work as many times as it is told; gives what that took where this process cannot measure it."""


@dataclass(frozen=True)
class Rival:
    """Somebody else who does the same work."""

    name: str
    round: Round
    target: Target = NO_TARGET


@dataclass(frozen=True)
class Contest:
    """The library and its rivals, ready for their rounds; the first rival is plain psycopg."""

    ours: Round
    rivals: list[Rival]
    tidy: Callable[[], object] = lambda: None
    """Undoes a round, on nobody's account."""


@dataclass(frozen=True)
class Workload:
    """A kind of work, by the name under which it is reported."""

    name: str
    open: Callable[[Database], AbstractContextManager[Contest]]
    calls: int
    """How often it is done in a round."""
    quick_calls: int
    items: int = 1
    """How many things a call works on."""


@dataclass(frozen=True)
class Comparison:
    """The library against one rival."""

    workload: str
    rival: str
    target: Target
    cpu_ours: float
    """Microseconds for each item, the median of the rounds; so are the next three."""
    cpu_rival: float
    wall_ours: float
    wall_rival: float
    cpu_ratio: float
    """The median of the ratios within each round, which does not mind that the machine gets faster or slower."""
    throughput_ratio: float

    @property
    def meets_target(self) -> bool:
        """Whether the ratios are as asked for."""
        cpu, throughput = self.target
        return (cpu is None or self.cpu_ratio <= cpu) and (throughput is None or self.throughput_ratio >= throughput)


def compare(workload: Workload, database: Database, rounds: int, *, quick: bool = False) -> list[Comparison]:
    """Let all do the work in turns, in a different order each time, and compare the library with each rival."""
    calls = workload.quick_calls if quick else workload.calls
    with workload.open(database) as contest:
        sides = [contest.ours, *(rival.round for rival in contest.rivals)]
        samples: list[list[Sample]] = [[] for _ in sides]
        for side in sides:  # Statements get prepared, caches filled.
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
    # Each begins without garbage of the others, and pays for its own: the collector stays on.
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    measured = work(calls)
    sample = Sample(time.process_time() - cpu, time.perf_counter() - wall)
    return measured or sample

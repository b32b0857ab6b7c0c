"""What telemetry adds to a call, with the reader in memory of OpenTelemetry's SDK: metrics alone, and with spans."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracerProvider

from benchmarks.database import Database
from benchmarks.limits import Fact
from mesh_storage import MeshStorage, Telemetry

_ROUNDS = 40
_CALLS = 200
_LIMIT_US = 8.0


def _calls(storage: MeshStorage) -> None:
    """Make many calls in one unit of work."""
    with storage.begin(read_only=True) as uow:
        for _ in range(_CALLS):
            uow.state.get("key-1")


def _units(storage: MeshStorage) -> None:
    """Make many units of work of one call each."""
    for _ in range(_CALLS):
        with storage.begin(read_only=True) as uow:
            uow.state.get("key-1")


def _measure(
    database: Database, work: Callable[[MeshStorage], None], *, collecting: bool = False, spans: bool = False
) -> float:
    """Return the CPU that is added, as the median of the rounds, in microseconds; on request with the collection."""
    reader = InMemoryMetricReader()
    tracers = TracerProvider() if spans else NoOpTracerProvider()
    telemetry = Telemetry(MeterProvider([reader]), tracers, statistics=False)

    def cost(storage: MeshStorage, *, collect: bool) -> float:
        begun = time.process_time()
        work(storage)
        if collect:
            reader.get_metrics_data()
        return time.process_time() - begun

    added: list[float] = []
    with MeshStorage.open(database.url, telemetry=telemetry) as storage:
        for number in range(-2, _ROUNDS):  # the first two warm up
            if number % 2:
                without = cost(database.storage, collect=False)
            with_it = cost(storage, collect=collecting)
            if not number % 2:
                without = cost(database.storage, collect=False)
            reader.get_metrics_data()
            if number >= 0:
                added.append(with_it - without)
    return statistics.median(added) / _CALLS * 1e6


def call(database: Database) -> Fact:
    """Measure what metrics add to a call."""
    return Fact("telemetry: metrics of a call", _measure(database, _calls), "µs", _LIMIT_US)


def unit_of_work(database: Database) -> Fact:
    """Measure what metrics add to a unit of work of one call, which has three durations besides."""
    return Fact("telemetry: metrics of a unit of work of one call", _measure(database, _units), "µs", 4 * _LIMIT_US)


def collected_call(database: Database) -> Fact:
    """Measure the same of a call, together with its share of the collection, which runs elsewhere."""
    added = _measure(database, _calls, collecting=True)
    return Fact("telemetry: metrics of a call, and recording them", added, "µs", 3 * _LIMIT_US)


def call_with_span(database: Database) -> Fact:
    """Measure what metrics and a span, which is made but not exported, add to a call."""
    return Fact("telemetry: metrics and span of a call", _measure(database, _calls, spans=True), "µs", 8 * _LIMIT_US)


FACTS: dict[str, Callable[[Database], Fact]] = {
    "telemetry: call": call,
    "telemetry: unit of work": unit_of_work,
    "telemetry: collected": collected_call,
    "telemetry: span": call_with_span,
}

"""What telemetry adds to a call, with the reader in memory of OpenTelemetry's SDK: metrics alone, and with spans."""

from __future__ import annotations

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
    """Return the CPU in microseconds that is added to one, on request with the collection.

    It is the difference between the cheapest rounds of both sides, since whatever else runs on the machine only adds.
    """
    reader = InMemoryMetricReader()
    tracers = TracerProvider() if spans else NoOpTracerProvider()
    telemetry = Telemetry(MeterProvider([reader]), tracers, statistics=False)
    with_it, without = list[float](), list[float]()
    with MeshStorage.open(database.url, telemetry=telemetry) as storage:
        for _ in range(_ROUNDS):
            for side, costs in ((storage, with_it), (database.storage, without)):
                begun = time.process_time()
                work(side)
                if collecting and side is storage:
                    reader.get_metrics_data()
                costs.append(time.process_time() - begun)
            reader.get_metrics_data()
    return (min(with_it) - min(without)) / _CALLS * 1e6


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

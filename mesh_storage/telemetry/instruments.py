"""The instruments of OpenTelemetry, which all storages that report to the same meter provider share.

A meter ignores the callbacks of an instrument that it already has, so the observable instruments are created once, and
look at every storage that is open.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    MeterProvider,
    Observation,
    get_meter,
    get_meter_provider,
)

import mesh_storage
from mesh_storage.telemetry.deferred import Deferred
from mesh_storage.telemetry.living import Living
from mesh_storage.telemetry.statistics import GAUGES, Gauge

if TYPE_CHECKING:
    from mesh_storage.telemetry.observed import Observed

SCOPE = "mesh_storage"
"""The name of the meter and of the tracer."""
_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
"""What the semantic conventions advise for `db.client.operation.duration`; those of pools advise nothing."""

Callback = Callable[[CallbackOptions], Iterable[Observation]]


class Instruments:
    """The instruments of one meter provider, or of the global one, whenever it is set."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self._meter = get_meter(SCOPE, mesh_storage.__version__, meter_provider=provider)
        self._observed: Living[Observed] = Living()
        self.deferred = Deferred()
        """What is recorded at the next collection."""
        self._describe_calls()
        self._describe_pool()
        self._describe_runtime()

    def add(self, observed: Observed) -> None:
        """Look at one more storage in each collection, as long as it exists."""
        self._observed.add(observed)

    def _describe_calls(self) -> None:
        count = self._meter.create_counter
        self.operation_duration = self._seconds(
            "db.client.operation.duration", "Duration of database client operations."
        )
        self.unit_duration = self._seconds(
            "mesh_storage.unit_of_work.duration", "Duration of units of work, including the wait for a connection."
        )
        self.retries = count(
            "mesh_storage.unit_of_work.retries", "{retry}", "Units of work that `run` tried again, by the error before."
        )
        self.cache_lookups = count(
            "mesh_storage.cache.lookups", "{lookup}", "Reads that a cache was asked for, by whether it had the answer."
        )

        self.fallbacks = count(
            "mesh_storage.replica.fallbacks",
            "{unit_of_work}",
            "Units of work that the primary answered in place of a replica, by the reason.",
        )

    def _describe_pool(self) -> None:
        number = self._meter.create_observable_up_down_counter
        number(
            "db.client.connection.count",
            self._from_all(lambda each: each.connections()),
            "{connection}",
            "The number of connections that are currently in the state of the attribute `db.client.connection.state`.",
        )
        number(
            "db.client.connection.max",
            self._from_all(lambda each: each.max_connections()),
            "{connection}",
            "The maximum number of open connections allowed.",
        )
        number(
            "db.client.connection.pending_requests",
            self._from_all(lambda each: each.pending_requests()),
            "{request}",
            "The number of current pending requests for an open connection.",
        )
        self.timeouts = self._meter.create_counter(
            "db.client.connection.timeouts",
            "{timeout}",
            "The number of timeouts while waiting for a connection of the pool.",
        )
        self.create_time = self._seconds("db.client.connection.create_time", "The time it took to create a connection.")
        self.wait_time = self._seconds(
            "db.client.connection.wait_time", "The time it took to obtain an open connection from the pool."
        )
        self.use_time = self._seconds(
            "db.client.connection.use_time", "The time between borrowing a connection and returning it to the pool."
        )

    def _describe_runtime(self) -> None:
        self._meter.create_observable_up_down_counter(
            "mesh_storage.lease.held",
            self._from_all(lambda each: each.held_leases()),
            "{lease}",
            "Leases that are held, by name.",
        )
        self.lost_leases = self._meter.create_counter(
            "mesh_storage.lease.lost", "{lease}", "Leases that were lost before they were given back."
        )
        self.failed_deliveries = self._meter.create_counter(
            "mesh_storage.delivery.failures", "{delivery}", "Deliveries that `consume` could not have handled."
        )
        gauge = self._meter.create_observable_gauge
        gauge(
            "mesh_storage.watch.lag",
            self._from_all(lambda each: each.watch_lags()),
            "s",
            "How old the view of a watcher is: since the last look whose batches it has taken.",
        )
        for statistic in GAUGES:
            gauge(statistic.name, self._from_all(_reading(statistic)), statistic.unit, statistic.description)

    def _seconds(self, name: str, description: str) -> Histogram:
        return self._meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_BUCKETS_S)

    def _from_all(self, read: Callable[[Observed], Iterable[Observation]]) -> Sequence[Callback]:
        def callback(_options: CallbackOptions) -> Iterable[Observation]:
            self.deferred.flush()
            return [observation for each in self._observed for observation in read(each)]

        return [callback]


def _reading(gauge: Gauge) -> Callable[[Observed], Iterable[Observation]]:
    return lambda observed: observed.statistic(gauge)


_global: list[Instruments] = []
# A provider keeps its instruments alive, by their callbacks.
_of_providers: weakref.WeakKeyDictionary[MeterProvider, weakref.ref[Instruments]] = weakref.WeakKeyDictionary()


def instruments_of(provider: MeterProvider | None) -> Instruments:
    """Return the instruments of a meter provider, the global one if None."""
    if provider is None or provider is get_meter_provider():
        if not _global:
            _global.append(Instruments(None))
        return _global[0]
    known = _of_providers.get(provider)
    found = None if known is None else known()
    if found is None:
        found = Instruments(provider)
        _of_providers[provider] = weakref.ref(found)
    return found

"""One storage as its telemetry sees it: its attributes, and what the instruments look at."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol

from opentelemetry.metrics import Observation
from opentelemetry.trace import get_tracer

import mesh_storage
from mesh_storage.postgres.server import Server
from mesh_storage.telemetry import Telemetry
from mesh_storage.telemetry.attributes import of_database, of_pool
from mesh_storage.telemetry.instruments import SCOPE, instruments_of
from mesh_storage.telemetry.living import Living
from mesh_storage.telemetry.statistics import Gauge, Statistics


class ObservedPool(Protocol):
    """A pool of connections."""

    size: int
    closed: bool

    @property
    def in_use(self) -> int:
        """The number of connections in use."""
        ...

    @property
    def idle(self) -> int:
        """The number of connections that wait for a unit of work."""
        ...

    @property
    def pending(self) -> int:
        """The number of requests for a connection that have none yet."""
        ...


class ObservedLease(Protocol):
    """A lease that was acquired."""

    @property
    def label(self) -> str:
        """Its name."""
        ...

    @property
    def held(self) -> bool:
        """Whether it is held."""
        ...


class ObservedWatch(Protocol):
    """A watch."""

    label: str
    """What it watches."""
    seen_at: float | None
    """The time, by `time.monotonic()`, up to which its caller has seen everything."""


class Observed:
    """What is known about one open storage; it keeps nothing of the storage alive."""

    def __init__(self, telemetry: Telemetry, server: Server) -> None:
        self.instruments = instruments_of(telemetry.meter_provider)
        self.tracer = get_tracer(SCOPE, mesh_storage.__version__, telemetry.tracer_provider)
        self.attributes = of_database(server)
        self.pool_attributes = of_pool(self.attributes)
        self.leases: Living[ObservedLease] = Living()
        self.watches: Living[ObservedWatch] = Living()
        self._statistics = Statistics(server.connect) if telemetry.statistics else None
        self._pool: weakref.ref[ObservedPool] | None = None

    def open(self, pool: ObservedPool) -> None:
        """Begin to be looked at, as soon as there is a pool."""
        self._pool = weakref.ref(pool)
        self.instruments.add(self)

    def close(self) -> None:
        """Close the connection that reads the server's statistics."""
        if self._statistics is not None:
            self._statistics.close()

    def connections(self) -> Iterator[Observation]:
        """Yield the number of connections in each state."""
        pool = self._open_pool()
        if pool is not None:
            for state, number in (("idle", pool.idle), ("used", pool.in_use)):
                yield Observation(number, self.pool_attributes | {"db.client.connection.state": state})

    def max_connections(self) -> Iterator[Observation]:
        """Yield the size of the pool."""
        pool = self._open_pool()
        if pool is not None:
            yield Observation(pool.size, self.pool_attributes)

    def pending_requests(self) -> Iterator[Observation]:
        """Yield the number of units of work that wait for a connection."""
        pool = self._open_pool()
        if pool is not None:
            yield Observation(pool.pending, self.pool_attributes)

    def held_leases(self) -> Iterable[Observation]:
        """Return the number of leases that are held, by name."""
        held: dict[str, int] = {}
        for lease in self.leases if self._open_pool() is not None else ():
            held[lease.label] = held.get(lease.label, 0) + lease.held
        return [
            Observation(number, self.pool_attributes | {"mesh_storage.lease.name": name})
            for name, number in held.items()
        ]

    def watch_lags(self) -> Iterable[Observation]:
        """Return the seconds by which each watch lags, the longest of those that watch the same."""
        lags: dict[str, float] = {}
        now = time.monotonic()
        for watch in self.watches if self._open_pool() is not None else ():
            if watch.seen_at is not None:
                lags[watch.label] = max(lags.get(watch.label, 0.0), now - watch.seen_at)
        return [
            Observation(lag, self.pool_attributes | {"mesh_storage.watch.aggregates": names})
            for names, lag in lags.items()
        ]

    def statistic(self, gauge: Gauge) -> Iterator[Observation]:
        """Yield the values of a statistic of the server."""
        if self._statistics is None or self._open_pool() is None:
            return
        for label, value in self._statistics.take(gauge):
            labels = {} if label is None else {gauge.attribute: label}
            yield Observation(value, self.pool_attributes | labels)

    def count_cache_lookup(self, operation: str, *, hit: bool) -> None:
        """Count a read, such as `state.get`, that a cache could answer or could not."""
        attributes = {"db.operation.name": operation, "mesh_storage.cache.result": "hit" if hit else "miss"}
        self.instruments.deferred.add(self.instruments.cache_lookups.add, 1, self.pool_attributes | attributes)

    def count_delivery_failure(self, error: BaseException, outcome: str) -> None:
        """Count a delivery that was not handled: it will be `retried`, is `dead`, or its lease was `lost`."""
        attributes = {"error.type": type(error).__qualname__, "mesh_storage.delivery.outcome": outcome}
        self.instruments.failed_deliveries.add(1, self.pool_attributes | attributes)

    def _open_pool(self) -> ObservedPool | None:
        pool = None if self._pool is None else self._pool()
        return None if pool is None or pool.closed else pool

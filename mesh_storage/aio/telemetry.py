"""The measured classes of a storage with telemetry; without it, none of this is imported.

Each takes the place of a class of `parts.py`. The repositories of a measured unit of work are generated: each has the
methods of its class, which call those of a plain one, so that what these call in turn is not measured again.
"""

from __future__ import annotations

import functools
import time
import typing
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any, ClassVar, TypeVar, cast

from sqlalchemy.util import ro_memoized_property

from mesh_storage.aio.lease import AsyncLease
from mesh_storage.aio.parts import AsyncParts
from mesh_storage.aio.postgres.concurrency import in_thread
from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.postgres.driver import AsyncDriver
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.postgres.replicas import AsyncReplicas
from mesh_storage.aio.unit_of_work import AsyncScope, AsyncUnitOfWork
from mesh_storage.aio.watch import AsyncWatch
from mesh_storage.errors import StorageTimeoutError, UnavailableError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.reading import Reason
from mesh_storage.postgres.server import Server
from mesh_storage.postgres.tenure import Tenure
from mesh_storage.settings import Settings
from mesh_storage.telemetry import Telemetry
from mesh_storage.telemetry.observed import Observed
from mesh_storage.telemetry.unit import Operation, Unit, outcome_of

T = TypeVar("T")


def measured(telemetry: Telemetry, server: Server) -> AsyncParts:
    """Return the classes of a storage that is measured."""
    observed = Observed(telemetry, server)
    return AsyncParts(
        _bound(AsyncMeasuredPool, observed=observed),
        _bound(AsyncMeasuredScope, observed=observed, units_of_work=_unit_of_work(observed)),
        _bound(AsyncMeasuredLease, observed=observed),
        _bound(AsyncMeasuredWatch, observed=observed),
        _bound(AsyncMeasuredReplicas, observed=observed, telemetry=telemetry),
        observed,
    )


class AsyncMeasuredPool(AsyncPool):
    """A pool that records how long connections are waited for and used."""

    observed: ClassVar[Observed]

    def __init__(self, settings: Settings, server: Server) -> None:
        super().__init__(settings, server)
        self._requests: dict[object, None] = {}
        self._borrowed: dict[AsyncUnitOfWorkConnection, float] = {}
        self.observed.open(self)

    @property
    def pending(self) -> int:
        """The number of requests for a connection that have none yet."""
        return len(self._requests)

    async def acquire(
        self, characteristics: Characteristics, *, beside: bool = False, until: float | None = None
    ) -> AsyncUnitOfWorkConnection:
        """Acquire a connection, and record the wait."""
        request = object()
        self._requests[request] = None
        begun = time.perf_counter()
        try:
            connection = await super().acquire(characteristics, beside=beside, until=until)
        finally:
            self._requests.pop(request, None)
        self._borrowed[connection] = now = time.perf_counter()
        instruments = self.observed.instruments
        instruments.deferred.add(instruments.wait_time.record, now - begun, self.observed.pool_attributes)
        return connection

    async def release(self, connection: AsyncUnitOfWorkConnection) -> None:
        """Release a connection, and record for how long it was in use."""
        try:
            await super().release(connection)
        finally:
            borrowed = self._borrowed.pop(connection, None)
            if borrowed is not None:
                seconds, instruments = time.perf_counter() - borrowed, self.observed.instruments
                instruments.deferred.add(instruments.use_time.record, seconds, self.observed.pool_attributes)

    async def close(self) -> None:
        """Close the idle connections, and that of the statistics."""
        try:
            await super().close()
        finally:
            await in_thread(self.observed.close)  # a collection may be in progress

    def after_fork(self) -> None:
        """Start with no connections in a forked child."""
        super().after_fork()
        self._requests = {}
        self._borrowed = {}

    async def _connect(self, deadline: float | None) -> AsyncDriver:
        begun = time.perf_counter()
        driver = await super()._connect(deadline)
        self.observed.instruments.create_time.record(time.perf_counter() - begun, self.observed.pool_attributes)
        return driver

    def _exhausted(self, timeout: float | None) -> UnavailableError | StorageTimeoutError:
        self.observed.instruments.timeouts.add(1, self.observed.pool_attributes)
        return super()._exhausted(timeout)


class AsyncMeasuredReplicas(AsyncReplicas):
    """Replicas whose pools are measured like that of the primary, and whose absence is counted."""

    observed: ClassVar[Observed]
    telemetry: ClassVar[Telemetry]

    def fall_back(self, reason: Reason) -> None:
        """Note and count that the primary answers a unit of work."""
        super().fall_back(reason)
        attributes = {"mesh_storage.replica.reason": reason}
        self.observed.instruments.fallbacks.add(1, self.observed.pool_attributes | attributes)

    def _open(self, settings: Settings, server: Server) -> AsyncPool:
        # The statistics are those of the primary.
        telemetry = Telemetry(self.telemetry.meter_provider, self.telemetry.tracer_provider, statistics=False)
        return _bound(AsyncMeasuredPool, observed=Observed(telemetry, server))(settings, server)


class AsyncMeasuredUnitOfWork(AsyncUnitOfWork):
    """A unit of work that knows its outcome; `_unit_of_work` adds measured repositories."""

    __slots__ = ("_unit",)  # not among the attributes, which are the repositories that were used

    def __init__(self, connection: AsyncUnitOfWorkConnection, unit: Unit) -> None:
        super().__init__(connection)
        self._unit = unit

    async def commit(self) -> None:
        """Commit everything since the last commit atomically."""
        try:
            await super().commit()
        except BaseException as error:
            self._unit.outcome = outcome_of(error)
            raise
        self._unit.outcome = "committed"


class AsyncMeasuredScope(AsyncScope):
    """The context manager of a measured unit of work."""

    observed: ClassVar[Observed]
    units_of_work: ClassVar[type[AsyncMeasuredUnitOfWork]]
    _unit: Unit

    async def __aenter__(self) -> AsyncUnitOfWork:
        unit = Unit(self.observed, self._retry)
        try:
            await super().__aenter__()
        except BaseException as error:
            unit.end(error)
            raise
        self._unit, self._calls = unit, unit.calls
        self._uow = self.units_of_work(self._connection, unit)
        return self._uow

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, traceback)
        except BaseException as failure:
            self._unit.end(failure)
            raise
        self._unit.end(error)


class AsyncMeasuredLease(AsyncLease):
    """A lease that is counted while it is held, and when it is lost."""

    observed: ClassVar[Observed]

    @property
    def label(self) -> str:
        """The name of the lease."""
        return self._name

    def _hold(self, tenure: Tenure) -> None:
        super()._hold(tenure)
        self.observed.leases.add(self)

    def _lost(self, tenure: Tenure, reason: str) -> None:
        super()._lost(tenure, reason)
        attributes = {"mesh_storage.lease.name": self._name, "mesh_storage.lease.reason": reason}
        self.observed.instruments.lost_leases.add(1, self.observed.pool_attributes | attributes)


class AsyncMeasuredWatch(AsyncWatch):
    """A watch whose lag is observed."""

    observed: ClassVar[Observed]

    def __init__(
        self,
        storage: object,
        pool: AsyncPool,
        aggregates: tuple[str, ...],
        *,
        prefix: str,
        after: str | None,
        poll: float,
    ) -> None:
        super().__init__(storage, pool, aggregates, prefix=prefix, after=after, poll=poll)
        self.label = ",".join(sorted(set(aggregates)))
        self.observed.watches.add(self)


def _bound(class_: type[T], **members: object) -> type[T]:
    """Return a subclass for one storage."""
    return cast("type[T]", type(class_.__name__, (class_,), members))


def _unit_of_work(observed: Observed) -> type[AsyncMeasuredUnitOfWork]:
    """Return the class of a unit of work whose repositories are measured."""
    repositories = {
        name: _repository(name, typing.get_type_hints(member.fget)["return"], observed)
        for name, member in vars(AsyncUnitOfWork).items()
        if isinstance(member, ro_memoized_property) and not name.startswith("_")
    }
    return _bound(AsyncMeasuredUnitOfWork, **repositories)


def _repository(name: str, class_: type[Any], observed: Observed) -> object:
    """Return the attribute of a unit of work that is a measured repository."""

    def initialize(self: Any, connection: AsyncUnitOfWorkConnection, unit: Unit) -> None:
        self._plain = class_(connection)
        self._unit = unit

    members: dict[str, object] = {"__init__": initialize}
    for method_name in dir(class_):
        if not method_name.startswith("_"):
            method = getattr(class_, method_name)
            measure = _stream if "Generator[" in method.__annotations__["return"] else _call
            members[method_name] = measure(Operation(observed, name, method_name), method)
    made = _bound(class_, **members)

    def repository(self: Any) -> Any:
        return made(self._connection, self._unit)

    repository.__name__ = name
    return ro_memoized_property(repository)


def _call(operation: Operation, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return a method that measures each call of another."""

    @functools.wraps(method)
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        span = self._unit.start(operation, args, kwargs)
        try:
            result = await method(self._plain, *args, **kwargs)
        except BaseException as error:
            operation.failed(time.perf_counter() - begun, span, error)
            raise
        operation.done(time.perf_counter() - begun, span)
        return result

    return call


def _stream(
    operation: Operation, method: Callable[..., AsyncGenerator[Any, None]]
) -> Callable[..., AsyncGenerator[Any, None]]:
    """Return a method that measures what another yields, from the first row until the last one or its closing."""

    async def stream(
        unit: Unit, rows: AsyncGenerator[Any, None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        begun = time.perf_counter()
        span = unit.start(operation, args, kwargs, current=False)
        try:
            async with aclosing(rows):
                async for row in rows:
                    yield row
        except GeneratorExit:
            operation.done(time.perf_counter() - begun, span)
            raise
        except BaseException as error:
            operation.failed(time.perf_counter() - begun, span, error)
            raise
        operation.done(time.perf_counter() - begun, span)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        return stream(self._unit, method(self._plain, *args, **kwargs), args, kwargs)

    return call

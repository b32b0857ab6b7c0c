"""What is recorded of a unit of work and of the calls in it: a span and a duration each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sized
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace import SpanKind, StatusCode

from mesh_storage.errors import MeshStorageError
from mesh_storage.postgres.retry import Retry
from mesh_storage.telemetry.attributes import Attributes, of_failure
from mesh_storage.telemetry.observed import Observed
from mesh_storage.telemetry.statistics import COLLECTIONS

_SEVERAL = {"nodes.with_state": (COLLECTIONS["nodes"], COLLECTIONS["node_states"])}
"""The operations that concern more than the table of their repository."""
_OUTCOMES = {"no": "rolled_back", "unknown": "unknown", "locally": "committed_locally"}


def outcome_of(error: BaseException) -> str:
    """Return what became of a transaction whose commit raised this; unknown if it was interrupted."""
    return _OUTCOMES[error.committed] if isinstance(error, MeshStorageError) else "unknown"


class Operation:
    """A method of a repository, with the attributes of its calls."""

    def __init__(self, observed: Observed, repository: str, method: str) -> None:
        self.name = f"{repository}.{method}"
        of_repository = (COLLECTIONS[repository],) if repository in COLLECTIONS else ()
        collections = _SEVERAL.get(self.name, of_repository)
        self.attributes = observed.attributes | {"db.operation.name": self.name}
        if len(collections) == 1:
            self.attributes["db.collection.name"] = collections[0]
        self.summary = " ".join([self.name, *collections])
        self._is_batch = method.endswith("_many") and not method.startswith("get_")
        self._defer = observed.instruments.deferred.add
        self._record = observed.instruments.operation_duration.record

    def span_attributes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attributes:
        """Return the attributes of a span, with the size of a batch unless it is 1, which is none."""
        attributes = self.attributes | {"db.query.summary": self.summary}
        if self._is_batch:
            sizes = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, Sized)]
            if sizes and sizes[0] != 1:
                attributes["db.operation.batch.size"] = sizes[0]
        return attributes

    def done(self, seconds: float, span: CallSpan | None) -> None:
        """Record a call that succeeded."""
        self._defer(self._record, seconds, self.attributes, None if span is None else span.end(seconds, None))

    def failed(self, seconds: float, span: CallSpan | None, error: BaseException) -> None:
        """Record a call that raised."""
        failure = of_failure(error)
        self._defer(
            self._record, seconds, self.attributes | failure, None if span is None else span.end(seconds, failure)
        )


class CallSpan:
    """The span of one call, in which the spans of its statements are; not those of a stream's consumer."""

    def __init__(self, tracer: trace.Tracer, operation: Operation, attributes: Attributes, *, current: bool) -> None:
        self._begun = time.time_ns()
        self._span = tracer.start_span(
            operation.summary, kind=SpanKind.CLIENT, attributes=attributes, start_time=self._begun
        )
        self._context = trace.set_span_in_context(self._span)
        self._token = context.attach(self._context) if current else None

    def end(self, seconds: float, failure: Attributes | None) -> context.Context:
        """End it after as long as the call took, so that span and metric agree; return its context."""
        if self._token is not None:
            context.detach(self._token)
        if failure is not None:
            _set_failure(self._span, failure)
        self._span.end(self._begun + round(seconds * 1e9))
        return self._context


class Unit:
    """One unit of work."""

    def __init__(self, observed: Observed, retry: Retry | None) -> None:
        """Begin it; `retry` says which attempt of which function it is."""
        self.calls: dict[str, int] = {}
        """How often each operation was called."""
        self.outcome = "rolled_back"
        """That of the last commit."""
        self._observed = observed
        attempt, name = 1, "unit_of_work"
        if retry is not None:
            attempt += retry.made
            name += f" {getattr(retry.work, '__qualname__', type(retry.work).__qualname__)}"
            if retry.made:
                observed.instruments.retries.add(1, observed.pool_attributes | {"error.type": retry.reason})
        self._begun = time.perf_counter()
        self._begun_ns = time.time_ns()
        self._span = observed.tracer.start_span(
            name, attributes=observed.pool_attributes | {"mesh_storage.attempt": attempt}, start_time=self._begun_ns
        )
        self._recording = self._span.is_recording()
        self._context = trace.set_span_in_context(self._span) if self._recording else None
        self._token = None if self._context is None else context.attach(self._context)

    def start(
        self, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, current: bool = True
    ) -> CallSpan | None:
        """Count a call, and begin its span if this unit of work is recorded."""
        self.calls[operation.name] = self.calls.get(operation.name, 0) + 1
        if not self._recording:
            return None
        return CallSpan(self._observed.tracer, operation, operation.span_attributes(args, kwargs), current=current)

    def end(self, error: BaseException | None) -> None:
        """Record how it ended, and with which error if one left its block."""
        seconds = time.perf_counter() - self._begun
        failure = {} if error is None else of_failure(error)
        outcome = {"mesh_storage.outcome": self.outcome}
        instruments, attributes = self._observed.instruments, self._observed.pool_attributes | outcome | failure
        instruments.deferred.add(instruments.unit_duration.record, seconds, attributes, self._context)
        # Whoever ended it in another thread or task, as some frameworks do, has another context there.
        if self._token is not None and trace.get_current_span() is self._span:
            context.detach(self._token)
        self._span.set_attributes(outcome)
        if failure:
            _set_failure(self._span, failure)
        self._span.end(self._begun_ns + round(seconds * 1e9))


def _set_failure(span: trace.Span, failure: Attributes) -> None:
    span.set_attributes(failure)
    span.set_status(StatusCode.ERROR)

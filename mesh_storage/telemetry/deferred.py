"""Measurements that wait until the metrics are collected, so that a call does not wait for the SDK to record them.

Recording a duration takes OpenTelemetry's SDK longer than all else that telemetry adds to a call, and locks. Many in a
row take less of the CPU than each in the middle of other work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from opentelemetry.context import Context

from mesh_storage.telemetry.attributes import Attributes

_MOST = 1000
"""If more are waiting, because nobody collects them so often, each one that is added records two."""


class Deferred:
    """Records measurements in the order in which they were made, from any thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[..., Any], float, Attributes, Context | None]] = deque()

    def add(
        self, record: Callable[..., Any], value: float, attributes: Attributes, context: Context | None = None
    ) -> None:
        """Call an instrument's `record` or `add` with these arguments later; the context is that of the span."""
        self._waiting.append((record, value, attributes, context))
        if len(self._waiting) > _MOST:
            self._record(2)

    def flush(self) -> None:
        """Record all that wait now."""
        self._record(len(self._waiting))

    def _record(self, number: int) -> None:
        for _ in range(number):
            try:
                record, value, attributes, context = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            record(value, attributes, context)

"""What a storage reports, kept in memory by OpenTelemetry's SDK."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mesh_storage import Telemetry


class Recorder:
    """Providers of OpenTelemetry's SDK, and what they got."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self._reader])
        self._exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider()
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def telemetry(self, *, statistics: bool = False) -> Telemetry:
        return Telemetry(self.meter_provider, self.tracer_provider, statistics=statistics)

    def metrics(self) -> dict[str, Metric]:
        """Collect, and return the metrics by name."""
        collected = self._reader.get_metrics_data()
        return {
            metric.name: metric
            for resource in (collected.resource_metrics if collected else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if scope.scope.name == "mesh_storage"
        }

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Collect, and return the attributes and the value of each point; the value of a histogram is its count."""
        metric = self.metrics().get(name)
        return [
            (dict(point.attributes or {}), point.value if isinstance(point, NumberDataPoint) else point.count)
            for point in (metric.data.data_points if metric else ())
        ]

    def by(self, name: str, *attributes: str) -> dict[Any, Any]:
        """Collect, and return the sums of the points by some of their attributes, None where there is none."""
        made: dict[Any, Any] = {}
        for given, value in self.points(name):
            key = tuple(given.get(attribute) for attribute in attributes)
            group = key[0] if len(key) == 1 else key
            made[group] = made.get(group, 0) + value
        return made

    def spans(self, start: str = "") -> list[ReadableSpan]:
        """Return the spans that have ended, in the order of their ends."""
        return [span for span in self._exporter.get_finished_spans() if span.name.startswith(start)]

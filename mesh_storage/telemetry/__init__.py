"""Telemetry: spans and metrics of a storage, for OpenTelemetry; see docs/telemetry.md for their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh_storage.errors import ConfigurationError, InvalidInputError

if TYPE_CHECKING:  # OpenTelemetry is an extra
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider


class Telemetry:
    """Where storages send their spans and metrics, as an argument of `open`; several storages may share it."""

    def __init__(
        self,
        meter_provider: MeterProvider | None = None,
        tracer_provider: TracerProvider | None = None,
        *,
        statistics: bool = True,
    ) -> None:
        """Choose the providers.

        Args:
            meter_provider: Gets the metrics; OpenTelemetry's global one if None.
            tracer_provider: Gets the spans; OpenTelemetry's global one if None.
            statistics: Whether each collection of the metrics reads the server's statistics by one query, on a
                connection of its own.

        Raises:
            ConfigurationError: The extra `otel` is not installed.
            InvalidInputError: An argument is not of its type.
        """
        try:
            from opentelemetry import metrics, trace
        except ImportError as error:
            raise ConfigurationError("telemetry needs OpenTelemetry: pip install 'mesh-storage[otel]'") from error
        for name, provider, kind in (
            ("meter_provider", meter_provider, metrics.MeterProvider),
            ("tracer_provider", tracer_provider, trace.TracerProvider),
        ):
            if provider is not None and not isinstance(provider, kind):
                raise InvalidInputError(f"{name} must be a {kind.__name__}, not {type(provider).__name__}", field=name)
        self.meter_provider = meter_provider
        """Gets the metrics; the global one if None."""
        self.tracer_provider = tracer_provider
        """Gets the spans; the global one if None."""
        self.statistics = statistics
        """Whether the server's statistics are read."""

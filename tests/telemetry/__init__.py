"""Telemetry: what OpenTelemetry's SDK gets of a storage."""

"""Where metrics and spans go: to whoever scrapes, and to a collector where one is named.

Owns the providers behind `worker/telemetry.py`, which knows what goes through them. Metrics can always be scraped
(Prometheus' text format). Where the environment names a collector (OTEL_EXPORTER_OTLP_ENDPOINT, and the rest of
OpenTelemetry's variables) they are pushed there too, and spans are made; without one no span is ever made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, generate_latest

COLLECTOR = "OTEL_EXPORTER_OTLP_ENDPOINT"
# Of one push with its repeats. Twice that is the longest that a dead collector can hold a worker that is leaving: its
# answers are committed by then, and whoever stopped it waits.
PUSH_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Exporters:
    """Both providers, and the page to scrape."""

    meters: MeterProvider
    tracers: trace.TracerProvider
    registry: CollectorRegistry

    def exposition(self) -> bytes:
        """All metrics as they stand, in Prometheus' text format."""
        return generate_latest(self.registry)


@contextmanager
def open_exporters(worker: str) -> Iterator[Exporters]:
    """Exporters for the body of the `with`; what they still hold is pushed at its end."""
    registry = CollectorRegistry()
    readers: list[MetricReader] = [PrometheusMetricReader(registry=registry, scope_info_enabled=False)]
    resource = Resource.create(
        {"service.name": os.environ.get("OTEL_SERVICE_NAME", "tokenmill"), "service.instance.id": worker}
    )
    tracers: TracerProvider | None = None
    if COLLECTOR in os.environ:
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(timeout=PUSH_TIMEOUT_S)))
        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=PUSH_TIMEOUT_S)))
    meters = MeterProvider(readers, resource, shutdown_on_exit=False)
    try:
        yield Exporters(meters=meters, tracers=tracers or trace.NoOpTracerProvider(), registry=registry)
    finally:
        if tracers is not None:
            tracers.shutdown()
        meters.shutdown()

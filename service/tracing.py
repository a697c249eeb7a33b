"""Traces by OpenTelemetry: off unless an address to send them to is set, and then from the request to the block.

Each application and each worker has a provider of its own and sets none globally. A job's row keeps the context of
the request that brought it (``origin``), so that every attempt joins that trace, however the job reached its worker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import NoOpTracerProvider, TracerProvider

from service.settings import Settings


class TelemetryMissingError(Exception):
    """Traces are asked for, but the packages that send them are not installed."""


def tracer_provider(settings: Settings, name: str) -> TracerProvider:
    """What makes the spans of the process ``name``, and sends them from a thread; one that does nothing if off.

    Raises:
        TelemetryMissingError: there is an address, but nothing to send with.
    """
    if settings.otlp_endpoint is None:
        return NoOpTracerProvider()
    require(settings)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk import trace as sdk
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": os.environ.get("OTEL_SERVICE_NAME", name), "service.version": version("aquant-service")}
    )
    provider = sdk.TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def require(settings: Settings) -> None:
    """Raise TelemetryMissingError if traces are asked for and cannot be sent."""
    if settings.otlp_endpoint is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise TelemetryMissingError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set ({settings.otlp_endpoint}), but the packages that send traces are "
            f"not installed ({error.name} not found): pip install 'aquant-service[telemetry]', or unset it."
        ) from error


def send(provider: TracerProvider) -> None:
    """Send what waits, and wait until it is sent or given up."""
    flush = getattr(provider, "force_flush", None)  # only the SDK's has it
    if flush is not None:
        flush()


def shut_down(provider: TracerProvider) -> None:
    """Send what waits, and end the thread."""
    stop = getattr(provider, "shutdown", None)
    if stop is not None:
        stop()


def carrier() -> dict[str, str]:
    """The current span, in a form that can be kept; empty without one."""
    kept: dict[str, str] = {}
    propagate.inject(kept)
    return kept


def context_of(kept: Mapping[str, Any]) -> Context:
    """The context that :func:`carrier` has kept."""
    return propagate.extract(kept)

"""Spans of the application's work, joined to the gateway's by the call's metadata; nothing without an endpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

from opentelemetry import propagate, trace

from services.gateway.config import TracingConfig
from services.gateway.telemetry import make_provider


class Spans:
    """Makes spans and sends them to an OTLP endpoint.

    Args:
        endpoint: host:port of a collector's OTLP gRPC receiver; no spans are made if None.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._tracer: trace.Tracer | None = None
        if endpoint is not None:
            provider = make_provider(TracingConfig(endpoint=endpoint), service="trackstar-ray", send_at_exit=True)
            self._tracer = provider.get_tracer("trackstar")

    def of(self, name: str, metadata: Mapping[str, str]) -> AbstractContextManager[None]:
        """A span around the block, a child of the one that the call's metadata names."""
        return contextlib.nullcontext() if self._tracer is None else self._span(self._tracer, name, metadata)

    @contextlib.contextmanager
    def _span(self, tracer: trace.Tracer, name: str, metadata: Mapping[str, str]) -> Iterator[None]:
        parent = propagate.extract(dict(metadata))
        with tracer.start_as_current_span(name, context=parent, kind=trace.SpanKind.SERVER):
            yield

"""Spans of calls and stages with OpenTelemetry, and the trace context that follows a call to the backends.

Contract: without an exporter no span is ever made and the SDK is not even imported; a caller's W3C trace context still
passes through to logs and backends unchanged. With one, each call is a span of the caller's trace (or of a new one),
what runs `span(name)` inside is its child, and `outgoing()` makes backends' spans children of whatever runs. Attributes
hold names and numbers of this code, never a caller's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.gateway.config import TracingConfig
from trackstar.rpc_errors import REQUEST_ID

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_PROPAGATOR = TraceContextTextMapPropagator()
_SERVICE = "trackstar-gateway"


class Telemetry:
    """Makes spans, or nothing.

    Args:
        config: where spans go and how many.
        exporter: takes them instead of `config.endpoint`.
    """

    def __init__(self, config: TracingConfig | None = None, *, exporter: SpanExporter | None = None) -> None:
        config = config or TracingConfig()
        self._provider = (
            make_provider(config, exporter) if exporter is not None or config.endpoint is not None else None
        )
        self._tracer = None if self._provider is None else self._provider.get_tracer(_SERVICE)

    @contextmanager
    def rpc(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[trace.Span]:
        """One call, in the trace that its metadata name.

        Args:
            method: `/package.Service/Method`.
            metadata: of the call.
        """
        carrier = {
            key: value for key, value in metadata if key in ("traceparent", "tracestate") and isinstance(value, str)
        }
        if self._tracer is None and not carrier:
            yield trace.INVALID_SPAN
            return
        parent = _PROPAGATOR.extract(carrier, context=otel_context.Context())
        if self._tracer is None:
            token = otel_context.attach(parent)
            try:
                yield trace.get_current_span(parent)
            finally:
                otel_context.detach(token)
            return
        service, _, name = method.removeprefix("/").partition("/")
        with self._tracer.start_as_current_span(
            f"{service}/{name}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
            # What callers did wrong is no error of the server; `finish` tells.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    @contextmanager
    def span(self, name: str, *, client: bool = False) -> Iterator[trace.Span]:
        """A part of the current call. `client`: it waits for another process.

        Args:
            name: one of the code's own, such as `encode`.
        """
        if self._tracer is None:
            yield trace.INVALID_SPAN
            return
        kind = trace.SpanKind.CLIENT if client else trace.SpanKind.INTERNAL
        with self._tracer.start_as_current_span(name, kind=kind, record_exception=False) as span:
            yield span

    def close(self) -> None:
        """Send what is left. It blocks; call it when no call runs any more."""
        if self._provider is not None:
            self._provider.shutdown()


def outgoing(request_id: str) -> tuple[tuple[str, str], ...]:
    """Metadata for a call to a backend: the request's id, and the trace context if there is one."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return ((REQUEST_ID, request_id), *carrier.items())


def trace_id_of(span: trace.Span) -> str:
    """The id of a span's trace in hexadecimal; empty if it has none."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def finish(span: trace.Span, code: str, *, failed: bool) -> None:
    """Write how a call ended on its span. `failed`: by the server's fault."""
    span.set_attribute("rpc.grpc.status", code)
    if failed:
        span.set_status(trace.Status(trace.StatusCode.ERROR, code))


def make_provider(
    config: TracingConfig, exporter: SpanExporter | None = None, *, service: str = _SERVICE, send_at_exit: bool = False
) -> TracerProvider:
    """What makes the spans of a process and sends them.

    Args:
        config: where spans go and how many.
        exporter: takes them instead of `config.endpoint`.
        service: names the process in traces.
        send_at_exit: send what is left when the interpreter ends, where nobody closes it.
    """
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(
            endpoint=config.endpoint, insecure=not (config.endpoint or "").startswith("https://"), timeout=10
        )
    sampler = ParentBased(TraceIdRatioBased(config.sample_ratio))
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}), sampler=sampler, shutdown_on_exit=send_at_exit
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider

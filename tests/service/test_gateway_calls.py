"""What stands around a call: ids, traces, deadlines, cancellation, sizes, metrics and the log line."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.gateway.logs import JsonFormatter
from services.gateway.metrics import BreakerState
from services.gateway.request import current
from services.gateway.telemetry import Telemetry, outgoing
from tests.service.scripted import (
    NAME,
    ScriptedTraceService,
    Served,
    ask,
    connected,
    failure,
    raising,
    sample,
    serving,
    stub_of,
    until,
)
from trackstar.errors import InvalidRequest
from trackstar.rpc_errors import from_call
from trackstar.v1 import trace_pb2

_TRACE = "0af7651916cd43dd8448eb211c80319c"
_PARENT = f"00-{_TRACE}-b7ad6b7169203331-01"


def _trailers(metadata: grpc.aio.Metadata | None) -> dict[str, str | bytes]:
    return {str(key): value for key, value in metadata or ()}


@pytest.mark.parametrize(
    ("header", "message", "expected"),
    [
        ("from-header", "", "from-header"),
        ("from-header", "from-message", "from-message"),
        ("", "from message", "from message"),
        ("", "", None),
        ("x" * 129, "", None),
        ("", "é", None),
        ("", "line\nbreak", None),
    ],
)
def test_every_call_has_an_id(header: str, message: str, expected: str | None) -> None:
    async def run() -> None:
        metadata = (("x-request-id", header),) if header else ()
        async with serving(ScriptedTraceService({"fail": raising(InvalidRequest("no"))})) as served:
            call = served.traces.Trace(ask(request_id=message), metadata=metadata)
            seen = (await call).request_id
            assert _trailers(await call.trailing_metadata())["x-request-id"] == seen
            assert seen == expected if expected else len(seen) == 32
            failed = await failure(served.traces.Trace(ask("fail", request_id=message), metadata=metadata))
            echoed = _trailers(failed.trailing_metadata())["x-request-id"]
            assert echoed == expected if expected else len(echoed) == 32
            stream = served.traces.TraceStream(_stream(request_id=message), metadata=metadata)
            parts = [part async for part in stream]
            streamed = parts[0].encoded.request_id
            assert streamed == expected if expected else len(streamed) == 32
            assert _trailers(await stream.trailing_metadata())["x-request-id"] == streamed

    asyncio.run(run())


def test_deadlines_are_the_clients_within_bounds() -> None:
    seen: list[float] = []

    async def look() -> None:
        seen.append(current().seconds_left())

    async def run() -> None:
        settings = {"deadline": {"default_seconds": 20, "max_seconds": 40}}
        async with serving(ScriptedTraceService({"look": look}), settings) as served:
            await served.traces.Trace(ask("look"))
            await served.traces.Trace(ask("look"), timeout=5)
            await served.traces.Trace(ask("look"), timeout=3000)
        # gRPC rounds a client's timeout up.
        assert all(limit - 4 < left <= limit + 0.5 for left, limit in zip(seen, (20, 5, 40), strict=True))

    asyncio.run(run())


def test_no_handler_outlives_its_deadline() -> None:
    async def run() -> None:
        servicer = ScriptedTraceService({"stuck": asyncio.Event().wait})
        settings = {"deadline": {"default_seconds": 0.2, "max_seconds": 0.4}}
        async with serving(servicer, settings) as served:
            began = time.monotonic()
            for timeout in (None, 60, 0.1):
                error = await failure(served.traces.Trace(ask("stuck"), timeout=timeout))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                stream = served.traces.TraceStream(_stream("stuck"), timeout=timeout)
                if timeout != 0.1:
                    parts = aiter(stream)
                    assert (await anext(parts)).HasField("encoded")
                    error = await failure(anext(parts))
                    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            # A hang would show as minutes; this is no measure of speed.
            assert time.monotonic() - began < 30
            await until(lambda: servicer.running == 0)
            await _ended(served)
            labels = {"service": NAME, "code": "DEADLINE_EXCEEDED"}
            # On a busy machine the short one may be given up by its client before it arrives.
            assert sample(served.gateway, "trackstar_rpc_handled_total", method="Trace", **labels) >= 2

    asyncio.run(run())


def test_a_client_that_leaves_cancels_its_call() -> None:
    async def run() -> None:
        servicer = ScriptedTraceService({"stuck": asyncio.Event().wait})
        async with serving(servicer) as served:
            call = served.traces.Trace(ask("stuck"))
            stream = served.traces.TraceStream(_stream("stuck"))
            await stream.read()
            await until(lambda: servicer.running == 2)
            call.cancel()
            stream.cancel()
            await until(lambda: servicer.cancelled == 2)
            async with connected(served.address) as other:
                lost = asyncio.ensure_future(stub_of(other).Trace(ask("stuck")))
                await until(lambda: servicer.running == 1)
                await other.close()
            await asyncio.wait([lost])
            await until(lambda: servicer.cancelled == 3)
            await _ended(served)
            labels = {"service": NAME, "code": "CANCELLED"}
            assert sample(served.gateway, "trackstar_rpc_handled_total", method="Trace", **labels) == 2
            assert sample(served.gateway, "trackstar_rpc_handled_total", method="TraceStream", **labels) == 1

    asyncio.run(run())


def test_a_stream_nobody_reads_ends_at_its_deadline() -> None:
    """Flow control stops a large answer in the middle of a write."""

    class Flood(ScriptedTraceService):
        async def TraceStream(self, request, context):  # type: ignore[no-untyped-def]
            self.running += 1
            try:
                while True:
                    yield trace_pb2.TraceStreamResponse(encoded=trace_pb2.EncodedStage(generation="g" * 1_000_000))
            finally:
                self.running -= 1

    async def run() -> None:
        servicer = Flood()
        async with serving(servicer, {"deadline": {"default_seconds": 0.5, "max_seconds": 0.5}}) as served:
            stream = served.traces.TraceStream(_stream())
            await stream.read()
            assert servicer.running == 1
            await until(lambda: servicer.running == 0)
            await _ended(served)
            stream.cancel()

    asyncio.run(run())


def test_broken_and_oversize_messages_are_the_callers_error() -> None:
    async def run() -> None:
        settings = {"connection": {"max_request_bytes": 2048, "max_response_bytes": 4096}}
        async with serving(ScriptedTraceService(), settings) as served:
            raw: Any = served.channel.unary_unary
            broken = await failure(raw(f"/{NAME}/Trace")(b"\xff\xff\xff"))
            assert broken.code() is grpc.StatusCode.INVALID_ARGUMENT
            long = await failure(served.traces.Trace(ask("a" * 4096)))
            assert long.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            # Trying again would not help, so it is no overload.
            assert isinstance(from_call(long), InvalidRequest)
            answer = await failure(served.traces.GetPassages(trace_pb2.GetPassagesRequest(page_size=5000)))
            assert answer.code() is grpc.StatusCode.INVALID_ARGUMENT
            error = from_call(answer)
            assert isinstance(error, InvalidRequest)
            assert error.field == "page_size"
            unknown = await failure(raw(f"/{NAME}/Nothing")(b""))
            assert unknown.code() is grpc.StatusCode.UNIMPLEMENTED
            labels = {"service": "other", "method": "other", "code": "UNIMPLEMENTED"}
            assert sample(served.gateway, "trackstar_rpc_handled_total", **labels) == 1

    asyncio.run(run())


def test_a_status_that_a_servicer_sends_itself_passes_through() -> None:
    class Aborting(ScriptedTraceService):
        async def Trace(self, request, context):  # type: ignore[no-untyped-def]
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "too far")

    async def run() -> None:
        async with serving(Aborting()) as served:
            error = await failure(served.traces.Trace(ask()))
            assert (error.code(), error.details()) == (grpc.StatusCode.OUT_OF_RANGE, "too far")
            await _ended(served)
            labels = {"service": NAME, "method": "Trace", "code": "OUT_OF_RANGE"}
            assert sample(served.gateway, "trackstar_rpc_handled_total", **labels) == 1

    asyncio.run(run())


def test_metrics_are_scraped_over_http() -> None:
    names = [
        *(f"trackstar_rpc_{name}" for name in ("handled_total", "duration_seconds_bucket", "in_flight")),
        *(f"trackstar_admission_{name}" for name in ("queue_length", "wait_seconds_bucket")),
        *("trackstar_stage_duration_seconds_bucket", "trackstar_candidates_bucket", "trackstar_rejected_total"),
        *("trackstar_generation_info", "trackstar_backend_retries_total", "trackstar_breaker_state"),
        *("trackstar_row_bytes_read_total", "trackstar_defects_total"),
    ]

    async def run() -> None:
        async with serving(ScriptedTraceService()) as served:
            metrics = served.gateway.metrics
            metrics.stage("encode", 0.2)
            metrics.candidates(1000)
            metrics.row_bytes(4096)
            metrics.retried("encoder")
            metrics.breaker("encoder", BreakerState.OPEN)
            metrics.generation("g1", "c1")
            metrics.generation("g2", "c2")
            running = asyncio.ensure_future(served.traces.Trace(ask("sleep 0.3")))
            await until(lambda: sample(served.gateway, "trackstar_rpc_in_flight") == 1)
            during = await asyncio.to_thread(_scrape, served.ports.metrics)
            await running
            await _ended(served)
            after = await asyncio.to_thread(_scrape, served.ports.metrics)
        assert "trackstar_rpc_in_flight 1.0" in during
        assert "trackstar_rpc_in_flight 0.0" in after
        handled = f'trackstar_rpc_handled_total{{code="OK",method="Trace",service="{NAME}"}} 1.0'
        assert handled not in during
        assert handled in after
        assert not [name for name in names if f"\n{name}" not in after]
        assert 'trackstar_generation_info{checkpoint="c2",generation="g2"} 1.0' in after
        assert "g1" not in after

    asyncio.run(run())


def test_one_log_line_a_call_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving(ScriptedTraceService()) as served:
            request = ask("the secret prompt", generation="gen\n1", request_id="r1")
            request.query.target = "secret target"
            metadata = (("authorization-x", "secret"), ("traceparent", _PARENT))
            await served.traces.Trace(request, metadata=metadata)
            stream = served.traces.TraceStream(trace_pb2.TraceStreamRequest(trace=request))
            assert len([part async for part in stream]) == 2

    with caplog.at_level(logging.DEBUG):
        asyncio.run(run())
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert not [line for line in lines if "secret" in line]
    calls = [json.loads(line) for line in lines if json.loads(line)["message"] == "rpc"]
    assert [call["method"] for call in calls] == [f"/{NAME}/Trace", f"/{NAME}/TraceStream"]
    for call in calls:
        assert (call["code"], call["request_id"], call["principal"]) == ("OK", "r1", "anonymous")
        assert call["generation"] == "gen 1"
        assert call["seconds"] > 0
        assert "\n" not in json.dumps(call)
    assert calls[0]["trace_id"] == _TRACE
    assert "trace_id" not in calls[1]


def test_trace_context_passes_through_without_an_exporter() -> None:
    seen: list[dict[str, str]] = []

    async def look() -> None:
        seen.append(dict(outgoing(current().request_id)))

    async def run() -> None:
        async with serving(ScriptedTraceService({"look": look})) as served:
            await served.traces.Trace(ask("look", request_id="r1"), metadata=(("traceparent", _PARENT),))
            await served.traces.Trace(ask("look", request_id="r2"))
            await served.traces.Trace(ask("look", request_id="r3"), metadata=(("traceparent", "nonsense"),))

    asyncio.run(run())
    assert seen == [{"x-request-id": "r1", "traceparent": _PARENT}, {"x-request-id": "r2"}, {"x-request-id": "r3"}]


def test_spans_of_call_and_stages_are_exported_as_one_trace() -> None:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry(exporter=exporter)
    sent: list[str] = []

    async def stage() -> None:
        with telemetry.span("encode", client=True):
            sent.append(dict(outgoing("r"))["traceparent"])

    async def run() -> None:
        actions = {"stage": stage, "fail": raising(InvalidRequest("no")), "break": raising(KeyError("defect"))}
        async with serving(ScriptedTraceService(actions), telemetry=telemetry) as served:
            await served.traces.Trace(ask("stage"), metadata=(("traceparent", _PARENT),))
            await failure(served.traces.Trace(ask("fail")))
            await failure(served.traces.Trace(ask("break")))
            stream = served.traces.TraceStream(_stream("stage"))
            assert len([part async for part in stream]) == 2

    asyncio.run(run())
    encode, called, refused, broken, encode_of_stream, streamed = exporter.get_finished_spans()
    assert (encode.name, called.name, streamed.name) == ("encode", f"{NAME}/Trace", f"{NAME}/TraceStream")
    assert f"{called.context.trace_id:032x}" == _TRACE
    assert encode.parent is not None
    assert encode.parent.span_id == called.context.span_id
    assert sent[0] == f"00-{_TRACE}-{encode.context.span_id:016x}-01"
    assert encode_of_stream.context.trace_id == streamed.context.trace_id != called.context.trace_id
    codes = [span.attributes["rpc.grpc.status"] for span in (called, refused, broken) if span.attributes]
    assert codes == ["OK", "INVALID_ARGUMENT", "INTERNAL"]
    assert [span.status.is_ok for span in (called, refused, broken)] == [True, True, False]


def test_spans_reach_a_collector() -> None:
    received: list[str] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:
            spans = [span for of in request.resource_spans for scope in of.scope_spans for span in scope.spans]
            received.extend(span.name for span in spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    async def run() -> None:
        collector = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)  # type: ignore[no-untyped-call]
        port = collector.add_insecure_port("127.0.0.1:0")
        await collector.start()
        async with serving(ScriptedTraceService(), {"tracing": {"endpoint": f"http://127.0.0.1:{port}"}}) as served:
            await served.traces.Trace(ask())
        await collector.stop(None)

    asyncio.run(run())
    assert received == [f"{NAME}/Trace"]


def _stream(prompt: str = "", **fields: str) -> trace_pb2.TraceStreamRequest:
    return trace_pb2.TraceStreamRequest(trace=ask(prompt, **fields))


async def _ended(served: Served) -> None:
    """The client may hear of the end of a call before the gateway has counted it."""
    await until(lambda: sample(served.gateway, "trackstar_rpc_in_flight") == 0)


def _scrape(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text

"""Whatever arrives at a gateway with everything around its calls: an answer, or a refusal that names the field."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.config import GatewayConfig
from services.gateway.generation_service import GenerationService
from services.gateway.generations import Generations
from services.gateway.job_service import JobService
from services.gateway.server import Gateway, Service
from services.gateway.trace_service import TraceService
from tests.service.honest import CountedIndex, HonestEncoder, HonestReranker, make_index
from tests.service.honest_jobs import instant_jobs
from tests.service.messages import messages
from trackstar.errors import InvalidRequest
from trackstar.rpc_errors import from_call
from trackstar.v1 import generation_pb2, generation_pb2_grpc, job_pb2, job_pb2_grpc, trace_pb2, trace_pb2_grpc

_KINDS: list[tuple[str, type[Message]]] = [
    ("TraceService/Trace", trace_pb2.TraceRequest),
    ("TraceService/TraceStream", trace_pb2.TraceStreamRequest),
    ("TraceService/GetPassages", trace_pb2.GetPassagesRequest),
    ("TraceService/Verify", trace_pb2.VerifyRequest),
    ("GenerationService/List", generation_pb2.ListRequest),
    ("GenerationService/Get", generation_pb2.GetRequest),
    ("GenerationService/Activate", generation_pb2.ActivateRequest),
    ("JobService/CreateReindexJob", job_pb2.CreateReindexJobRequest),
    ("JobService/Get", job_pb2.JobServiceGetRequest),
    ("JobService/List", job_pb2.JobServiceListRequest),
    ("JobService/Watch", job_pb2.JobServiceWatchRequest),
    ("JobService/Cancel", job_pb2.JobServiceCancelRequest),
]
_MESSAGE_BYTES = 4 << 20
_EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
}


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[grpc.Channel]:
    """A channel to a whole gateway, which runs in a thread."""
    begun = threading.Event()
    ready: list[Any] = []

    async def serve() -> None:
        generations = Generations(make_index(tmp_path, "alpha", active="alpha"), lambda facts: CountedIndex(facts.name))
        await generations.start()
        jobs = instant_jobs(tmp_path)
        traces = TraceService(generations, HonestEncoder(), HonestReranker())
        services = [
            Service(
                add=trace_pb2_grpc.add_TraceServiceServicer_to_server,
                servicer=traces,
                descriptor=trace_pb2.DESCRIPTOR.services_by_name["TraceService"],
            ),
            Service(
                add=generation_pb2_grpc.add_GenerationServiceServicer_to_server,
                servicer=GenerationService(generations),
                descriptor=generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
            ),
            Service(
                add=job_pb2_grpc.add_JobServiceServicer_to_server,
                servicer=JobService(jobs),
                descriptor=job_pb2.DESCRIPTOR.services_by_name["JobService"],
            ),
        ]
        listen = {"address": "127.0.0.1:0", "metrics_address": None}
        gateway = Gateway(GatewayConfig.model_validate({"listen": listen, "notice_seconds": 0}), services)
        ports = await gateway.start()
        stop = asyncio.Event()
        ready.extend((ports.grpc, asyncio.get_running_loop(), stop))
        begun.set()
        await stop.wait()
        await gateway.stop()
        await jobs.close()
        await generations.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert begun.wait(30)
    port, loop, stop = ready
    with grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)


def _caller(channel: grpc.Channel, method: str) -> Callable[[bytes], None]:
    """Sends bytes to a method and checks what comes back."""
    path = f"/trackstar.v1.{method}"
    stream: Any = channel.unary_stream(path)
    unary: Any = channel.unary_unary(path)

    def call(data: bytes) -> None:
        try:
            list(stream(data, timeout=30)) if method.endswith(("Stream", "Watch")) else unary(data, timeout=30)
        except grpc.RpcError as error:
            refusal = error
        else:
            return
        assert refusal.code() in _EXPECTED, (refusal.code(), refusal.details())
        found = from_call(refusal)
        if isinstance(found, InvalidRequest) and "cannot be read" not in str(found):
            assert found.field is not None, str(found)

    return call


def _examples(channel: grpc.Channel, method: str, kind: type[Message], count: int) -> None:
    call = _caller(channel, method)

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(st.one_of(messages(kind).map(lambda message: message.SerializeToString()), st.binary(max_size=60)))
    def send(data: bytes) -> None:
        # Longer messages are refused by gRPC itself, before anything of ours sees them.
        if len(data) < _MESSAGE_BYTES:
            call(data)

    send()


@pytest.mark.parametrize(("method", "kind"), _KINDS, ids=[method for method, _ in _KINDS])
def test_nothing_that_arrives_is_internal(channel: grpc.Channel, method: str, kind: type[Message]) -> None:
    _examples(channel, method, kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), _KINDS, ids=[method for method, _ in _KINDS])
def test_nothing_in_ten_thousand_is_internal(channel: grpc.Channel, method: str, kind: type[Message]) -> None:
    _examples(channel, method, kind, 1500)

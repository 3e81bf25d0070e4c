"""A TraceService that does what a test tells it to, behind a real gateway on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from services.gateway.config import check
from services.gateway.health import Probe
from services.gateway.request import current
from services.gateway.server import Gateway, Ports, Service, address_of
from services.gateway.telemetry import Telemetry
from trackstar.v1 import trace_pb2, trace_pb2_grpc

DESCRIPTOR = trace_pb2.DESCRIPTOR.services_by_name["TraceService"]
NAME = DESCRIPTOR.full_name

Action = Callable[[], Awaitable[object]]


class ScriptedTraceService(trace_pb2_grpc.TraceServiceServicer):
    """The prompt names an action; `sleep SECONDS` needs none. The answer holds the id that the servicer saw."""

    def __init__(self, actions: Mapping[str, Action] | None = None) -> None:
        self.actions = dict(actions or {})
        self.running = self.most_running = self.done = self.cancelled = 0

    async def Trace(self, request: trace_pb2.TraceRequest, context: Any) -> trace_pb2.TraceResponse:
        await self._act(request.query.prompt)
        return trace_pb2.TraceResponse(request_id=current().request_id)

    async def TraceStream(
        self, request: trace_pb2.TraceStreamRequest, context: Any
    ) -> AsyncIterator[trace_pb2.TraceStreamResponse]:
        yield trace_pb2.TraceStreamResponse(encoded=trace_pb2.EncodedStage(request_id=current().request_id))
        await self._act(request.trace.query.prompt)
        yield trace_pb2.TraceStreamResponse(done=trace_pb2.DoneStage())

    async def GetPassages(self, request: trace_pb2.GetPassagesRequest, context: Any) -> trace_pb2.GetPassagesResponse:
        return trace_pb2.GetPassagesResponse(generation="g" * request.page_size)

    async def Verify(self, request: trace_pb2.VerifyRequest, context: Any) -> trace_pb2.VerifyResponse:
        return trace_pb2.VerifyResponse(request_id=current().principal.name)

    async def _act(self, prompt: str) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            verb, _, seconds = prompt.partition(" ")
            if verb == "sleep":
                await asyncio.sleep(float(seconds))
            elif prompt in self.actions:
                await self.actions[prompt]()
            self.done += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def raising(error: BaseException) -> Action:
    """An action that fails."""

    async def fail() -> None:
        raise error

    return fail


def ask(prompt: str = "", **fields: Any) -> trace_pb2.TraceRequest:
    """A request for the action that `prompt` names."""
    return trace_pb2.TraceRequest(query=trace_pb2.Query(prompt=prompt), **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A gateway that runs, and a client of it."""

    gateway: Gateway
    ports: Ports
    address: str
    channel: grpc.aio.Channel
    traces: trace_pb2_grpc.TraceServiceAsyncStub


@asynccontextmanager
async def serving(
    servicer: object,
    settings: Mapping[str, Any] | None = None,
    *,
    probes: Iterable[Probe] = (),
    telemetry: Telemetry | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[Served]:
    """A gateway on free ports of the loopback address, stopped at the end."""
    values: dict[str, Any] = {"drain_seconds": 1, "notice_seconds": 0, **(settings or {})}
    values["listen"] = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", **values.get("listen", {})}
    config = check(values)
    service = Service(add=trace_pb2_grpc.add_TraceServiceServicer_to_server, servicer=servicer, descriptor=DESCRIPTOR)
    gateway = Gateway(config, [service], probes=probes, telemetry=telemetry)
    ports = await gateway.start()
    address = address_of(config, ports)
    try:
        async with connected(address, credentials) as channel:
            traces = stub_of(channel)
            yield Served(gateway=gateway, ports=ports, address=address, channel=channel, traces=traces)
    finally:
        await gateway.stop()


@asynccontextmanager
async def connected(
    address: str, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel that shares no connection with another, and that never tries again by itself."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    if credentials is None:
        made = grpc.aio.insecure_channel(address, options=options)
    else:
        made = grpc.aio.secure_channel(address, credentials, options=options)
    async with made as channel:
        yield channel


def stub_of(channel: grpc.aio.Channel) -> trace_pb2_grpc.TraceServiceAsyncStub:
    """The generated client."""
    return trace_pb2_grpc.TraceServiceStub(channel)


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"the call should have failed and answered {answer}")


def sample(gateway: Gateway, name: str, **labels: str) -> float:
    """The value of one metric now, 0 if there is none."""
    return gateway.metrics.registry.get_sample_value(name, labels) or 0.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must become true."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)

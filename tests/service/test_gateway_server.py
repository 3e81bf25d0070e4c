"""The gateway as a server: health, reflection, ports, draining, signals, and what its image needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.gateway.config import PREFIX, check
from services.gateway.health import Probe
from services.gateway.server import Gateway
from tests.service.scripted import (
    NAME,
    ScriptedTraceService,
    ask,
    connected,
    failure,
    sample,
    serving,
    stub_of,
    until,
)
from trackstar.errors import InvalidRequest, NotReady
from trackstar.rpc_errors import from_call
from trackstar.v1 import trace_pb2

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _Dependency:
    """Something that is there or not."""

    def __init__(self) -> None:
        self.there = False
        self.looked = 0

    async def check(self) -> None:
        self.looked += 1
        if not self.there:
            raise NotReady("no generation is active")


async def _health(channel: grpc.aio.Channel, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


def test_health_follows_the_probes(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        needed, elsewhere, slow, broken = _Dependency(), _Dependency(), asyncio.Event(), [True]

        async def defect() -> None:
            if broken[0]:
                raise KeyError("defect")

        probes = [
            Probe(name="generation", check=needed.check, services=(NAME,)),
            Probe(name="elsewhere", check=elsewhere.check, services=("trackstar.v1.Other",)),
            Probe(name="slow", check=slow.wait),
            Probe(name="defect", check=defect),
        ]
        settings = {"readiness_seconds": 0.05, "admission": {"max_in_flight": 1, "max_queued": 0}}
        async with serving(ScriptedTraceService(), settings, probes=probes) as served:

            async def reaches(status: int, service: str = "") -> None:
                async with asyncio.timeout(10):
                    while await _health(served.channel, service) != status:
                        await asyncio.sleep(0.01)

            assert await _health(served.channel) == _NOT_SERVING
            needed.there = True
            slow.set()
            looked = needed.looked
            await until(lambda: needed.looked > looked + 2)
            assert await _health(served.channel, NAME) == _NOT_SERVING
            assert sample(served.gateway, "trackstar_defects_total") == 1
            broken[0] = False
            await reaches(_SERVING, NAME)
            # The server as a whole needs what any of its services needs.
            assert await _health(served.channel) == _NOT_SERVING
            elsewhere.there = True
            await reaches(_SERVING)
            needed.there = False
            await reaches(_NOT_SERVING, NAME)
            needed.there = True
            await reaches(_SERVING, NAME)
            unknown: Any = health_pb2_grpc.HealthStub(served.channel)
            error = await failure(unknown.Check(health_pb2.HealthCheckRequest(service="nobody")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            # Neither a place nor a token is needed.
            running = asyncio.ensure_future(served.traces.Trace(ask("sleep 0.3")))
            await until(lambda: sample(served.gateway, "trackstar_rpc_in_flight") == 1)
            await reaches(_SERVING)
            await running

    asyncio.run(run())
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_a_health_watch_hears_of_draining_and_does_not_hold_it_up() -> None:
    async def run() -> None:
        async with serving(ScriptedTraceService(), {"drain_seconds": 60}) as served:
            stub: Any = health_pb2_grpc.HealthStub(served.channel)
            seen: list[int] = []

            async def watch() -> None:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for change in stub.Watch(health_pb2.HealthCheckRequest(service=NAME)):
                        seen.append(change.status)

            watching = asyncio.create_task(watch())
            await until(lambda: _SERVING in seen)
            async with asyncio.timeout(20):
                await served.gateway.stop()
            await watching
            assert seen[-2:] == [_SERVING, _NOT_SERVING]

    asyncio.run(run())


def test_reflection_lists_services_and_their_messages() -> None:
    async def run() -> None:
        async with serving(ScriptedTraceService()) as served:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
            ]
            listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
            names = {service.name for service in listed.list_services_response.service}
            assert {NAME, "grpc.health.v1.Health"} <= names
            files = [
                FileDescriptorProto.FromString(file)
                for file in described.file_descriptor_response.file_descriptor_proto
            ]
            assert "trackstar/v1/trace.proto" in [file.name for file in files]
        async with serving(ScriptedTraceService(), {"listen": {"reflection": False}}) as served:
            # As a unary call: a stream's client races with the refusal while it writes.
            call: Any = served.channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            assert (await failure(call(b""))).code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(run())


def test_a_port_is_not_shared() -> None:
    async def run() -> None:
        async with serving(ScriptedTraceService()) as served:
            taken = {"address": served.address, "metrics_address": None}
            with pytest.raises(InvalidRequest, match="cannot listen"):
                await Gateway(check({"listen": taken}), []).start()
            taken = {"address": "127.0.0.1:0", "metrics_address": f"127.0.0.1:{served.ports.metrics}"}
            with pytest.raises(InvalidRequest, match="metrics cannot listen"):
                await Gateway(check({"listen": taken}), []).start()

    asyncio.run(run())


def test_draining_ends_what_takes_too_long_with_unavailable() -> None:
    async def run() -> None:
        servicer = ScriptedTraceService({"stuck": asyncio.Event().wait})
        async with serving(servicer, {"drain_seconds": 0.4}) as served:
            short = asyncio.ensure_future(served.traces.Trace(ask("sleep 0.2")))
            stuck = asyncio.ensure_future(failure(served.traces.Trace(ask("stuck"))))
            stream = aiter(served.traces.TraceStream(trace_pb2.TraceStreamRequest(trace=ask("stuck"))))
            await anext(stream)
            await until(lambda: servicer.running == 3)
            await served.gateway.stop()
            await short
            for error in (await stuck, await failure(anext(stream))):
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert isinstance(from_call(error), NotReady)
            assert (servicer.done, servicer.cancelled) == (1, 2)
            assert sample(served.gateway, "trackstar_rpc_in_flight") == 0
            await served.gateway.stop()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def _process(**settings: str) -> AsyncIterator[tuple[Process, str]]:
    """A gateway process and its address."""
    given = {"LISTEN__ADDRESS": "127.0.0.1:0", "LISTEN__METRICS_ADDRESS": "127.0.0.1:0", **settings}
    environment = {**os.environ, **{PREFIX + key: value for key, value in given.items()}}
    command = [sys.executable, "-m", "tests.service.gateway_process"]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=environment)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            port = (await process.stdout.readline()).decode().strip()
        yield process, f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_running_call(number: signal.Signals) -> None:
    async def run() -> None:
        limits = {"ADMISSION__MAX_IN_FLIGHT": "8", "ADMISSION__MAX_QUEUED": "16", "DRAIN_SECONDS": "20"}
        async with _process(**limits) as (process, address), connected(address) as channel:
            traces = stub_of(channel)

            async def stream() -> int:
                parts = traces.TraceStream(trace_pb2.TraceStreamRequest(trace=ask("sleep 0.7")))
                return len([part async for part in parts])

            async def load(found: list[grpc.StatusCode]) -> None:
                while True:
                    try:
                        await traces.Trace(ask("sleep 0.01"))
                        found.append(grpc.StatusCode.OK)
                    except grpc.aio.AioRpcError as error:
                        found.append(error.code())
                        return

            # Twelve for eight places: some still wait when the signal comes.
            running = [asyncio.ensure_future(traces.Trace(ask("sleep 0.5"))) for _ in range(6)]
            streams = [asyncio.create_task(stream()) for _ in range(6)]
            loaded: list[list[grpc.StatusCode]] = [[] for _ in range(3)]
            loads = [asyncio.create_task(load(found)) for found in loaded]
            await asyncio.sleep(0.25)
            process.send_signal(number)
            await asyncio.wait_for(asyncio.gather(*running, *loads), 20)
            assert await asyncio.gather(*streams) == [2] * 6
            # What came before the signal was answered; what came after was told to go elsewhere.
            for codes in loaded:
                assert set(codes[:-1]) <= {grpc.StatusCode.OK}
                assert codes[-1] is grpc.StatusCode.UNAVAILABLE
            async with connected(address) as late:
                error = await failure(stub_of(late).Trace(ask()))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
            output, log = await asyncio.wait_for(process.communicate(), 20)
            assert process.returncode == 0
            assert output.decode().split() == ["closed"]
            lines = [json.loads(line) for line in log.decode().splitlines()]
            assert {line["level"] for line in lines} == {"info"}
            assert [line["message"] for line in lines if line["message"] != "rpc"] == ["serving", "draining", "stopped"]

    asyncio.run(run())


def test_a_second_signal_does_not_wait() -> None:
    async def run() -> None:
        async with _process(DRAIN_SECONDS="300") as (process, address), connected(address) as channel:
            call = asyncio.ensure_future(failure(stub_of(channel).Trace(ask("sleep 300"))))
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert process.returncode is None
            process.send_signal(signal.SIGTERM)
            assert (await asyncio.wait_for(call, 20)).code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.wait_for(process.communicate(), 20)
            assert process.returncode == 0

    asyncio.run(run())


def test_neither_torch_nor_the_sdk_is_needed() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'ray'): sys.modules[name] = None\n"
        "import services.gateway.server, services.gateway.command\n"
        "from services.gateway.config import GatewayConfig\n"
        "services.gateway.server.Gateway(GatewayConfig(), [])\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"

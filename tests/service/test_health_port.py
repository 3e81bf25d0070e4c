"""The port for probes: it answers before the index is open, while the gateway drains, and under TLS without a token."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.gateway import config as settings
from services.gateway.command import Parts, Served, serve
from services.gateway.server import Ports, Service
from tests.service.certificates import Authority
from tests.service.scripted import (
    DESCRIPTOR,
    NAME,
    ScriptedTraceService,
    ask,
    connected,
    failure,
    stub_of,
)
from trackstar.errors import InvalidRequest, NotReady
from trackstar.v1 import trace_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _Slow:
    """A factory whose index opens when it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    @asynccontextmanager
    async def services(self, parts: Parts) -> AsyncIterator[Served]:
        await self.open.wait()
        service = Service(
            add=trace_pb2_grpc.add_TraceServiceServicer_to_server,
            servicer=ScriptedTraceService(),
            descriptor=DESCRIPTOR,
        )
        yield Served(services=[service])


def _config(folder: Path, health_address: str, **more: Any) -> settings.GatewayConfig:
    """A gateway that asks for TLS and a token, as on a cluster."""
    identity = Authority().issue("server")
    (folder / "tls.crt").write_bytes(identity.certificate)
    (folder / "tls.key").write_bytes(identity.key)
    (folder / "principals.yaml").write_text("principals: []")
    return settings.check(
        {
            "listen": {
                "address": "127.0.0.1:0",
                "metrics_address": None,
                "health_address": health_address,
            },
            "tls": {"certificate": folder / "tls.crt", "key": folder / "tls.key"},
            "auth": {"principals_file": folder / "principals.yaml"},
            "readiness_seconds": 0.05,
            **more,
        }
    )


def test_it_answers_from_before_the_index_is_open_until_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        port, slow, started = _free_port(), _Slow(), asyncio.Event()
        config = _config(tmp_path, f"127.0.0.1:{port}", notice_seconds=1)
        serving = asyncio.create_task(serve(config, slow.services, started=lambda _ports: started.set()))
        async with connected(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)

            async def status(service: str) -> int:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True)
                return int(answer.status)

            async def reaches(service: str, wanted: int) -> None:
                async with asyncio.timeout(10):
                    while await status(service) != wanted:
                        await asyncio.sleep(0.01)

            async with asyncio.timeout(10):
                assert await status("live") == _SERVING
            assert await status("") == _NOT_SERVING
            assert not started.is_set()
            slow.open.set()
            await reaches("", _SERVING)
            await reaches(NAME, _SERVING)
            # Nothing else is to be had there.
            assert (await failure(stub_of(channel).Trace(ask()))).code() is grpc.StatusCode.UNIMPLEMENTED
            os.kill(os.getpid(), signal.SIGTERM)
            await reaches("", _NOT_SERVING)
            assert await status(NAME) == _NOT_SERVING
            assert await status("live") == _SERVING
            assert not serving.done()
        async with asyncio.timeout(20):
            assert await serving == 0

    asyncio.run(run())


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            config = _config(tmp_path, f"127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(InvalidRequest, match="health checks cannot listen on") as caught:
                await serve(config, _Slow().services)
            assert caught.value.field == "listen.health_address"

    asyncio.run(run())


def test_an_index_that_cannot_be_opened_ends_it(tmp_path: Path) -> None:
    @asynccontextmanager
    async def broken(_parts: Parts) -> AsyncIterator[Served]:
        raise NotReady("there is nothing to serve")
        yield Served(services=[])  # type: ignore[unreachable]

    def never(_ports: Ports) -> None:
        raise AssertionError

    async def run() -> None:
        with pytest.raises(NotReady, match="nothing to serve"):
            await serve(_config(tmp_path, "127.0.0.1:0"), broken, started=never)

    asyncio.run(run())


@pytest.mark.parametrize("address", ["unix:/tmp/health", "nowhere", "127.0.0.1"])
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match=r"listen\.health_address"):
        settings.check({"listen": {"health_address": address}})


def test_everybody_may_ask_it_where_calls_need_a_token(tmp_path: Path) -> None:
    """The rule that a gateway off the loopback needs principals is about calls."""
    config = settings.check({"listen": {"health_address": "0.0.0.0:50052"}})
    assert config.lets_anyone_in

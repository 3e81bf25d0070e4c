"""The gateway as a process: settings, log, signals, exit code; and a command that digests tokens.

Contract: `run_gateway` returns 0 after SIGTERM or SIGINT once running calls have ended; a second signal ends them at
once. Errors of starting are raised, for the command line to say.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Annotated

import typer
from google.protobuf.descriptor import ServiceDescriptor

from services.gateway import logs
from services.gateway.auth import digest_of_token, make_token
from services.gateway.config import GatewayConfig
from services.gateway.health import HealthPort, Probe
from services.gateway.metrics import GatewayMetrics
from services.gateway.server import Gateway, Ports, Service
from services.gateway.telemetry import Telemetry
from trackstar.v1 import generation_pb2, job_pb2, trace_pb2

_LOG = logging.getLogger(__name__)

# Every service that the gateway offers to clients; their methods are label values of the metrics.
PUBLIC: tuple[ServiceDescriptor, ...] = (
    trace_pb2.DESCRIPTOR.services_by_name["TraceService"],
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    job_pb2.DESCRIPTOR.services_by_name["JobService"],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What servicers are made from."""

    config: GatewayConfig
    metrics: GatewayMetrics
    telemetry: Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a factory makes: services, and what they need to be ready."""

    services: Sequence[Service]
    probes: Iterable[Probe] = ()


# Opens what services stand on, and closes it after the last call.
ServicesFactory = Callable[[Parts], AbstractAsyncContextManager[Served]]


def run_gateway(
    config: GatewayConfig, services_factory: ServicesFactory, *, started: Callable[[Ports], None] | None = None
) -> int:
    """Serve until a signal; returns the exit code.

    Args:
        config: settings.
        services_factory: opens the services.
        started: hears where the gateway listens, once it does.

    Raises:
        TrackstarError: it cannot start.
    """
    logs.configure(config.log_level)
    return asyncio.run(serve(config, services_factory, started=started))


async def serve(
    config: GatewayConfig, services_factory: ServicesFactory, *, started: Callable[[Ports], None] | None = None
) -> int:
    """As `run_gateway`, in the loop that runs, with logging as it is."""
    parts = Parts(config=config, metrics=GatewayMetrics(PUBLIC), telemetry=Telemetry(config.tracing))
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, ended.set)
    try:
        async with AsyncExitStack() as held:
            address, health_port = config.listen.health_address, None
            if address is not None:
                # Before an index is opened, which may take minutes: who asks is to know that the process lives.
                health_port = await held.enter_async_context(HealthPort.listen(address))
            served = await held.enter_async_context(services_factory(parts))
            gateway = Gateway(
                config,
                served.services,
                probes=served.probes,
                metrics=parts.metrics,
                telemetry=parts.telemetry,
                health_port=health_port,
            )
            ports = await gateway.start()
            if started is not None:
                started(ports)
            await ended.wait()
            ended.clear()
            stopping = asyncio.create_task(gateway.stop())
            again = asyncio.create_task(ended.wait())
            await asyncio.wait([stopping, again], return_when=asyncio.FIRST_COMPLETED)
            if again.done() and not stopping.done():
                _LOG.warning("a second signal: running calls are given up")
                gateway.give_up()
            again.cancel()
            await stopping
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    return 0


def hash_token(
    new: Annotated[bool, typer.Option("--new", help="Make a token and show it once, on standard error.")] = False,
) -> None:
    """Print the digest of a token for the principals file; the token is read from standard input, never an argument."""
    token = make_token() if new else sys.stdin.readline().strip()
    digest = digest_of_token(token)
    if new:
        print(f"token: {token}", file=sys.stderr)
    print(digest)

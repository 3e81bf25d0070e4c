"""The gateway as a whole: services, what stands around their calls, and the ports they are reached at.

    gateway = Gateway(config, services, probes=probes, metrics=metrics, telemetry=telemetry)
    ports = await gateway.start()
    ...
    await gateway.stop()

Contract: `start` returns when calls are taken. `stop` tells health checks, refuses new calls, closes the port, gives
running calls `drain_seconds`, and answers those that are left with UNAVAILABLE. Servicers are given, so this knows
nothing of traces.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection

from services.gateway.admission import Admission
from services.gateway.auth import ANONYMOUS, Authenticator
from services.gateway.config import GatewayConfig, is_loopback, split_address
from services.gateway.health import SERVICE as HEALTH
from services.gateway.health import Health, HealthPort, Probe
from services.gateway.interceptors import GatewayInterceptor
from services.gateway.metrics import GatewayMetrics, MetricsServer
from services.gateway.running import RunningCalls
from services.gateway.telemetry import Telemetry
from services.gateway.tls import Certificates
from trackstar.errors import InvalidRequest

_LOG = logging.getLogger(__name__)

# For answers that are written and not yet sent, and for health watches, which never end by themselves.
_SENDING_SECONDS = 1.0
_METADATA_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One service to be served.

    `add`: the generated `add_..._to_server`; `servicer`: an object with its methods; `descriptor`: from the `_pb2`
    module, `DESCRIPTOR.services_by_name["..."]`.
    """

    add: Callable[[Any, grpc.aio.Server], None]
    servicer: object
    descriptor: ServiceDescriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the gateway listens. `grpc` is 1 for a Unix socket; `metrics` None without them."""

    grpc: int
    metrics: int | None


class Gateway:
    """One gateway, in the event loop that starts it.

    Args:
        config: its settings.
        services: what it serves.
        probes: what it needs to be ready.
        metrics: counts; made for `services` if None.
        telemetry: makes spans; as configured if None.
        health_port: a port for probes that is open already.
    """

    def __init__(
        self,
        config: GatewayConfig,
        services: Sequence[Service],
        *,
        probes: Iterable[Probe] = (),
        metrics: GatewayMetrics | None = None,
        telemetry: Telemetry | None = None,
        health_port: HealthPort | None = None,
    ) -> None:
        self._config = config
        self._services = tuple(services)
        self._names = tuple(service.descriptor.full_name for service in self._services)
        self.metrics = metrics or GatewayMetrics(service.descriptor for service in self._services)
        self.telemetry = telemetry or Telemetry(config.tracing)
        self._running = RunningCalls()
        self._health = Health(
            self._names, probes, period_seconds=config.readiness_seconds, metrics=self.metrics, port=health_port
        )
        self._server: grpc.aio.Server | None = None
        self._metrics_server: MetricsServer | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> Ports:
        """Listen.

        Raises:
            InvalidRequest: an address cannot be listened on, or the files of TLS or principals cannot be used.
            NotFound: there is no file of principals.
        """
        assert self._server is None, "a gateway starts once"
        listen = self._config.listen
        server = grpc.aio.server(interceptors=[self._interceptor()], options=_options(self._config))
        for service in self._services:
            service.add(service.servicer, server)
        await self._health.add_to(server)
        if listen.reflection:
            names = (*self._names, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        port = self._bind(server)
        try:
            self._metrics_server = (
                MetricsServer(self.metrics, listen.metrics_address) if listen.metrics_address else None
            )
        except OSError as error:
            raise InvalidRequest(
                f"metrics cannot listen on {listen.metrics_address}: {error.strerror}", field="listen.metrics_address"
            ) from error
        await server.start()
        self._server = server
        self._looking = asyncio.create_task(self._health.run())
        ports = Ports(grpc=port, metrics=self._metrics_server.port if self._metrics_server else None)
        _LOG.info("serving", extra={"fields": {"port": ports.grpc, "metrics_port": ports.metrics}})
        return ports

    async def stop(self) -> None:
        """Drain, then close all ports. Nothing happens if it does not run."""
        server, self._server = self._server, None
        if server is None or self._looking is None:
            return
        seconds = self._config.drain_seconds
        _LOG.info("draining", extra={"fields": {"running": len(self._running), "seconds": seconds}})
        self._looking.cancel()
        await asyncio.wait([self._looking])
        await self._health.drain()
        self._running.drain()
        # Refused callers back off. Without this, gRPC would answer CANCELLED to calls it has and we have not seen yet.
        await asyncio.sleep(self._config.notice_seconds)
        # Stops taking calls at once; the grace of the second stop below is what counts.
        stopping = asyncio.create_task(server.stop(seconds + 2 * _SENDING_SECONDS))
        if not await self._running.wait(seconds):
            _LOG.warning("calls are given up", extra={"fields": {"running": len(self._running)}})
            self._running.end()
            await self._running.wait(_SENDING_SECONDS)
        await server.stop(_SENDING_SECONDS)
        await stopping
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        await asyncio.to_thread(self.telemetry.close)
        _LOG.info("stopped")

    def give_up(self) -> None:
        """End running calls now instead of waiting for them, while `stop` waits."""
        self._running.end()

    async def __aenter__(self) -> Ports:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _interceptor(self) -> GatewayInterceptor:
        config = self._config
        return GatewayInterceptor(
            metrics=self.metrics,
            telemetry=self.telemetry,
            authenticator=Authenticator(
                config.auth.principals_file,
                anonymous=ANONYMOUS if config.lets_anyone_in else None,
                reload_seconds=config.auth.reload_seconds,
            ),
            admission=Admission(
                max_in_flight=config.admission.max_in_flight,
                max_queued=config.admission.max_queued,
                max_wait_seconds=config.admission.max_wait_seconds,
                metrics=self.metrics,
            ),
            deadlines=config.deadline,
            max_response_bytes=config.connection.max_response_bytes,
            running=self._running,
        )

    def _bind(self, server: grpc.aio.Server) -> int:
        address = self._config.listen.address
        secure = self._config.tls.certificate is not None
        credentials = Certificates(self._config.tls).credentials() if secure else None
        if credentials is None and not is_loopback(address):
            _LOG.warning("tokens travel in plain text; configure TLS, or leave it to a proxy beside this process")
        try:
            if credentials is not None:
                return server.add_secure_port(address, credentials)
            return server.add_insecure_port(address)
        except RuntimeError as error:
            raise InvalidRequest(
                f"gRPC cannot listen on {address}; is the port taken?", field="listen.address"
            ) from error


def address_of(config: GatewayConfig, ports: Ports) -> str:
    """What a client on this machine connects to."""
    if config.listen.address.startswith("unix:"):
        return config.listen.address
    host, _ = split_address(config.listen.address)
    return f"[{host}]:{ports.grpc}" if ":" in host else f"{host}:{ports.grpc}"


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    connection = config.connection

    def milliseconds(seconds: float) -> int:
        return round(1000 * seconds)

    return [
        # Two processes on one port would share its calls without a word.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", connection.max_request_bytes),
        ("grpc.max_send_message_length", connection.max_response_bytes),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.keepalive_time_ms", milliseconds(connection.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", milliseconds(connection.keepalive_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", milliseconds(connection.min_ping_seconds)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds(connection.min_ping_seconds)),
        ("grpc.max_connection_age_ms", milliseconds(connection.max_age_seconds)),
        ("grpc.max_connection_age_grace_ms", milliseconds(connection.max_age_grace_seconds)),
    ]

"""grpc.health.v1 for every service: ready when what it needs is ready.

Contract: a service is SERVING while all its probes pass; the empty name, which stands for the whole server, while all
probes of all services pass. Nothing is SERVING before the first look, nor ever again after `drain`. Probes run side by
side, each within the period; changes are logged once.

A `HealthPort` is for probes that have neither certificate nor token, such as a kubelet's: it repeats all that on a port
of its own, and knows one service more, `live`, which is SERVING for as long as the event loop answers, also while an
index is being opened and while the gateway drains.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from services.gateway.metrics import GatewayMetrics
from trackstar.errors import InvalidRequest, TrackstarError

_LOG = logging.getLogger(__name__)

SERVICE = "grpc.health.v1.Health"
LIVE = "live"
_STATUS = {True: health_pb2.HealthCheckResponse.SERVING, False: health_pb2.HealthCheckResponse.NOT_SERVING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing that must be there.

    `check` returns if it is, raises a `TrackstarError` that says what is missing otherwise. `services`: full names of
    the services that need it; every one if empty.
    """

    name: str
    check: Callable[[], Awaitable[object]]
    services: tuple[str, ...] = ()


class HealthPort:
    """A plain-text port that answers health checks and nothing else; made by `listen`."""

    def __init__(self, servicer: health.HealthServicer, port: int) -> None:
        self.port = port
        self._servicer = servicer

    @classmethod
    @asynccontextmanager
    async def listen(cls, address: str) -> AsyncIterator[HealthPort]:
        """A port for as long as the block runs; until a `Health` says more, only `live` is SERVING.

        Raises:
            InvalidRequest: the address cannot be listened on.
        """
        servicer = health.HealthServicer()
        await servicer.set("", _STATUS[False])
        await servicer.set(LIVE, _STATUS[True])
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise InvalidRequest(
                f"health checks cannot listen on {address}; is the port taken?", field="listen.health_address"
            ) from error
        await server.start()
        try:
            yield cls(servicer, port)
        finally:
            await server.stop(None)

    async def tell(self, service: str, ready: bool) -> None:
        """A service, or with "" the whole server, is ready or not."""
        await self._servicer.set(service, _STATUS[ready])


class Health:
    """Looks at probes and answers health checks.

    Args:
        services: full names of the services.
        probes: what they need.
        period_seconds: time between two looks.
        metrics: counts probes that fail by a defect.
        port: hears of everything too.
    """

    def __init__(
        self,
        services: Sequence[str],
        probes: Iterable[Probe],
        *,
        period_seconds: float,
        metrics: GatewayMetrics,
        port: HealthPort | None = None,
    ) -> None:
        self._services = tuple(services)
        self._probes = tuple(probes)
        self._period_seconds = period_seconds
        self._metrics = metrics
        self._port = port
        self._servicer = health.HealthServicer()
        self._missing: dict[str, str] = {}
        self._known: dict[str, bool] = {}

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Answer health checks on `server`, NOT_SERVING for now."""
        for service in ("", *self._services):
            await self._tell(service, False)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._period_seconds)

    async def look(self) -> None:
        """Run all probes once and tell the result."""
        found = await asyncio.gather(*(self._missing_of(probe) for probe in self._probes))
        missing = {probe.name: reason for probe, reason in zip(self._probes, found, strict=True) if reason}
        for name in missing.keys() - self._missing.keys():
            _LOG.warning("not ready: %s", missing[name], extra={"fields": {"probe": name}})
        for name in self._missing.keys() - missing.keys():
            _LOG.info("ready again", extra={"fields": {"probe": name}})
        self._missing = missing
        for service in ("", *self._services):
            needed = [probe for probe in self._probes if not service or not probe.services or service in probe.services]
            ready = not any(probe.name in missing for probe in needed)
            if self._known.get(service) != ready:
                self._known[service] = ready
                await self._tell(service, ready)

    async def drain(self) -> None:
        """NOT_SERVING from now on; `run` has to be cancelled before."""
        await self._servicer.enter_graceful_shutdown()
        if self._port is not None:
            for service in ("", *self._services):
                await self._port.tell(service, False)

    async def _tell(self, service: str, ready: bool) -> None:
        await self._servicer.set(service, _STATUS[ready])
        if self._port is not None:
            await self._port.tell(service, ready)

    async def _missing_of(self, probe: Probe) -> str:
        """Why a probe fails; empty if it passes."""
        try:
            async with asyncio.timeout(self._period_seconds):
                await probe.check()
        except TrackstarError as error:
            return str(error) or type(error).__name__
        except TimeoutError:
            return f"no answer within {self._period_seconds:g} s"
        except Exception:
            if probe.name not in self._missing:
                self._metrics.defects.inc()
                _LOG.exception("a probe failed", extra={"fields": {"probe": probe.name}})
            return "its probe failed"
        return ""

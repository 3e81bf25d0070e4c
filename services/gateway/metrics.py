"""What the gateway counts, for Prometheus, on a port of its own.

Contract: one `GatewayMetrics` holds its own registry, so two gateways in one process do not mix. Label values are
bounded: methods and services are those that are registered, everything else is `other`. It is the cascade's
`StageObserver`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from services.gateway.config import split_address
from trackstar.audit_record import AUDIT_GAUGES, Audit

OTHER = "other"
# Seconds: from a refusal to the longest exhaustive trace.
_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
# Standard deviations; what stands out of a large corpus lies between 3 and 30.
_Z_SCORES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.5, 15.0, 20.0, 25.0, 30.0, 40.0, 60.0, 100.0)
_CANDIDATES = tuple(float(10**power * step) for power in range(1, 9) for step in (1, 3))


class Rejected(enum.StrEnum):
    """Why a call was turned away before it began."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    UNAUTHENTICATED = "unauthenticated"
    DRAINING = "draining"


class BreakerState(enum.IntEnum):
    """State of a circuit breaker, as its gauge shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2

    @classmethod
    def of(cls, state: str) -> BreakerState:
        """The state that `trackstar.breaker` calls `state`, such as `half-open`."""
        return cls[state.upper().replace("-", "_")]


class GatewayMetrics:
    """All metrics of one gateway.

    Args:
        services: their methods become label values.
    """

    def __init__(self, services: Iterable[ServiceDescriptor] = ()) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._methods = {
            f"/{service.full_name}/{method.name}": (service.full_name, method.name)
            for service in services
            for method in service.methods
        }
        self._handled = Counter(
            "trackstar_rpc_handled",
            "Calls that have ended, by code.",
            ["service", "method", "code"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "trackstar_rpc_duration_seconds",
            "Time from a call's arrival to its end.",
            ["service", "method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("trackstar_rpc_in_flight", "Calls that are running or waiting.", registry=self.registry)
        self._stage = Histogram(
            "trackstar_stage_duration_seconds",
            "Time of one call's stages.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._candidates = Histogram(
            "trackstar_candidates",
            "Passages scored exactly for one call.",
            buckets=_CANDIDATES,
            registry=self.registry,
        )
        self._best_z_score = Histogram(
            "trackstar_best_z_score",
            "Z-score of the best proponent of a trace without a filter.",
            buckets=_Z_SCORES,
            registry=self.registry,
        )
        self._rejected = Counter(
            "trackstar_rejected", "Calls turned away before they began.", ["reason"], registry=self.registry
        )
        self.queue_length = Gauge(
            "trackstar_admission_queue_length", "Calls that wait for a place.", registry=self.registry
        )
        self.queue_wait = Histogram(
            "trackstar_admission_wait_seconds",
            "Time that admitted calls waited for a place.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._generation = Gauge(
            "trackstar_generation_info",
            "1 for the generation that answers.",
            ["generation", "checkpoint"],
            registry=self.registry,
        )
        self._audit = {
            gauge.name: Gauge(gauge.name, gauge.help, ["generation"], registry=self.registry) for gauge in AUDIT_GAUGES
        }
        self._retries = Counter(
            "trackstar_backend_retries",
            "Calls to a backend that were tried again.",
            ["backend"],
            registry=self.registry,
        )
        self._breaker = Gauge(
            "trackstar_breaker_state",
            "Circuit breaker of a backend: 0 closed, 1 half open, 2 open.",
            ["backend"],
            registry=self.registry,
        )
        self._row_bytes = Counter("trackstar_row_bytes_read", "Bytes of rows read for calls.", registry=self.registry)
        self._reindex_shards = Gauge(
            "trackstar_reindex_shards",
            "Shards of the jobs that run, by how far they have come.",
            ["state"],
            registry=self.registry,
        )
        self._reindex_jobs = Gauge(
            "trackstar_reindex_jobs", "Jobs by where they are in their lives.", ["state"], registry=self.registry
        )
        self._reindex_rate = Gauge(
            "trackstar_reindex_tokens_per_second", "Tokens encoded by the jobs that run.", registry=self.registry
        )
        self._reindex_remaining = Gauge(
            "trackstar_reindex_remaining_seconds",
            "Time until all jobs that run have ended; NaN while one cannot tell.",
            registry=self.registry,
        )
        self.defects = Counter(
            "trackstar_defects",
            "Errors that nobody raised on purpose; each has a traceback in the log.",
            registry=self.registry,
        )
        for reason in Rejected:
            self._rejected.labels(reason)

    def knows(self, method: str) -> bool:
        """Whether `/package.Service/Method` has labels of its own."""
        return method in self._methods

    def handled(self, method: str, code: str, seconds: float) -> None:
        """A call has ended. `method` as gRPC has it, `code` the name of a status code."""
        service, name = self._methods.get(method, (OTHER, OTHER))
        self._handled.labels(service, name, code).inc()
        self._duration.labels(service, name).observe(seconds)

    def rejected(self, reason: Rejected) -> None:
        """A call was turned away."""
        self._rejected.labels(reason).inc()

    def stage(self, name: str, seconds: float) -> None:
        """A stage of one call took so long in all. `name` is one of the code's own, never a caller's."""
        self._stage.labels(name).observe(seconds)

    def candidates(self, count: int) -> None:
        """One call had so many passages scored exactly."""
        self._candidates.observe(count)

    def best_z_score(self, z_score: float) -> None:
        """The best proponent of one call stands so far above the background."""
        self._best_z_score.observe(z_score)

    def row_bytes(self, count: int) -> None:
        """So many bytes of rows were read."""
        self._row_bytes.inc(count)

    def generation(self, name: str, checkpoint: str) -> None:
        """This generation answers from now on."""
        self._generation.clear()
        self._generation.labels(name, checkpoint).set(1)

    def reindex(
        self,
        *,
        jobs: Mapping[str, int],
        shards: Mapping[str, int],
        tokens_per_second: float,
        remaining_seconds: float | None,
    ) -> None:
        """Jobs were looked at. Keys are states of the code's own; `shards` and the rest are of those that run."""
        for state, count in jobs.items():
            self._reindex_jobs.labels(state).set(count)
        for state, count in shards.items():
            self._reindex_shards.labels(state).set(count)
        self._reindex_rate.set(tokens_per_second)
        self._reindex_remaining.set(float("nan") if remaining_seconds is None else remaining_seconds)

    def audit(self, audit: Audit | None) -> None:
        """What the last audit of the generation that answers found; None if it was never audited."""
        for gauge in AUDIT_GAUGES:
            shown = self._audit[gauge.name]
            shown.clear()
            if audit is not None:
                shown.labels(audit.generation).set(gauge.value(audit))

    def retried(self, backend: str) -> None:
        """A call to a backend is tried again. `backend`: encoder, reranker or milvus."""
        self._retries.labels(backend).inc()

    def breaker(self, backend: str, state: BreakerState) -> None:
        """A circuit breaker has changed."""
        self._breaker.labels(backend).set(state)


class MetricsServer:
    """Serves a registry over HTTP from a thread until `stop`.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, metrics: GatewayMetrics, address: str) -> None:
        host, port = split_address(address)
        self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_port)

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

"""Puts the gateway's services together over whatever backends there are.

Contract: nothing here opens a network connection or a model. `serving` opens the active generation, and closes what it
opened after the last call; a folder without an active generation serves too, and is not ready until there is one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, asynccontextmanager

from services.backends import EncoderBackend, RerankerBackend
from services.gateway.command import Parts, Served
from services.gateway.generation_service import GenerationService
from services.gateway.generations import Generations, Pointer
from services.gateway.health import Probe
from services.gateway.job_assembly import jobs_of
from services.gateway.job_service import JobService
from services.gateway.metrics import GatewayMetrics
from services.gateway.server import Service
from services.gateway.trace_service import TraceService
from trackstar.audit_record import read_audit
from trackstar.catalog import Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex
from trackstar.errors import TrackstarError
from trackstar.v1 import generation_pb2, generation_pb2_grpc, job_pb2, job_pb2_grpc, trace_pb2, trace_pb2_grpc

_LOG = logging.getLogger(__name__)

_TRACES = trace_pb2.DESCRIPTOR.services_by_name["TraceService"]
_GENERATIONS = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
_JOBS = job_pb2.DESCRIPTOR.services_by_name["JobService"]


@asynccontextmanager
async def serving(
    parts: Parts,
    catalog: Catalog,
    encoder: EncoderBackend,
    reranker: RerankerBackend,
    open_coarse: Callable[[GenerationFacts], CoarseIndex],
    *,
    probes: Iterable[Probe] = (),
    searches_per_generation: int = 1,
    pointer: Pointer | None = None,
) -> AsyncIterator[Served]:
    """The services of one index.

    Args:
        parts: settings, metrics and spans.
        catalog: the index's generations.
        encoder: reads queries.
        reranker: scores and explains.
        open_coarse: opens a generation's coarse index; runs in a thread.
        probes: what else must be there for traces.
        searches_per_generation: coarse searches that may run at once in one generation.
        pointer: says which generation is active; the index folder if None.
    """
    generations = Generations(
        catalog,
        open_coarse,
        pointer=pointer,
        searches_per_generation=searches_per_generation,
        on_active=lambda facts: _show(parts.metrics, catalog, facts),
    )
    await generations.start()
    try:
        async with jobs_of(parts, catalog.root) as jobs:
            yield Served(
                services=[
                    Service(
                        add=trace_pb2_grpc.add_TraceServiceServicer_to_server,
                        servicer=TraceService(generations, encoder, reranker, observer=_Observer(parts)),
                        descriptor=_TRACES,
                    ),
                    Service(
                        add=generation_pb2_grpc.add_GenerationServiceServicer_to_server,
                        servicer=GenerationService(generations),
                        descriptor=_GENERATIONS,
                    ),
                    Service(
                        add=job_pb2_grpc.add_JobServiceServicer_to_server,
                        servicer=JobService(jobs),
                        descriptor=_JOBS,
                    ),
                ],
                probes=[
                    Probe(name="active generation", check=generations.ready, services=(_TRACES.full_name,)),
                    *probes,
                ],
            )
    finally:
        await generations.close()


def _show(metrics: GatewayMetrics, catalog: Catalog, facts: GenerationFacts) -> None:
    """The generation that answers now, and its last audit, as metrics."""
    metrics.generation(facts.name, facts.checkpoint_digest)
    try:
        metrics.audit(read_audit(catalog.home(facts.name, retired=True)))
    except TrackstarError as error:
        # What answers does not hang on what is shown of it.
        _LOG.warning("the audit of generation %s cannot be shown: %s", facts.name, error)


class _Observer:
    """Counts stages and makes spans of them; see `stages.StageObserver`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def stage(self, name: str, seconds: float) -> None:
        """A stage of one call took so long in all."""
        self._parts.metrics.stage(name, seconds)

    def candidates(self, count: int) -> None:
        """One call had so many passages scored exactly."""
        self._parts.metrics.candidates(count)

    def best_z_score(self, z_score: float) -> None:
        """The best proponent of one call stands so far above the background."""
        self._parts.metrics.best_z_score(z_score)

    def span(self, name: str) -> AbstractContextManager[object]:
        """Around the work of a stage."""
        return self._parts.telemetry.span(name)

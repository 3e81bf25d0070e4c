"""A gateway whose encoder and reranker run elsewhere, such as in a Ray Serve application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from services.gateway.assembly import serving
from services.gateway.coarse_local import local_coarse
from services.gateway.coarse_milvus import connect, milvus_coarse
from services.gateway.command import Parts, Served, ServicesFactory
from services.gateway.health import Probe
from services.gateway.metrics import BreakerState
from services.gateway.pointer import MilvusPointer
from services.gateway.remote import BackendLink, RemoteEncoder, RemoteReranker
from trackstar.breaker import CircuitBreaker
from trackstar.catalog import Catalog
from trackstar.errors import InvalidRequest


def remote_services(index: str) -> ServicesFactory:
    """The services of one index over the backends that the settings name.

    Args:
        index: folder or URL of the index; its generations are listed and activated there.
    """

    @asynccontextmanager
    async def factory(parts: Parts) -> AsyncIterator[Served]:
        backends = parts.config.backends
        if backends.encoder_address is None or backends.reranker_address is None:
            raise InvalidRequest(
                "a gateway of its own needs backends.encoder_address and backends.reranker_address; "
                "to serve everything in one process, use `trackstar serve`",
                field="backends.encoder_address",
            )
        async with AsyncExitStack() as held:
            encoder_link = _link(parts, "encoder", backends.encoder_address)
            held.push_async_callback(encoder_link.close)
            reranker_link = _link(parts, "reranker", backends.reranker_address)
            held.push_async_callback(reranker_link.close)
            catalog = Catalog(index)
            milvus = parts.config.milvus
            pointer = None
            if milvus.address is None:
                open_coarse, parallel = local_coarse(catalog), 1
            else:
                link = held.enter_context(connect(milvus, parts.metrics))
                open_coarse, parallel = milvus_coarse(milvus, link), milvus.parallel
                pointer = MilvusPointer(milvus, link, catalog)
            served = await held.enter_async_context(
                serving(
                    parts,
                    catalog,
                    RemoteEncoder(encoder_link),
                    RemoteReranker(reranker_link),
                    open_coarse,
                    probes=[
                        Probe(name="encoder", check=encoder_link.ready),
                        Probe(name="reranker", check=reranker_link.ready),
                    ],
                    searches_per_generation=parallel,
                    pointer=pointer,
                )
            )
            yield served

    return factory


def _link(parts: Parts, name: str, address: str) -> BackendLink:
    breaker = CircuitBreaker(f"the {name}", on_change=lambda state: parts.metrics.breaker(name, BreakerState.of(state)))
    return BackendLink(
        address,
        name=name,
        application=parts.config.backends.application,
        breaker=breaker,
        on_retry=lambda: parts.metrics.retried(name),
    )

"""The whole service in one process: gateway, encoder and reranker over one index folder, on one port.

The same gateway and the same cores as on a cluster; only what lies between them differs: a function call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from services.encoder.core import BATCH_EXAMPLES, BATCH_SECONDS, BATCH_TOKENS, EncoderCore
from services.encoder.model import LocalModel, ModelWorker
from services.gateway.assembly import serving
from services.gateway.coarse_local import local_coarse
from services.gateway.command import Parts, Served, ServicesFactory
from services.gateway.metrics import GatewayMetrics
from services.reranker.core import RerankerCore
from trackstar.index import Index
from trackstar.model import LoadedModel


def embedded_services(
    index: str, *, model: str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> ServicesFactory:
    """The services of one index in this process; opened in a thread, so that health checks are answered meanwhile.

    Args: as of `Embedded.open`, whose errors the factory raises.
    """

    @asynccontextmanager
    async def factory(parts: Parts) -> AsyncIterator[Served]:
        opened = await asyncio.to_thread(
            Embedded.open, index, model=model, device=device, trust_remote_code=trust_remote_code
        )
        async with opened.services(parts) as served:
            yield served

    return factory


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What `trackstar serve` opens: an index folder and its checkpoint."""

    index: Index
    loaded: LoadedModel

    @classmethod
    def open(
        cls, index: str, *, model: str | None = None, device: str = "cpu", trust_remote_code: bool = False
    ) -> Embedded:
        """Open an index and the checkpoint it was built with.

        Raises:
            TrackstarError: one of them cannot be opened, or they do not belong together.
        """
        opened = Index(index)
        return cls(index=opened, loaded=opened.load_model(model, device=device, trust_remote_code=trust_remote_code))

    @asynccontextmanager
    async def services(self, parts: Parts) -> AsyncIterator[Served]:
        """A `ServicesFactory`."""
        observer = _Observer(parts.metrics)
        worker = await asyncio.to_thread(ModelWorker, self.index, self.loaded)
        encoder = EncoderCore(
            self.index, self.loaded.tokenizer, self.loaded.max_tokens, LocalModel(worker), observer=observer
        )
        reranker = RerankerCore(self.index, encoder, observer=observer)
        try:
            async with serving(
                parts, self.index.catalog, encoder, reranker, local_coarse(self.index.catalog)
            ) as served:
                yield served
        finally:
            await reranker.close()
            await encoder.close()


class _Observer:
    """The cores' observer, beside the gateway's metrics under the names that Ray's replicas use."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        registry = metrics.registry
        self._tokens = Counter("trackstar_encode_tokens", "Tokens of queries that were encoded.", registry=registry)
        self._examples = Histogram(
            "trackstar_encode_batch_examples", "Queries in a batch.", buckets=BATCH_EXAMPLES, registry=registry
        )
        self._batch_tokens = Histogram(
            "trackstar_encode_batch_tokens", "Tokens in a batch.", buckets=BATCH_TOKENS, registry=registry
        )
        self._seconds = Histogram(
            "trackstar_encode_batch_duration_seconds", "Time of a batch.", buckets=BATCH_SECONDS, registry=registry
        )

    def batch(self, examples: int, tokens: int, seconds: float) -> None:
        """A batch of queries was encoded."""
        self._tokens.inc(tokens)
        self._examples.observe(examples)
        self._batch_tokens.observe(tokens)
        self._seconds.observe(seconds)

    def scored(self, passages: int, row_bytes: int) -> None:
        """Passages were scored."""
        self._metrics.row_bytes(row_bytes)

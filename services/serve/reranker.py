"""The reranker's deployment: a replica reads rows, and asks encoder replicas for token shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from services.encoder.core import TokenShares
from services.reranker.core import RerankerCore
from services.serve.calls import call
from services.serve.config import ServeConfig
from services.serve.observers import RayRerankerObserver
from trackstar.index import Index
from trackstar.v1 import reranker_pb2


class RemoteExplainer:
    """Token shares from the encoder's replicas."""

    def __init__(self, encoder: DeploymentHandle[Any]) -> None:
        self._encoder = encoder

    async def contributions(
        self, passages: Sequence[NDArray[np.int32]], dual_d: NDArray[np.float32], *, timeout_seconds: float
    ) -> list[TokenShares]:
        """See `services.reranker.core.Explainer`."""
        found: list[TokenShares] = await call(
            self._encoder.contributions, passages, dual_d, timeout_seconds=timeout_seconds, what="token shares"
        )
        return found


class RerankerReplica:
    """One replica; its methods are those of `RerankerCore`."""

    def __init__(self, config: ServeConfig, encoder: DeploymentHandle[Any]) -> None:
        torch.set_num_threads(config.torch_threads)
        self._core = RerankerCore(Index(config.index), RemoteExplainer(encoder), observer=RayRerankerObserver())

    async def rerank(self, request: reranker_pb2.RerankRequest, timeout_seconds: float) -> reranker_pb2.RerankResponse:
        """See `RerankerCore.rerank`."""
        return await self._core.rerank(request, timeout_seconds=timeout_seconds)

    async def explain(
        self, request: reranker_pb2.ExplainRequest, timeout_seconds: float
    ) -> reranker_pb2.ExplainResponse:
        """See `RerankerCore.explain`."""
        return await self._core.explain(request, timeout_seconds=timeout_seconds)

    async def read_passages(
        self, request: reranker_pb2.ReadPassagesRequest, timeout_seconds: float
    ) -> reranker_pb2.ReadPassagesResponse:
        """See `RerankerCore.read_passages`."""
        return await self._core.read_passages(request, timeout_seconds=timeout_seconds)

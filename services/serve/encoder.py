"""The encoder's deployment: a replica holds the whole model, or leads a gang of actors that hold it together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from services.encoder.core import EncoderCore, TokenShares
from services.encoder.model import LocalModel, ModelBackend, ModelWorker
from services.serve.config import ServeConfig
from services.serve.observers import RayEncoderObserver
from trackstar.index import Index
from trackstar.model import load_tokenizer
from trackstar.v1 import encoder_pb2

if TYPE_CHECKING:
    from services.encoder.gang import Gang


class EncoderReplica:
    """One replica; its methods are those of `EncoderCore`."""

    def __init__(self, config: ServeConfig) -> None:
        torch.set_num_threads(config.torch_threads)
        index = Index(config.index)
        self._gang: Gang | None = None
        model: ModelBackend
        if config.gang.ranks > 1:
            from services.encoder.gang import Gang
            from services.encoder.gang_copy import GangWithCopy
            from services.encoder.rank import RankWorker

            # The model lies with the ranks; this process only reads and writes its words.
            folder = config.model or index.facts["model"]["path"]
            tokenizer, max_tokens = load_tokenizer(folder, trust_remote_code=config.trust_remote_code)
            self._gang = Gang(
                RankWorker,
                config,
                ranks=config.gang.ranks,
                strategy=config.gang.strategy,
                cpus=config.gang.cpus,
                gpus=config.gang.gpus,
            )
            model = GangWithCopy(
                self._gang,
                lambda: index.load_model(config.model, trust_remote_code=config.trust_remote_code).model,
            )
        else:
            loaded = index.load_model(config.model, device=config.device, trust_remote_code=config.trust_remote_code)
            tokenizer, max_tokens = loaded.tokenizer, loaded.max_tokens
            model = LocalModel(ModelWorker(index, loaded))
        self._core = EncoderCore(
            index,
            tokenizer,
            max_tokens,
            model,
            max_waiting_tokens=config.max_waiting_tokens,
            observer=RayEncoderObserver(),
        )

    async def check_health(self) -> None:
        """Called by Serve; raises when the replica must be replaced."""
        if self._gang is not None:
            await self._gang.check_health()

    async def encode(self, request: encoder_pb2.EncodeRequest, timeout_seconds: float) -> encoder_pb2.EncodeResponse:
        """See `EncoderCore.encode`."""
        return await self._core.encode(request, timeout_seconds=timeout_seconds)

    async def tail_patch(
        self, request: encoder_pb2.TailPatchRequest, timeout_seconds: float
    ) -> encoder_pb2.TailPatchResponse:
        """See `EncoderCore.tail_patch`."""
        return await self._core.tail_patch(request, timeout_seconds=timeout_seconds)

    async def contributions(
        self, passages: Sequence[NDArray[np.int32]], dual_d: NDArray[np.float32], timeout_seconds: float
    ) -> list[TokenShares]:
        """See `EncoderCore.contributions`."""
        return await self._core.contributions(passages, dual_d, timeout_seconds=timeout_seconds)

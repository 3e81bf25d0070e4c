"""An encoder of passages that is a gang: the model cut over several actors, led by the worker that reads the corpus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.encoder.gang import Gang
from services.encoder.member import RankContext
from services.reindex.config import GangPool
from trackstar.encode import Encoded, Example
from trackstar.index import Index
from trackstar.index_config import IndexConfig
from trackstar.sharding import shard

_START_SECONDS = 1800.0


class PassageRank:
    """One rank: its share of the checkpoint."""

    def __init__(self, context: RankContext, root: str, config: IndexConfig, torch_threads: int) -> None:
        torch.set_num_threads(torch_threads)
        index = Index(root)
        loaded = index.load_model(config.model, trust_remote_code=config.trust_remote_code)
        self._encoder = index.encoder(shard(loaded, strategy=context.strategy, device=context.device))

    def encode(self, examples: Sequence[Example]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rows [N, d] and losses [N], whole on every rank."""
        found = self._encoder.encode(examples)
        return found.rows_ND.cpu().numpy(), found.loss_N.cpu().numpy()


@dataclass(slots=True)
class GangEncoderMaker:
    """Makes gangs; an `EncoderMaker`."""

    config: IndexConfig
    pool: GangPool
    torch_threads: int

    def __call__(self, index: Index) -> GangEncoder:
        return GangEncoder(index, self)


@dataclass(slots=True, init=False)
class GangEncoder:
    """A `PassageEncoder` over one gang; a gang that is lost is replaced, and the call fails with `NotReady`."""

    _gang: Gang = field(repr=False)

    def __init__(self, index: Index, maker: GangEncoderMaker) -> None:
        pool = maker.pool
        self._gang = Gang(
            PassageRank,
            str(index.root),
            maker.config,
            maker.torch_threads,
            ranks=pool.ranks,
            strategy=pool.strategy,
            cpus=pool.cpus,
            gpus=pool.gpus,
        )

    def encode(self, examples: Sequence[Example], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """See `Encoder.encode`; tokens are told of at the end.

        Raises:
            NotReady: the gang was lost, or does not start.
        """
        rows_ND, loss_N = asyncio.run(self._call(examples))
        if on_batch is not None:
            on_batch(sum(len(example.tokens) for example in examples))
        return Encoded(rows_ND=torch.from_numpy(rows_ND.copy()), loss_N=torch.from_numpy(loss_N.copy()))

    def close(self) -> None:
        """End the gang."""
        asyncio.run(self._gang.close())

    async def _call(self, examples: Sequence[Example]) -> Any:
        await self._gang.ready(_START_SECONDS)
        return await self._gang.call("encode", list(examples))

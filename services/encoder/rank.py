"""One rank of the encoder's gang: its share of the checkpoint, with the methods of `ModelWorker`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.encoder.model import ModelWorker
from trackstar.encode import Example
from trackstar.errors import UnsupportedModel
from trackstar.index import Index
from trackstar.sharding import shard
from trackstar.tail_patch import PatchEffect, PatchStep

if TYPE_CHECKING:
    from services.encoder.member import RankContext
    from services.serve.config import ServeConfig


class RankWorker(ModelWorker):
    """Loads the checkpoint on the host and keeps this rank's share on its device."""

    def __init__(self, context: RankContext, config: ServeConfig) -> None:
        torch.set_num_threads(config.torch_threads)
        index = Index(config.index)
        loaded = index.load_model(config.model, trust_remote_code=config.trust_remote_code)
        super().__init__(index, shard(loaded, strategy=context.strategy, device=context.device))

    def tail_patch(self, query: Example, passage: Example, step: PatchStep) -> PatchEffect:
        """Not on a cut model.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel(
            "a training step needs the whole model in one process; a gang's leader takes it on a copy of its own"
        )

"""What the ranks of a gang run in its tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from services.encoder.member import RankContext
from tests import tiny
from tests.distributed import jobs
from trackstar.encode import Encoder, fold_factors
from trackstar.errors import InvalidRequest
from trackstar.sharding import shard


class Rows:
    """A tiny model cut over the gang."""

    def __init__(self, context: RankContext, folder: str) -> None:
        torch.set_num_threads(1)
        self._context = context
        loaded = shard(tiny.load(Path(folder)), strategy=context.strategy, device=context.device)
        layout = loaded.layout(layer_blocks=2, rows=jobs.ROWS, cols=jobs.COLS)
        corrections = jobs.correction_of(loaded, "none")
        self._encoder = Encoder(loaded, layout, fold_factors(loaded, layout, corrections, seed=jobs.SEED))

    def rows(self) -> NDArray[np.float32]:
        """Rows of the examples of the tests."""
        found: NDArray[np.float32] = self._encoder.encode(jobs.examples()).rows_ND.numpy()
        return found

    def pids(self) -> list[int]:
        """Process ids of all ranks."""
        found = [0] * self._context.world
        dist.all_gather_object(found, os.getpid())
        return found

    def wait_for_rank(self, rank: int, seconds: float) -> None:
        """All ranks but one wait for it in a collective; that one sleeps first."""
        if self._context.rank == rank:
            time.sleep(seconds)
        dist.barrier()

    def refuse(self) -> None:
        """Every rank says no."""
        raise InvalidRequest("no")

    def refuse_alone(self, rank: int) -> None:
        """One rank says no, the others wait for it."""
        if self._context.rank == rank:
            raise InvalidRequest("no")
        dist.barrier()

    def fail_alone(self, rank: int) -> None:
        """One rank has a defect, the others wait for it."""
        if self._context.rank == rank:
            raise ZeroDivisionError("a defect")
        dist.barrier()

"""The model as the encoder service asks for it: plain arrays in and out, in this process or spread over a gang.

`ModelWorker` does the work. Every rank of a gang holds one and runs the same methods with the same arguments, and each
returns the whole answer, so a method may not depend on clocks or chance. `LocalModel` runs one worker in this process,
`gang.Gang` several in Ray actors. Both are a `ModelBackend`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trackstar.complete import Completion, complete
from trackstar.encode import QUERY_LENGTH_STEP, Encoder, Example
from trackstar.index import Index
from trackstar.model import LoadedModel
from trackstar.tail_patch import PatchEffect, PatchStep, TailPatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Un-whitened rows float32 [N, d] and summed losses float32 [N]."""

    rows_Nd: NDArray[np.float32]
    loss_N: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares of <row, dual> of one passage: by token and block float32 [T, b], and of unplaced experts [b]."""

    by_token_Tb: NDArray[np.float32]
    unplaced_b: NDArray[np.float32]


class ModelWorker:
    """One rank's model with its hooks.

    Args:
        index: tells how rows are made.
        loaded: the checkpoint, whole or this rank's share of it.
    """

    def __init__(self, index: Index, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._encoder: Encoder = index.encoder(loaded, length_step=QUERY_LENGTH_STEP)
        self._patcher: TailPatcher | None = None

    def encode(self, examples: Sequence[Example]) -> Rows:
        """Rows and losses of queries."""
        found = self._encoder.encode(examples)
        return Rows(rows_Nd=found.rows_ND.cpu().numpy(), loss_N=found.loss_N.cpu().numpy())

    def contributions(self, examples: Sequence[Example], dual_d: NDArray[np.float32]) -> list[Shares]:
        """How every token and block of each passage adds to <row, dual>."""
        found = self._encoder.contributions(examples, torch.from_numpy(dual_d.copy()))
        return [Shares(by_token_Tb=item.by_token_Tb.numpy(), unplaced_b=item.unplaced_b.numpy()) for item in found]

    def complete(self, prompt: NDArray[np.int32], max_new_tokens: int, stop_tokens: tuple[int, ...]) -> Completion:
        """What the model itself says after the prompt, greedily."""
        return complete(self._loaded.model, prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)

    def copy_for_steps(self) -> None:
        """Make the copy that steps are taken on, unless it is there; the model must not run meanwhile."""
        if self._patcher is None:
            self._patcher = TailPatcher(self._loaded.model)

    def tail_patch(self, query: Example, passage: Example, step: PatchStep) -> PatchEffect:
        """What one training step on the passage does to the query's target, measured on the copy."""
        self.copy_for_steps()
        assert self._patcher is not None
        return self._patcher.measure(query, [passage], step)[0]


class ModelBackend(Protocol):
    """Runs the methods of a `ModelWorker`, one at a time."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's result.

        Raises:
            NotReady: the model is not there now; the same call can succeed later.
        """

    async def close(self) -> None:
        """Let go of the model."""


class LocalModel:
    """One worker in this process. The serving weights have one thread, the copy that is patched another."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker
        self._serving = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._patching = ThreadPoolExecutor(max_workers=1, thread_name_prefix="patch")

    async def call(self, method: str, *arguments: Any) -> Any:
        """See `ModelBackend.call`."""
        loop, work = asyncio.get_running_loop(), getattr(self._worker, method)
        if method != "tail_patch":
            return await loop.run_in_executor(self._serving, work, *arguments)
        await loop.run_in_executor(self._serving, self._worker.copy_for_steps)
        return await loop.run_in_executor(self._patching, work, *arguments)

    async def close(self) -> None:
        """See `ModelBackend.close`."""
        for thread in (self._serving, self._patching):
            await asyncio.to_thread(thread.shutdown, wait=True, cancel_futures=True)

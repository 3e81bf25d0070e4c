"""A gang that serves, beside a whole copy of its model for training steps.

Tail-patch needs the whole model in one process. A gang holds it in pieces, so its leader loads the checkpoint once more
on its host's processor when the first step is asked for: slow, and as large as the checkpoint and its copy in float32,
but it never touches the ranks that serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel

from services.encoder.gang import Gang
from trackstar.encode import Example
from trackstar.tail_patch import PatchEffect, PatchStep, TailPatcher


class GangWithCopy:
    """See `services.encoder.model.ModelBackend`.

    Args:
        gang: runs every method but `tail_patch`.
        load: loads the whole model; called once, in a thread, when it is first needed.
    """

    def __init__(self, gang: Gang, load: Callable[[], PreTrainedModel]) -> None:
        self._gang = gang
        self._load = load
        self._patching = ThreadPoolExecutor(max_workers=1, thread_name_prefix="patch")
        self._patcher: TailPatcher | None = None

    async def call(self, method: str, *arguments: Any) -> Any:
        """See `ModelBackend.call`."""
        if method != "tail_patch":
            return await self._gang.call(method, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._patching, self._tail_patch, *arguments)

    async def close(self) -> None:
        """See `ModelBackend.close`."""
        await asyncio.to_thread(self._patching.shutdown, wait=True, cancel_futures=True)
        await self._gang.close()

    def _tail_patch(self, query: Example, passage: Example, step: PatchStep) -> PatchEffect:
        if self._patcher is None:
            self._patcher = TailPatcher(self._load())
        return self._patcher.measure(query, [passage], step)[0]

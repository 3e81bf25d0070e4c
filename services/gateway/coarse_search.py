"""Coarse searches of concurrent calls, joined: what waits while a search runs becomes the next search's batch.

A search reads every code of a generation once, however many queries it is given, so joining them costs no one much and
multiplies what the gateway can answer. Searches block, so they run in a thread pool that all generations share. A call
gives up when its time is over; the thread goes on until its search ends, and nothing else is started in its place, so
threads never pile up behind an index that does not answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.timing import within
from trackstar.coarse import CoarseIndex
from trackstar.errors import NotReady, Overloaded

_LEAST_SECONDS = 0.001

Hits = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    """Codes [n, .] of one call, when it gives up (monotonic), and where its hits go."""

    codes: NDArray[Any]
    limit: int
    until: float
    hits: asyncio.Future[Hits]


class CoarseSearch:
    """Searches one coarse index for many calls; used from one event loop.

    Args:
        index: owned from now on; its methods are called from `threads`, `parallel` at a time.
        threads: where searches run.
        parallel: searches that may run at once; 1 unless the index says it bears more.
        max_batch: codes in one search.
        max_waiting: calls that may wait; further ones are refused.
    """

    def __init__(
        self,
        index: CoarseIndex,
        threads: Executor,
        *,
        parallel: int = 1,
        max_batch: int = 64,
        max_waiting: int = 256,
    ) -> None:
        self._index = index
        self._threads = threads
        self._parallel = parallel
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    async def search(self, codes: NDArray[Any], limit: int, *, timeout_seconds: float) -> Hits:
        """As `CoarseIndex.search`, for the codes [n, .] of one call.

        Raises:
            DeadlineExceeded: no answer within `timeout_seconds`.
            Overloaded: too many calls wait already.
            NotReady: it was closed.
            TrackstarError: whatever the index raises.
        """
        if self._closed:
            raise NotReady("the generation was put away while it was asked; ask again")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} coarse searches wait already; try again later")
        item = _Waiting(
            codes=codes,
            limit=limit,
            until=time.monotonic() + timeout_seconds,
            hits=asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(item)
        self._start()
        try:
            async with within(timeout_seconds, "the coarse search"):
                return await item.hits
        finally:
            # A caller that has left takes no place in the queue.
            if item in self._waiting:
                self._waiting.remove(item)

    async def close(self) -> None:
        """Refuse what waits, let running searches end, and close the index."""
        self._closed = True
        for item in self._waiting:
            if not item.hits.done():
                item.hits.set_exception(NotReady("the generation was put away while it was asked; ask again"))
        self._waiting.clear()
        if self._running:
            await asyncio.wait(self._running)
        await asyncio.get_running_loop().run_in_executor(self._threads, self._index.close)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._parallel:
            task = asyncio.create_task(self._run(self._take()))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not self._closed:
            self._start()

    def _take(self) -> list[_Waiting]:
        """The call that has waited longest, and those of the same limit that fit in one search with it."""
        limit = self._waiting[0].limit
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        size = 0
        for item in self._waiting:
            if item.limit == limit and (not batch or size + len(item.codes) <= self._max_batch):
                batch.append(item)
                size += len(item.codes)
            else:
                others.append(item)
        self._waiting = others
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        # As long as the one that waits longest: the others give up by themselves.
        seconds = max(_LEAST_SECONDS, max(item.until for item in batch) - time.monotonic())
        search = partial(self._index.search, limit=batch[0].limit, timeout_seconds=seconds)
        try:
            codes = np.concatenate([item.codes for item in batch])
            ids_QL, cosines_QL = await loop.run_in_executor(self._threads, search, codes)
        except Exception as error:
            # Each caller gets what the index raised, as if it had searched by itself.
            for item in batch:
                if not item.hits.done():
                    item.hits.set_exception(error)
            return
        start = 0
        for item in batch:
            part = slice(start, start + len(item.codes))
            if not item.hits.done():
                item.hits.set_result((ids_QL[part], cosines_QL[part]))
            start = part.stop

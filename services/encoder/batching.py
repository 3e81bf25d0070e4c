"""Dynamic batching by token count: what waits while the model is busy goes into its next batch together.

Contract: `submit` gives one item and waits for its result. A batch takes waiting items in the order they came until
their tokens reach `max_tokens` (one item larger than that goes alone). Nothing waits for company: an idle model starts
at once, and under load batches grow by themselves. An item whose caller has gone leaves the queue. At most
`max_waiting_tokens` wait; more are refused at once.

Everything runs on one event loop; `run` does the work elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from trackstar.errors import NotReady, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    tokens: int
    result: asyncio.Future[Result]


class TokenBatcher(Generic[Item, Result]):
    """Collects items into batches.

    Args:
        run: does one batch; one result or exception for each item, in order. If it fails itself, all do.
        max_tokens: tokens of a batch.
        max_waiting_tokens: tokens that may wait.
        lanes: batches under way at once; with more than one, one can finish while another holds the model, but each is
            smaller.
        on_batch: hears of each batch: number of items and of tokens.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        max_tokens: int,
        max_waiting_tokens: int,
        lanes: int = 1,
        on_batch: Callable[[int, int], None] = lambda _items, _tokens: None,
    ) -> None:
        self._run = run
        self._max_tokens = max_tokens
        self._max_waiting_tokens = max_waiting_tokens
        self._lanes = lanes
        self._on_batch = on_batch
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._waiting_tokens = 0
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue, those of callers that have gone included until their turn comes."""
        return self._waiting_tokens

    async def submit(self, item: Item, *, tokens: int) -> Result:
        """The item's result.

        Raises:
            Overloaded: too many tokens wait already.
            NotReady: closed.
        """
        if self._closed:
            raise NotReady("this replica is shutting down; ask another")
        if self._queue and self._waiting_tokens + tokens > self._max_waiting_tokens:
            raise Overloaded(f"{self._waiting_tokens:,} tokens wait for the model already; try again later")
        waiting: _Waiting[Item, Result] = _Waiting(item, tokens, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._waiting_tokens += tokens
        self._start()
        return await waiting.result

    async def close(self) -> None:
        """Refuse what waits, and wait for what runs."""
        self._closed = True
        for waiting in self._queue:
            if not waiting.result.done():
                waiting.result.set_exception(NotReady("this replica is shutting down; ask another"))
        self._queue.clear()
        self._waiting_tokens = 0
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self) -> None:
        while self._queue and len(self._running) < self._lanes:
            batch = self._take()
            if batch:
                task = asyncio.create_task(self._work(batch))
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    def _take(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        tokens = 0
        while self._queue:
            waiting = self._queue[0]
            if not waiting.result.done():
                if batch and tokens + waiting.tokens > self._max_tokens:
                    break
                batch.append(waiting)
                tokens += waiting.tokens
            self._queue.popleft()
            self._waiting_tokens -= waiting.tokens
        return batch

    async def _work(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        self._on_batch(len(batch), sum(waiting.tokens for waiting in batch))
        try:
            results: Sequence[Result | Exception] = await self._run([waiting.item for waiting in batch])
        except Exception as error:
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if waiting.result.done():
                continue
            if isinstance(result, Exception):
                waiting.result.set_exception(result)
            else:
                waiting.result.set_result(result)

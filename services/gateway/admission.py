"""How many calls run at once, and who waits: a bounded number of places and a bounded queue before them.

Contract: places go to waiting calls in the order they came. A call is refused with `Overloaded` at once when the queue
is full, and when it has waited its longest; the refusal says when to come back, from how long calls took lately. A call
that is cancelled leaves the queue, and a place that was just given to it goes to the next. So under any load the work
in progress and the wait are bounded. It is used from one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.gateway.metrics import GatewayMetrics, Rejected
from trackstar.errors import DeadlineExceeded, Overloaded

# Weight of the latest call in the running mean of how long calls take.
_LATEST = 0.1
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 0.1, 60.0


class Admission:
    """The places and the queue.

    Args:
        max_in_flight: places.
        max_queued: calls that may wait.
        max_wait_seconds: longest wait of one.
        metrics: hears of lengths, waits and refusals.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        max_in_flight: int,
        max_queued: int,
        max_wait_seconds: float,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_queued = max_queued
        self._max_wait_seconds = max_wait_seconds
        self._metrics = metrics
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._in_flight = 0
        self._mean_seconds: float | None = None

    @property
    def in_flight(self) -> int:
        """Calls that have a place."""
        return self._in_flight

    @property
    def queued(self) -> int:
        """Calls that wait for one."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, deadline: float) -> AsyncIterator[None]:
        """Hold a place; `deadline` by the clock ends the wait for it.

        Raises:
            Overloaded: the queue is full, or the wait was too long.
            DeadlineExceeded: the deadline passed before.
        """
        came = self._clock()
        if self._in_flight < self._max_in_flight and not self._waiting:
            self._in_flight += 1
        else:
            await self._wait(came, deadline)
        began = self._clock()
        self._metrics.queue_wait.observe(began - came)
        try:
            yield
        finally:
            took = self._clock() - began
            mean = took if self._mean_seconds is None else self._mean_seconds
            self._mean_seconds = mean + _LATEST * (took - mean)
            self._leave()

    async def _wait(self, came: float, deadline: float) -> None:
        """Until the place is ours; counted already when this returns."""
        if len(self._waiting) >= self._max_queued:
            self._metrics.rejected(Rejected.QUEUE_FULL)
            raise self._overloaded(f"{self._in_flight} calls run and {len(self._waiting)} wait already")
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        self._metrics.queue_length.set(len(self._waiting))
        seconds = min(self._max_wait_seconds, deadline - came)
        try:
            async with asyncio.timeout(seconds):
                await given
        except BaseException as error:
            if given.done() and not given.cancelled():
                # It was given at the same moment; nobody will use it.
                self._leave()
            if not isinstance(error, TimeoutError):
                raise
            if self._max_wait_seconds >= deadline - came:
                raise DeadlineExceeded(
                    "the deadline passed before there was a place; give the call more time"
                ) from None
            self._metrics.rejected(Rejected.QUEUE_TIMEOUT)
            raise self._overloaded(f"there was no place within {self._max_wait_seconds:g} s") from None
        finally:
            if given in self._waiting:
                self._waiting.remove(given)
            self._metrics.queue_length.set(len(self._waiting))

    def _leave(self) -> None:
        """Hand the place to whoever waits longest, or free it."""
        while self._waiting:
            given = self._waiting.popleft()
            if not given.done():
                given.set_result(None)
                return
        self._in_flight -= 1

    def _overloaded(self, what: str) -> Overloaded:
        mean = 1.0 if self._mean_seconds is None else self._mean_seconds
        wait = mean * (len(self._waiting) + 1) / self._max_in_flight
        seconds = min(max(wait, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
        return Overloaded(f"{what}; try again in {seconds:.1f} s", retry_after_seconds=seconds)

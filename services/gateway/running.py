"""The calls that run now, so that a server which shuts down can wait for them and end what is left.

Contract: a call is counted from `enter` to the end of its block, whatever ends it. It is used from one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from trackstar.errors import DeadlineExceeded, NotReady


class RunningCalls:
    """Counts calls and bounds their time."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._watching: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = self._ended = False

    def __len__(self) -> int:
        return len(self._limits)

    @property
    def draining(self) -> bool:
        """Whether new calls are to be refused."""
        return self._draining

    @asynccontextmanager
    async def enter(self, seconds: float, *, watches: bool = False) -> AsyncIterator[None]:
        """One call, which is cancelled after so many seconds; one that `watches`, when the server begins to shut down.

        Raises:
            DeadlineExceeded: they are over.
            NotReady: the server shuts down and cannot wait any longer.
        """
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self._limits.add(limit)
                if watches:
                    self._watching.add(limit)
                self._idle.clear()
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            if self._ended or (watches and self._draining):
                raise NotReady("this server shuts down; ask another") from None
            raise DeadlineExceeded(f"the call was not done in {seconds:.3g} s; give it more time") from None
        finally:
            self._limits.discard(limit)
            self._watching.discard(limit)
            if not self._limits:
                self._idle.set()

    def drain(self) -> None:
        """Have new calls refused from now on, and end those that only watch."""
        self._draining = True
        _expire(self._watching)

    async def wait(self, seconds: float) -> bool:
        """Wait until no call runs, at most so many seconds; whether none does."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def end(self) -> None:
        """Cancel the calls that run; each answers that the server shuts down."""
        self._ended = True
        _expire(self._limits)


def _expire(limits: Iterable[asyncio.Timeout]) -> None:
    for limit in limits:
        if not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())

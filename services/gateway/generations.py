"""Which generation answers, and how one takes over from another while calls run.

Contract: a call holds one `ServedGeneration` from its beginning to its end; nothing about it changes meanwhile. On a
switch the new one is opened first, then new calls get it, and the old one is closed when the last call that holds it
has ended. The pointer in the index folder is followed, so a switch by another process is followed too. Generations
asked for by name are opened when asked for, and a few are kept.

It knows catalog and coarse index; encoder and reranker open what they need by themselves, by the generation's name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from services.gateway.coarse_search import CoarseSearch
from services.timing import within
from trackstar.catalog import Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex
from trackstar.codes import CodeSpec
from trackstar.errors import NotFound, NotReady, TrackstarError

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_OPENING_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedGeneration:
    """A finished generation with its coarse index open. `facts.state` is of when it was opened."""

    facts: GenerationFacts
    spec: CodeSpec
    search: CoarseSearch

    @property
    def name(self) -> str:
        """Its concrete name."""
        return self.facts.name


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """An open generation, and how many calls hold it. `retired`: to be closed when none does; `gone`: for no new call,
    because the index does not have it any more."""

    served: ServedGeneration
    holders: int = 0
    retired: bool = False
    gone: bool = False


class Pointer(Protocol):
    """Says which generation is active, durably and for everybody; a `Catalog` is one."""

    def pointer(self) -> str | None:
        """Its name; None while there is none."""

    def activate(self, name: str) -> None:
        """Point to another; raises as `Catalog.activate`."""


class Generations:
    """The switchboard; used from one event loop.

    Args:
        catalog: of the index folder.
        pointer: says which generation is active; the index folder if None.
        open_coarse: opens a generation's coarse index; runs in a thread.
        threads: coarse searches that run at once, over all generations.
        searches_per_generation: how many of them in one generation.
        poll_seconds: how often the active pointer is looked at.
        max_named: generations other than the active one that stay open without a call.
        on_active: hears of every generation that becomes active, such as to count it.
    """

    def __init__(
        self,
        catalog: Catalog,
        open_coarse: Callable[[GenerationFacts], CoarseIndex],
        *,
        pointer: Pointer | None = None,
        threads: int = 4,
        searches_per_generation: int = 1,
        poll_seconds: float = 2.0,
        max_named: int = 1,
        on_active: Callable[[GenerationFacts], None] = lambda _facts: None,
    ) -> None:
        self._catalog = catalog
        self._pointer: Pointer = pointer or catalog
        self._open_coarse = open_coarse
        self._searches_per_generation = searches_per_generation
        self._poll_seconds = poll_seconds
        self._max_named = max_named
        self._on_active = on_active
        self._searching = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="coarse")
        # Apart, so that a catalog can be read and a generation opened while searches fill the other pool.
        self._reading = ThreadPoolExecutor(max_workers=2, thread_name_prefix="catalog")
        self._active: str | None = None
        # Those open now, least recently used first; those being opened; those being closed.
        self._open: dict[str, _Entry] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._switching = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._failure: str | None = None

    async def start(self) -> None:
        """Open the active generation, if there is one, and begin to watch.

        Raises:
            TrackstarError: it cannot be opened.
        """
        await self._follow()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop watching and close everything; calls that still hold a generation fail."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._opening:
            await asyncio.wait(self._opening.values())
        for entry in list(self._open.values()):
            self._put_away(entry)
        if self._closing:
            await asyncio.wait(self._closing.values())
        self._searching.shutdown(wait=False)
        self._reading.shutdown(wait=False)

    @property
    def active(self) -> str | None:
        """Name of the generation that new calls get; None while there is none."""
        return self._active

    async def ready(self) -> None:
        """Return if new calls get a generation; a probe for health.

        Raises:
            NotReady: none is active.
        """
        await self._active_name()

    @asynccontextmanager
    async def hold(
        self, name: str = "", *, timeout_seconds: float = _OPENING_SECONDS
    ) -> AsyncIterator[ServedGeneration]:
        """A generation for as long as the block runs: the active one, or the one of that name.

        Raises:
            DeadlineExceeded: it was not open within `timeout_seconds`; it goes on opening for others.
            NotFound: no generation of that name.
            NotReady: none is active yet, or it is still being built.
            TrackstarError: its coarse index cannot be opened.
        """
        async with within(timeout_seconds, "opening the generation"):
            entry = await self._acquire(name or await self._active_name())
        try:
            yield entry.served
        finally:
            self._release(entry)

    async def activate(self, name: str) -> tuple[GenerationFacts, str]:
        """Switch to a finished generation; returns its facts, and the name of the one before ("" if none).

        Raises:
            NotFound: no generation of that name.
            NotReady: it is still being built.
            TrackstarError: it cannot be opened, or the pointer cannot be written; then nothing has changed.
        """
        async with self._switching:
            entry = await self._acquire(name)
            try:
                await self._read(lambda: self._pointer.activate(name))
                previous = self._switch(name)
            finally:
                self._release(entry)
        return await self.describe(name), previous or ""

    async def names(self) -> list[str]:
        """Names of all generations of the index, sorted; also of those that are being built."""
        return await self._read(self._catalog.names)

    async def describe(self, name: str = "") -> GenerationFacts:
        """Facts of a generation as they are now; of the active one without a name.

        Raises:
            NotFound: no generation of that name.
            NotReady: none is active yet.
        """
        facts = await self._describe(name or await self._active_name())
        if facts.state not in ("ready", "active"):
            return facts
        return replace(facts, state="active" if facts.name == self._active else "ready")

    async def _describe(self, name: str) -> GenerationFacts:
        try:
            return await self._read(lambda: self._catalog.describe(name))
        except NotFound as error:
            # The catalog names folders and other generations, which are not for every caller.
            raise _gone(name) from error

    async def _active_name(self) -> str:
        if self._active is None:
            # Perhaps one was activated since the last look.
            await self._follow()
        if self._active is None:
            raise NotReady("no generation is active yet; activate one, or ask one by its name")
        return self._active

    async def _follow(self) -> None:
        """Switch to what the pointer names."""
        async with self._switching:
            name = await self._read(self._pointer.pointer)
            if name is None or name == self._active:
                return
            entry = await self._acquire(name)
            self._switch(name)
            self._release(entry)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._follow()
                await self._forget_removed()
                self._failure = None
            except (TrackstarError, OSError) as error:
                # Said once, not every few seconds; what serves goes on serving.
                if str(error) != self._failure:
                    self._failure = str(error)
                    _LOG.warning("the active generation cannot be followed: %s", error)

    async def _forget_removed(self) -> None:
        names = await self._read(self._catalog.finished)
        for name, entry in list(self._open.items()):
            entry.gone = name not in names and name != self._active
            if entry.gone:
                self._retire(entry)

    def _switch(self, name: str) -> str | None:
        """From here on new calls get `name`, which is open and held; returns what they got before."""
        previous, self._active = self._active, name
        if previous is not None and previous != name and previous in self._open:
            self._retire(self._open[previous])
        self._open[name].retired = self._open[name].gone = False
        if previous != name:
            self._on_active(self._open[name].served.facts)
        return previous

    async def _acquire(self, name: str) -> _Entry:
        """An open entry with one holder more; opened if need be, once however many wait for it."""
        while (entry := self._open.get(name)) is None:
            closing = self._closing.get(name)
            if closing is not None:
                # Its files may be locked until it is closed.
                await asyncio.shield(closing)
                continue
            task = self._opening.get(name)
            if task is None:
                task = self._opening[name] = asyncio.create_task(self._open_one(name))
            # A caller that leaves must not end what others wait for.
            await asyncio.shield(task)
        if entry.gone:
            raise _gone(name)
        self._open[name] = self._open.pop(name)
        entry.holders += 1
        return entry

    def _release(self, entry: _Entry) -> None:
        entry.holders -= 1
        if entry.holders == 0 and entry.retired:
            self._put_away(entry)
        self._trim()

    def _retire(self, entry: _Entry) -> None:
        entry.retired = True
        if entry.holders == 0:
            self._put_away(entry)

    def _trim(self) -> None:
        """Close what was asked by name the longest ago."""
        idle = [entry for name, entry in self._open.items() if name != self._active and entry.holders == 0]
        for entry in idle[: max(0, len(idle) - self._max_named)]:
            self._put_away(entry)

    def _put_away(self, entry: _Entry) -> None:
        name = entry.served.name
        if self._open.pop(name, None) is not None:
            self._closing[name] = asyncio.create_task(self._close_one(entry))

    # Both take their names off the lists themselves: who waits for a task then never meets one that has ended.

    async def _open_one(self, name: str) -> None:
        try:
            facts = await self._describe(name)
            if facts.state == "retired":
                raise _gone(name)
            if facts.spec is None:
                raise NotReady(f"generation {name!r} is still being built")
            index = await self._read(lambda: self._open_coarse(facts))
            search = CoarseSearch(index, self._searching, parallel=self._searches_per_generation)
            self._open[name] = _Entry(served=ServedGeneration(facts=facts, spec=facts.spec, search=search))
        finally:
            del self._opening[name]

    async def _close_one(self, entry: _Entry) -> None:
        try:
            await entry.served.search.close()
        except TrackstarError as error:
            _LOG.warning("generation %s did not close cleanly: %s", entry.served.name, error)
        finally:
            del self._closing[entry.served.name]

    async def _read(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)


def _gone(name: str) -> NotFound:
    return NotFound(f"there is no generation {name!r}; it may have been retired", kind="generation", name=name)

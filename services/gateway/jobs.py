"""Jobs for an event loop: the ledger in threads of its own, watching, and a look at all of them every now and then.

Contract: calls block nothing. Every look hands over what was not handed over, writes down what has ended, and tells
how things stand, so that a job needs no caller to get on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from services.gateway.job_ledger import STATES, Job, JobLedger
from trackstar.errors import Overloaded, TrackstarError
from trackstar.jobs import SHARD_STATES, JobSpec

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_BUSY_SECONDS = 30.0
_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """All jobs together. shards, tokens_per_second, remaining_seconds: of those that run; None if one cannot tell."""

    jobs: Mapping[str, int]
    shards: Mapping[str, int]
    tokens_per_second: float
    remaining_seconds: float | None


class Jobs:
    """The jobs of one index, in the event loop that starts it.

    Args:
        ledger: of the index.
        max_watchers: how many callers may watch.
        poll_seconds: how often jobs are looked at.
        on_look: hears of all of them at every look.
        on_defect: hears of a look that failed by a defect.
    """

    def __init__(
        self,
        ledger: JobLedger,
        *,
        max_watchers: int = 64,
        poll_seconds: float = 1.0,
        on_look: Callable[[Totals], None] = lambda _totals: None,
        on_defect: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger = ledger
        self._max_watchers = max_watchers
        self._poll_seconds = poll_seconds
        self._on_look = on_look
        self._on_defect = on_defect
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="jobs")
        self._watchers = 0
        self._looking: asyncio.Task[None] | None = None
        # What went wrong with a job lately; "" stands for all of them.
        self._failures: dict[str, str] = {}

    async def start(self) -> None:
        """Begin to look at them."""
        self._looking = asyncio.create_task(self._look_again())

    async def close(self) -> None:
        """Stop looking; jobs go on."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def create(self, job_id: str, spec: Mapping[str, Any], *, request_id: str, caller: str) -> Job:
        """See `JobLedger.create`."""
        return await self._run(partial(self._ledger.create, job_id, spec, request_id=request_id, caller=caller))

    async def get(self, job_id: str) -> Job:
        """See `JobLedger.get`."""
        return await self._run(partial(self._ledger.get, job_id))

    async def specs(self) -> list[JobSpec]:
        """See `JobLedger.specs`."""
        return await self._run(self._ledger.specs)

    async def cancel(self, job_id: str, *, caller: str) -> Job:
        """See `JobLedger.cancel`."""
        return await self._run(partial(self._ledger.cancel, job_id, caller=caller))

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """A job now, and whenever something about it has changed, until it has ended.

        Raises:
            NotFound: there is none.
            Overloaded: too many callers watch.
        """
        if self._watchers >= self._max_watchers:
            raise Overloaded(f"{self._watchers} callers watch jobs already", retry_after_seconds=_BUSY_SECONDS)
        self._watchers += 1
        try:
            last: Job | None = None
            while True:
                job = await self.get(job_id)
                if job != last:
                    yield job
                if job.ended:
                    return
                last = job
                await asyncio.sleep(self._poll_seconds)
        finally:
            self._watchers -= 1

    async def look(self) -> None:
        """Look at every job once."""
        found: list[Job] = []
        for job_id in await self._run(self._ledger.ids):
            try:
                found.append(await self._run(partial(self._ledger.look, job_id)))
                self._failures.pop(job_id, None)
            except (TrackstarError, OSError) as error:
                # Said once, not every second.
                if self._failures.get(job_id) != str(error):
                    self._failures[job_id] = str(error)
                    _LOG.warning("job %s: %s", job_id, error)
        self._on_look(totals(found))

    async def _look_again(self) -> None:
        while True:
            try:
                await self.look()
                self._failures.pop("", None)
            except Exception as error:
                if self._failures.get("") != repr(error):
                    self._failures[""] = repr(error)
                    self._on_defect()
                    _LOG.exception("jobs cannot be looked at")
            await asyncio.sleep(self._poll_seconds)

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def totals(jobs: Sequence[Job]) -> Totals:
    """All jobs together."""
    running = [job.progress for job in jobs if job.state == "running" and job.progress is not None]
    remaining = [progress.remaining_seconds for progress in running]
    known = [seconds for seconds in remaining if seconds is not None]
    states = Counter(job.state for job in jobs)
    return Totals(
        jobs={state: states[state] for state in STATES},
        shards={state: sum(progress.shards.get(state, 0) for progress in running) for state in SHARD_STATES},
        tokens_per_second=sum(progress.tokens_per_second for progress in running),
        remaining_seconds=None if len(known) < len(remaining) else max(known, default=0.0),
    )

"""How far a reindex job is: in its record, in Ray's metrics and on the console.

Contract: as `trackstar.build.Progress`. The record is written at most once a second, and whenever the state changes;
a record that cannot be written stops nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from trackstar.build import Progress
from trackstar.errors import TrackstarError
from trackstar.jobs import JobProgress, JobStore, PipelineState

_log = logging.getLogger(__name__)

_EVERY_SECONDS = 1.0
# The state of the pipeline that a step of the build belongs to.
_STATES: dict[str, PipelineState] = {
    "preparing": "PLANNED",
    "planning": "PLANNED",
    "encoding": "ENCODING",
    "task queries": "STATISTICS",
    "statistics": "STATISTICS",
    "whitening": "STATISTICS",
    "purging": "STATISTICS",
    "coding": "CODING",
    "importing": "IMPORTING",
}
_SHARDS = {"encoding": "encoded", "coding": "coded", "importing": "imported"}


class ProgressMetrics(Protocol):
    """Shows progress to whoever measures."""

    def show(self, progress: JobProgress) -> None:
        """Progress as it is now."""


class NoMetrics:
    """Shows nothing."""

    def show(self, progress: JobProgress) -> None:
        """Nothing."""


class JobReporter:
    """Keeps a job's record.

    Args:
        store: where the record goes; None for nowhere.
        job_id: of the job.
        console: hears everything too.
        metrics: shows it.
        clock: unix seconds.
    """

    def __init__(
        self,
        store: JobStore | None,
        job_id: str,
        console: Progress,
        *,
        metrics: ProgressMetrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._console, self._clock = store, console, clock
        self._metrics = metrics or NoMetrics()
        now = clock()
        self._step, self._step_started, self._first = "", now, 0
        self._step_tokens = 0
        self._written = 0.0
        self.progress = JobProgress(
            job_id=job_id,
            state="PLANNED",
            shards={"planned": 0, "encoded": 0, "coded": 0, "imported": 0},
            started_seconds=now,
            updated_seconds=now,
        )

    # --- trackstar.build.Progress -----------------------------------------------------------------------------------

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str = "passages"
    ) -> None:
        """See `Progress.start`."""
        self._console.start(step, done, total, tokens=tokens, unit=unit)
        self._step, self._step_started, self._first, self._step_tokens = step, self._clock(), done, 0
        self._change(
            state=_STATES.get(step, self.progress.state),
            passages_done=done,
            passages_total=total,
            tokens_done=0,
            tokens_total=tokens,
            tokens_per_second=0.0,
            remaining_seconds=None,
        )

    def advance(self, step: str, done: int, tokens: int) -> None:
        """See `Progress.advance`."""
        self._console.advance(step, done, tokens)
        if step != self._step:
            self._step, self._step_started, self._first, self._step_tokens = step, self._clock(), 0, 0
        self._step_tokens += tokens
        elapsed = self._clock() - self._step_started
        rate = self._step_tokens / elapsed if elapsed > 0 else 0.0
        self._change(
            state=_STATES.get(step, self.progress.state),
            passages_done=done,
            tokens_done=self._step_tokens,
            tokens_per_second=rate,
            remaining_seconds=self._remaining(done, elapsed),
        )

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self._console.note(text)
        self._change(note=text)

    def shards(self, step: str, finished: int, planned: int) -> None:
        """See `Progress.shards`."""
        name = _SHARDS.get(step)
        if name is not None:
            self._change(shards={**self.progress.shards, "planned": planned, name: finished})

    # --- beyond a build ---------------------------------------------------------------------------------------------

    def state(self, state: PipelineState) -> None:
        """The pipeline has come to a state."""
        self._change(state=state, remaining_seconds=None)

    def found(
        self, *, generation: str | None = None, collection: str | None = None, recall: float | None = None
    ) -> None:
        """What the job makes, as soon as it is known."""
        known = {"generation": generation, "collection": collection, "recall": recall}
        self._change(**{name: value for name, value in known.items() if value is not None})

    def failed(self, error: TrackstarError) -> None:
        """The job ends with an error."""
        self._change(error=" ".join(str(error).split()))
        self.flush()

    def flush(self) -> None:
        """Write the record now."""
        self._write(self._clock())

    def _remaining(self, done: int, elapsed: float) -> float | None:
        progress = self.progress
        if progress.tokens_total and self._step_tokens:
            return max(0, progress.tokens_total - self._step_tokens) * elapsed / self._step_tokens
        if progress.passages_total is not None and done > self._first:
            return max(0, progress.passages_total - done) * elapsed / (done - self._first)
        return None

    def _change(self, **changes: object) -> None:
        before = self.progress.state
        now = self._clock()
        self.progress = replace(self.progress, updated_seconds=now, **changes)  # type: ignore[arg-type]
        if self.progress.state != before or now - self._written >= _EVERY_SECONDS:
            self._write(now)

    def _write(self, now: float) -> None:
        self._written = now
        self._metrics.show(self.progress)
        if self._store is None:
            return
        try:
            self._store.write_progress(self.progress)
        except (TrackstarError, OSError) as error:
            _log.warning("the job's record cannot be written: %s", error)

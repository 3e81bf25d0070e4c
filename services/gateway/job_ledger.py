"""Jobs as they stand between their records and what runs them.

    request id ─► job id ─► spec and configuration written down ─► handed to the runner ─► progress ─► end written down

Contract: a job that is written down is run once, or ended; whoever dies in between, the same request again or the next
look goes on where things stood. The index folder tells everything, so several gateways may share one, and a restarted
one knows all jobs. How a job ended is written down when it is first seen, and outlives what the runner remembers.
Methods block, and may be called from several threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from services.gateway.job_config import JobConfiguration
from services.gateway.job_runners import JobRunner, Run
from trackstar.errors import NotFound, NotReady, Overloaded, TrackstarError
from trackstar.jobs import JobEnd, JobProgress, JobSpec, JobStore

_LOG = logging.getLogger(__name__)

State = Literal["pending", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = ("pending", "running", "succeeded", "failed", "cancelled")

_ENDS: Mapping[str, Literal["succeeded", "failed", "cancelled"]] = {
    "succeeded": "succeeded",
    "failed": "failed",
    "stopped": "cancelled",
}
_FORGOTTEN = Run(
    state="failed",
    message="what ran the job no longer knows it; ask again with another request id, what is finished is kept",
)
_BUSY_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it is now. `error`: one sentence on why it failed, "" otherwise; `updated_seconds`: unix time."""

    spec: JobSpec
    state: State
    progress: JobProgress | None
    error: str
    updated_seconds: float

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.state not in ("pending", "running")


class JobLedger:
    """The jobs of one index.

    Args:
        store: their records.
        runner: runs them.
        configuration: makes their configurations.
        max_unfinished: how many may wait or run.
        fresh_seconds: how long what the runner said holds.
        clock: unix seconds.
    """

    def __init__(
        self,
        store: JobStore,
        runner: JobRunner,
        configuration: JobConfiguration,
        *,
        max_unfinished: int = 1,
        fresh_seconds: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._runner = runner
        self._configuration = configuration
        self._max_unfinished = max_unfinished
        self._fresh_seconds = fresh_seconds
        self._clock = clock
        self._creating = threading.Lock()
        # What the runner said lately, jobs that have ended (which stay as they are), and runs told to end.
        self._said: dict[str, tuple[float, Run]] = {}
        self._ended: dict[str, Job] = {}
        self._told: set[str] = set()
        # Why the runner could not be asked lately, and when that was.
        self._silent: tuple[float, str] | None = None

    def ids(self) -> list[str]:
        """Of all jobs, sorted."""
        return self._store.list()

    def specs(self) -> list[JobSpec]:
        """What was asked, the newest first."""
        found = [
            self._ended[job_id].spec if job_id in self._ended else self._store.spec(job_id) for job_id in self.ids()
        ]
        return sorted(found, key=lambda spec: (-spec.created_seconds, spec.job_id))

    def create(self, job_id: str, spec: Mapping[str, Any], *, request_id: str, caller: str) -> Job:
        """Write a job down and hand it over, or what is missing of that.

        Raises:
            InvalidRequest: the id's job is another one, or a path is not allowed.
            Overloaded: too many jobs have not ended.
            NotReady: it could not be handed over now; the same request may be repeated.
        """
        # One at a time, so that the bound holds.
        with self._creating:
            config = ""
            if not self._is_known(job_id):
                config = self._configuration.derive(spec)
                self._check_unfinished()
            if self._store.create(
                job_id, spec, config, request_id=request_id, caller=caller, created_seconds=self._clock()
            ):
                _LOG.info("job written down", extra={"fields": {"job": job_id, "principal": caller}})
        self._submit(job_id)
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            NotFound: there is none.
            CorruptArtifact: its records cannot be read.
        """
        if job_id in self._ended:
            return self._ended[job_id]
        spec = self._store.spec(job_id)
        state, error, updated = self._state(job_id)
        # Read after the state, so that a job that has ended is shown as it ended.
        progress = self._store.progress(job_id)
        if state == "failed" and progress is not None:
            error = progress.error or error
        if updated is None:
            updated = spec.created_seconds if progress is None else progress.updated_seconds
        job = Job(spec=spec, state=state, progress=progress, error=error, updated_seconds=updated)
        if job.ended:
            self._ended[job_id] = job
        return job

    def cancel(self, job_id: str, *, caller: str) -> Job:
        """Have a job end; one that has ended stays as it is.

        Raises:
            NotFound: there is none.
            NotReady: the runner could not be told now; it is told at a later look.
        """
        if (job := self.get(job_id)).ended:
            return job
        if not self._store.cancelled(job_id):
            self._store.write_cancelled(job_id, caller, self._clock())
            _LOG.info("job cancelled", extra={"fields": {"job": job_id, "principal": caller}})
        self._stop(job_id)
        return self.get(job_id)

    def look(self, job_id: str) -> Job:
        """As `get`; a job that was not handed over is, and a wish to end is passed on."""
        job = self.get(job_id)
        if not job.ended:
            if not self._store.cancelled(job_id):
                self._submit(job_id)
            elif job_id not in self._told:
                self._stop(job_id)
        return job

    def _submit(self, job_id: str) -> None:
        store = self._store
        if store.submitted(job_id) or store.cancelled(job_id) or store.end(job_id) is not None:
            return
        try:
            self._runner.submit(job_id, str(store.config(job_id)))
        except NotReady:
            raise
        except TrackstarError as error:
            store.write_end(job_id, JobEnd(state="failed", error=str(error), ended_seconds=self._clock()))
            return
        store.write_submitted(job_id, self._clock())
        if store.cancelled(job_id):
            # Somebody wanted it to end before the runner knew it.
            self._stop(job_id)

    def _stop(self, job_id: str) -> None:
        self._runner.stop(job_id)
        self._told.add(job_id)
        self._said.pop(job_id, None)

    def _state(self, job_id: str) -> tuple[State, str, float | None]:
        """State and error of a job, and when it ended."""
        end = self._store.end(job_id)
        if end is None:
            # Before the runner is asked: one that was submitted by then is known to it.
            submitted, cancelled = self._store.submitted(job_id), self._store.cancelled(job_id)
            try:
                run = self._said_of(job_id)
            except NotReady:
                # Nobody can tell now; what was last written down still holds.
                return "pending" if self._store.progress(job_id) is None else "running", "", None
            if run is None:
                if not submitted and not cancelled:
                    return "pending", "", None
                run = Run(state="stopped") if cancelled else _FORGOTTEN
            if run.state == "pending" or run.state == "running":
                return run.state, "", None
            state = "cancelled" if cancelled and run.state == "failed" else _ENDS[run.state]
            error = run.message if state == "failed" else ""
            self._store.write_end(job_id, JobEnd(state=state, error=error, ended_seconds=self._clock()))
            end = self._store.end(job_id)
            assert end is not None
        return end.state, end.error, end.ended_seconds

    def _said_of(self, job_id: str) -> Run | None:
        """What the runner says of a job; that it knows none is never kept."""
        now = time.monotonic()
        when, kept = self._said.get(job_id, (0.0, None))
        if kept is not None and now - when < self._fresh_seconds:
            return kept
        if self._silent is not None and now - self._silent[0] < self._fresh_seconds:
            # Calls do not queue up before a cluster that does not answer.
            raise NotReady(self._silent[1])
        try:
            run = self._runner.state(job_id)
        except NotReady as error:
            self._silent = (time.monotonic(), str(error))
            raise
        if run is not None:
            self._said[job_id] = (now, run)
        return run

    def _is_known(self, job_id: str) -> bool:
        try:
            self._store.spec(job_id)
        except NotFound:
            return False
        return True

    def _check_unfinished(self) -> None:
        count = sum(not self.get(job_id).ended for job_id in self.ids())
        if count >= self._max_unfinished:
            raise Overloaded(
                f"{count} jobs have not ended, and no more may wait; cancel one or wait for it",
                retry_after_seconds=_BUSY_SECONDS,
            )

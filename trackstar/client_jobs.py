"""The clients' calls about reindex jobs.

    with Client("localhost:50051") as client:
        job = client.create_reindex_job(str(uuid.uuid4()), mix="task", activate=True)
        for job in client.watch_job(job.job_id):
            print(job.pipeline_state, job.shards, job.tokens_per_second, job.remaining_seconds)

Contract: as `client`. A request id names its job for good: after a failure whose outcome is not known, the same call
again gets the same job. A watch outlives deadlines and restarts of the gateway; it ends with the job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Unpack

import grpc

from trackstar.client_calls import AsyncCalls, BlockingCalls
from trackstar.client_job_types import JobInfo, ReindexOptions, spec_message, to_job
from trackstar.client_retry import Attempts
from trackstar.errors import DeadlineExceeded
from trackstar.rpc_errors import from_call
from trackstar.v1 import job_pb2, job_pb2_grpc

# A watch is patient: it tries again until nothing was heard for the client's timeout.
_WATCH_ATTEMPTS = 1000


class JobCalls(BlockingCalls):
    """See the module."""

    def create_reindex_job(
        self, request_id: str, *, timeout_seconds: float | None = None, **options: Unpack[ReindexOptions]
    ) -> JobInfo:
        """Start a job that builds another generation, or get the one that this request has started.

        Args:
            request_id: names the request, such as a UUID.
            timeout_seconds: instead of the client's.
            options: see `ReindexOptions`.

        Raises:
            InvalidRequest: the request id's job is another one, or something cannot be done as asked.
            Overloaded: too many jobs have not ended.
        """
        request = job_pb2.CreateReindexJobRequest(request_id=request_id, spec=spec_message(**options))
        return to_job(self._call(self._jobs.CreateReindexJob, request, timeout_seconds).job)

    def job(self, job_id: str, *, timeout_seconds: float | None = None) -> JobInfo:
        """One job."""
        return to_job(self._call(self._jobs.Get, job_pb2.JobServiceGetRequest(job_id=job_id), timeout_seconds).job)

    def jobs(self, *, timeout_seconds: float | None = None) -> list[JobInfo]:
        """All jobs, the newest first."""
        found: list[JobInfo] = []
        request = job_pb2.JobServiceListRequest()
        while True:
            response = self._call(self._jobs.List, request, timeout_seconds)
            found += [to_job(item) for item in response.jobs]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def cancel_job(self, job_id: str, *, timeout_seconds: float | None = None) -> JobInfo:
        """Have a job end; what it has finished is kept. It may still be running in the answer."""
        request = job_pb2.JobServiceCancelRequest(job_id=job_id)
        return to_job(self._call(self._jobs.Cancel, request, timeout_seconds).job)

    def watch_job(self, job_id: str, *, timeout_seconds: float | None = None) -> Iterator[JobInfo]:
        """A job now, and whenever something about it has changed; the last one has ended.

        Args:
            job_id: its id.
            timeout_seconds: for all of it; as long as it takes if None.

        Raises:
            DeadlineExceeded: the job has not ended in that time.
        """
        watch = _Watch(self._patient(), timeout_seconds)
        request = job_pb2.JobServiceWatchRequest(job_id=job_id)
        while True:
            call = self._jobs.Watch(request, timeout=watch.seconds_left(), metadata=self._metadata)
            try:
                for message in call:
                    if (job := watch.heard(to_job(message.job), self._patient())) is not None:
                        yield job
                    if watch.ended:
                        return
            except grpc.RpcError as error:
                time.sleep(watch.pause_after(error, self._patient()))
            finally:
                call.cancel()

    @property
    def _jobs(self) -> job_pb2_grpc.JobServiceStub:
        return job_pb2_grpc.JobServiceStub(self._channel)

    def _patient(self) -> Attempts:
        return Attempts(replace(self._retry, attempts=_WATCH_ATTEMPTS), self._timeout_seconds)


class AsyncJobCalls(AsyncCalls):
    """See `JobCalls`."""

    async def create_reindex_job(
        self, request_id: str, *, timeout_seconds: float | None = None, **options: Unpack[ReindexOptions]
    ) -> JobInfo:
        """See `JobCalls.create_reindex_job`."""
        request = job_pb2.CreateReindexJobRequest(request_id=request_id, spec=spec_message(**options))
        return to_job((await self._call(self._jobs.CreateReindexJob, request, timeout_seconds)).job)

    async def job(self, job_id: str, *, timeout_seconds: float | None = None) -> JobInfo:
        """See `JobCalls.job`."""
        request = job_pb2.JobServiceGetRequest(job_id=job_id)
        return to_job((await self._call(self._jobs.Get, request, timeout_seconds)).job)

    async def jobs(self, *, timeout_seconds: float | None = None) -> list[JobInfo]:
        """See `JobCalls.jobs`."""
        found: list[JobInfo] = []
        request = job_pb2.JobServiceListRequest()
        while True:
            response = await self._call(self._jobs.List, request, timeout_seconds)
            found += [to_job(item) for item in response.jobs]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def cancel_job(self, job_id: str, *, timeout_seconds: float | None = None) -> JobInfo:
        """See `JobCalls.cancel_job`."""
        request = job_pb2.JobServiceCancelRequest(job_id=job_id)
        return to_job((await self._call(self._jobs.Cancel, request, timeout_seconds)).job)

    async def watch_job(self, job_id: str, *, timeout_seconds: float | None = None) -> AsyncIterator[JobInfo]:
        """See `JobCalls.watch_job`."""
        watch = _Watch(self._patient(), timeout_seconds)
        request = job_pb2.JobServiceWatchRequest(job_id=job_id)
        while True:
            call = self._jobs.Watch(request, timeout=watch.seconds_left(), metadata=self._metadata)
            try:
                async for message in call:
                    if (job := watch.heard(to_job(message.job), self._patient())) is not None:
                        yield job
                    if watch.ended:
                        return
            except grpc.RpcError as error:
                await asyncio.sleep(watch.pause_after(error, self._patient()))
            finally:
                call.cancel()

    @property
    def _jobs(self) -> job_pb2_grpc.JobServiceAsyncStub:
        return job_pb2_grpc.JobServiceStub(self._channel)

    def _patient(self) -> Attempts:
        return Attempts(replace(self._retry, attempts=_WATCH_ATTEMPTS), self._timeout_seconds)


class _Watch:
    """One watch over all its calls. `patience` starts anew whenever something is heard."""

    def __init__(self, patience: Attempts, timeout_seconds: float | None) -> None:
        self._patience = patience
        self._until = float("inf") if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._last: JobInfo | None = None
        self._heard = False

    @property
    def ended(self) -> bool:
        return self._last is not None and self._last.ended

    def seconds_left(self) -> float:
        """For the next call; not longer than the patience, because the connection may be lost without a word."""
        self._heard = False
        return min(self._patience.seconds_left(), self._left())

    def heard(self, job: JobInfo, patience: Attempts) -> JobInfo | None:
        """A message has come; the job, unless it is as it was."""
        self._heard, self._patience = True, patience
        self._left()
        if job == self._last:
            return None
        self._last = job
        return job

    def pause_after(self, error: grpc.RpcError, patience: Attempts) -> float:
        """Seconds before the next call.

        Raises:
            TrackstarError: there is no use in another one.
        """
        failure = from_call(error)
        if isinstance(failure, DeadlineExceeded) and self._heard:
            # The call is over, the job is not.
            self._patience = patience
            return 0.0
        return self._patience.pause_after_error(failure, cause=error)

    def _left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the job has not ended in the time given; it goes on, and may be watched again")
        return left

"""`trackstar.v1.JobService` on grpc.aio: starting jobs, hearing of them, ending them.

Contract: as `trace_service`. Every method is for callers that may reindex. A gateway whose settings name no
configuration of jobs answers every one with one sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import grpc

from services.gateway import pages, validate_jobs
from services.gateway.errors import one_line
from services.gateway.job_ledger import Job
from services.gateway.jobs import Jobs
from services.gateway.request import RequestContext, current
from services.timing import within
from trackstar.errors import PermissionDenied, TrackstarError
from trackstar.jobs import JobSpec
from trackstar.v1 import job_pb2, job_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_STATES = {
    "pending": job_pb2.JOB_STATE_PENDING,
    "running": job_pb2.JOB_STATE_RUNNING,
    "succeeded": job_pb2.JOB_STATE_SUCCEEDED,
    "failed": job_pb2.JOB_STATE_FAILED,
    "cancelled": job_pb2.JOB_STATE_CANCELLED,
}
_MIXES = {name: number for number, name in validate_jobs.MIX_KINDS.items()}
_CODES = {name: number for number, name in validate_jobs.CODE_KINDS.items()}
_LIST = hashlib.sha256(b"jobs").digest()[:16]
_TEXT_BYTES = 2000


class JobService(job_pb2_grpc.JobServiceServicer):
    """See the protos.

    Args:
        jobs: None where there are none.
    """

    def __init__(self, jobs: Jobs | None) -> None:
        self._jobs = jobs

    async def CreateReindexJob(
        self, request: job_pb2.CreateReindexJobRequest, context: Context
    ) -> job_pb2.CreateReindexJobResponse:
        """Write it down and hand it over."""
        call, jobs = self._allowed()
        asked = validate_jobs.create(request)
        async with within(call.seconds_left(), "starting the job"):
            job = await jobs.create(asked.job_id, asked.spec, request_id=asked.request_id, caller=call.principal.name)
        return job_pb2.CreateReindexJobResponse(job=to_message(job))

    async def Get(self, request: job_pb2.JobServiceGetRequest, context: Context) -> job_pb2.JobServiceGetResponse:
        """One job."""
        call, jobs = self._allowed()
        job_id = validate_jobs.job_id(request.job_id)
        async with within(call.seconds_left(), "reading the job"):
            return job_pb2.JobServiceGetResponse(job=to_message(await jobs.get(job_id)))

    async def List(self, request: job_pb2.JobServiceListRequest, context: Context) -> job_pb2.JobServiceListResponse:
        """The newest first; a page starts behind the last job of the one before."""
        call, jobs = self._allowed()
        asked = validate_jobs.list_jobs(request)
        behind = (float("-inf"), "")
        if asked.page_token:
            token = pages.decode(asked.page_token, generation="", digest=_LIST)
            behind = (-token.offset, token.generation)
        async with within(call.seconds_left(), "reading the jobs"):
            specs = [spec for spec in await jobs.specs() if _place(spec) > behind]
            page = specs[: asked.page_size]
            response = job_pb2.JobServiceListResponse(jobs=[to_message(await jobs.get(spec.job_id)) for spec in page])
        if len(specs) > len(page):
            place, job_id = _place(page[-1])
            response.next_page_token = pages.PageToken(generation=job_id, digest=_LIST, offset=-place).encode()
        return response

    async def Watch(
        self, request: job_pb2.JobServiceWatchRequest, context: Context
    ) -> AsyncIterator[job_pb2.JobServiceWatchResponse]:
        """Now, at every change, and at the end."""
        _, jobs = self._allowed()
        job_id = validate_jobs.job_id(request.job_id)
        async with aclosing(jobs.watch(job_id)) as changes:
            async for job in changes:
                yield job_pb2.JobServiceWatchResponse(job=to_message(job))

    async def Cancel(
        self, request: job_pb2.JobServiceCancelRequest, context: Context
    ) -> job_pb2.JobServiceCancelResponse:
        """Have it end."""
        call, jobs = self._allowed()
        job_id = validate_jobs.job_id(request.job_id)
        async with within(call.seconds_left(), "cancelling the job"):
            job = await jobs.cancel(job_id, caller=call.principal.name)
        return job_pb2.JobServiceCancelResponse(job=to_message(job))

    def _allowed(self) -> tuple[RequestContext, Jobs]:
        call = current()
        if not call.principal.may_reindex:
            raise PermissionDenied(f"{call.principal.name!r} may not reindex")
        if self._jobs is None:
            raise TrackstarError("this gateway starts no jobs: its settings name no reindex.config_file")
        return call, self._jobs


def to_message(job: Job) -> job_pb2.Job:
    """A job as a message."""
    message = job_pb2.Job(
        job_id=job.spec.job_id,
        request_id=job.spec.request_id,
        caller=job.spec.caller,
        spec=spec_message(job.spec.asked),
        state=_STATES[job.state],
        error=one_line(job.error, max_bytes=_TEXT_BYTES),
        create_time_seconds=job.spec.created_seconds,
        update_time_seconds=job.updated_seconds,
    )
    if (progress := job.progress) is not None:
        message.MergeFrom(
            job_pb2.Job(
                pipeline_state=job_pb2.PipelineState.Value(f"PIPELINE_STATE_{progress.state}"),
                shards=job_pb2.ShardCounts(**progress.shards),
                passages_done=progress.passages_done,
                passages_total=progress.passages_total,
                tokens_done=progress.tokens_done,
                tokens_total=progress.tokens_total,
                tokens_per_second=progress.tokens_per_second,
                remaining_seconds=None if job.ended else progress.remaining_seconds,
                generation=progress.generation,
                collection=progress.collection,
                recall=progress.recall,
                note=one_line(progress.note, max_bytes=_TEXT_BYTES),
            )
        )
    return message


def spec_message(asked: Mapping[str, Any]) -> job_pb2.ReindexSpec:
    """What was asked, as a message; the way back of `validate_jobs.create`."""
    spec = job_pb2.ReindexSpec(
        append_paths=asked.get("append_paths", ()),
        task_queries=asked.get("task_queries", ""),
        refit=asked.get("refit", False),
        purge=asked.get("purge", False),
        activate=asked.get("activate", False),
    )
    if "mix" in asked:
        mix = asked["mix"]
        spec.mix.CopyFrom(
            job_pb2.ReindexMix(
                kind=_MIXES.get(mix.get("kind"), job_pb2.MIX_KIND_UNSPECIFIED), damping=mix.get("damping")
            )
        )
        if mix.get("weight") == validate_jobs.CROSSING:
            spec.mix.crossing = True
        elif "weight" in mix:
            spec.mix.weight = mix["weight"]
    if "code" in asked:
        code = asked["code"]
        spec.code.CopyFrom(
            job_pb2.ReindexCode(
                kind=_CODES.get(code.get("kind"), job_pb2.CODE_KIND_UNSPECIFIED), size=code.get("size", 0)
            )
        )
    return spec


def _place(spec: JobSpec) -> tuple[int, str]:
    """Where a job comes in the list: in microseconds before now, so to speak, and by id within one."""
    return -round(1e6 * spec.created_seconds), spec.job_id

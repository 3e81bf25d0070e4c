"""What the clients ask of reindex jobs and get back, as values and as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from trackstar.v1 import job_pb2

JobState = Literal["unknown", "pending", "running", "succeeded", "failed", "cancelled"]
Mix = Literal["train", "task", "none"]
Code = Literal["bits", "prefix"]

_STATES: dict[int, JobState] = {
    job_pb2.JOB_STATE_PENDING: "pending",
    job_pb2.JOB_STATE_RUNNING: "running",
    job_pb2.JOB_STATE_SUCCEEDED: "succeeded",
    job_pb2.JOB_STATE_FAILED: "failed",
    job_pb2.JOB_STATE_CANCELLED: "cancelled",
}
_MIXES: dict[Mix, job_pb2.MixKind.ValueType] = {
    "train": job_pb2.MIX_KIND_TRAIN,
    "task": job_pb2.MIX_KIND_TASK,
    "none": job_pb2.MIX_KIND_NONE,
}
_CODES: dict[Code, job_pb2.CodeKind.ValueType] = {
    "bits": job_pb2.CODE_KIND_BITS,
    "prefix": job_pb2.CODE_KIND_PREFIX,
}
_PIPELINE_PREFIX = "PIPELINE_STATE_"
_PIPELINE = set(job_pb2.PipelineState.values()) - {job_pb2.PIPELINE_STATE_UNSPECIFIED}
_MIX_NAMES = {number: name for name, number in _MIXES.items()}
_CODE_NAMES = {number: name for name, number in _CODES.items()}


class ReindexOptions(TypedDict, total=False):
    """What a job may be asked to do; what is left out stays as the operator set it.

    append_paths: files and folders that are added to the corpus. mix: what the Hessian is of. weight: share of the
    task's, or "crossing". damping: relative to the mean eigenvalue. code, code_size: the coarse code. task_queries: a
    file. refit: make the Hessian of all rows anew. purge: leave deleted documents out for good. activate: have the
    generation answer once it has passed its audit.
    """

    append_paths: Sequence[str]
    mix: Mix
    weight: float | Literal["crossing"]
    damping: float
    code: Code
    code_size: int
    task_queries: str
    refit: bool
    purge: bool
    activate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """A job; see `trackstar.v1.Job`. What is not known yet is None, or "" where it is text.

    spec: what was asked, as in `ReindexOptions`. pipeline_state: such as "ENCODING"; "" before it has said anything.
    shards: how many have come as far as "planned", "encoded", "coded" and "imported". Times are unix seconds.
    """

    job_id: str
    request_id: str
    caller: str
    spec: ReindexOptions
    state: JobState
    pipeline_state: str
    shards: Mapping[str, int]
    passages_done: int
    passages_total: int | None
    tokens_done: int
    tokens_total: int | None
    tokens_per_second: float
    remaining_seconds: float | None
    generation: str
    collection: str
    recall: float | None
    note: str
    error: str
    create_time_seconds: float
    update_time_seconds: float

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.state in ("succeeded", "failed", "cancelled")


def spec_message(**options: Unpack[ReindexOptions]) -> job_pb2.ReindexSpec:
    """What is asked as a message."""
    spec = job_pb2.ReindexSpec(
        append_paths=options.get("append_paths", ()),
        task_queries=options.get("task_queries", ""),
        refit=options.get("refit", False),
        purge=options.get("purge", False),
        activate=options.get("activate", False),
    )
    if "mix" in options:
        spec.mix.kind = _MIXES[options["mix"]]
    if "weight" in options:
        if options["weight"] == "crossing":
            spec.mix.crossing = True
        else:
            spec.mix.weight = options["weight"]
    if "damping" in options:
        spec.mix.damping = options["damping"]
    if "code" in options:
        spec.code.kind = _CODES[options["code"]]
    if "code_size" in options:
        spec.code.size = options["code_size"]
    return spec


def to_job(found: job_pb2.Job) -> JobInfo:
    """A job."""
    state = job_pb2.PipelineState.Name(found.pipeline_state) if found.pipeline_state in _PIPELINE else ""
    shards = found.shards
    return JobInfo(
        job_id=found.job_id,
        request_id=found.request_id,
        caller=found.caller,
        spec=_to_spec(found.spec),
        state=_STATES.get(found.state, "unknown"),
        pipeline_state=state.removeprefix(_PIPELINE_PREFIX),
        shards={name: getattr(shards, name) for name in ("planned", "encoded", "coded", "imported")},
        passages_done=found.passages_done,
        passages_total=found.passages_total if found.HasField("passages_total") else None,
        tokens_done=found.tokens_done,
        tokens_total=found.tokens_total if found.HasField("tokens_total") else None,
        tokens_per_second=found.tokens_per_second,
        remaining_seconds=found.remaining_seconds if found.HasField("remaining_seconds") else None,
        generation=found.generation,
        collection=found.collection,
        recall=found.recall if found.HasField("recall") else None,
        note=found.note,
        error=found.error,
        create_time_seconds=found.create_time_seconds,
        update_time_seconds=found.update_time_seconds,
    )


def _to_spec(spec: job_pb2.ReindexSpec) -> ReindexOptions:
    found: ReindexOptions = {}
    if spec.append_paths:
        found["append_paths"] = tuple(spec.append_paths)
    if spec.mix.kind in _MIX_NAMES:
        found["mix"] = _MIX_NAMES[spec.mix.kind]
    if (share := spec.mix.WhichOneof("share")) is not None:
        found["weight"] = spec.mix.weight if share == "weight" else "crossing"
    if spec.mix.HasField("damping"):
        found["damping"] = spec.mix.damping
    if spec.code.kind in _CODE_NAMES:
        found["code"] = _CODE_NAMES[spec.code.kind]
    if spec.code.size:
        found["code_size"] = spec.code.size
    if spec.task_queries:
        found["task_queries"] = spec.task_queries
    if spec.refit:
        found["refit"] = True
    if spec.purge:
        found["purge"] = True
    if spec.activate:
        found["activate"] = True
    return found

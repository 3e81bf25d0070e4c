"""Requests for jobs as they may be: as `validate`, for `JobService`.

What is asked becomes plain values with only what was given in it:

    {"append_paths": ["…"], "mix": {"kind": "task", "weight": 0.3, "damping": 0.1}, "code": {"kind": "bits"},
     "task_queries": "…", "refit": true, "purge": true, "activate": true}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.gateway.validate import LIMITS, AskedList
from trackstar.errors import InvalidRequest
from trackstar.jobs import is_job_id, job_id_of
from trackstar.v1 import job_pb2

MIX_KINDS = {job_pb2.MIX_KIND_TRAIN: "train", job_pb2.MIX_KIND_TASK: "task", job_pb2.MIX_KIND_NONE: "none"}
CODE_KINDS = {job_pb2.CODE_KIND_BITS: "bits", job_pb2.CODE_KIND_PREFIX: "prefix"}
CROSSING = "crossing"

_DEFAULT_PAGE = 100
_MAX_PATHS = 100
_PATH_BYTES = 4096
_MAX_DAMPING = 100.0
_MIN_SIZE, _MAX_SIZE = 8, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedJob:
    """A job that can be written down. `spec`: see the module; whether its paths are allowed is for others to say."""

    request_id: str
    job_id: str
    spec: dict[str, Any]


def create(request: job_pb2.CreateReindexJobRequest) -> AskedJob:
    """Check a request for a job.

    Raises:
        InvalidRequest: with the field at fault.
    """
    name = request.request_id
    if not 1 <= len(name) <= LIMITS.id_characters or not name.isascii() or not name.isprintable():
        raise InvalidRequest(
            f"request_id: name the request with 1 to {LIMITS.id_characters} printable ASCII characters, such as a UUID",
            field="request_id",
        )
    spec = request.spec
    asked: dict[str, Any] = {
        "append_paths": _paths(spec),
        "mix": _mix(spec.mix),
        "code": _code(spec.code),
        "task_queries": _path("spec.task_queries", spec.task_queries),
        "refit": spec.refit,
        "purge": spec.purge,
        "activate": spec.activate,
    }
    given = {key: value for key, value in asked.items() if value}
    return AskedJob(request_id=name, job_id=job_id_of(name), spec=given)


def job_id(value: str) -> str:
    """An id that can name a job.

    Raises:
        InvalidRequest: with the field at fault.
    """
    if not is_job_id(value):
        raise InvalidRequest(f"job_id: {value[:40]!r} cannot name a job", field="job_id")
    return value


def list_jobs(request: job_pb2.JobServiceListRequest) -> AskedList:
    """Check a request for a list of jobs.

    Raises:
        InvalidRequest: with the field at fault.
    """
    if request.page_size > LIMITS.page_size:
        raise InvalidRequest(f"page_size: at most {LIMITS.page_size:,}, not {request.page_size:,}", field="page_size")
    if len(request.page_token) > LIMITS.token_characters:
        raise InvalidRequest("page_token: this is no token that an answer gave", field="page_token")
    return AskedList(page_size=request.page_size or _DEFAULT_PAGE, page_token=request.page_token)


def _paths(spec: job_pb2.ReindexSpec) -> list[str]:
    field = "spec.append_paths"
    if len(spec.append_paths) > _MAX_PATHS:
        raise InvalidRequest(f"{field}: at most {_MAX_PATHS} paths, not {len(spec.append_paths):,}", field=field)
    paths = [_path(field, path) for path in spec.append_paths]
    if "" in paths or len(set(paths)) < len(paths):
        raise InvalidRequest(f"{field}: name every path once, and none without a name", field=field)
    return paths


def _path(field: str, value: str) -> str:
    if len(value) > _PATH_BYTES or len(value.encode()) > _PATH_BYTES:
        raise InvalidRequest(f"{field}: is longer than {_PATH_BYTES:,} bytes", field=field)
    if not value.isprintable():
        raise InvalidRequest(f"{field}: holds characters that no path has", field=field)
    return value


def _mix(mix: job_pb2.ReindexMix) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if mix.kind:
        if mix.kind not in MIX_KINDS:
            raise InvalidRequest(f"spec.mix.kind: there is no value {mix.kind}", field="spec.mix.kind")
        asked["kind"] = MIX_KINDS[mix.kind]
    if (share := mix.WhichOneof("share")) is not None:
        field = f"spec.mix.{share}"
        if asked.get("kind", "task") != "task":
            raise InvalidRequest(f"{field}: only a mix with a task has a share of it", field=field)
        # Written so that NaN is refused too.
        if share == "weight" and not 0 <= mix.weight <= 1:
            raise InvalidRequest(f"{field}: must lie between 0 and 1, not {mix.weight:g}", field=field)
        if share == "crossing" and not mix.crossing:
            raise InvalidRequest(f"{field}: is true, or left out", field=field)
        asked["weight"] = mix.weight if share == "weight" else CROSSING
    if mix.HasField("damping"):
        if not 0 <= mix.damping <= _MAX_DAMPING:
            raise InvalidRequest(
                f"spec.mix.damping: must lie between 0 and {_MAX_DAMPING:g}, not {mix.damping:g}",
                field="spec.mix.damping",
            )
        asked["damping"] = mix.damping
    return asked


def _code(code: job_pb2.ReindexCode) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if code.kind:
        if code.kind not in CODE_KINDS:
            raise InvalidRequest(f"spec.code.kind: there is no value {code.kind}", field="spec.code.kind")
        asked["kind"] = CODE_KINDS[code.kind]
    if code.size:
        if not _MIN_SIZE <= code.size <= _MAX_SIZE:
            raise InvalidRequest(
                f"spec.code.size: must lie between {_MIN_SIZE} and {_MAX_SIZE:,}, not {code.size:,}",
                field="spec.code.size",
            )
        asked["size"] = code.size
    return asked

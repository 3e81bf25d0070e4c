"""Records of reindex jobs: what was asked, what runs, and how far it is.

    <index>/jobs/<job_id>/spec.json        what was asked, by whom and when
    <index>/jobs/<job_id>/config.yaml      the whole configuration that the job runs
    <index>/jobs/<job_id>/submitted.json   the job was handed to what runs it
    <index>/jobs/<job_id>/progress.json    how far it is; written by the job while it runs
    <index>/jobs/<job_id>/cancelled.json   somebody wants it to end
    <index>/jobs/<job_id>/ended.json       how it ended

Contract: spec and config appear together or not at all, and never change; nor do submitted, cancelled and ended, of
which the first counts. progress is replaced whole. In an object store, which has no exclusive writes here, that holds
as long as one gateway at a time says so. Nothing is remembered between calls, so that any process may ask at any time.
Times are unix seconds and come from the caller. Starts nothing and needs neither torch nor Ray.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from trackstar.blobs import Location, RemotePath
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.storage import publish, publish_json, read_json

PipelineState = Literal["PLANNED", "ENCODING", "STATISTICS", "CODING", "IMPORTING", "LOADED", "AUDITED", "ACTIVE"]
PIPELINE_STATES: tuple[PipelineState, ...] = get_args(PipelineState)
SHARD_STATES = ("planned", "encoded", "coded", "imported")

Record = TypeVar("Record")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def job_id_of(request_id: str) -> str:
    """The id of the job that a request asks for; the same request, the same job."""
    return f"job-{hashlib.sha256(request_id.encode()).hexdigest()[:12]}"


def is_job_id(text: str) -> bool:
    """Whether `text` can name a job."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """How far a job is.

    state: of the pipeline. shards: how many have come as far as each of `SHARD_STATES`; planned: all there are.
    Totals are None until they are known, `remaining_seconds` until it can be told; `generation` and `collection` are ""
    until known. recall: of the audit. note: what was last worth telling. error: one sentence, "" if there is none.
    """

    job_id: str
    state: PipelineState
    shards: dict[str, int]
    passages_done: int = 0
    passages_total: int | None = None
    tokens_done: int = 0
    tokens_total: int | None = None
    tokens_per_second: float = 0.0
    remaining_seconds: float | None = None
    generation: str = ""
    collection: str = ""
    recall: float | None = None
    note: str = ""
    error: str = ""
    started_seconds: float
    updated_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What was asked. `asked`: as it was given; `caller`: who asked, "" if unknown; `created_seconds`: when."""

    job_id: str
    asked: dict[str, Any]
    request_id: str = ""
    caller: str = ""
    created_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a job ended. `error`: one sentence, "" if there is none; `ended_seconds`: when that was seen."""

    state: Literal["succeeded", "failed", "cancelled"]
    error: str
    ended_seconds: float


_PROGRESS = TypeAdapter(JobProgress)
_SPEC = TypeAdapter(JobSpec)
_END = TypeAdapter(JobEnd)


class JobStore:
    """The jobs of an index.

    Args:
        root: of the index, a folder or in an object store.
    """

    def __init__(self, root: Location) -> None:
        self._jobs = root / "jobs"

    def create(
        self,
        job_id: str,
        spec: Mapping[str, Any],
        config: str,
        *,
        request_id: str = "",
        caller: str = "",
        created_seconds: float = 0.0,
    ) -> bool:
        """Write down a job, unless it has been already; returns whether it is new.

        Args:
            job_id: names the job.
            spec: what was asked; JSON.
            config: the whole configuration, as YAML.
            request_id: names the request, for people.
            caller: who asked.
            created_seconds: now.

        Raises:
            InvalidRequest: the id names a job that asks for something else, or cannot name one.
        """
        home = self.home(job_id)
        wanted = JobSpec(
            job_id=job_id, asked=dict(spec), request_id=request_id, caller=caller, created_seconds=created_seconds
        )
        if not (home / "spec.json").is_file() and _appears(home, wanted, config):
            return True
        if self.spec(job_id).asked != wanted.asked:
            raise InvalidRequest(
                f"job {job_id!r} exists and was asked for something else; give another request id", field="request_id"
            )
        return False

    def home(self, job_id: str) -> Location:
        """Folder of a job, whether there is one or not.

        Raises:
            InvalidRequest: the id cannot name a job.
        """
        if not is_job_id(job_id):
            raise InvalidRequest(f"{job_id[:40]!r} cannot name a job", field="job_id")
        return self._jobs / job_id

    def config(self, job_id: str) -> Location:
        """Where a job's configuration is."""
        return self.home(job_id) / "config.yaml"

    def list(self) -> list[str]:
        """Ids of all jobs, sorted."""
        return sorted(path.parent.name for path in self._jobs.glob("*/spec.json") if is_job_id(path.parent.name))

    def spec(self, job_id: str) -> JobSpec:
        """What was asked.

        Raises:
            NotFound: no such job.
            CorruptArtifact: its record cannot be read.
        """
        found = self._read(job_id, "spec.json", _SPEC)
        if found is None:
            raise NotFound(f"there is no job {job_id!r}", kind="job", name=job_id)
        return found

    def progress(self, job_id: str) -> JobProgress | None:
        """How far a job is; None before it has said anything.

        Raises:
            CorruptArtifact: its record cannot be read.
        """
        return self._read(job_id, "progress.json", _PROGRESS)

    def write_progress(self, progress: JobProgress) -> None:
        """Say how far a job is; only the job itself does."""
        if progress.shards.keys() != set(SHARD_STATES):
            raise InvalidRequest(f"shards are counted as {', '.join(SHARD_STATES)}, not {', '.join(progress.shards)}")
        publish_json(self.home(progress.job_id) / "progress.json", asdict(progress))

    def submitted(self, job_id: str) -> bool:
        """Whether the job was handed to what runs it."""
        return (self.home(job_id) / "submitted.json").is_file()

    def write_submitted(self, job_id: str, now_seconds: float) -> None:
        """The job was handed to what runs it."""
        self._once(job_id, "submitted.json", {"submitted_seconds": now_seconds})

    def cancelled(self, job_id: str) -> bool:
        """Whether somebody wants the job to end."""
        return (self.home(job_id) / "cancelled.json").is_file()

    def write_cancelled(self, job_id: str, caller: str, now_seconds: float) -> None:
        """`caller` wants the job to end."""
        self._once(job_id, "cancelled.json", {"caller": caller, "cancelled_seconds": now_seconds})

    def end(self, job_id: str) -> JobEnd | None:
        """How the job ended; None before."""
        return self._read(job_id, "ended.json", _END)

    def write_end(self, job_id: str, end: JobEnd) -> None:
        """The job has ended; the first to say so is believed."""
        self._once(job_id, "ended.json", asdict(end))

    def _read(self, job_id: str, name: str, kind: TypeAdapter[Record]) -> Record | None:
        path = self.home(job_id) / name
        try:
            return kind.validate_python(read_json(path))
        except NotFound:
            return None
        except ValidationError as error:
            raise CorruptArtifact(f"{str(path)!r} is not the record of a job") from error

    def _once(self, job_id: str, name: str, content: Any) -> None:
        path = self.home(job_id) / name
        if isinstance(path, RemotePath):
            if not path.is_file():
                publish_json(path, content)
            return
        # Several gateways may say the same at once; under a name of its own none is in another's way.
        own = path.with_name(f".{name}.{secrets.token_hex(4)}")
        publish_json(own, content)
        try:
            path.hardlink_to(own)
        except FileExistsError:
            pass
        except OSError:
            # A file system without links; there the last one at once is believed.
            own.replace(path)
        own.unlink(missing_ok=True)


def _appears(home: Location, spec: JobSpec, config: str) -> bool:
    """Make the folder of a job with both files at once; False if there is one already."""
    if isinstance(home, RemotePath):
        # There is a job once there is its spec.
        publish(home / "config.yaml", config.encode())
        publish_json(home / "spec.json", asdict(spec))
        return True
    own = home.with_name(f".{home.name}.{secrets.token_hex(4)}")
    publish(own / "config.yaml", config.encode())
    publish_json(own / "spec.json", asdict(spec))
    try:
        # A folder that holds something is never replaced.
        own.rename(home)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)
        if not (home / "spec.json").is_file():
            raise
        return False
    return True

"""The command line's way to reindex jobs: `trackstar jobs --address HOST:PORT list | get | watch | cancel | create`.

Contract: as `cli`; how far a watched job is goes to standard error, a line whenever something has changed, and the
command ends as the job does: 0 if it has succeeded, 1 with its sentence otherwise.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console

from trackstar.cli_index import print_json
from trackstar.cli_remote import Gateway, Timeout, TlsCa, TokenFile, UseTls
from trackstar.console import fact_table, plain
from trackstar.errors import InvalidRequest, TrackstarError
from trackstar.progress import duration_text

if TYPE_CHECKING:
    from trackstar.client_job_types import JobInfo, ReindexOptions

jobs = typer.Typer(help="Start, watch and end jobs that build another generation.")

_Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
_JobId = Annotated[str, typer.Argument(help="Id of the job.")]


@jobs.callback()
def _root(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="HOST:PORT of the gateway.")],
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls: UseTls = False,
    timeout: Timeout = 60.0,
) -> None:
    context.obj = Gateway(address=address, token_file=token_file, tls_ca=tls_ca, tls=tls, timeout_seconds=timeout)


@jobs.command("list")
def list_jobs(context: typer.Context, as_json: _Json = False) -> None:
    """Show all jobs, the newest first."""
    with _gateway(context).connect() as client:
        found = client.jobs()
    if as_json:
        print_json([asdict(job) for job in found])
        return
    for job in found:
        print(f"{job.job_id}  {progress_line(job)}")
    if not found:
        print("there are no jobs", file=sys.stderr)


@jobs.command()
def get(context: typer.Context, job_id: _JobId, as_json: _Json = False) -> None:
    """Show one job."""
    with _gateway(context).connect() as client:
        _show(client.job(job_id), as_json=as_json)


@jobs.command()
def watch(context: typer.Context, job_id: _JobId, as_json: _Json = False) -> None:
    """Tell how far a job is until it has ended, then show it."""
    _watch(_gateway(context), job_id, as_json=as_json)


@jobs.command()
def cancel(context: typer.Context, job_id: _JobId, as_json: _Json = False) -> None:
    """Have a job end; what it has finished is kept."""
    with _gateway(context).connect() as client:
        _show(client.cancel_job(job_id), as_json=as_json)


@jobs.command()
def create(
    context: typer.Context,
    request_id: Annotated[
        str | None, typer.Option(help="Names the request; the same one gets the same job. A new UUID if left out.")
    ] = None,
    append: Annotated[list[str] | None, typer.Option(help="Add this file or folder to the corpus; repeatable.")] = None,
    mix: Annotated[str | None, typer.Option(metavar="train|task|none", help="What the Hessian is of.")] = None,
    weight: Annotated[str | None, typer.Option(metavar="0..1|crossing", help="Share of the task's Hessian.")] = None,
    damping: Annotated[float | None, typer.Option(help="Damping relative to the mean eigenvalue.")] = None,
    code: Annotated[str | None, typer.Option(metavar="prefix|bits", help="Kind of the coarse code.")] = None,
    code_size: Annotated[int | None, typer.Option(min=8, help="Coordinates of the coarse code.")] = None,
    task_queries: Annotated[str | None, typer.Option(help="File of queries whose Hessian is the task's.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Make the Hessian of all rows anew.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Leave deleted documents out for good.")] = False,
    activate: Annotated[bool, typer.Option("--activate", help="Let the generation answer after its audit.")] = False,
    watch_it: Annotated[bool, typer.Option("--watch", help="Then watch the job.")] = False,
    as_json: _Json = False,
) -> None:
    """Start a job; what is left out stays as the operator of the gateway set it."""
    options: ReindexOptions = {"refit": refit, "purge": purge, "activate": activate}
    if append:
        options["append_paths"] = append
    if mix is not None:
        options["mix"] = cast(Literal["train", "task", "none"], _one_of("--mix", mix, "train", "task", "none"))
    if weight is not None:
        options["weight"] = _weight(weight)
    if damping is not None:
        options["damping"] = damping
    if code is not None:
        options["code"] = cast(Literal["bits", "prefix"], _one_of("--code", code, "prefix", "bits"))
    if code_size is not None:
        options["code_size"] = code_size
    if task_queries is not None:
        options["task_queries"] = task_queries
    if request_id is None:
        request_id = str(uuid.uuid4())
        print(f"request {request_id}; should the answer be lost, give it as --request-id", file=sys.stderr)
    gateway = _gateway(context)
    with gateway.connect() as client:
        job = client.create_reindex_job(request_id, **options)
    if watch_it:
        _watch(gateway, job.job_id, as_json=as_json)
    else:
        _show(job, as_json=as_json)


def progress_line(job: JobInfo) -> str:
    """How far a job is, on one line: state, pipeline, shards, tokens per second, remaining time, or why it failed."""
    parts = [" ".join(word for word in (job.state, job.pipeline_state) if word)]
    if total := job.shards["planned"]:
        counts = ", ".join(f"{job.shards[name]:,} {name}" for name in ("encoded", "coded", "imported"))
        parts.append(f"{counts} of {total:,} shards")
    if not job.ended and job.tokens_per_second:
        parts.append(f"{job.tokens_per_second:,.0f} tokens/s")
    if job.remaining_seconds is not None:
        parts.append(f"{duration_text(job.remaining_seconds)} left")
    elif job.state == "running":
        parts.append("remaining time not known yet")
    if job.recall is not None:
        parts.append(f"recall {job.recall:.3f}")
    if job.error:
        parts.append(job.error)
    return plain(", ".join(parts))


def _watch(gateway: Gateway, job_id: str, *, as_json: bool) -> None:
    last, job = "", None
    with gateway.connect() as client:
        for job in client.watch_job(job_id):
            if (line := progress_line(job)) != last:
                print(line, file=sys.stderr, flush=True)
            last = line
    assert job is not None, "a watch begins with the job as it is"
    _show(job, as_json=as_json)
    if job.state != "succeeded":
        raise TrackstarError(f"job {job_id} {'was cancelled' if job.state == 'cancelled' else f'failed: {job.error}'}")


def _show(job: JobInfo, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(job))
    else:
        Console().print(fact_table(_facts(job)))


def _facts(job: JobInfo) -> Iterator[tuple[str, str]]:
    yield "job", job.job_id
    yield "progress", progress_line(job)
    yield "asked", ", ".join(f"{name}: {_text(value)}" for name, value in job.spec.items()) or "nothing in particular"
    yield "request", job.request_id
    yield "by", f"{job.caller}, {_time(job.create_time_seconds)}"
    yield "told", _time(job.update_time_seconds)
    if job.tokens_done:
        total = "" if job.tokens_total is None else f" of {job.tokens_total:,}"
        yield "tokens", f"{job.tokens_done:,}{total}"
    if job.generation:
        yield "generation", job.generation
    if job.collection:
        yield "collection", job.collection
    if job.note:
        yield "note", job.note


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _weight(text: str) -> float | Literal["crossing"]:
    if text == "crossing":
        return "crossing"
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"--weight is a number from 0 to 1 or crossing, not {text!r}") from None


def _one_of(option: str, value: str, *allowed: str) -> str:
    if value not in allowed:
        raise InvalidRequest(f"{option} is one of {', '.join(allowed)}, not {value!r}")
    return value


def _gateway(context: typer.Context) -> Gateway:
    found: Gateway = context.obj
    return found

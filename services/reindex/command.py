"""`trackstar reindex CONFIG`: runs a job in this process, on the Ray cluster around it or on one of its own.

Inside a Ray job, or where RAY_ADDRESS names a cluster, that one does the work; elsewhere Ray is started on this machine
and ends with the command.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from rich.console import Console

from services.gateway.coarse_milvus import connect
from services.reindex.config import ReindexConfig
from services.reindex.job import Outcome, run_job
from services.reindex.metrics import RayProgressMetrics
from services.reindex.progress import JobReporter
from trackstar.blobs import location
from trackstar.build import Silent
from trackstar.corpus import Corpus
from trackstar.errors import NotReady, TrackstarError
from trackstar.jobs import JobStore
from trackstar.progress import StepProgress
from trackstar.queries import read_queries
from trackstar.runs import load_plan

# The object store holds numbers of items and answers, nothing large.
_OBJECT_STORE_BYTES = 256 << 20


def reindex(config: ReindexConfig, *, job_id: str = "") -> Outcome:
    """Run a job to its end.

    Args:
        config: what to do.
        job_id: of its record, below the index's `jobs`; without one no record is kept.

    Raises:
        TrackstarError: it cannot go on; what is finished is kept.
    """
    store = JobStore(location(config.index)) if job_id else None
    try:
        _look(config)
    except TrackstarError as error:
        JobReporter(store, job_id, Silent()).failed(error)
        raise
    with ExitStack() as held:
        progress = held.enter_context(StepProgress(Console(stderr=True)))
        held.enter_context(_ending())
        held.enter_context(_cluster(config))
        reporter = JobReporter(store, job_id, progress, metrics=RayProgressMetrics())
        try:
            found = run_job(config, reporter)
        except TrackstarError as error:
            reporter.failed(error)
            raise
        reporter.flush()
    return found


def _look(config: ReindexConfig) -> None:
    """What can be seen to be wrong before Ray is there."""
    rows = location(config.index) / "rows"
    for number, corpus in enumerate(config.build.corpora):
        if load_plan(rows, number) is None:
            Corpus(corpus)
    if config.build.task_queries is not None:
        read_queries(config.build.task_queries)
    if config.build.code.store == "milvus":
        connect(config.milvus).close()


@contextmanager
def _cluster(config: ReindexConfig) -> Iterator[None]:
    """Ray for as long as the block runs."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or None
    # What Ray says of its own work is no news to whoever looks at the job's progress; warnings of it are in its logs.
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: Any = {"log_to_driver": False, "configure_logging": False}
    if address is not None:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NotReady(f"there is no Ray cluster at {address!r}: {str(error).splitlines()[0]}") from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Sockets lie in it, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ts", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        ray.init(
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=folder,
            **options,
        )
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ending() -> Iterator[None]:
    """Take SIGTERM, with which jobs are cancelled, for an interrupt, so that everything is let go of."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

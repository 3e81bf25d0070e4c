"""`trackstar reindex CONFIG`: runs a job in this process, on the Ray cluster around it or on one of its own.

Inside a Ray job, or where RAY_ADDRESS names a cluster, that one does the work; elsewhere Ray is started on this machine
and ends with the command.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from rich.console import Console

from services.gateway.coarse_milvus import connect
from services.reindex.config import ReindexConfig
from services.reindex.job import Outcome, run_job
from services.reindex.metrics import RayProgressMetrics
from services.reindex.progress import JobReporter
from services.reindex.ray_cluster import cluster
from trackstar.blobs import location
from trackstar.build import Silent
from trackstar.corpus import Corpus
from trackstar.errors import TrackstarError
from trackstar.jobs import JobStore
from trackstar.progress import StepProgress
from trackstar.queries import read_queries
from trackstar.runs import load_plan


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
        held.enter_context(cluster(config.ray_address))
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
def _ending() -> Iterator[None]:
    """Take SIGTERM, with which jobs are cancelled, for an interrupt, so that everything is let go of."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

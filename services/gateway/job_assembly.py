"""Puts jobs together as the settings say.

Contract: nothing here asks a runner; a cluster that cannot be reached is found out by the first job.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.command import Parts
from services.gateway.config import ReindexConfig
from services.gateway.job_config import JobConfiguration
from services.gateway.job_ledger import JobLedger
from services.gateway.job_ray import RayJobRunner
from services.gateway.job_runners import JobRunner, ProcessJobRunner
from services.gateway.jobs import Jobs, Totals
from trackstar.blobs import Location, local
from trackstar.jobs import JobStore


@asynccontextmanager
async def jobs_of(parts: Parts, root: Location) -> AsyncIterator[Jobs | None]:
    """The jobs of an index; None if the settings want none.

    Args:
        parts: settings and metrics.
        root: the index.

    Raises:
        NotFound, InvalidRequest: the operator's configuration cannot be used.
    """
    config = parts.config.reindex
    if config.config_file is None:
        yield None
        return
    configuration = JobConfiguration(config.config_file, config.allowed_paths, root)
    configuration.check()

    def told(all_jobs: Totals) -> None:
        parts.metrics.reindex(
            jobs=all_jobs.jobs,
            shards=all_jobs.shards,
            tokens_per_second=all_jobs.tokens_per_second,
            remaining_seconds=all_jobs.remaining_seconds,
        )

    ledger = JobLedger(
        JobStore(root),
        _runner(config, root),
        configuration,
        max_unfinished=config.max_unfinished,
        fresh_seconds=config.poll_seconds,
    )
    jobs = Jobs(
        ledger,
        max_watchers=config.max_watchers,
        poll_seconds=config.poll_seconds,
        on_look=told,
        on_defect=parts.metrics.defects.inc,
    )
    await jobs.start()
    try:
        yield jobs
    finally:
        await jobs.close()


def _runner(config: ReindexConfig, root: Location) -> JobRunner:
    if config.runner == "ray":
        assert config.ray_address is not None, "the settings are checked"
        return RayJobRunner(
            config.ray_address,
            command=config.entrypoint,
            token_file=config.token_file,
            ca_file=config.ray_ca_file,
            environment=config.environment,
            timeout_seconds=config.timeout_seconds,
        )
    return ProcessJobRunner(
        local(root) / "jobs",
        command=config.entrypoint,
        environment=config.environment,
        stop_seconds=config.stop_seconds,
    )

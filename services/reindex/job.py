"""The reindex job: from a corpus to a generation that answers, on a Ray cluster.

    PLANNED ─► ENCODING ─► STATISTICS ─► CODING ─► IMPORTING ─► LOADED ─► AUDITED ─► ACTIVE

Every step is that of `trackstar.build` with Ray's actors for an engine, and leaves files that the next run finds; the
same job given again does what is missing. Nothing that answers is touched before the audit has passed. A shard or code
that is not what was written is made again, once; what is found damaged after that is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from services.reindex.audit import audit
from services.reindex.config import ReindexConfig
from services.reindex.gang_encoder import GangEncoderMaker
from services.reindex.milvus import MilvusStore, check_server
from services.reindex.progress import JobReporter
from services.reindex.ray_engine import RayEngine
from trackstar.blobs import Location, RemotePath, location
from trackstar.build import Build
from trackstar.engine import Engine
from trackstar.errors import CorruptArtifact, NotReady
from trackstar.index import Index
from trackstar.locks import writing
from trackstar.storage import digest_of, leftovers

_NAMESPACE = "trackstar-reindex"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job has made. `collection`: on the Milvus server, "" without; `recall`: of the audit."""

    generation: str
    collection: str
    recall: float
    is_active: bool


def run_job(config: ReindexConfig, reporter: JobReporter, *, engine: Engine | None = None) -> Outcome:
    """Run a job to its end, in a process that has called `ray.init` unless an engine is given.

    Args:
        config: what to do.
        reporter: hears how far it is.
        engine: who does the work; Ray's actors if None.

    Raises:
        TrackstarError: it cannot go on; what is finished is kept.
        NotReady: another job builds there, or the audit did not pass.
    """
    root = location(config.index)
    with ExitStack() as held:
        held.enter_context(writing(root))
        if engine is None:
            engine = RayEngine(config.workers)
            held.enter_context(_alone(root))
        # Before anything expensive, so that a password that is missing or wrong is known at once.
        check_server(config)
        _sweep(root)
        name = _built(config, root, engine, reporter)
        reporter.found(generation=name)
        index = Index(root)
        home = index.catalog.home(name)
        store = held.enter_context(MilvusStore.of(config, index, name))
        try:
            store.fill(engine, reporter)
        except CorruptArtifact as error:
            # The collection is gone with what was wrong with it.
            reporter.note(str(error))
            store.fill(engine, reporter)
        reporter.found(collection=store.collection)
        reporter.state("LOADED")
        found = audit(config.build.audit, index, name, store, engine, reporter)
        reporter.found(recall=found.recall)
        if not found.passed:
            raise NotReady(
                f"generation {name!r} does not become active: {'; '.join(found.reasons)} ({home / 'audit.json'!s})"
            )
        reporter.state("AUDITED")
        if config.build.activate:
            store.activate()
            index.catalog.activate(name)
            reporter.state("ACTIVE")
        _sweep(root)
    return Outcome(generation=name, collection=store.collection, recall=found.recall, is_active=config.build.activate)


def _built(config: ReindexConfig, root: Location, engine: Engine, reporter: JobReporter) -> str:
    """The generation's name, once it is built."""
    workers, make = config.workers, None
    if workers.gang.ranks > 1:
        make = GangEncoderMaker(config.build, workers.gang, workers.torch_threads)
    build = Build(config.build, root, engine=engine, progress=reporter, make_encoder=make)
    try:
        return build.run(verify=config.verify)
    except CorruptArtifact as error:
        reporter.note(f"{error}; comparing everything with its digests, and making again what differs")
        return build.run(verify=True)


def _sweep(root: Location) -> None:
    """Take away what killed processes left half written; workers that still write there start again."""
    if isinstance(root, Path) and root.is_dir():
        for path in leftovers(root):
            path.unlink(missing_ok=True)


@contextmanager
def _alone(root: Location) -> Iterator[None]:
    """Hold a name in the Ray cluster, for an index in an object store, where there are no locks."""
    if not isinstance(root, RemotePath):
        yield
        return
    remote: Any = ray.remote
    name = f"index-{digest_of(str(root))[:16]}"
    try:
        holder = remote(num_cpus=0)(_Holder).options(name=name, namespace=_NAMESPACE).remote()
        ray.get(holder.__ray_ready__.remote())
    except ValueError as error:
        raise NotReady(
            f"another job of this Ray cluster builds in {str(root)!r} now; wait until it ends, or stop it, and give "
            "the same command again"
        ) from error
    try:
        yield
    finally:
        ray.kill(holder)


class _Holder:
    """Does nothing but have a name; it ends with the job that made it."""

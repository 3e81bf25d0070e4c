"""The audit of a job: the exact scan is shared out over the actors, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from services.reindex.milvus import MilvusStore
from services.reindex.progress import JobReporter
from trackstar.audit import AuditConfig, audit_generation
from trackstar.audit_record import Audit, publish_audit
from trackstar.blobs import Location
from trackstar.engine import Engine, Report
from trackstar.exact import Rankings, merge, scan_shard
from trackstar.index import Index


def audit(
    config: AuditConfig, index: Index, name: str, store: MilvusStore, engine: Engine, reporter: JobReporter
) -> Audit:
    """Audit a generation and keep what was found beside it.

    Raises:
        CorruptArtifact: a shard of rows or codes is not what was written; the sentence names the file.
    """
    generation = store.generation
    rows = generation.rows
    coarse, coarse_name = store.coarse()

    def scan(dual_Qd: Tensor, signs: Sequence[float], k: int) -> Rankings:
        make = partial(ScanWorker, root=index.root, name=name, dual_Qd=dual_Qd, signs=tuple(signs), k=k)
        reporter.start("audit", 0, rows.num_passages)

        def told() -> Iterator[Rankings]:
            done = 0
            for shard, rankings in engine.map("audit", make, range(rows.num_shards)):
                done += rows.receipts[shard].num_passages
                reporter.advance("audit", done, 0)
                yield rankings

        return merge(told(), num_queries=len(dual_Qd), signs=signs, k=k)

    try:
        found = audit_generation(
            generation,
            rows,
            coarse,
            config,
            codes=generation.codes,
            coarse_name=coarse_name,
            scan=scan,
            max_candidates=store.max_candidates,
        )
    finally:
        coarse.close()
    publish_audit(generation.home, found)
    return found


class ScanWorker:
    """Scans shards for the audit's queries; answers are (shard, rankings)."""

    def __init__(
        self, report: Report, *, root: Location, name: str, dual_Qd: Tensor, signs: Sequence[float], k: int
    ) -> None:
        index = Index(root)
        self._rows = index.rows(name)
        self._generation = index.generation(name, rows=self._rows, searched=False)
        self._dual_Qd, self._signs, self._k = dual_Qd, signs, k

    def __call__(self, shard: int) -> tuple[int, Rankings]:
        """Scans one; raises as `scan_shard`."""
        found = scan_shard(self._rows, self._generation, shard, self._dual_Qd, self._signs, self._k)
        return shard, found

    def close(self) -> None:
        """Close the files."""
        self._generation.close()
        self._rows.close()

"""A job's codes on a Milvus server: one collection for each generation, filled shard by shard, loaded, and aliased.

Codes whose store is not `milvus` lie in the index folder, and all of this does nothing but open them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from services.gateway.coarse_milvus import alias_of, collection_of, connect
from services.gateway.config import MilvusConfig
from services.reindex.config import BulkImport, ReindexConfig
from services.reindex.progress import JobReporter
from trackstar.blobs import Location
from trackstar.coarse import CoarseIndex
from trackstar.code_store import CodeStore
from trackstar.codes import CodeSpec
from trackstar.engine import Engine, Report
from trackstar.generation import Generation
from trackstar.index import Index
from trackstar.milvus_alias import AliasPointer
from trackstar.milvus_bulk import BulkFolder
from trackstar.milvus_import import CollectionImport
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_server import MAX_CANDIDATES, MilvusServerIndex


def check_server(config: ReindexConfig) -> None:
    """Return if the server that codes are to go to, if any, answers and knows who asks.

    Raises:
        NotFound: there is no token file.
        TrackstarError: the server does not answer, or does not let the job in.
    """
    if config.build.code.store == "milvus":
        with connect(config.milvus) as link:
            AliasPointer(link, alias_of(config.milvus)).get(timeout_seconds=config.milvus.timeout_seconds)


class MilvusStore:
    """Where a generation's codes are searched."""

    def __init__(
        self, config: MilvusConfig, bulk: BulkImport | None, link: MilvusLink | None, generation: Generation
    ) -> None:
        """Not for callers: see `of`."""
        self._config, self._bulk, self._link, self.generation = config, bulk, link, generation
        self.collection = collection_of(config, generation.name) if link is not None else ""

    @classmethod
    @contextmanager
    def of(cls, config: ReindexConfig, index: Index, name: str) -> Iterator[MilvusStore]:
        """The store of a finished generation; its connections end with the block."""
        generation = index.generation(name, searched=False)
        link = connect(config.milvus) if config.build.code.store == "milvus" else None
        try:
            yield cls(config.milvus, config.bulk, link, generation)
        finally:
            generation.close()
            if link is not None:
                link.close()

    @property
    def max_candidates(self) -> int:
        """The most that one search answers."""
        return MAX_CANDIDATES if self._link is not None else self.generation.codes.num_codes

    def fill(self, engine: Engine, reporter: JobReporter) -> None:
        """Put all codes into the collection, each shard once.

        Raises:
            Incompatible: the server takes no codes of that size, or the collection holds others.
            CorruptArtifact: it holds another number of codes in the end; given again, everything is sent anew.
            NotReady: the server does not answer.
        """
        generation = self.generation
        if self._link is None:
            generation.import_codes(lambda step, done, _total: reporter.advance(step, done, 0))
            return
        importing, codes = self._import(), generation.codes
        missing = importing.missing(range(codes.num_shards))
        if not missing and importing.is_complete(codes.num_codes):
            return
        done = codes.num_shards - len(missing)
        reporter.start("importing", done, codes.num_shards, unit="shards")
        make = partial(
            ImportWorker,
            home=generation.home,
            facts=generation.facts,
            config=self._config,
            bulk=self._bulk,
            spec=generation.spec,
            dim=generation.layout.dim,
        )
        for _ in engine.map("importing", make, missing):
            done += 1
            reporter.advance("importing", done, 0)
            reporter.shards("importing", done, codes.num_shards)
        importing.finish(codes.num_codes)

    def coarse(self) -> tuple[CoarseIndex, str]:
        """The index that is to be searched, and what it is called."""
        if self._link is None:
            return self.generation.coarse, self.generation.code.store
        opened = MilvusServerIndex.open(
            self._link, self.collection, spec=self.generation.spec, dim=self.generation.layout.dim
        )
        return opened, self.collection

    def activate(self) -> None:
        """Point the alias to the collection."""
        if self._link is not None:
            AliasPointer(self._link, alias_of(self._config)).set(self.collection)

    def _import(self) -> CollectionImport:
        assert self._link is not None
        generation = self.generation
        return _importing(self._link, self._config, self._bulk, generation.home, generation.spec, generation.layout.dim)


class ImportWorker:
    """Sends code shards to the server; items are numbers of shards, answers numbers of codes."""

    def __init__(
        self,
        report: Report,
        *,
        home: Location,
        facts: dict[str, Any],
        config: MilvusConfig,
        bulk: BulkImport | None,
        spec: CodeSpec,
        dim: int,
    ) -> None:
        self._codes = CodeStore(home, facts)
        self._link = connect(config)
        self._import = _importing(self._link, config, bulk, home, spec, dim)

    def __call__(self, number: int) -> int:
        """Sends a shard; raises as `CollectionImport.add`."""
        shard = self._codes.shard(number)
        self._import.add(number, shard, self._codes.digest(number))
        return len(shard.passage_ids)

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


def _importing(
    link: MilvusLink, config: MilvusConfig, bulk: BulkImport | None, home: Location, spec: CodeSpec, dim: int
) -> CollectionImport:
    """An import into a generation's collection, ready to be added to."""
    collection = collection_of(config, home.name)
    found = CollectionImport(
        link,
        collection,
        spec=spec,
        dim=dim,
        receipts=home / "imports" / collection,
        bulk=None if bulk is None else BulkFolder(bulk.folder, bulk.server_folder),
    )
    found.prepare()
    return found

"""Coarse indexes that lie in the index folder: Milvus Lite's database, or codes held in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trackstar.blobs import local
from trackstar.catalog import Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.code_store import CodeStore, fill
from trackstar.errors import CorruptArtifact, NotReady


def local_coarse(catalog: Catalog) -> Callable[[GenerationFacts], CoarseIndex]:
    """Opens the coarse index of one of the catalog's generations, where its store says."""

    def open_one(facts: GenerationFacts) -> CoarseIndex:
        if facts.spec is None:
            raise NotReady(f"generation {facts.name!r} is still being built; give the index command again")
        if facts.store != "memory":
            return _milvus_lite(local(catalog.home(facts.name)), facts)
        index = MemoryIndex(facts.spec, facts.dim)
        fill(index, CodeStore.open(catalog, facts.name))
        return index

    return open_one


def _milvus_lite(home: Path, facts: GenerationFacts) -> CoarseIndex:
    # Only where it is used: a gateway over a Milvus server goes without the embedded one.
    from trackstar.milvus import MilvusLiteIndex

    assert facts.spec is not None
    if not (home / "coarse" / "receipt.json").is_file():
        raise NotReady(f"generation {facts.name!r} has no coarse index; give the index command again")
    opened = MilvusLiteIndex.open(home / "coarse" / "milvus.db", dim=facts.dim, size=facts.spec.size)
    if (count := opened.count()) != facts.num_passages:
        opened.close()
        raise CorruptArtifact(
            f"the coarse index of generation {facts.name!r} holds {count} of {facts.num_passages} passages; delete "
            f"{str(home / 'coarse')!r} and give the index command again"
        )
    return opened

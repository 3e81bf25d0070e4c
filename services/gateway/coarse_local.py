"""Coarse indexes that lie in the index folder: Milvus Lite's database, or codes held in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from trackstar.blobs import local
from trackstar.catalog import Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.errors import CorruptArtifact, NotReady
from trackstar.milvus import MilvusLiteIndex


def local_coarse(catalog: Catalog) -> Callable[[GenerationFacts], CoarseIndex]:
    """Opens the coarse index of one of the catalog's generations, where its store says."""

    def open_one(facts: GenerationFacts) -> CoarseIndex:
        home = local(catalog.home(facts.name))
        if facts.spec is None:
            raise NotReady(f"generation {facts.name!r} is still being built; give the index command again")
        return _in_memory(home, facts) if facts.store == "memory" else _milvus_lite(home, facts)

    return open_one


def _milvus_lite(home: Path, facts: GenerationFacts) -> CoarseIndex:
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


def _in_memory(home: Path, facts: GenerationFacts) -> CoarseIndex:
    assert facts.spec is not None
    index = MemoryIndex(facts.spec, facts.dim)
    first = 0
    for path in sorted((home / "codes").glob("*.safetensors")):
        try:
            codes = safetensors.numpy.load_file(path)["codes"]
        except (SafetensorError, KeyError) as error:
            raise CorruptArtifact(f"{str(path)!r} is unreadable; delete {str(home)!r} to rebuild it") from error
        index.add(np.arange(first, first + len(codes), dtype=np.int64), codes)
        first += len(codes)
    if first != facts.num_passages:
        raise CorruptArtifact(f"{str(home)!r} holds codes of {first} of {facts.num_passages} passages")
    return index

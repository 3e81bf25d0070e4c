"""Coarse indexes that lie in the index folder: Milvus Lite's database, or codes held in memory."""

from __future__ import annotations

from collections.abc import Callable

from trackstar.catalog import Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex
from trackstar.code_store import CodeStore, open_coarse
from trackstar.errors import NotReady


def local_coarse(catalog: Catalog) -> Callable[[GenerationFacts], CoarseIndex]:
    """Opens the coarse index of one of the catalog's generations, where its store says."""

    def open_one(facts: GenerationFacts) -> CoarseIndex:
        if facts.spec is None:
            raise NotReady(f"generation {facts.name!r} is still being built; give the index command again")
        codes = CodeStore.open(catalog, facts.name)
        return open_coarse(codes, store=facts.store, spec=facts.spec, dim=facts.dim)

    return open_one

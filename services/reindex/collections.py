"""Collections on a Milvus server that no generation needs any more: of those that are gone, retired or unfinished."""

from __future__ import annotations

from services.gateway.coarse_milvus import alias_of, connect
from services.gateway.config import MilvusConfig
from trackstar.catalog import Catalog
from trackstar.milvus_alias import AliasPointer
from trackstar.milvus_collection import collections, drop


def unused_collections(config: MilvusConfig, catalog: Catalog, *, delete: bool = False) -> list[str]:
    """Names of collections with the configured prefix that may go; what the alias points to never does.

    Args:
        config: of the server; its prefix must be this index's alone.
        catalog: the index's generations.
        delete: take them away too.

    Raises:
        NotReady: the server is down.
    """
    with connect(config) as link:
        kept = {f"{config.collection_prefix}{name}" for name in catalog.finished()}
        kept.add(AliasPointer(link, alias_of(config)).get() or "")
        found = [name for name in collections(link, config.collection_prefix) if name not in kept]
        if delete:
            for name in found:
                drop(link, name)
    return found

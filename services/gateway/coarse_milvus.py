"""Coarse indexes on a Milvus server, one collection for each generation, behind one link with retries and a breaker."""

from __future__ import annotations

from collections.abc import Callable

from services.gateway.config import MilvusConfig
from services.gateway.metrics import BreakerState, GatewayMetrics
from trackstar.breaker import CircuitBreaker
from trackstar.catalog import Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex
from trackstar.code_store import CodeStore, fill
from trackstar.errors import InvalidRequest, NotFound, NotReady
from trackstar.milvus_collection import drop
from trackstar.milvus_link import MilvusAccess, MilvusLink
from trackstar.milvus_server import MilvusServerIndex

_BACKEND = "milvus"


def connect(config: MilvusConfig, metrics: GatewayMetrics | None = None) -> MilvusLink:
    """A link to the configured server; nothing is sent yet.

    Raises:
        InvalidRequest: the settings do not go together.
        NotFound: there is no token file.
    """
    assert config.address is not None
    user, password, token = _secret(config)
    access = MilvusAccess(
        address=config.address,
        user=user,
        password=password,
        token=token,
        database=config.database,
        tls=config.tls,
        ca_file=config.ca_file,
    )
    if metrics is None:
        return MilvusLink(access)
    breaker = CircuitBreaker("Milvus", on_change=lambda state: metrics.breaker(_BACKEND, BreakerState.of(state)))
    return MilvusLink(access, breaker=breaker, on_retry=lambda _method, _reason: metrics.retried(_BACKEND))


def milvus_coarse(config: MilvusConfig, link: MilvusLink) -> Callable[[GenerationFacts], CoarseIndex]:
    """Opens a generation's collection."""

    def open_one(facts: GenerationFacts) -> CoarseIndex:
        if facts.spec is None:
            raise NotReady(f"generation {facts.name!r} is still being built; give the index command again")
        opened = MilvusServerIndex.open(
            link,
            collection_of(config, facts.name),
            spec=facts.spec,
            dim=facts.dim,
            timeout_seconds=config.timeout_seconds,
        )
        if (count := opened.count(timeout_seconds=config.timeout_seconds)) != facts.num_codes:
            opened.close()
            raise NotReady(
                f"Milvus holds {count:,} of {facts.num_codes:,} codes of generation {facts.name!r}; "
                "give `trackstar fill-milvus` again"
            )
        return opened

    return open_one


def fill_collection(
    config: MilvusConfig,
    catalog: Catalog,
    name: str,
    *,
    anew: bool = False,
    on_rows: Callable[[int, int], None] = lambda _done, _total: None,
) -> str:
    """Put a generation's codes into its collection, or go on with that; returns the collection's name.

    Args:
        config: the server.
        catalog: of the index.
        name: the generation.
        anew: drop the collection first.
        on_rows: called with (passages done, passages in total).

    Raises:
        TrackstarError: the codes cannot be read, or the server does not take them.
    """
    facts = catalog.describe(name)
    if facts.spec is None:
        raise NotReady(f"generation {name!r} is still being built; give the index command again")
    collection = collection_of(config, name)
    with connect(config) as link:
        if anew:
            drop(link, collection)
        try:
            index = MilvusServerIndex.open(link, collection, spec=facts.spec, dim=facts.dim)
        except NotFound:
            index = MilvusServerIndex.create(link, collection, spec=facts.spec, dim=facts.dim)
        fill(index, CodeStore.open(catalog, name), on_rows)
        index.flush()
        index.close()
    return collection


def collection_of(config: MilvusConfig, name: str) -> str:
    """Name of a generation's collection."""
    return f"{config.collection_prefix}{name}"


def _secret(config: MilvusConfig) -> tuple[str, str, str]:
    """User, password and token; empty where the server asks for none."""
    if config.token_file is None:
        return "", "", ""
    if not config.token_file.is_file():
        raise NotFound(f"there is no token file {str(config.token_file)!r}")
    secret = config.token_file.read_text(encoding="utf-8").strip()
    if not secret:
        raise InvalidRequest(f"{str(config.token_file)!r} holds no token", field="milvus.token_file")
    user, colon, password = secret.partition(":")
    return (user, password, "") if colon else ("", "", secret)

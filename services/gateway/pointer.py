"""The active generation as an alias of a Milvus server, for gateways that search there.

The alias is what counts: every gateway and job of the deployment follows it, whether the index folder can be written or
not. The folder's own pointer is moved along, for those who have no Milvus server.
"""

from __future__ import annotations

import logging

from services.gateway.coarse_milvus import alias_of, collection_of
from services.gateway.config import MilvusConfig
from trackstar.audit_record import check_audited
from trackstar.catalog import Catalog
from trackstar.errors import TrackstarError
from trackstar.milvus_alias import AliasPointer
from trackstar.milvus_link import MilvusLink

_log = logging.getLogger(__name__)


class MilvusPointer:
    """See `services.gateway.generations.Pointer`.

    Args:
        config: of the server.
        link: to it.
        catalog: the index's generations.
    """

    def __init__(self, config: MilvusConfig, link: MilvusLink, catalog: Catalog) -> None:
        self._config, self._catalog = config, catalog
        self._alias = AliasPointer(link, alias_of(config))

    def pointer(self) -> str | None:
        """The generation whose collection the alias names; the folder's while there is no such alias.

        Raises:
            NotReady: the server is down.
        """
        collection = self._alias.get(timeout_seconds=self._config.timeout_seconds)
        if collection is None:
            return self._catalog.pointer()
        return collection.removeprefix(self._config.collection_prefix)

    def activate(self, name: str) -> None:
        """Move the alias, and the folder's pointer along.

        Raises:
            NotFound: no generation of that name, or its codes are not on the server.
            NotReady: it was not audited, or the server is down.
        """
        check_audited(self._catalog.home(name))
        self._alias.set(collection_of(self._config, name), timeout_seconds=self._config.timeout_seconds)
        try:
            self._catalog.activate(name)
        except (TrackstarError, OSError) as error:
            _log.warning("the index folder still names another generation: %s", error)

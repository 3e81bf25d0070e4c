"""An alias on a Milvus server: the durable pointer from a name to the collection of the active generation.

A change of the pointer is one step on the server: whoever reads it gets the old collection or the new one. Inside the
server, though, it spreads while searches run, and a search under the alias may still go to the old collection
afterwards. So the alias is only read, and what is searched is the collection that it names. It needs no torch.
"""

from __future__ import annotations

from pymilvus.grpc_gen import milvus_pb2

from trackstar.errors import Incompatible, NotFound
from trackstar.milvus_collection import check_name
from trackstar.milvus_link import MilvusLink, NoSuchAlias


class AliasPointer:
    """The alias of one name. Safe to use from several threads and processes; the last `set` stands.

    Args:
        link: to the server.
        alias: its name; letters, digits and underscores.

    Raises:
        InvalidRequest: an alias cannot have that name.
    """

    def __init__(self, link: MilvusLink, alias: str) -> None:
        check_name(alias)
        self._link = link
        self.alias = alias

    def __repr__(self) -> str:
        return f"AliasPointer({self.alias!r})"

    def get(self, *, timeout_seconds: float | None = None) -> str | None:
        """Name of the collection it points to; None if there is no such alias.

        Raises:
            NotReady: the server is down.
        """
        request = milvus_pb2.DescribeAliasRequest(alias=self.alias)
        try:
            answer = self._link.call("DescribeAlias", request, self._link.deadline(timeout_seconds))
        except NotFound:
            return None
        return str(answer.collection) or None

    def set(self, collection: str, *, timeout_seconds: float | None = None) -> None:
        """Point it to a collection, whether it exists already or not; again is as good.

        Raises:
            NotFound: there is no such collection.
            Incompatible: a collection has the alias's name.
            NotReady: the server is down.
        """
        check_name(collection)
        deadline = self._link.deadline(timeout_seconds)
        alter = milvus_pb2.AlterAliasRequest(alias=self.alias, collection_name=collection)
        create = milvus_pb2.CreateAliasRequest(alias=self.alias, collection_name=collection)
        try:
            self._link.call("AlterAlias", alter, deadline, patient=True)
        except NoSuchAlias:
            try:
                self._link.call("CreateAlias", create, deadline, patient=True)
            except Incompatible:
                if self.get(timeout_seconds=timeout_seconds) is None:
                    raise
                # Another one has made it meanwhile.
                self._link.call("AlterAlias", alter, deadline, patient=True)

    def drop(self, *, timeout_seconds: float | None = None) -> None:
        """Remove the alias, not the collection; one that is not there is as good.

        Raises:
            NotReady: the server is down.
        """
        request = milvus_pb2.DropAliasRequest(alias=self.alias)
        try:
            self._link.call("DropAlias", request, self._link.deadline(timeout_seconds), patient=True)
        except NotFound:
            return

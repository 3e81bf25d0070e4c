"""Has a Milvus server take into memory, indexed, everything that a collection was given.

    written out    what is still in the server's log becomes segments
    indexed        every segment has its index
    loaded         query nodes hold the segments
    refreshed      and those that bulk imports made since they were loaded, which a server otherwise finds by and by

Each is waited for, and none is needed for right answers to upserts: it makes searches fast, and bulk imports seen. It
needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pymilvus.grpc_gen import common_pb2, milvus_pb2

from trackstar.errors import NotReady
from trackstar.milvus_link import MilvusLink, NoSuchIndex
from trackstar.milvus_server import MilvusServerIndex

Step = Literal["write out", "index", "load", "count"]

_POLL_SECONDS = 0.1


def make_visible(
    link: MilvusLink,
    index: MilvusServerIndex,
    *,
    timeout_seconds: float,
    on_wait: Callable[[Step], None] = lambda _step: None,
) -> None:
    """Write out, index and load a collection, for up to `timeout_seconds` each; after it, `index.count` counts all.

    Args:
        link: to the server.
        index: of the collection.
        timeout_seconds: for each step.
        on_wait: called before each step.

    Raises:
        NotReady: a step takes longer, and goes on; or an index could not be built.
        NotFound: there is no such collection.
    """
    on_wait("write out")
    index.flush(timeout_seconds=timeout_seconds)
    on_wait("index")
    try:
        _wait_for_index(link, index.collection, link.deadline(timeout_seconds))
    except NoSuchIndex:
        # The collection's making was interrupted; loading makes up for it.
        index.load(timeout_seconds=timeout_seconds)
        _wait_for_index(link, index.collection, link.deadline(timeout_seconds))
    on_wait("load")
    index.load(timeout_seconds=timeout_seconds)
    _refresh(link, index.collection, link.deadline(timeout_seconds))


def _wait_for_index(link: MilvusLink, collection: str, deadline: float) -> None:
    request = milvus_pb2.DescribeIndexRequest(collection_name=collection)
    while True:
        [found] = link.call("DescribeIndex", request, deadline, patient=True).index_descriptions
        if found.state == common_pb2.Finished:
            return
        if found.state == common_pb2.Failed:
            raise NotReady(
                f"{link.name} could not build the index of {collection!r} ({found.index_state_fail_reason}); give the "
                "command again"
            )
        link.pause(_POLL_SECONDS, deadline, f"indexing {collection!r}")


def _refresh(link: MilvusLink, collection: str, deadline: float) -> None:
    request = milvus_pb2.LoadCollectionRequest(collection_name=collection, replica_number=1, refresh=True)
    link.call("LoadCollection", request, deadline, patient=True)
    asked = milvus_pb2.GetLoadingProgressRequest(collection_name=collection)
    while link.call("GetLoadingProgress", asked, deadline, patient=True).refresh_progress < 100:
        link.pause(_POLL_SECONDS, deadline, f"loading {collection!r} again")

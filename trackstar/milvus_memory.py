"""How much memory codes take on a Milvus server, and what the server itself tells of it.

A collection is searched from memory. Its index holds the codes as they are (BIN_FLAT, FLAT), so it takes their bytes
and eight for each id, in every replica; what is upserted and not yet written out is held besides. Milvus 2.3.5 names
no collection's memory: it tells what each query node has and uses, and how large a collection is in storage. It needs
no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pymilvus.grpc_gen import milvus_pb2

from trackstar.codes import CodeSpec
from trackstar.errors import Incompatible
from trackstar.milvus_collection import identity
from trackstar.milvus_link import MilvusLink

_ID_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMemory:
    """Memory of one query node: its name, what it has, and what its process uses."""

    name: str
    total_bytes: int
    used_bytes: int


def needed_bytes(spec: CodeSpec, num_passages: int, *, replicas: int = 1) -> int:
    """Bytes that the codes and ids of so many passages take in the memory of the query nodes together, at least."""
    return replicas * num_passages * (spec.row_bytes + _ID_BYTES)


def query_nodes(link: MilvusLink, *, timeout_seconds: float | None = None) -> list[NodeMemory]:
    """Memory of every query node, as the server tells.

    Raises:
        Incompatible: it tells it in another form.
        NotReady: the server is down, or its user may not ask.
    """
    try:
        return [
            NodeMemory(
                name=str(node["name"]),
                total_bytes=int(node["hardware_infos"]["memory"]),
                used_bytes=int(node["hardware_infos"]["memory_usage"]),
            )
            for node in _nodes(link, timeout_seconds)
            if node.get("type") == "querynode"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise Incompatible(f"{link.name} does not tell its memory in a form that is known") from error


def stored_bytes(link: MilvusLink, collection: str, *, timeout_seconds: float | None = None) -> int | None:
    """Bytes that a collection takes in the server's storage, what is still in its log left out; None where not told.

    Raises:
        NotFound: there is no such collection.
        NotReady: the server is down, or its user may not ask.
    """
    number = str(identity(link, collection, link.deadline(timeout_seconds)))
    for node in _nodes(link, timeout_seconds):
        sizes = (node.get("quota_metrics") or {}).get("CollectionBinlogSize")
        if isinstance(sizes, dict) and number in sizes:
            return int(sizes[number])
    return None


def _nodes(link: MilvusLink, timeout_seconds: float | None) -> list[dict[str, Any]]:
    request = milvus_pb2.GetMetricsRequest(request=json.dumps({"metric_type": "system_info"}))
    answer = link.call("GetMetrics", request, link.deadline(timeout_seconds))
    try:
        return [node["infos"] for node in json.loads(answer.response)["nodes_info"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Incompatible(f"{link.name} does not tell its parts in a form that is known") from error

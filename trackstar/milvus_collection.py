"""Collections of coarse codes on a Milvus server: made, described, dropped; and how large a code the server takes.

What the codes of a collection are is written in its description. See `trackstar.milvus_server` for what is done with
them.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from pymilvus.grpc_gen import common_pb2, milvus_pb2, schema_pb2

from trackstar.codes import CodeKind
from trackstar.errors import Incompatible, InvalidRequest, NotFound
from trackstar.milvus_link import MilvusLink

# Names of the fields: the primary key, and the vector.
ID, CODE = "passage_id", "code"
_LARGEST_POWER = 18


def create_collection(
    link: MilvusLink,
    collection: str,
    kind: CodeKind,
    size: int,
    deadline: float,
    *,
    note: dict[str, Any] | None = None,
    num_shards: int = 1,
) -> None:
    """Make an empty collection, without an index; one of the same name and fields is as good.

    Args:
        link: to the server.
        collection: its name.
        kind, size: of the codes.
        deadline: see `MilvusLink.deadline`.
        note: what `describe` will say.
        num_shards: channels that can be written to at once.

    Raises:
        Incompatible: the server takes no codes of that size, or the collection is another.
        NotReady: the server is down.
    """
    vector = schema_pb2.BinaryVector if kind == "bits" else schema_pb2.FloatVector
    schema = schema_pb2.CollectionSchema(
        name=collection,
        description=json.dumps({"trackstar": note}, sort_keys=True) if note else "",
        fields=[
            schema_pb2.FieldSchema(name=ID, is_primary_key=True, data_type=schema_pb2.Int64),
            schema_pb2.FieldSchema(name=CODE, data_type=vector, type_params=pairs(dim=str(size))),
        ],
    )
    request = milvus_pb2.CreateCollectionRequest(
        collection_name=collection,
        schema=schema.SerializeToString(),
        shards_num=num_shards,
        consistency_level=common_pb2.Bounded,
    )
    link.call("CreateCollection", request, deadline, patient=True)


def drop(link: MilvusLink, collection: str, *, timeout_seconds: float | None = None) -> None:
    """Delete a collection with all its codes; one that is not there is as good."""
    check_name(collection)
    request = milvus_pb2.DropCollectionRequest(collection_name=collection)
    deadline = link.deadline(timeout_seconds)
    if describe(link, collection, deadline) is not None:
        link.call("DropCollection", request, deadline, patient=True)


def largest_code(link: MilvusLink, kind: CodeKind, *, timeout_seconds: float | None = None) -> int:
    """Coordinates of the largest code that the server takes, a power of two; found by trying, on an empty collection.

    Raises:
        Incompatible: it takes none.
        NotReady: the server is down.
    """
    deadline = link.deadline(timeout_seconds)
    name = f"trackstar_probe_{secrets.token_hex(8)}"
    for power in range(_LARGEST_POWER, 2, -1):
        try:
            create_collection(link, name, kind, 1 << power, deadline)
        except Incompatible:
            continue
        drop(link, name)
        return 1 << power
    raise Incompatible(f"{link.name} holds no codes of the kind {kind!r}")


def describe(link: MilvusLink, collection: str, deadline: float) -> dict[str, Any] | None:
    """What the collection's codes are; None if there is none, and nothing in it if it is not one of ours."""
    request = milvus_pb2.DescribeCollectionRequest(collection_name=collection)
    try:
        schema = link.call("DescribeCollection", request, deadline).schema
    except NotFound:
        return None
    try:
        found = json.loads(schema.description)["trackstar"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def words(code: dict[str, Any]) -> str:
    """What `describe` says, for messages."""
    if not code:
        return "something else"
    return f"{code.get('size')} {code.get('kind')} of {code.get('dim')} dimensions with seed {code.get('seed')}"


def pairs(**values: str) -> list[Any]:
    """Parameters in the form in which Milvus takes them."""
    return [common_pb2.KeyValuePair(key=key, value=value) for key, value in values.items()]


def check_name(collection: str) -> None:
    """Raise InvalidRequest unless a collection can have that name."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
        raise InvalidRequest(f"{collection!r} is no name of a collection; use letters, digits and underscores")

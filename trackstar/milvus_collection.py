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
    """Delete a collection with all its codes; one that is not there is as good.

    Raises:
        InvalidRequest: an alias points to it; 2.3.5 would delete it all the same and leave the alias pointing nowhere.
        NotReady: the server is down.
    """
    check_name(collection)
    deadline = link.deadline(timeout_seconds)
    found = _description(link, collection, deadline)
    if found is None:
        return
    if found.aliases:
        raise InvalidRequest(
            f"the collection {collection!r} of {link.name} is what the alias {found.aliases[0]!r} points to; point it "
            "to another one before this one is deleted"
        )
    link.call("DropCollection", milvus_pb2.DropCollectionRequest(collection_name=collection), deadline, patient=True)


def collections(link: MilvusLink, prefix: str = "", *, timeout_seconds: float | None = None) -> list[str]:
    """Names of the collections that begin with `prefix`, sorted; loaded or not, and whoever made them.

    Raises:
        NotReady: the server is down.
    """
    answer = link.call("ShowCollections", milvus_pb2.ShowCollectionsRequest(), link.deadline(timeout_seconds))
    return sorted(name for name in answer.collection_names if name.startswith(prefix))


def identity(link: MilvusLink, collection: str, deadline: float) -> int:
    """The server's number of a collection, which another one of the same name does not have.

    Raises:
        NotFound: there is none.
    """
    found = _description(link, collection, deadline)
    if found is None:
        raise NotFound(f"{link.name} has no collection {collection!r}; import the generation's codes first")
    return int(found.collectionID)


def check_fits(link: MilvusLink, kind: CodeKind, size: int, *, timeout_seconds: float | None = None) -> None:
    """Raise Incompatible, naming both sizes, unless the server takes codes of that size; it is asked, not assumed.

    Raises:
        Incompatible: it does not.
        NotReady: the server is down.
    """
    name = f"trackstar_probe_{secrets.token_hex(8)}"
    try:
        create_collection(link, name, kind, size, link.deadline(timeout_seconds))
    except Incompatible as error:
        largest, unit = (
            largest_code(link, kind, timeout_seconds=timeout_seconds),
            "bits" if kind == "bits" else "floats",
        )
        if largest >= size:
            raise
        raise Incompatible(
            f"{link.name} takes codes of up to {largest:,} {unit}, not {size:,}; build the generation with a smaller "
            "code, or use a newer server"
        ) from error
    drop(link, name)


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
    answer = _description(link, collection, deadline)
    if answer is None:
        return None
    try:
        found = json.loads(answer.schema.description)["trackstar"]
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


def _description(link: MilvusLink, collection: str, deadline: float) -> Any:
    """What the server says of a collection; None if there is none."""
    request = milvus_pb2.DescribeCollectionRequest(collection_name=collection)
    try:
        return link.call("DescribeCollection", request, deadline)
    except NotFound:
        return None

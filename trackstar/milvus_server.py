"""The coarse index on a Milvus server: one collection of bits or float prefixes, scanned exactly.

    bits      BINARY_VECTOR, HAMMING, BIN_FLAT    estimated cosine = cos(pi * hamming / k)
    prefix    FLOAT_VECTOR, IP, FLAT              estimated cosine = (D/k) * dot

The primary key is the passage's id, given by us, and codes are upserted: an id that is added again, after a failure or
by another process, replaces its code and counts once. What a code stands for is kept in the collection's description
and compared on opening.

Consistency: an index that has written sees all it wrote. One that has not searches with bounded staleness, some five
seconds: collections are searched once they are complete, and after a restart the server then does not answer before it
has read its log again. `count` is exact, deletions and what others wrote included.

How large a code may be differs between versions: 2.3.5 takes 32,768 bits or floats, current ones 262,144 bits; see
`largest_code` of `trackstar.milvus_collection`. Timeouts, retries and what happens while the server is down are those
of `trackstar.milvus_link`. It needs no torch.

Legend: N codes, Q queries, L candidates, k coordinates of a code.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymilvus.grpc_gen import common_pb2, milvus_pb2, schema_pb2

from trackstar.coarse import check_codes, check_ids, check_limit
from trackstar.codes import CodeSpec, check_size, padded_dim
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady
from trackstar.milvus_collection import CODE, ID, check_fits, check_name, create_collection, describe, pairs, words
from trackstar.milvus_link import MilvusLink, NoSuchIndex, NotLoaded

# What a server answers per query at most.
MAX_CANDIDATES = 16_384

# A server takes messages of up to 64 MiB; small ones pass its queues sooner.
_BATCH_BYTES = 8 << 20
# Candidates per request; each takes some twelve bytes of the answer.
_MAX_HITS = 1 << 18
_MAX_DELETIONS = 10_000
_POLL_SECONDS = 0.1


class MilvusServerIndex:
    """`CoarseIndex` in a collection of a Milvus server; made by `create` or `open`.

    Safe to use from several threads. Closing it leaves the link open and the collection as it is.
    """

    def __init__(self, link: MilvusLink, collection: str, *, spec: CodeSpec, dim: int) -> None:
        """Not for callers: neither makes nor checks the collection."""
        self._link = link
        self.collection = collection
        self._spec = spec
        self._cosine_per_dot = np.float32(padded_dim(dim) / spec.size)
        angles = np.pi * np.arange(spec.size + 1) / spec.size
        self._cosine_of = np.cos(angles).astype(np.float32) if spec.kind == "bits" else None
        # Hybrid time of the last write of this object; 0 before the first.
        self._written = 0
        # Whether it deleted something after that: of deletions, 2.3.5 tells no time.
        self._deleted = False
        self._is_loaded = False
        self._closed = False

    @classmethod
    def create(
        cls,
        link: MilvusLink,
        collection: str,
        *,
        spec: CodeSpec,
        dim: int,
        num_shards: int = 1,
        timeout_seconds: float | None = None,
    ) -> MilvusServerIndex:
        """Make an empty collection.

        Args:
            link: to the server.
            collection: its name; letters, digits and underscores.
            spec: kind and size of the codes.
            dim: d, dimension of the vectors the codes stand for.
            num_shards: channels that can be written to at once.
            timeout_seconds: for the whole.

        Raises:
            InvalidRequest: there is one of that name, or vectors of that dimension have no such code.
            Incompatible: the server takes no codes of that size; the message names the largest it takes.
            NotReady: the server is down.
        """
        check_name(collection)
        check_size(spec.size, dim)
        deadline = link.deadline(timeout_seconds)
        if describe(link, collection, deadline) is not None:
            raise InvalidRequest(f"{link.name} has a collection {collection!r} already; open it, or drop it")
        index = cls(link, collection, spec=spec, dim=dim)
        note = {**asdict(spec), "dim": dim}
        try:
            create_collection(link, collection, spec.kind, spec.size, deadline, note=note, num_shards=num_shards)
        except Incompatible:
            check_fits(link, spec.kind, spec.size)
            raise
        index._index(deadline)
        return index

    @classmethod
    def open(
        cls,
        link: MilvusLink,
        collection: str,
        *,
        spec: CodeSpec,
        dim: int,
        load: bool = True,
        timeout_seconds: float | None = None,
    ) -> MilvusServerIndex:
        """Open a collection that was made for the same `spec` and `dim`, and load it, or leave that to its first use.

        Raises:
            NotFound: there is none.
            Incompatible: it was made for other codes, or by something else.
            NotReady: the server is down, or loading takes longer; it goes on.
        """
        check_name(collection)
        deadline = link.deadline(timeout_seconds)
        found = describe(link, collection, deadline)
        if found is None:
            raise NotFound(f"{link.name} has no collection {collection!r}; import the generation's codes first")
        wanted = {**asdict(spec), "dim": dim}
        if found != wanted:
            raise Incompatible(
                f"the collection {collection!r} of {link.name} holds {words(found)}, not {words(wanted)}; import the "
                "generation's codes again under another name"
            )
        index = cls(link, collection, spec=spec, dim=dim)
        if load:
            index._load(deadline)
        return index

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any], *, timeout_seconds: float | None = None) -> None:
        """See `CoarseIndex.add`; an interrupted call may have stored some of its codes.

        It waits while the server is down, for up to `timeout_seconds` for every 8 MiB.

        Raises:
            StorageFull: the server's disk is full.
            Overloaded: the server takes nothing more now.
        """
        self._check_open()
        check_ids(passage_ids, len(codes))
        check_codes(self._spec.kind, self._spec.size, codes)
        step = max(1, _BATCH_BYTES // self._spec.row_bytes)
        for start in range(0, len(codes), step):
            batch = codes[start : start + step]
            ids = schema_pb2.ScalarField(long_data=schema_pb2.LongArray(data=passage_ids[start : start + step]))
            request = milvus_pb2.UpsertRequest(
                collection_name=self.collection,
                num_rows=len(batch),
                fields_data=[
                    schema_pb2.FieldData(type=schema_pb2.Int64, field_name=ID, scalars=ids),
                    schema_pb2.FieldData(type=self._type, field_name=CODE, vectors=self._vectors(batch)),
                ],
            )
            answer = self._link.call("Upsert", request, self._link.deadline(timeout_seconds), patient=True)
            self._written = max(self._written, answer.timestamp)
            self._deleted = False

    def delete(self, passage_ids: NDArray[np.int64], *, timeout_seconds: float | None = None) -> None:
        """Remove the codes of int64 [N] ids; those of which there are none are as good.

        It waits while the server is down, for up to `timeout_seconds` for every 10,000 ids; an interrupted call may
        have removed some.

        Raises:
            InvalidRequest: no such ids, or one twice.
            NotReady: the server is down.
        """
        self._check_open()
        check_ids(passage_ids, len(passage_ids))
        for start in range(0, len(passage_ids), _MAX_DELETIONS):
            ids = passage_ids[start : start + _MAX_DELETIONS].tolist()
            request = milvus_pb2.DeleteRequest(collection_name=self.collection, expr=f"{ID} in {ids}")
            self._link.call("Delete", request, self._link.deadline(timeout_seconds), patient=True)
            self._deleted = True

    def search(
        self, codes: NDArray[Any], limit: int, *, timeout_seconds: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `CoarseIndex.search`; limit at most `MAX_CANDIDATES`.

        At that limit alone, which of the passages tied at the last place come is the server's choice.
        """
        self._check_open()
        check_codes(self._spec.kind, self._spec.size, codes)
        check_limit(limit, MAX_CANDIDATES)
        deadline = self._link.deadline(timeout_seconds)
        if not len(codes):
            limit = min(limit, self._count(deadline))
            return np.empty((0, limit), dtype=np.int64), np.empty((0, limit), dtype=np.float32)
        # A few more than asked for show whether equal cosines were cut apart, where the server chooses as it likes.
        asked = min(limit + limit // 8 + 16, MAX_CANDIDATES)
        step = max(1, min(_MAX_HITS // asked, _BATCH_BYTES // self._spec.row_bytes))
        ordered = []
        for start in range(0, len(codes), step):
            hits = self._hits(codes[start : start + step], asked, deadline)
            for query, (ids, cosines) in enumerate(hits, start):
                ordered.append(self._ordered(codes[query : query + 1], ids, cosines, limit, asked, deadline))
        if len({len(ids) for ids, _ in ordered}) > 1:
            raise NotReady(f"{self._link.name} answered some queries in part; ask again")
        return np.stack([ids for ids, _ in ordered]), np.stack([cosines for _, cosines in ordered])

    def count(self, *, timeout_seconds: float | None = None) -> int:
        """See `CoarseIndex.count`; loads the collection if need be."""
        self._check_open()
        return self._count(self._link.deadline(timeout_seconds))

    def flush(self, *, timeout_seconds: float | None = None) -> None:
        """Have the server write out and index what it holds in its log; once, after everything is added.

        Raises:
            NotReady: it takes longer; it goes on.
        """
        self._check_open()
        deadline = self._link.deadline(timeout_seconds)
        request = milvus_pb2.FlushRequest(collection_names=[self.collection])
        answer = self._link.call("Flush", request, deadline, patient=True)
        state = milvus_pb2.GetFlushStateRequest(
            segmentIDs=answer.coll_segIDs[self.collection].data,
            flush_ts=answer.coll_flush_ts[self.collection],
            collection_name=self.collection,
        )
        while not self._link.call("GetFlushState", state, deadline, patient=True).flushed:
            self._link.pause(_POLL_SECONDS, deadline, f"writing out {self.collection!r}")

    def load(self, *, timeout_seconds: float | None = None) -> None:
        """Have the server take the collection into memory, where it is not.

        Raises:
            NotFound: there is no such collection.
            NotReady: it takes longer; it goes on.
        """
        self._check_open()
        self._is_loaded = False
        self._load(self._link.deadline(timeout_seconds))

    def close(self) -> None:
        """See `CoarseIndex.close`."""
        self._closed = True

    @property
    def _type(self) -> Any:
        return schema_pb2.BinaryVector if self._spec.kind == "bits" else schema_pb2.FloatVector

    @property
    def _metric(self) -> str:
        return "HAMMING" if self._spec.kind == "bits" else "IP"

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest(f"the coarse index {self.collection!r} is closed; open it again")

    def _vectors(self, codes: NDArray[Any]) -> Any:
        if self._spec.kind == "bits":
            return schema_pb2.VectorField(dim=self._spec.size, binary_vector=codes.tobytes())
        return schema_pb2.VectorField(dim=self._spec.size, float_vector=_floats(codes))

    def _consistency(self) -> dict[str, Any]:
        if self._deleted:
            return {"consistency_level": common_pb2.Strong, "use_default_consistency": False}
        level = common_pb2.Session if self._written else common_pb2.Bounded
        return {"consistency_level": level, "guarantee_timestamp": self._written, "use_default_consistency": False}

    def _count(self, deadline: float) -> int:
        request = milvus_pb2.QueryRequest(
            collection_name=self.collection,
            output_fields=["count(*)"],
            consistency_level=common_pb2.Strong,
            use_default_consistency=False,
        )
        answer = self._loaded("Query", request, deadline, patient=True)
        return int(answer.fields_data[0].scalars.long_data.data[0])

    def _hits(
        self, codes_Qk: NDArray[Any], limit: int, deadline: float
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids and estimated cosines of the best `limit` codes of each query, in the server's order."""
        kind = common_pb2.PlaceholderType
        group = common_pb2.PlaceholderGroup(
            placeholders=[
                common_pb2.PlaceholderValue(
                    tag="$0",
                    type=kind.BinaryVector if self._spec.kind == "bits" else kind.FloatVector,
                    values=[code.tobytes() for code in codes_Qk],
                )
            ]
        )
        request = milvus_pb2.SearchRequest(
            collection_name=self.collection,
            dsl_type=common_pb2.BoolExprV1,
            placeholder_group=group.SerializeToString(),
            nq=len(codes_Qk),
            search_params=pairs(
                anns_field=CODE, topk=str(limit), metric_type=self._metric, params="{}", round_decimal="-1"
            ),
            **self._consistency(),
        )
        results = self._loaded("Search", request, deadline, patient=False).results
        ids = np.array(results.ids.int_id.data, dtype=np.int64)
        values = np.array(results.scores, dtype=np.float32)
        sizes = list(results.topks) or [0] * len(codes_Qk)
        if len(ids) != len(values) or sum(sizes) != len(ids) or len(sizes) != len(codes_Qk):
            raise CorruptArtifact(
                f"{self._link.name} answered {len(ids)} ids and {len(values)} scores to {len(codes_Qk)} queries of "
                f"{self.collection!r}"
            )
        cosines = values * self._cosine_per_dot if self._cosine_of is None else self._cosine_of[values.astype(np.int64)]
        stops = np.cumsum(sizes)[:-1]
        return list(zip(np.split(ids, stops), np.split(cosines, stops), strict=True))

    def _ordered(
        self,
        query_1k: NDArray[Any],
        ids: NDArray[np.int64],
        cosines: NDArray[np.float32],
        limit: int,
        asked: int,
        deadline: float,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best `limit` hits in the contract's order."""
        # Ask for more while the last place is tied with the last hit: the tie's smaller ids may not have come yet.
        while len(ids) == asked < MAX_CANDIDATES and cosines[limit - 1] == cosines[-1]:
            asked = min(2 * asked, MAX_CANDIDATES)
            ids, cosines = self._hits(query_1k, asked, deadline)[0]
        order = np.lexsort((ids, -cosines))[:limit]
        return ids[order], cosines[order]

    def _loaded(self, method: str, request: Any, deadline: float, *, patient: bool) -> Any:
        """Call what needs the collection in memory, and load it where the server says that it is not."""
        while True:
            if not self._is_loaded:
                self._load(deadline)
            try:
                return self._link.call(method, request, deadline, patient=patient)
            except NotLoaded:
                self._is_loaded = False
                # A server that has just started says so of what it is about to load by itself.
                self._link.pause(_POLL_SECONDS, deadline, f"loading {self.collection!r}")

    def _load(self, deadline: float) -> None:
        name = self.collection
        state = milvus_pb2.GetLoadStateRequest(collection_name=name)
        while (found := self._link.call("GetLoadState", state, deadline).state) != common_pb2.LoadStateLoaded:
            if found == common_pb2.LoadStateNotExist:
                raise NotFound(f"{self._link.name} has no collection {name!r}; import the generation's codes again")
            if found == common_pb2.LoadStateNotLoad:
                request = milvus_pb2.LoadCollectionRequest(collection_name=name, replica_number=1)
                try:
                    self._link.call("LoadCollection", request, deadline)
                except NoSuchIndex:
                    # `create` was interrupted.
                    self._index(deadline)
                    continue
            self._link.pause(_POLL_SECONDS, deadline, f"loading {name!r}")
        self._is_loaded = True

    def _index(self, deadline: float) -> None:
        """Build the index that the server needs to load a collection; of these kinds, none but the codes themselves."""
        request = milvus_pb2.CreateIndexRequest(
            collection_name=self.collection,
            field_name=CODE,
            extra_params=pairs(
                index_type="BIN_FLAT" if self._spec.kind == "bits" else "FLAT", metric_type=self._metric, params="{}"
            ),
        )
        self._link.call("CreateIndex", request, deadline, patient=True)


def _floats(codes: NDArray[np.float32]) -> Any:
    """A message of packed floats, from its bytes: given numbers, it would take them one by one."""
    data = codes.astype("<f4").tobytes()
    length, prefix = len(data), bytearray(b"\x0a")
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    return schema_pb2.FloatArray.FromString(bytes(prefix) + bytes([length]) + data)

"""The coarse index on Milvus Lite: float prefixes in one collection of a database folder, through pymilvus.

Milvus Lite holds float vectors only, so here the code is a prefix; its inner product times D/k estimates the cosine.
The collection carries no vector index: Milvus Lite then scans its segments exactly, while a FLAT index would keep every
vector a second time on disk and in memory and answer the same.

The engine runs in this process behind a gRPC server that listens on a Unix socket in a private folder, so no other user
of the machine can reach it and no proxy setting can come between. One process at a time may hold a database folder.
Nothing of pymilvus or Milvus Lite, errors included, leaves this module.

Costs to know: every number of a code passes through Python on the way in (about 1 M numbers per second and core), and
so does every number of every candidate on the way out, because the engine materialises whole rows: a query costs time
in proportion to limit * k beside the scan. The whole collection lies in memory while open.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.db import MilvusLite
from milvus_lite.exceptions import DataDirLockedError, MilvusLiteError
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from pymilvus.grpc_gen import milvus_pb2_grpc

from trackstar.coarse import check_codes, check_ids, check_limit
from trackstar.codes import check_size, padded_dim
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady, StorageFull

# What a Milvus server answers per query at most, kept here so that a plan holds on both.
MAX_CANDIDATES = 16_384

_COLLECTION = "codes"
_ID, _CODE, _DIM = "passage_id", "code", "trackstar.dim"
# Small batches: the engine turns a batch into Python numbers of some 30 bytes each, and is fastest while they are few.
_BATCH_BYTES = 1 << 20
_MESSAGE_BYTES = 1 << 28
# Candidates per request: each is a Python dictionary on the server's side and another on ours.
_MAX_HITS = 1 << 16
# Scores per request: the engine holds one float32 for each pair of a query and a stored code.
_MAX_SCORES = 1 << 25
_STOP_SECONDS = 5.0


class MilvusLiteIndex:
    """`CoarseIndex` of float prefixes in a Milvus Lite database folder; made by `create` or `open`.

    What `add` returned from survives the end of the process; a power cut may take what no `search` or `close` followed.
    A full disk or a damaged file closes the index; once that is mended, `open` finds all that `add` returned from.
    """

    def __init__(self, path: Path) -> None:
        """Not for callers: holds the folder and serves it, whether or not it has a collection."""
        self._path = path
        with ExitStack() as held, _translated(path):
            database = MilvusLite(str(path))
            # Waits for the engine's own thread.
            held.callback(database.close)
            socket_folder = tempfile.mkdtemp(prefix="trackstar-")
            held.callback(shutil.rmtree, socket_folder, ignore_errors=True)
            workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="milvus-lite")
            held.callback(workers.shutdown)
            server = grpc.server(
                workers,
                options=[
                    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                    ("grpc.max_send_message_length", _MESSAGE_BYTES),
                ],
            )
            milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
            address = f"unix:{socket_folder}/socket"
            try:
                server.add_insecure_port(address)
            except RuntimeError as error:
                # The system limits a socket's path to some 100 characters.
                raise NotReady(
                    f"the coarse index cannot listen at {address!r}; set TMPDIR to a short path that can be written"
                ) from error
            server.start()
            held.callback(lambda: server.stop(_STOP_SECONDS).wait())
            self._client = MilvusClient(uri=address)
            held.callback(self._client.close)
            # Runs at `close`, and otherwise when the index is forgotten or the interpreter ends.
            self._shut_down = weakref.finalize(self, held.pop_all().close)
        self._size = 0
        self._cosine_per_dot = np.float32(0)
        self._is_flushed = True
        self._count: int | None = None

    @classmethod
    def create(cls, path: Path | str, *, dim: int, size: int) -> MilvusLiteIndex:
        """Make an empty index in the folder `path`, which must not hold one yet.

        Args:
            path: database folder; its parent must exist.
            dim: d, dimension of the vectors the codes stand for.
            size: k, coordinates per code.

        Raises:
            InvalidRequest: the folder holds an index, is a file, or vectors of that dimension have no such code.
            NotFound: the parent folder is missing.
            NotReady: another process holds the folder.
        """
        path = Path(path)
        check_size(size, dim)
        if not path.parent.is_dir():
            raise NotFound(f"the folder {str(path.parent)!r} for the coarse index does not exist; make it first")
        if path.exists() and not path.is_dir():
            raise InvalidRequest(f"{str(path)!r} is a file; a coarse index needs a folder of its own")
        _quieten()
        index = cls(path)
        try:
            with index._engine():
                if index._client.has_collection(_COLLECTION):
                    raise InvalidRequest(f"{str(path)!r} holds a coarse index already; open it, or delete the folder")
                schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
                schema.add_field(_ID, DataType.INT64, is_primary=True)
                schema.add_field(_CODE, DataType.FLOAT_VECTOR, dim=size)
                index._client.create_collection(_COLLECTION, schema=schema, properties={_DIM: str(dim)})
        except BaseException:
            index.close()
            raise
        index._describe(dim, size)
        return index

    @classmethod
    def open(cls, path: Path | str, *, dim: int, size: int) -> MilvusLiteIndex:
        """Open the index in the folder `path`, which must have been made for the same `dim` and `size`.

        Raises:
            NotFound: there is no index.
            NotReady: another process holds the folder.
            Incompatible: the index was made for another dimension or size of code.
            CorruptArtifact: its files cannot be read.
        """
        path = Path(path)
        # Asking the engine would make the folder.
        if not (path / "collections" / _COLLECTION).is_dir():
            raise NotFound(f"{str(path)!r} holds no coarse index; build it first")
        _quieten()
        index = cls(path)
        try:
            with index._engine():
                description = index._client.describe_collection(_COLLECTION)
            stored_dim = int(description["properties"][_DIM])
            stored_size = next(field["params"]["dim"] for field in description["fields"] if field["name"] == _CODE)
            if (stored_dim, stored_size) != (dim, size):
                raise Incompatible(
                    f"the coarse index {str(path)!r} holds {stored_size} of {stored_dim} coordinates, "
                    f"not {size} of {dim}; build it again"
                )
        except BaseException:
            index.close()
            raise
        index._describe(dim, size)
        return index

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        """See `CoarseIndex.add`; an interrupted call may have stored some of its codes.

        Raises:
            StorageFull: the disk is full.
        """
        self._check_open()
        check_ids(passage_ids, len(codes))
        check_codes("prefix", self._size, codes)
        step = max(1, _BATCH_BYTES // (4 * self._size))
        with self._engine():
            for start in range(0, len(codes), step):
                self._is_flushed, self._count = False, None
                batch = zip(passage_ids[start : start + step].tolist(), codes[start : start + step], strict=True)
                self._client.insert(_COLLECTION, [{_ID: passage_id, _CODE: code} for passage_id, code in batch])

    def search(
        self, codes: NDArray[Any], limit: int, *, timeout_seconds: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `CoarseIndex.search`; limit at most `MAX_CANDIDATES`."""
        self._check_open()
        check_codes("prefix", self._size, codes)
        check_limit(limit, MAX_CANDIDATES)
        self._flush()
        num = self.count()
        limit = min(limit, num)
        ids_QL = np.empty((len(codes), limit), dtype=np.int64)
        cosines_QL = np.empty((len(codes), limit), dtype=np.float32)
        if limit == 0:
            return ids_QL, cosines_QL
        # One more than asked for shows whether equal scores were cut apart, where the engine chooses as it likes.
        asked = min(limit + 1, num, MAX_CANDIDATES)
        step = max(1, min(_MAX_HITS // asked, _MAX_SCORES // num))
        for start in range(0, len(codes), step):
            for offset, hits in enumerate(self._hits(codes[start : start + step], asked)):
                query = start + offset
                ids_QL[query], cosines_QL[query] = self._ordered(codes[query : query + 1], hits, limit, num)
        return ids_QL, cosines_QL

    def count(self) -> int:
        """See `CoarseIndex.count`."""
        self._check_open()
        if self._count is None:
            with self._engine():
                self._count = int(self._client.get_collection_stats(_COLLECTION)["row_count"])
        return self._count

    def close(self) -> None:
        """See `CoarseIndex.close`; writes out what is pending, stops the server and lets go of the folder.

        Raises:
            StorageFull: the disk is full.
        """
        try:
            if self._shut_down.alive:
                # The engine would do this too, but hide a failure.
                self._flush()
        finally:
            self._shut_down()

    def _describe(self, dim: int, size: int) -> None:
        self._size = size
        self._cosine_per_dot = np.float32(padded_dim(dim) / size)

    def _check_open(self) -> None:
        if not self._shut_down.alive:
            raise InvalidRequest(f"the coarse index {str(self._path)!r} is closed; open it again")

    def _flush(self) -> None:
        # The engine turns everything unflushed into Python numbers once per search.
        if not self._is_flushed:
            with self._engine():
                self._client.flush(_COLLECTION)
            self._is_flushed = True

    def _hits(self, codes_Qk: NDArray[Any], limit: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Ids and inner products of the best `limit` codes of each query, in the engine's order."""
        with self._engine():
            answers = self._client.search(
                _COLLECTION, list(codes_Qk), limit=limit, anns_field=_CODE, search_params={"metric_type": "IP"}
            )
        for hits in answers:
            ids = np.fromiter((hit[_ID] for hit in hits), dtype=np.int64, count=len(hits))
            products = np.fromiter((hit["distance"] for hit in hits), dtype=np.float32, count=len(hits))
            yield ids, products

    def _ordered(
        self, query_1k: NDArray[Any], hits: tuple[NDArray[np.int64], NDArray[np.float32]], limit: int, num: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best `limit` hits as ids and cosines, in the contract's order."""
        ids, products = hits
        # Ask for more while the last place is tied with the last hit: the tie's smaller ids may not have come yet.
        while products[limit - 1] == products[-1] and len(ids) < min(num, MAX_CANDIDATES):
            ids, products = next(self._hits(query_1k, min(2 * len(ids), num, MAX_CANDIDATES)))
        order = np.lexsort((ids, -products))[:limit]
        return ids[order], products[order] * self._cosine_per_dot

    @contextmanager
    def _engine(self) -> Iterator[None]:
        """Turn the engine's errors into ours, and stop the engine: after a failed write it would go on without it."""
        try:
            with _translated(self._path):
                yield
        except (StorageFull, CorruptArtifact):
            self._shut_down()
            raise


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except DataDirLockedError as error:
        raise NotReady(f"the coarse index {str(path)!r} is open already; close it there first") from error
    except (MilvusException, MilvusLiteError, grpc.RpcError, OSError) as error:
        # Behind the server an error is only its text.
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise StorageFull(
                f"the disk is full while writing the coarse index {str(path)!r}; free some space and go on"
            ) from error
        raise CorruptArtifact(
            f"the coarse index {str(path)!r} cannot be used ({error}); delete it and build it again"
        ) from error


def _quieten() -> None:
    """Both packages log every refused request with a traceback; what matters comes as an exception of ours."""
    for name in ("pymilvus", "pymilvus.milvus_client", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

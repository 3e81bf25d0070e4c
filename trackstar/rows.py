"""Reading gradient rows and their passages, one by one or shard by shard. How they are kept is told in `row_shards`.

`passage_id` is the global row number; ids are dense over all parts that are open. Rows are read one by one with
positioned reads, or ranged requests where the folder lies in an object store, and each is checked against its CRC,
pages of the sidecar against theirs; whole shards are read in order by `batches`. A local sidecar is compared with its
digest at its first use, and again whenever it is not the file it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.blobs import Location, RemotePath, each
from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady
from trackstar.passages import Passage
from trackstar.ranges import LocalRanges, RangeReader, RemoteRanges
from trackstar.row_shards import (
    ROW_DTYPES,
    ROW_GROUP,
    SIDECAR_SCHEMA,
    Receipt,
    digest_of_receipts,
    not_a_receipt,
    read_parts,
    read_receipt,
    read_receipts,
    starts_of,
    stem,
)
from trackstar.storage import file_digest

_HEADER_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_MAX_HEADER = 1 << 20
_AGAIN = "give the index command again with --verify, or the job with verify: true, to build this shard anew"
# Of the sidecars in an object store, the footers that are kept; those of local files are read each time.
_KEPT_FOOTERS = 1024
# What tells a local file from another, or from itself before it was written to: device, inode, size, time in ns.
FileState = tuple[int, int, int, int]
_UNKNOWN: FileState = (-1, -1, -1, -1)
# So many shards are looked at when a store is opened; of larger ones each at its first use.
_OPENED_AT_ONCE = 4096
_KEPT_PATHS = 4096


class RowStore:
    """Read access to finished rows; safe to use from several threads, but not while `close` runs.

    Raises:
        NotReady: the rows are not complete, or what holds them does not answer or cannot be read.
        CorruptArtifact: a file does not have the size, shape or type its receipt and totals say.
    """

    def __init__(
        self, folder: Location, *, parts: int | None = None, versions: Mapping[int, str] | None = None
    ) -> None:
        """Open the first `parts` parts, or all; of the shards in `versions` the version named there."""
        self.folder = folder
        self._ranges: RangeReader[Any] = RemoteRanges(folder.store) if isinstance(folder, RemotePath) else LocalRanges()
        self.parts = read_parts(folder)[:parts]
        if len(self.parts) < (parts or 1):
            raise NotReady(f"the rows in {str(folder)!r} are not complete; give the index command again")
        self.versions = dict(versions or {})
        self.dim = self.parts[0].dim
        self.dtype = self.parts[0].dtype
        self.receipts = [self._version(receipt) for part in self.parts for receipt in read_receipts(folder, part)]
        self.num_shards = len(self.receipts)
        self.starts = starts_of(receipt.num_passages for receipt in self.receipts)
        self.num_passages = int(self.starts[-1])
        self.num_tokens = sum(receipt.num_tokens for receipt in self.receipts)
        # What a single part is known by, it keeps being known by.
        self.digest = self.parts[0].digest if self._is_plain else digest_of_receipts(self.receipts)
        self._row_bytes = self.dim * ROW_DTYPES[self.dtype].itemsize
        # Of an index with a million shards, all paths would take as much memory as its rows need to be scanned.
        self._path = lru_cache(maxsize=_KEPT_PATHS)(self._make_path)
        # Of local files only: objects are never written to.
        self._sidecar_states: dict[int, FileState | None] = {}
        self._offsets: dict[int, int] = {}
        if self.num_shards <= _OPENED_AT_ONCE:
            self._offsets.update(enumerate(each(folder, self._open_header, self.receipts)))
        self._checksums = lru_cache(maxsize=4096)(self._read_checksums)
        self._footers = lru_cache(maxsize=_KEPT_FOOTERS)(self._read_footer)

    @property
    def _is_plain(self) -> bool:
        return len(self.parts) == 1 and not self.versions

    def _version(self, receipt: Receipt) -> Receipt:
        version = self.versions.get(receipt.shard)
        if version is None:
            return receipt
        found = read_receipt(self.folder, receipt.shard, version)
        if found is None:
            raise CorruptArtifact(
                f"shard {receipt.shard} of {str(self.folder)!r} is missing in its version {version}; purge again"
            )
        return found

    def close(self) -> None:
        """Close the open shard files."""
        self._ranges.close()

    def read(self, passage_ids: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Rows [N, d] float32 of the given passages, each checked against its CRC.

        Raises:
            NotFound: an id is out of range.
            NotReady: the object store does not answer, or the disk.
            CorruptArtifact: a row's bytes are not those that were written.
        """
        places = self._locate(passage_ids)
        buffer = np.empty((len(places), self._row_bytes), dtype=np.uint8)
        views = [row.data for row in buffer]
        shards = sorted({shard for shard, _ in places})
        checksums = dict(zip(shards, each(self.folder, self._checksums, shards), strict=True))
        counts = self._read_into(
            [
                (self._path(shard), self._offset(shard) + row * self._row_bytes, view)
                for (shard, row), view in zip(places, views, strict=True)
            ]
        )
        for (shard, row), view, count in zip(places, views, counts, strict=True):
            if count != self._row_bytes or zlib.crc32(view) != checksums[shard][row]:
                passage_id = self.first(shard) + row
                raise self._corrupt(shard, f"row {row} (passage {passage_id}) does not match its checksum")
        return torch.from_numpy(buffer.reshape(-1)).view(ROW_DTYPES[self.dtype]).view(-1, self.dim).float()

    def batches(self, *, verify: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Every shard's first passage id and rows [n, d] in their stored type, in order.

        Args:
            verify: compare each shard with the digests in its receipt first.

        Raises:
            CorruptArtifact: a shard is truncated or was altered.
        """
        for receipt in self.receipts:
            yield self.first(receipt.shard), self.shard(receipt.shard, verify=verify)

    def first(self, shard: int) -> int:
        """First passage id of a shard."""
        return int(self.starts[shard])

    def shard(self, shard: int, *, verify: bool = False) -> Tensor:
        """All rows [n, d] of one shard in their stored type."""
        path, count = self._path(shard), self.receipts[shard].num_passages
        if isinstance(path, RemotePath):
            raw = self._fetch(path, shard, verify=verify)
        elif verify:
            # Read once: what is compared with its digest is what is returned.
            with _reading(path):
                raw = np.fromfile(path, dtype=np.uint8)
            receipt, sidecar = self.receipts[shard], path.with_suffix(".parquet")
            _compare(path, hashlib.sha256(raw.data).hexdigest(), receipt.rows_digest)
            _compare(sidecar, _digest_of_file(sidecar), receipt.sidecar_digest)
            raw = raw[self._offset(shard) :]
        else:
            with _reading(path):
                raw = np.fromfile(path, dtype=np.uint8, offset=self._offset(shard))
        if raw.size != count * self._row_bytes:
            raise self._corrupt(shard, f"it holds {raw.size:,} bytes of rows, {count * self._row_bytes:,} expected")
        return torch.from_numpy(raw).view(ROW_DTYPES[self.dtype]).view(count, self.dim)

    def state(self, shard: int) -> FileState | None:
        """Changes when the file of a shard's rows is replaced or written to; None for objects, which never are."""
        return _state(self._path(shard))

    def verify(self, shard: int) -> None:
        """Compare both files of a shard with the digests in its receipt; raises as `verify_files`."""
        receipt = self.receipts[shard]
        digests = {"rows_digest": receipt.rows_digest, "sidecar_digest": receipt.sidecar_digest}
        self.verify_files(self._path(shard).with_suffix(".json"), digests)

    @staticmethod
    def verify_files(path: Location, receipt: Mapping[str, Any]) -> None:
        """Compare the two files beside a shard's receipt with the digests it holds; the rows need not be complete.

        Args:
            path: the receipt's path.
            receipt: its content.

        Raises:
            CorruptArtifact: they differ, one is missing, or it is not a receipt.
        """
        for suffix, key in ((".safetensors", "rows_digest"), (".parquet", "sidecar_digest")):
            try:
                expected: str = receipt[key]
            except (KeyError, TypeError) as error:
                raise not_a_receipt(path) from error
            file = path.with_suffix(suffix)
            _compare(file, _digest_of_file(file), expected)

    def passages(self, passage_ids: Sequence[int] | NDArray[np.int64]) -> list[Passage]:
        """The passages of the given ids, in the order given; of a purged one nothing but the id is left.

        Raises:
            NotFound: an id is out of range.
        """
        wanted = self._locate(passage_ids)
        found: dict[tuple[int, int], Passage] = {}
        rows_of: dict[tuple[int, int], set[int]] = {}
        for shard, row in wanted:
            rows_of.setdefault((shard, row // ROW_GROUP), set()).add(row % ROW_GROUP)
        groups = sorted(rows_of)
        for group, table in zip(groups, each(self.folder, lambda group: self._read_group(*group), groups), strict=True):
            # A group is read as a whole; only what is wanted of it becomes Python objects.
            rows = sorted(rows_of[group])
            for row, passage in zip(rows, table.take(rows).to_pylist(), strict=True):
                found[group[0], group[1] * ROW_GROUP + row] = Passage(
                    passage_id=passage["passage_id"],
                    doc_id=passage["doc_id"],
                    text=passage["text"],
                    source=passage["source"],
                    metadata=json.loads(passage["metadata"]),
                    token_start=passage["token_start"],
                    token_end=passage["token_end"],
                    tokens=np.array(passage["tokens"], dtype=np.int32),
                )
        return [found[place] for place in wanted]

    def column(self, name: str) -> NDArray[Any]:
        """One numeric or string column of all sidecars, in passage order."""
        shards = [receipt.shard for receipt in self.receipts]
        tables = each(self.folder, lambda shard: self.shard_column(shard, name), shards)
        values: NDArray[Any] = pa.chunked_array([chunk for table in tables for chunk in table.chunks]).to_numpy()
        return values

    def shard_column(self, shard: int, name: str) -> pa.ChunkedArray:
        """One column of one sidecar, as Arrow holds it."""
        with self._sidecar(shard) as file:
            return file.read(columns=[name]).column(name)

    def _locate(self, passage_ids: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
        """Shard and row within it of every passage."""
        ids = np.asarray(passage_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.num_passages)]
        if len(outside):
            raise NotFound(f"there is no passage {outside[0]}; the index holds passages 0 to {self.num_passages - 1}")
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return list(zip(shards.tolist(), (ids - self.starts[shards]).tolist(), strict=True))

    def _make_path(self, shard: int) -> Location:
        """Of the file of a shard's rows."""
        return stem(self.folder, shard, self.receipts[shard].version).with_suffix(".safetensors")

    def _offset(self, shard: int) -> int:
        if (offset := self._offsets.get(shard)) is None:
            offset = self._offsets[shard] = self._open_header(self.receipts[shard])
        return offset

    def _fetch(self, path: RemotePath, shard: int, *, verify: bool) -> NDArray[np.uint8]:
        """The bytes of all rows; moved once, though they are compared with the digest too."""
        receipt, header = self.receipts[shard], self._offset(shard)
        raw = np.empty(receipt.num_passages * self._row_bytes, dtype=np.uint8)
        head = bytearray(header)
        counts = self._read_into([(path, 0, memoryview(head)), (path, header, raw.data)])
        if verify:
            found = hashlib.sha256(head)
            found.update(raw.data)
            _compare(path, found.hexdigest(), receipt.rows_digest)
            sidecar = path.with_suffix(".parquet")
            _compare(sidecar, _digest_of_file(sidecar), receipt.sidecar_digest)
        return raw[: counts[1]]

    def _read_into(self, pieces: list[tuple[Any, int, memoryview]]) -> list[int]:
        try:
            return self._ranges.read_into(pieces)
        except NotFound as error:
            raise CorruptArtifact(f"{error}, a part of these rows; {_AGAIN}") from error

    @contextmanager
    def _sidecar(self, shard: int) -> Iterator[pq.ParquetFile]:
        path, receipt = self._path(shard).with_suffix(".parquet"), self.receipts[shard]
        state = _state(path)
        if state is not None and state != self._sidecar_states.get(shard, _UNKNOWN):
            _compare(path, _digest_of_file(path), receipt.sidecar_digest)
            self._sidecar_states[shard] = state
        try:
            if isinstance(path, RemotePath):
                size, footer = self._footers(path)
                opened = pq.ParquetFile(
                    path.ranged(size), metadata=footer, pre_buffer=True, page_checksum_verification=True
                )
            else:
                opened = pq.ParquetFile(path, page_checksum_verification=True)
            with opened as file:
                if not file.schema_arrow.equals(SIDECAR_SCHEMA):
                    raise _corrupt(path, "it has other columns")
                if file.metadata.num_rows != receipt.num_passages:
                    raise _corrupt(path, f"it holds {file.metadata.num_rows:,} passages")
                yield file
        except (FileNotFoundError, NotFound) as error:
            raise _corrupt(path, "the file is missing") from error
        # Arrow reports damaged bytes as any of these, and what the system refuses with its number.
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise _unreadable(path, error) from error
            raise _corrupt(path, "it is unreadable") from error

    @staticmethod
    def _read_footer(path: RemotePath) -> tuple[int, pq.FileMetaData]:
        size = path.store.size(path.key)
        return size, pq.read_metadata(path.ranged(size))

    def _read_checksums(self, shard: int) -> NDArray[np.uint32]:
        found: NDArray[np.uint32] = self.shard_column(shard, "crc32").to_numpy()
        return found

    def _read_group(self, shard: int, group: int) -> pa.Table:
        with self._sidecar(shard) as file:
            return file.read_row_group(group)

    def _open_header(self, receipt: Receipt) -> int:
        """Validate the header and size of a shard; returns the offset of its first row."""
        path = self._path(receipt.shard)
        try:
            with _reading(path), path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                found = json.loads(stream.read(min(length, _MAX_HEADER)))["rows"]
                found = {"dtype": found["dtype"], "shape": found["shape"]}
                size = stream.seek(0, os.SEEK_END)
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise self._corrupt(receipt.shard, "its header is unreadable") from error
        expected = {"dtype": _HEADER_NAMES[self.dtype], "shape": [receipt.num_passages, self.dim]}
        if found != expected:
            raise Incompatible(
                f"{str(path)!r} holds {found['dtype']} {found['shape']}, the index expects {expected['dtype']} "
                f"{expected['shape']}; it belongs to another projection or index"
            )
        expected_size = 8 + length + receipt.num_passages * self._row_bytes
        if size != expected_size:
            raise self._corrupt(receipt.shard, f"it has {size:,} bytes, {expected_size:,} expected")
        return int(8 + length)

    def _corrupt(self, shard: int, what: str) -> CorruptArtifact:
        return _corrupt(self._path(shard), what)


def _state(path: Location) -> FileState | None:
    """None for an object, and for a file that is missing: opening it says so."""
    if isinstance(path, RemotePath):
        return None
    try:
        with _reading(path):
            found = path.stat()
    except CorruptArtifact:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest_of_file(path: Location) -> str:
    with _reading(path):
        return file_digest(path)


@contextmanager
def _reading(path: Location) -> Iterator[None]:
    """What the system says of a file, as an error of ours."""
    try:
        yield
    except (FileNotFoundError, NotFound) as error:
        raise _corrupt(path, "the file is missing") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Location, error: OSError) -> NotReady:
    return NotReady(f"{str(path)!r} cannot be read now ({error.strerror}); the same request can succeed once it can be")


def _compare(path: Location, found: str, expected: str) -> None:
    if found != expected:
        raise _corrupt(path, f"its digest is {found[:12]}, its receipt says {expected[:12]}")


def _corrupt(path: Location, what: str) -> CorruptArtifact:
    return CorruptArtifact(f"{str(path)!r} is not what was written: {what}; {_AGAIN}")

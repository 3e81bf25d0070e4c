"""Row shards: the un-whitened gradient rows of a corpus on disk, with the passages they belong to.

    rows/000007.safetensors   one tensor "rows" [n, d], bfloat16 or float32; row i at a computable offset
    rows/000007.parquet       sidecar: passage, tokens, loss, norm and CRC-32 of every row
    rows/000007.json          receipt: counts, digests of both files, where the next shard starts; written last
    rows/complete.json        totals, written when the corpus is finished

`passage_id` is the global row number, so shard and offset follow by arithmetic: every shard but the last holds exactly
`shard_passages` rows. A shard without a receipt does not exist. Rows are read one by one with positioned reads, or
ranged requests where the folder lies in an object store, and each is checked against its CRC, pages of the sidecar
against theirs; whole shards are read in order by `batches`. A local sidecar that is not the file it was when the store
was opened is compared with its digest again. Writing needs a local folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.blobs import Location, RemotePath, each
from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady
from trackstar.passages import Cursor, Passage
from trackstar.ranges import LocalRanges, RangeReader, RemoteRanges
from trackstar.storage import digest_of, file_digest, publish, publish_json, read_json

ROW_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_HEADER_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_SCHEMA = pa.schema(
    [
        ("passage_id", pa.int64()),
        ("doc_id", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("metadata", pa.string()),
        ("token_start", pa.int64()),
        ("token_end", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("loss", pa.float32()),
        ("norm", pa.float32()),
        ("crc32", pa.uint32()),
    ]
)
# Small groups, so that fetching a passage decodes few others.
_ROW_GROUP = 256
_MAX_HEADER = 1 << 20
_AGAIN = "give the index command again with --verify to build this shard anew"
# Of the sidecars in an object store, the footers that are kept; those of local files are read each time.
_KEPT_FOOTERS = 1024
# What tells a local file from another, or from itself before it was written to: device, inode, size, time in ns.
FileState = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a finished shard holds and where the next one starts."""

    shard: int
    num_passages: int
    num_tokens: int
    rows_digest: str
    sidecar_digest: str
    next_cursor: Cursor


def write_shard(
    folder: Path,
    shard: int,
    passages: Sequence[Passage],
    rows_ND: Tensor,
    loss_N: Tensor,
    *,
    dtype: str,
    next_cursor: Cursor,
) -> Receipt:
    """Publish one shard: rows, sidecar, then the receipt that makes it exist.

    Args:
        folder: the `rows` folder.
        shard: number of the shard.
        passages: the N passages.
        rows_ND: float32 [N, d]; stored as `dtype`, rounded to nearest even.
        loss_N: float32 [N].
        dtype: "bfloat16" or "float32".
        next_cursor: where the next shard starts in the corpus.
    """
    stored_ND = rows_ND.cpu().to(ROW_DTYPES[dtype]).contiguous()
    raw = stored_ND.view(torch.uint8).numpy()
    columns: dict[str, Any] = {
        "passage_id": [passage.passage_id for passage in passages],
        "doc_id": [passage.doc_id for passage in passages],
        "text": [passage.text for passage in passages],
        "source": [passage.source for passage in passages],
        "metadata": [json.dumps(dict(passage.metadata), sort_keys=True, ensure_ascii=False) for passage in passages],
        "token_start": [passage.token_start for passage in passages],
        "token_end": [passage.token_end for passage in passages],
        "tokens": [passage.tokens for passage in passages],
        "loss": loss_N.cpu().numpy(),
        "norm": rows_ND.norm(dim=1).cpu().numpy(),
        "crc32": np.array([zlib.crc32(row) for row in raw], dtype=np.uint32),
    }
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(columns, schema=_SCHEMA),
        buffer,
        compression="zstd",
        row_group_size=_ROW_GROUP,
        write_page_checksum=True,
    )
    stem = folder / f"{shard:06d}"
    rows_digest = publish(stem.with_suffix(".safetensors"), safetensors.torch.save({"rows": stored_ND}))
    sidecar_digest = publish(stem.with_suffix(".parquet"), buffer.getvalue())
    receipt = Receipt(
        shard=shard,
        num_passages=len(passages),
        num_tokens=sum(len(passage.tokens) for passage in passages),
        rows_digest=rows_digest,
        sidecar_digest=sidecar_digest,
        next_cursor=next_cursor,
    )
    publish_json(stem.with_suffix(".json"), asdict(receipt))
    return receipt


def finished_shards(folder: Location) -> list[Receipt]:
    """Receipts of the shards 0, 1, … that exist without a gap.

    Raises:
        CorruptArtifact: a receipt is unreadable.
    """
    receipts: list[Receipt] = []
    step = folder.store.concurrency if isinstance(folder, RemotePath) else 1
    while True:
        first = len(receipts)
        paths = [_stem(folder, shard).with_suffix(".json") for shard in range(first, first + step)]
        for receipt in each(folder, _read_receipt, paths):
            if receipt is None:
                return receipts
            receipts.append(receipt)


def _read_receipt(path: Location) -> Receipt | None:
    try:
        content = read_json(path)
        return Receipt(**{**content, "next_cursor": Cursor(*content["next_cursor"])})
    except NotFound:
        return None
    except (KeyError, TypeError) as error:
        raise _not_a_receipt(path) from error


def _not_a_receipt(path: Location) -> CorruptArtifact:
    return CorruptArtifact(f"{str(path)!r} is not a shard receipt; delete it to build the shard again")


def mark_complete(folder: Path, *, shard_passages: int, dim: int, dtype: str) -> None:
    """Publish the totals of a finished corpus."""
    receipts = finished_shards(folder)
    publish_json(
        folder / "complete.json",
        {
            "num_passages": sum(receipt.num_passages for receipt in receipts),
            "num_tokens": sum(receipt.num_tokens for receipt in receipts),
            "num_shards": len(receipts),
            "shard_passages": shard_passages,
            "dim": dim,
            "dtype": dtype,
            "digest": _digest(receipts),
        },
    )


def _digest(receipts: Sequence[Receipt]) -> str:
    return digest_of([[receipt.rows_digest, receipt.sidecar_digest] for receipt in receipts])


def _stem(folder: Location, shard: int) -> Location:
    return folder / f"{shard:06d}"


class RowStore:
    """Read access to finished rows; safe to use from several threads, but not while `close` runs.

    Raises:
        NotReady: the rows are not complete, or what holds them does not answer or cannot be read.
        CorruptArtifact: a file does not have the size, shape or type its receipt and totals say.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._ranges: RangeReader[Any] = RemoteRanges(folder.store) if isinstance(folder, RemotePath) else LocalRanges()
        try:
            totals = read_json(folder / "complete.json")
        except NotFound as error:
            raise NotReady(f"the rows in {str(folder)!r} are not complete; give the index command again") from error
        try:
            self.num_passages: int = totals["num_passages"]
            self.num_tokens: int = totals["num_tokens"]
            self.shard_passages: int = totals["shard_passages"]
            self.dim: int = totals["dim"]
            self.dtype: str = totals["dtype"]
            self.digest: str = totals["digest"]
            self.num_shards: int = totals["num_shards"]
        except (KeyError, TypeError) as error:
            raise CorruptArtifact(
                f"{str(folder / 'complete.json')!r} does not hold the totals of the rows; delete it and give the index "
                "command again"
            ) from error
        self.receipts = finished_shards(folder)
        if len(self.receipts) != self.num_shards:
            raise CorruptArtifact(
                f"{str(folder)!r} holds receipts of {len(self.receipts)} shards but {self.num_shards} were finished; "
                "give the index command again to rebuild what is missing"
            )
        if _digest(self.receipts) != self.digest:
            raise CorruptArtifact(
                f"the receipts in {str(folder)!r} are not those of the finished rows (digest {self.digest[:12]}); "
                "delete complete.json there and give the index command again"
            )
        self._row_bytes = self.dim * ROW_DTYPES[self.dtype].itemsize
        self._paths = [_stem(folder, receipt.shard).with_suffix(".safetensors") for receipt in self.receipts]
        self._offsets = each(folder, self._open_header, self.receipts)
        self._sidecars = [path.with_suffix(".parquet") for path in self._paths]
        self._sidecar_states = [_state(path) for path in self._sidecars]
        self._checksums = lru_cache(maxsize=4096)(self._read_checksums)
        self._footers = lru_cache(maxsize=_KEPT_FOOTERS)(self._read_footer)

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
        places = [self._locate(int(passage_id)) for passage_id in passage_ids]
        buffer = np.empty((len(places), self._row_bytes), dtype=np.uint8)
        views = [memoryview(row) for row in buffer]
        shards = sorted({shard for shard, _ in places})
        checksums = dict(zip(shards, each(self.folder, self._checksums, shards), strict=True))
        counts = self._read_into(
            [
                (self._paths[shard], self._offsets[shard] + row * self._row_bytes, view)
                for (shard, row), view in zip(places, views, strict=True)
            ]
        )
        for (shard, row), view, count in zip(places, views, counts, strict=True):
            if count != self._row_bytes or zlib.crc32(view) != checksums[shard][row]:
                passage_id = shard * self.shard_passages + row
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
            yield receipt.shard * self.shard_passages, self.shard(receipt.shard, verify=verify)

    def shard(self, shard: int, *, verify: bool = False) -> Tensor:
        """All rows [n, d] of one shard in their stored type."""
        path, count = self._paths[shard], self.receipts[shard].num_passages
        if isinstance(path, RemotePath):
            raw = self._fetch(path, shard, verify=verify)
        else:
            if verify:
                self.verify(shard)
            with _reading(path):
                raw = np.fromfile(path, dtype=np.uint8, offset=self._offsets[shard])
        if raw.size != count * self._row_bytes:
            raise self._corrupt(shard, f"it holds {raw.size:,} bytes of rows, {count * self._row_bytes:,} expected")
        return torch.from_numpy(raw).view(ROW_DTYPES[self.dtype]).view(count, self.dim)

    def state(self, shard: int) -> FileState | None:
        """Changes when the file of a shard's rows is replaced or written to; None for objects, which never are."""
        return _state(self._paths[shard])

    def verify(self, shard: int) -> None:
        """Compare both files of a shard with the digests in its receipt; raises as `verify_files`."""
        receipt = self.receipts[shard]
        digests = {"rows_digest": receipt.rows_digest, "sidecar_digest": receipt.sidecar_digest}
        self.verify_files(self._paths[shard].with_suffix(".json"), digests)

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
                raise _not_a_receipt(path) from error
            file = path.with_suffix(suffix)
            _compare(file, _digest_of_file(file), expected)

    def passages(self, passage_ids: Sequence[int] | NDArray[np.int64]) -> list[Passage]:
        """The passages of the given ids, in the order given.

        Raises:
            NotFound: an id is out of range.
        """
        wanted = [self._locate(int(passage_id)) for passage_id in passage_ids]
        found: dict[tuple[int, int], Passage] = {}
        rows_of: dict[tuple[int, int], set[int]] = {}
        for shard, row in wanted:
            rows_of.setdefault((shard, row // _ROW_GROUP), set()).add(row % _ROW_GROUP)
        groups = sorted(rows_of)
        for group, table in zip(groups, each(self.folder, lambda group: self._read_group(*group), groups), strict=True):
            # A group is read as a whole; only what is wanted of it becomes Python objects.
            for passage in table.take(sorted(rows_of[group])).to_pylist():
                found[self._locate(passage["passage_id"])] = Passage(
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

    def _locate(self, passage_id: int) -> tuple[int, int]:
        if not 0 <= passage_id < self.num_passages:
            raise NotFound(f"there is no passage {passage_id}; the index holds passages 0 to {self.num_passages - 1}")
        return divmod(passage_id, self.shard_passages)

    def _fetch(self, path: RemotePath, shard: int, *, verify: bool) -> NDArray[np.uint8]:
        """The bytes of all rows; moved once, though they are compared with the digest too."""
        receipt, header = self.receipts[shard], self._offsets[shard]
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
        path, receipt = self._sidecars[shard], self.receipts[shard]
        state = _state(path)
        if state != self._sidecar_states[shard]:
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
                if not file.schema_arrow.equals(_SCHEMA):
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
        path = self._paths[receipt.shard]
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
        return _corrupt(self._paths[shard], what)


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

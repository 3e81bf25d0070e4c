"""Shards of gradient rows as files: how one is written, and what makes a set of them a finished part of an index.

    rows/000007.safetensors   one tensor "rows" [n, d], bfloat16 or float32; row i at a computable offset
    rows/000007.parquet       sidecar: passage, tokens, loss, norm and CRC-32 of every row
    rows/000007.json          receipt: counts and digests of both files; written last
    rows/part-000.json        totals of a part and the corpus it was made from; written when all its shards are there
    rows/part-000.parquet     the receipts of its shards

A part is what one corpus gave. Parts follow each other, shards and passages being numbered on, and a part that is
finished never changes, so that an index grows without touching what generations stand on. Every shard of a part but its
last holds `shard_passages` rows. A shard without a receipt does not exist.

Deleted passages are purged by writing a new version of their shard, `000007-<version>`, beside the old one: same ids,
but zeros for a row and nothing for a text. Which version counts is for the generation to say.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.blobs import Location, RemotePath
from trackstar.errors import CorruptArtifact, NotFound
from trackstar.passages import Passage
from trackstar.storage import publish, publish_json, read_json

Place = TypeVar("Place", Path, RemotePath, Location)

ROW_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SIDECAR_SCHEMA = pa.schema(
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
ROW_GROUP = 256
_RECEIPTS = pa.schema(
    [
        ("shard", pa.int64()),
        ("num_passages", pa.int64()),
        ("num_tokens", pa.int64()),
        ("rows_digest", pa.string()),
        ("sidecar_digest", pa.string()),
        ("version", pa.string()),
    ]
)
_RECEIPT_NAME = re.compile(r"(\d{6,})(?:-(\w+))?\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a finished shard holds; `version` is empty for the one that was encoded."""

    shard: int
    num_passages: int
    num_tokens: int
    rows_digest: str
    sidecar_digest: str
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A finished part: the shards first_shard, first_shard + 1, … and the corpus they were made from.

    `corpus` holds the corpus's settings and fingerprint; `digest` is that of the receipts.
    """

    number: int
    first_shard: int
    num_shards: int
    num_passages: int
    num_tokens: int
    shard_passages: int
    dim: int
    dtype: str
    digest: str
    corpus: Mapping[str, Any]


def stem(folder: Place, shard: int, version: str = "") -> Place:
    """Path of a shard's files without their endings."""
    return folder / (f"{shard:06d}-{version}" if version else f"{shard:06d}")


def write_shard(
    folder: Location,
    shard: int,
    passages: Sequence[Passage],
    rows_ND: Tensor,
    loss_N: Tensor,
    *,
    dtype: str,
    version: str = "",
) -> Receipt:
    """Publish one shard: rows, sidecar, then the receipt that makes it exist.

    Args:
        folder: the `rows` folder.
        shard: number of the shard.
        passages: the N passages.
        rows_ND: float32 [N, d]; stored as `dtype`, rounded to nearest even.
        loss_N: float32 [N].
        dtype: "bfloat16" or "float32".
        version: of a shard that takes the place of another.
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
        pa.table(columns, schema=SIDECAR_SCHEMA),
        buffer,
        compression="zstd",
        row_group_size=ROW_GROUP,
        write_page_checksum=True,
    )
    path = stem(folder, shard, version)
    rows_digest = publish(path.with_suffix(".safetensors"), safetensors.torch.save({"rows": stored_ND}))
    sidecar_digest = publish(path.with_suffix(".parquet"), buffer.getvalue())
    receipt = Receipt(
        shard=shard,
        num_passages=len(passages),
        num_tokens=sum(len(passage.tokens) for passage in passages),
        rows_digest=rows_digest,
        sidecar_digest=sidecar_digest,
        version=version,
    )
    publish_json(path.with_suffix(".json"), asdict(receipt))
    return receipt


def blank(passage: Passage) -> Passage:
    """What stands in the place of a passage that was purged; nothing else has no tokens."""
    return replace(
        passage, doc_id="", text="", source="", metadata={}, token_start=0, token_end=0, tokens=passage.tokens[:0]
    )


def read_receipt(folder: Location, shard: int, version: str = "") -> Receipt | None:
    """The receipt of a shard; None if it does not exist.

    Raises:
        CorruptArtifact: it is unreadable.
    """
    path = stem(folder, shard, version).with_suffix(".json")
    try:
        return Receipt(**read_json(path))
    except NotFound:
        return None
    except TypeError as error:
        raise not_a_receipt(path) from error


def not_a_receipt(path: Location) -> CorruptArtifact:
    """The error about a receipt of another form."""
    return CorruptArtifact(f"{str(path)!r} is not a shard receipt; delete it to build the shard again")


def finished_shards(folder: Location) -> list[int]:
    """Numbers of the shards that have a receipt, ascending; one look at the folder, whatever their number."""
    return sorted(shard for shard, version in _receipts(folder) if not version)


def purged_shards(folder: Location) -> list[tuple[int, str]]:
    """Numbers and versions of the shards that were purged, ascending."""
    return sorted((shard, version) for shard, version in _receipts(folder) if version)


def complete_part(
    folder: Location,
    number: int,
    receipts: Sequence[Receipt],
    *,
    first_shard: int,
    shard_passages: int,
    dim: int,
    dtype: str,
    corpus: Mapping[str, Any],
) -> Part:
    """Publish a finished part.

    Args:
        folder: the `rows` folder.
        number: of the part.
        receipts: of all its shards, in order.
        first_shard: number of the first of them.
        shard_passages: rows of every shard but the last.
        dim: d.
        dtype: of the stored rows.
        corpus: settings and fingerprint.
    """
    part = Part(
        number=number,
        first_shard=first_shard,
        num_shards=len(receipts),
        num_passages=sum(receipt.num_passages for receipt in receipts),
        num_tokens=sum(receipt.num_tokens for receipt in receipts),
        shard_passages=shard_passages,
        dim=dim,
        dtype=dtype,
        digest=digest_of_receipts(receipts),
        corpus=dict(corpus),
    )
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([asdict(receipt) for receipt in receipts], schema=_RECEIPTS), buffer, compression="zstd"
    )
    publish(_part_path(folder, number).with_suffix(".parquet"), buffer.getvalue())
    publish_json(_part_path(folder, number), asdict(part))
    return part


def read_part(folder: Location, number: int) -> Part | None:
    """A part's totals; None while it is not finished.

    Raises:
        CorruptArtifact: they are unreadable.
    """
    path = _part_path(folder, number)
    try:
        return Part(**read_json(path))
    except NotFound:
        return None
    except TypeError as error:
        raise CorruptArtifact(
            f"{str(path)!r} does not hold the totals of the rows; delete it and give the index command again"
        ) from error


def read_parts(folder: Location) -> list[Part]:
    """The finished parts 0, 1, … without a gap."""
    parts: list[Part] = []
    while (part := read_part(folder, len(parts))) is not None:
        parts.append(part)
    return parts


def read_receipts(folder: Location, part: Part) -> list[Receipt]:
    """The receipts of a part's shards, in order.

    Raises:
        CorruptArtifact: they are missing, unreadable or those of other rows.
    """
    path = _part_path(folder, part.number).with_suffix(".parquet")
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        # Column by column: a dictionary for each shard would outlive its use in the memory of the process.
        columns = (table[name].to_pylist() for name in _RECEIPTS.names)
        receipts = [Receipt(**dict(zip(_RECEIPTS.names, row, strict=True))) for row in zip(*columns, strict=True)]
    except (NotFound, OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise CorruptArtifact(
            f"{str(path)!r} cannot be read; delete {_part_path(folder, part.number).name} and give the index command "
            "again"
        ) from error
    if digest_of_receipts(receipts) != part.digest:
        raise CorruptArtifact(
            f"the receipts in {str(path)!r} are not those of the finished rows (digest {part.digest[:12]}); delete "
            f"{_part_path(folder, part.number).name} there and give the index command again"
        )
    return receipts


def digest_of_receipts(receipts: Iterable[Receipt]) -> str:
    """`storage.digest_of` the digests of everything that rows are, without holding them all as text."""
    found = hashlib.sha256(b"[")
    for number, receipt in enumerate(receipts):
        pair = json.dumps([receipt.rows_digest, receipt.sidecar_digest], separators=(",", ":"))
        found.update((f",{pair}" if number else pair).encode())
    found.update(b"]")
    return found.hexdigest()


def starts_of(counts: Iterable[int]) -> NDArray[np.int64]:
    """First passage id of every shard, and the one behind the last: int64 [shards + 1]."""
    counts_S = np.fromiter(counts, dtype=np.int64)
    starts: NDArray[np.int64] = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts_S)])
    return starts


def _receipts(folder: Location) -> Iterator[tuple[int, str]]:
    """Shards and versions that have a receipt; "" for the version that was encoded."""
    names = folder.store.names(folder.key) if isinstance(folder, RemotePath) else _names(folder)
    return ((int(match[1]), match[2] or "") for name in names if (match := _RECEIPT_NAME.fullmatch(name)))


def _part_path(folder: Location, number: int) -> Location:
    return folder / f"part-{number:03d}.json"


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []

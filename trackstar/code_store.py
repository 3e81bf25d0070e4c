"""The codes and norms of a generation on disk, and how a coarse index is filled from them. It needs no torch.

    generations/<id>/generation.json           counts, and digests of the files below
    generations/<id>/codes.parquet             shards, how many passages and codes each has, digests of the code files
    generations/<id>/codes/000007.safetensors  "ids" [c], "codes" [c, .] and "norms" float32 [n] of a shard's rows
    generations/<id>/norms.safetensors         norms of all rows

Codes are compared with their digests before they are used, norms with theirs. A coarse index is derived from the codes
and can be filled again at any time; filling one twice changes nothing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from trackstar.blobs import Location, RemotePath, local
from trackstar.catalog import Catalog
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.codes import CodeSpec
from trackstar.errors import CorruptArtifact, NotFound, NotReady
from trackstar.storage import file_digest, read_json
from trackstar.tensor_files import load_arrays

CODE_MANIFEST = "codes.parquet"
MANIFEST_SCHEMA = pa.schema(
    [("shard", pa.int64()), ("passages", pa.int64()), ("codes", pa.int64()), ("digest", pa.string())]
)


def code_path(home: Location, shard: int) -> Location:
    """File of a shard's codes in a generation's folder."""
    return home / "codes" / f"{shard:06d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeShard:
    """Codes [c, .] of the passages `passage_ids`, int64 [c], ascending; norms float32 [n] of all rows of the shard.

    Passages that were purged have no code.
    """

    passage_ids: NDArray[np.int64]
    codes: NDArray[Any]
    norms: NDArray[np.float32]


class CodeStore:
    """Codes and norms of one finished generation.

    Args:
        home: the generation's folder.
        facts: what its generation.json says.

    Raises:
        CorruptArtifact: what describes the codes cannot be read.
    """

    def __init__(self, home: Location, facts: dict[str, Any]) -> None:
        self.home = home
        try:
            self.num_passages: int = facts["num_passages"]
            self.num_codes: int = facts["num_codes"]
            self._digests: dict[str, str] = facts["files"]
        except (KeyError, TypeError) as error:
            raise CorruptArtifact(
                f"{str(home / 'generation.json')!r} is not what was written; give the index command again"
            ) from error
        data = self.verify(CODE_MANIFEST) or (home / CODE_MANIFEST).read_bytes()
        manifest = pq.read_table(io.BytesIO(data))
        self.num_shards = manifest.num_rows
        self._passages: list[int] = manifest["passages"].to_pylist()
        self._codes: list[int] = manifest["codes"].to_pylist()
        self._code_digests: list[str] = manifest["digest"].to_pylist()
        self._stops = np.cumsum(self._passages)

    @classmethod
    def open(cls, catalog: Catalog, name: str) -> CodeStore:
        """The codes of the catalog's generation `name`.

        Raises:
            NotFound: no finished generation of that name.
            CorruptArtifact: what describes it cannot be read.
        """
        home = catalog.home(name)
        return cls(home, read_json(home / "generation.json"))

    def digest(self, number: int) -> str:
        """Of one shard's file."""
        return self._code_digests[number]

    def shard(self, number: int) -> CodeShard:
        """One shard, compared with its digest.

        Raises:
            CorruptArtifact: it is missing, or not what was written.
        """
        path = code_path(self.home, number)
        try:
            data = path.read_bytes()
        except (NotFound, FileNotFoundError) as error:
            raise CorruptArtifact(
                f"{str(path)!r} is missing; delete {str(self.home)!r} and give the index command again"
            ) from error
        if hashlib.sha256(data).hexdigest() != self._code_digests[number]:
            raise self._altered(f"codes/{path.name}")
        arrays = safetensors.numpy.load(data)
        if len(arrays["ids"]) != self._codes[number] or len(arrays["norms"]) != self._passages[number]:
            raise self._altered(f"codes/{path.name}")
        return CodeShard(passage_ids=arrays["ids"], codes=arrays["codes"], norms=arrays["norms"])

    def shards(self) -> Iterator[CodeShard]:
        """Every shard in order, one in memory at a time; raises as `shard`."""
        return map(self.shard, range(self.num_shards))

    def stop(self, number: int) -> int:
        """How many passages the shards up to this one have."""
        return int(self._stops[number])

    def norms(self) -> NDArray[np.float32]:
        """Norms [N] of all passages; codes are not read.

        Raises:
            CorruptArtifact: they are missing, or not what was written.
        """
        name = "norms.safetensors"
        try:
            data = self.verify(name)
            arrays = load_arrays(self.home / name) if data is None else safetensors.numpy.load(data)
            norms_N: NDArray[np.float32] = arrays["norms"]
        except (NotFound, FileNotFoundError, KeyError, SafetensorError) as error:
            raise self._altered(name) from error
        return norms_N

    def verify(self, name: str) -> bytes | None:
        """Compare one of the generation's files with its digest; its bytes if they came from an object store.

        Raises:
            CorruptArtifact: it is missing, or not what was written.
        """
        path = self.home / name
        try:
            data = path.read_bytes() if isinstance(path, RemotePath) else None
            found = file_digest(path) if data is None else hashlib.sha256(data).hexdigest()
        except NotFound as error:
            raise self._altered(name) from error
        if found != self._digests.get(name):
            raise self._altered(name)
        return data

    def _altered(self, name: str) -> CorruptArtifact:
        return CorruptArtifact(
            f"{str(self.home / name)!r} is not what was written; delete {str(self.home)!r} and give the index command "
            "again, the rows are kept"
        )


def fill(
    index: CoarseIndex, store: CodeStore, on_rows: Callable[[int, int], None] = lambda _done, _total: None
) -> None:
    """Add all codes to an index that was made for them.

    Args:
        index: empty, or left from an interrupted `fill`.
        store: the codes.
        on_rows: called with (passages done, passages in total).

    Raises:
        CorruptArtifact: a shard is not what was written, or the index holds another number of passages than the store.
        NotReady: the index's server is down.
    """
    for number, shard in enumerate(store.shards()):
        if len(shard.passage_ids):
            index.add(shard.passage_ids, shard.codes)
        on_rows(store.stop(number), store.num_passages)
    if (count := index.count()) != store.num_codes:
        raise CorruptArtifact(f"the coarse index holds {count} passages after importing {store.num_codes}")


def open_coarse(codes: CodeStore, *, store: str, spec: CodeSpec, dim: int) -> CoarseIndex:
    """The coarse index that needs no server: codes held in memory, or Milvus Lite's database in the index folder.

    Args:
        codes: of the generation.
        store: "milvus-lite", or one of which the codes are held in memory here: "memory", and "milvus", whose server
            is for those to ask who are told where it is.
        spec: kind and size of the codes.
        dim: d, dimension of the vectors they stand for.

    Raises:
        NotReady: Milvus Lite was not filled, or is held by another process.
        CorruptArtifact: a shard is not what was written, or the database does not hold every passage.
    """
    if store != "milvus-lite":
        index = MemoryIndex(spec, dim)
        fill(index, codes)
        return index
    # Only where it is used: a gateway over a Milvus server goes without the embedded one.
    from trackstar.milvus import MilvusLiteIndex

    name, folder = codes.home.name, codes.home / "coarse"
    if not (folder / "receipt.json").is_file():
        raise NotReady(f"generation {name!r} has no coarse index; give the index command again")
    opened = MilvusLiteIndex.open(local(codes.home) / "coarse" / "milvus.db", dim=dim, size=spec.size)
    if (count := opened.count()) != codes.num_codes:
        opened.close()
        raise CorruptArtifact(
            f"the coarse index of generation {name!r} holds {count} of {codes.num_codes} passages; "
            f"delete {str(folder)!r} and give the index command again"
        )
    return opened

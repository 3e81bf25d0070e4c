"""The codes and norms of a generation on disk, and how a coarse index is filled from them. It needs no torch.

    generations/<id>/generation.json           digests of the files, and of all norms together
    generations/<id>/codes/000007.safetensors  "codes" [n, .] and "norms" float32 [n] of a shard's rows
    rows/complete.json                         how many passages there are, and in a shard

Codes are compared with their digests before they are used, norms with theirs. A coarse index is derived from the codes
and can be filled again at any time; filling one twice changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from trackstar.blobs import Location, RemotePath, each, local
from trackstar.catalog import Catalog
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.codes import CodeSpec
from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady
from trackstar.storage import file_digest, read_json
from trackstar.tensor_files import load_arrays


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodeShard:
    """Codes [n, .] and norms float32 [n] of the passages first, first + 1, …"""

    first: int
    codes: NDArray[Any]
    norms: NDArray[np.float32]

    @property
    def passage_ids(self) -> NDArray[np.int64]:
        """Int64 [n]."""
        return np.arange(self.first, self.first + len(self.norms), dtype=np.int64)


class CodeStore:
    """Codes and norms of one finished generation.

    Args:
        home: the generation's folder.
        facts: what its generation.json says.
        num_passages: N, of the rows.
        shard_passages: passages in every shard but the last.
    """

    def __init__(self, home: Location, facts: dict[str, Any], *, num_passages: int, shard_passages: int) -> None:
        self.home = home
        self.num_passages = num_passages
        self.shard_passages = shard_passages
        self.num_shards = -(-num_passages // shard_passages)
        self._digests: dict[str, str] = facts["files"]
        self._norms_digest: str = facts["norms"]

    @classmethod
    def open(cls, catalog: Catalog, name: str) -> CodeStore:
        """The codes of the catalog's generation `name`.

        Raises:
            NotFound: no finished generation of that name.
            Incompatible: it was built on other rows.
            CorruptArtifact: what describes it cannot be read.
        """
        home, totals_path = catalog.home(name), catalog.root / "rows" / "complete.json"
        facts, totals = read_json(home / "generation.json"), read_json(totals_path)
        try:
            if facts["rows"] != totals["digest"]:
                raise Incompatible(
                    f"generation {name!r} was built on rows {facts['rows'][:12]}, these rows are "
                    f"{totals['digest'][:12]}; build it again"
                )
            return cls(home, facts, num_passages=totals["num_passages"], shard_passages=totals["shard_passages"])
        except (KeyError, TypeError) as error:
            raise CorruptArtifact(
                f"{str(home / 'generation.json')!r} or {str(totals_path)!r} is not what was written; give the index "
                "command again"
            ) from error

    def shard(self, number: int) -> CodeShard:
        """One shard, compared with its digest.

        Raises:
            CorruptArtifact: it is missing, or not what was written.
        """
        arrays = self._read(number, self._checked)
        return CodeShard(first=number * self.shard_passages, codes=arrays["codes"], norms=arrays["norms"])

    def shards(self) -> Iterator[CodeShard]:
        """Every shard in order, one in memory at a time; raises as `shard`."""
        return map(self.shard, range(self.num_shards))

    def norms(self) -> NDArray[np.float32]:
        """Norms [N] of all passages; codes are not read.

        Raises:
            CorruptArtifact: a shard is missing, or its norms are not what was written.
        """
        norms = each(
            self.home,
            lambda number: self._read(number, lambda name: load_arrays(self.home / name, ("norms",)))["norms"],
            range(self.num_shards),
        )
        norms_N = np.concatenate(norms)
        if hashlib.sha256(norms_N.tobytes()).hexdigest() != self._norms_digest:
            raise self._altered("codes")
        return norms_N

    def verify(self, name: str) -> bytes | None:
        """Compare one of the generation's files with its digest; its bytes if they came from an object store.

        Raises:
            NotFound: it is missing.
            CorruptArtifact: it is not what was written.
        """
        path = self.home / name
        data = path.read_bytes() if isinstance(path, RemotePath) else None
        found = file_digest(path) if data is None else hashlib.sha256(data).hexdigest()
        if found != self._digests[name]:
            raise self._altered(name)
        return data

    def _read(self, number: int, load: Callable[[str], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        name = f"codes/{number:06d}.safetensors"
        path = self.home / name
        try:
            found = load(name)
        except (NotFound, FileNotFoundError) as error:
            raise CorruptArtifact(
                f"{str(path)!r} is missing; delete {str(self.home)!r} and give the index command again"
            ) from error
        except SafetensorError as error:
            raise CorruptArtifact(f"{str(path)!r} is unreadable; delete {str(self.home)!r} to rebuild it") from error
        num = min(self.shard_passages, self.num_passages - number * self.shard_passages)
        if any(len(array) != num for array in found.values()):
            raise CorruptArtifact(
                f"{str(path)!r} does not hold one norm for every row; delete {str(self.home)!r} to rebuild it"
            )
        return found

    def _checked(self, name: str) -> dict[str, NDArray[Any]]:
        data = self.verify(name)
        return load_arrays(self.home / name) if data is None else safetensors.numpy.load(data)

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
    for shard in store.shards():
        index.add(shard.passage_ids, shard.codes)
        on_rows(shard.first + len(shard.norms), store.num_passages)
    if (count := index.count()) != store.num_passages:
        raise CorruptArtifact(f"the coarse index holds {count} passages after importing {store.num_passages}")


def open_coarse(codes: CodeStore, *, store: str, spec: CodeSpec, dim: int) -> CoarseIndex:
    """The coarse index that lies in the index folder: codes held in memory, or Milvus Lite's database.

    Args:
        codes: of the generation.
        store: "memory" or "milvus-lite".
        spec: kind and size of the codes.
        dim: d, dimension of the vectors they stand for.

    Raises:
        NotReady: Milvus Lite was not filled, or is held by another process.
        CorruptArtifact: a shard is not what was written, or the database does not hold every passage.
    """
    if store == "memory":
        index = MemoryIndex(spec, dim)
        fill(index, codes)
        return index
    # Only where it is used: a gateway over a Milvus server goes without the embedded one.
    from trackstar.milvus import MilvusLiteIndex

    name, folder = codes.home.name, codes.home / "coarse"
    if not (folder / "receipt.json").is_file():
        raise NotReady(f"generation {name!r} has no coarse index; give the index command again")
    opened = MilvusLiteIndex.open(local(codes.home) / "coarse" / "milvus.db", dim=dim, size=spec.size)
    if (count := opened.count()) != codes.num_passages:
        opened.close()
        raise CorruptArtifact(
            f"the coarse index of generation {name!r} holds {count} of {codes.num_passages} passages; "
            f"delete {str(folder)!r} and give the index command again"
        )
    return opened

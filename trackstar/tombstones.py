"""Deleted documents: which passages no answer may show any more, from the moment they are deleted.

    deleted.parquet     passage_id and doc_id of every deleted passage

Ids of passages never change, so a deletion holds for every generation of the index, those built later included. It is
a filter: rows and texts stay on disk until a generation is built that purges them, and what is then unused is
collected. Whoever answers looks at the file again every few seconds.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trackstar.blobs import Location
from trackstar.errors import CorruptArtifact, NotFound
from trackstar.locks import writing
from trackstar.rows import RowStore
from trackstar.storage import digest_of, publish

_NAME = "deleted.parquet"
_SCHEMA = pa.schema([("passage_id", pa.int64()), ("doc_id", pa.string())])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deleted:
    """Deleted passages: ids int64 [n], ascending, and the documents they were of."""

    passage_ids: NDArray[np.int64]
    doc_ids: tuple[str, ...]

    @property
    def digest(self) -> str | None:
        """Of the ids; None if there are none."""
        return digest_of(self.passage_ids.tolist()) if len(self.passage_ids) else None

    def without(self, passage_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the ids that are not deleted, in their order."""
        if not len(self.passage_ids):
            return passage_ids
        return passage_ids[~np.isin(passage_ids, self.passage_ids)]

    def mask(self, num_passages: int) -> NDArray[np.bool_] | None:
        """Which of the passages 0, 1, … may be shown, bool [N]; None if all may."""
        gone = self.passage_ids[self.passage_ids < num_passages]
        if not len(gone):
            return None
        mask_N = np.ones(num_passages, dtype=np.bool_)
        mask_N[gone] = False
        return mask_N


class Tombstones:
    """The deletions of an index as they are now, give or take `refresh_seconds`; safe to use from several threads.

    Args:
        root: the index folder.
        refresh_seconds: how long a look at the list is good for.
        clock: monotonic seconds.
    """

    def __init__(
        self, root: Location, *, refresh_seconds: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._root, self._refresh_seconds, self._clock = root, refresh_seconds, clock
        self._lock = threading.Lock()
        self._known = NONE
        self._looked: float | None = None
        self._state: object = None

    def now(self) -> Deleted:
        """What is deleted; raises as `read_deleted`."""
        with self._lock:
            if self._looked is None or self._clock() - self._looked >= self._refresh_seconds:
                state = self._look()
                if state is None or state != self._state:
                    self._known = read_deleted(self._root)
                    self._state = state
                self._looked = self._clock()
            return self._known

    def _look(self) -> object:
        """Something that changes with a local list; None in an object store, where looking costs as much as reading."""
        path = self._root / _NAME
        if not isinstance(path, Path):
            return None
        try:
            found = path.stat()
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns


NONE = Deleted(passage_ids=np.empty(0, dtype=np.int64), doc_ids=())


def read_deleted(root: Location) -> Deleted:
    """What is deleted from an index.

    Raises:
        CorruptArtifact: the list is unreadable; nothing may be shown until it is mended.
    """
    path = root / _NAME
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()), schema=_SCHEMA)
    except (NotFound, FileNotFoundError):
        return NONE
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptArtifact(f"{str(path)!r} cannot be read; bring it back from a copy, or delete again") from error
    return Deleted(passage_ids=table["passage_id"].to_numpy(), doc_ids=tuple(table["doc_id"].to_pylist()))


def delete_documents(root: Location, rows: RowStore, doc_ids: Sequence[str]) -> Deleted:
    """Delete documents from every answer; returns all that is deleted now.

    Args:
        root: the index folder.
        rows: where their passages are looked for; every sidecar's ids are read.
        doc_ids: as the corpus has them.

    Raises:
        NotFound: no passage is of such a document; then nothing is deleted.
        NotReady: another process deletes at this moment.
    """
    with writing(root, name=".deleted.lock"):
        known = read_deleted(root)
        wanted = pa.array(sorted(set(doc_ids)), type=pa.string())
        ids, names = [known.passage_ids], list(known.doc_ids)
        for shard in range(rows.num_shards):
            column = rows.shard_column(shard, "doc_id")
            places = np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy())
            if len(places):
                ids.append(rows.first(shard) + places)
                names += column.take(pa.array(places)).to_pylist()
        if missing := set(doc_ids) - set(names):
            raise NotFound(
                f"no passage of the index is of document {min(missing)!r}; nothing was deleted",
                kind="document",
                name=min(missing),
            )
        all_ids, places = np.unique(np.concatenate(ids), return_index=True)
        table = pa.table({"passage_id": all_ids, "doc_id": [names[place] for place in places]}, schema=_SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        publish(root / _NAME, buffer.getvalue())
    return read_deleted(root)

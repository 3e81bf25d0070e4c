"""Puts the codes of a generation into a collection of a Milvus server, each shard once, from several processes.

    receipts/000007.started.json   a shard's codes may be on the server, in part or whole
    receipts/000007.json           they are: how many, and the digest of their file
    receipts/complete.json         the collection holds what it should, counted

Any process may be killed at any time and started again, and so may the server. A shard with a receipt is left alone;
one that was merely started is upserted, which replaces whatever is there; one that was not is imported in bulk where
the server can (see `trackstar.milvus_bulk`), else upserted. Every file names the collection by the server's own number,
so that receipts of a collection that was deleted are none.

Bulk imports do not look at what is there, and a server may lose or keep what it did not say. So nothing is believed
without the count at the end: the number of codes, doubles included, must be that of the passages, or all begins anew.

Different processes take different shards; one calls `finish`, once no shard is missing. It needs no torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from trackstar.blobs import Location
from trackstar.coarse import check_codes, check_ids
from trackstar.code_store import CodeShard
from trackstar.codes import CodeSpec, check_size
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady
from trackstar.milvus_bulk import BulkFolder, refusal, submit, task, tasks, wait
from trackstar.milvus_collection import check_fits, check_name, drop, identity
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_load import Step, make_visible
from trackstar.milvus_server import MilvusServerIndex
from trackstar.storage import publish_json, read_json


class CollectionImport:
    """One collection's import; `prepare` comes first.

    Args:
        link: to the server.
        collection: its name; letters, digits and underscores.
        spec: kind and size of the codes.
        dim: d, dimension of the vectors the codes stand for.
        receipts: folder for them, shared by all processes.
        bulk: where files for bulk imports go; upserts only if not given.
        timeout_seconds: for each step on the server: a batch of upserts, writing out, indexing, loading; and for a bulk
            import to make progress.

    Raises:
        InvalidRequest: the name or the sizes do not fit.
    """

    def __init__(
        self,
        link: MilvusLink,
        collection: str,
        *,
        spec: CodeSpec,
        dim: int,
        receipts: Location,
        bulk: BulkFolder | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        check_name(collection)
        check_size(spec.size, dim)
        self._link = link
        self.collection = collection
        self._spec = spec
        self._dim = dim
        self._receipts = receipts
        self._bulk = bulk
        self._timeout_seconds = timeout_seconds
        self._index: MilvusServerIndex | None = None
        self._identity = 0
        self._is_asked = False
        self._failures = 0
        self.bulk_refusal: str | None = None
        """Why the server imports no files, in its words; None where it was not asked or does."""

    def prepare(self) -> None:
        """Make the collection, or open the one that is there.

        Raises:
            Incompatible: it was made for other codes or by something else, or the server takes no codes so large.
            NotReady: the server is down.
        """
        codes: dict[str, Any] = {"spec": self._spec, "dim": self._dim}
        try:
            self._index = MilvusServerIndex.open(self._link, self.collection, **codes, load=False)
        except NotFound:
            check_fits(self._link, self._spec.kind, self._spec.size)
            try:
                self._index = MilvusServerIndex.create(self._link, self.collection, **codes)
            except InvalidRequest:
                # Another process has made it meanwhile.
                self._index = MilvusServerIndex.open(self._link, self.collection, **codes, load=False)
        self._identity = identity(self._link, self.collection, self._link.deadline())

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Those of the shards that have no receipt, in order."""
        self._prepared()
        return [number for number in shards if "digest" not in (self._read(self._receipt(number)) or {})]

    def is_complete(self, expected: int) -> bool:
        """Whether `finish` counted so many codes before, in this very collection."""
        self._prepared()
        found = self._read(self._receipts / "complete.json")
        return found is not None and found.get("count") == expected

    def add(self, number: int, shard: CodeShard, digest: str) -> None:
        """Put a shard's codes into the collection and then write its receipt; one that has it is left alone.

        The first time that something could be imported in bulk, the server is asked whether it does that.

        Args:
            number: the shard's.
            shard: its codes.
            digest: of its file; a receipt with another one does not count.

        Raises:
            InvalidRequest: the codes are not those of the collection.
            NotFound: the collection was deleted meanwhile.
            CorruptArtifact: an interrupted bulk import hangs on the server, so that it could still add its codes at any
                time; collection and receipts are deleted, as by `finish`.
            StorageFull: there is no space, here or on the server.
            NotReady, Overloaded: the server is down or busy, or the folder for bulk imports cannot be written; call it
                again.
        """
        index = self._prepared()
        passage_ids, codes = shard.passage_ids, shard.codes
        check_ids(passage_ids, len(codes))
        check_codes(self._spec.kind, self._spec.size, codes)
        receipt = self._read(self._receipt(number))
        if receipt is not None and receipt.get("digest") == digest:
            return
        started = self._read(self._started(number))
        is_new = receipt is None and started is None
        if started is not None:
            self._settle(started)
        if not (is_new and self._imported(number, passage_ids, codes)):
            if is_new:
                self._publish(self._started(number))
            if len(codes):
                index.add(passage_ids, codes, timeout_seconds=self._timeout_seconds)
        self._publish(self._receipt(number), count=len(codes), digest=digest)
        self._forget(number)

    def finish(self, expected: int, on_wait: Callable[[Step], None] = lambda _step: None) -> None:
        """Have the server write out, index and load the collection, and count its codes; after every shard is added.

        Args:
            expected: passages that have a code.
            on_wait: called before each step that may take long.

        Raises:
            CorruptArtifact: it holds another number; collection and receipts are deleted, so that giving the command
                again imports everything anew.
            InvalidRequest: the same, but an alias points to the collection, which stays.
            NotReady: the server is down, or a step takes longer, and goes on.
        """
        index = self._prepared()
        make_visible(self._link, index, timeout_seconds=self._timeout_seconds, on_wait=on_wait)
        on_wait("count")
        count = index.count(timeout_seconds=self._timeout_seconds)
        if count != expected:
            self._begin_anew(f"was counted and holds {count:,} codes, not {expected:,}")
        for path in self._receipts.glob("*"):
            if path.name.endswith(".started.json"):
                self._forget(int(path.name.partition(".")[0]))
        self._publish(self._receipts / "complete.json", count=count)

    def _imported(self, number: int, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> bool:
        """Import a shard of which nothing is on the server in bulk; whether that was done, and without doubt."""
        if self._bulk is None or not len(codes):
            return False
        if not self._is_asked:
            self.bulk_refusal = refusal(self._link, self._bulk, self._spec.kind, timeout_seconds=self._timeout_seconds)
            self._is_asked = True
        if self.bulk_refusal is not None:
            return False
        file = f"{self.collection}-{number:06d}-{secrets.token_hex(8)}.parquet"
        self._publish(self._started(number), file=file)
        self._bulk.write(file, self._spec.kind, passage_ids, codes)
        try:
            task_id = submit(self._link, self.collection, self._bulk.server_name(file))
        except Incompatible as error:
            self.bulk_refusal = str(error)
            return False
        except NotReady:
            # It may have been taken all the same.
            self._settle({"file": file})
            return False
        self._publish(self._started(number), file=file, task=task_id)
        [ended] = wait(self._link, [task_id], stall_seconds=self._timeout_seconds)
        if ended is not None and ended.state == "running":
            raise NotReady(
                f"{self._link.name} makes no progress with import {task_id} of {file!r}; give the command again"
            )
        if ended is not None and ended.state == "done" and ended.rows == len(codes):
            self._failures = 0
            return True
        # One fails when the server is restarted; the next shows whether it was that.
        self._failures += 1
        if ended is not None and self._failures > 1:
            self.bulk_refusal = ended.reason
        return False

    def _settle(self, started: dict[str, Any]) -> None:
        """Wait until nothing of an interrupted bulk import goes on, so that an upsert is the last word."""
        file, task_id = started.get("file"), started.get("task")
        if file is None:
            return
        deadline = self._link.deadline(self._timeout_seconds)
        if task_id is None or task(self._link, task_id, deadline) is None:
            found = tasks(self._link, self.collection, deadline)
            ours = [one.task_id for one in found if any(name.endswith(file) for name in one.files)]
            # Where the server does not tell the files, it may be any.
            task_ids = ours or [one.task_id for one in found if one.state == "running" and not one.files]
        else:
            task_ids = [task_id]
        ended = wait(self._link, task_ids, stall_seconds=self._timeout_seconds)
        if any(one is not None and one.state == "running" for one in ended):
            self._begin_anew("was to get a file whose import does not end")

    def _begin_anew(self, why: str) -> NoReturn:
        drop(self._link, self.collection, timeout_seconds=self._timeout_seconds)
        for path in self._receipts.glob("*"):
            path.unlink(missing_ok=True)
        raise CorruptArtifact(
            f"the collection {self.collection!r} of {self._link.name} {why}; it is deleted, give the command again to "
            "import everything anew"
        )

    def _prepared(self) -> MilvusServerIndex:
        if self._index is None:
            raise InvalidRequest(f"the import into {self.collection!r} is not prepared; call prepare first")
        return self._index

    def _receipt(self, number: int) -> Location:
        return self._receipts / f"{number:06d}.json"

    def _started(self, number: int) -> Location:
        return self._receipts / f"{number:06d}.started.json"

    def _publish(self, path: Location, **content: Any) -> None:
        publish_json(path, {"collection": self.collection, "collection_id": self._identity, **content})

    def _read(self, path: Location) -> dict[str, Any] | None:
        """What a file says of this very collection; of an unreadable one, that there is one."""
        try:
            found = read_json(path)
        except NotFound:
            return None
        except CorruptArtifact:
            return {}
        return found if isinstance(found, dict) and found.get("collection_id") == self._identity else None

    def _forget(self, number: int) -> None:
        """Remove what a finished shard needs no longer."""
        started = self._read(self._started(number))
        if started is not None and self._bulk is not None and started.get("file"):
            self._bulk.remove(started["file"])
        self._started(number).unlink(missing_ok=True)

"""Bulk import into a Milvus server: a Parquet file in its storage becomes rows of a collection, past its message log.

    int64 "passage_id", binary "code"            bits
    int64 "passage_id", list<float32> "code"     prefix

The server reads the file itself, so it lies in a folder or bucket that the server reads too (`BulkFolder`). What it
makes of it is asked of the server, on a small file (`refusal`): nothing is assumed of its version.

A bulk import looks at nothing that is there: of a file that is imported twice, every passage is there twice, counted
twice, though found once. An upsert afterwards removes both and leaves one. See `trackstar.milvus_import`, which so
mends whatever is in doubt.

It needs no torch.

Legend: N codes.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pymilvus.grpc_gen import common_pb2, milvus_pb2

from trackstar.codes import CodeKind, CodeSpec
from trackstar.errors import Incompatible, InvalidRequest, NotReady, StorageFull
from trackstar.milvus_collection import CODE, ID, drop
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_load import make_visible
from trackstar.milvus_server import MilvusServerIndex
from trackstar.object_store import open_filesystem

# The server reads a row group at a time.
_GROUP_BYTES = 16 << 20
_POLL_SECONDS = 0.2
_STORE_SECONDS = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BulkFolder:
    """A folder that we write and the server reads.

    Args:
        place: a local folder, or a URL that fsspec knows, such as s3://bucket/imports; its credentials come from the
            environment.
        server: the same folder as the server names it: below its bucket, such as "imports", or an absolute path where
            its storage is a local disk.
        storage_options: for fsspec, as `trackstar.blobs.location` takes them.

    Raises:
        InvalidRequest: the URL's scheme is unknown, or its package is not installed.
    """

    def __init__(self, place: str | Path, server: str, *, storage_options: dict[str, Any] | None = None) -> None:
        text = str(place)
        scheme = urlsplit(text).scheme if "://" in text else "file"
        try:
            self._files = (
                fsspec.filesystem("file")
                if scheme == "file"
                else open_filesystem(scheme, _STORE_SECONDS, storage_options or {})
            )
            self._place = self._files._strip_protocol(text).rstrip("/")
        except (ValueError, ImportError) as error:
            raise InvalidRequest(
                f"the folder for bulk imports {text!r} cannot be opened: {str(error).rstrip('.')}"
            ) from error
        self._is_remote = scheme != "file"
        self._server = server.rstrip("/")

    def __repr__(self) -> str:
        return f"BulkFolder({self._place!r}, {self._server!r})"

    def server_name(self, file: str) -> str:
        """What the server calls the file of that name."""
        return f"{self._server}/{file}" if self._server else file

    def write(self, file: str, kind: CodeKind, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        """Write int64 [N] ids and their codes [N, .] as a Parquet file.

        Raises:
            StorageFull: there is no space.
            NotReady: the folder cannot be written.
        """
        step = max(1, _GROUP_BYTES // (codes.dtype.itemsize * codes.shape[1]))
        path = f"{self._place}/{file}"
        try:
            self._files.makedirs(self._place, exist_ok=True)
            with self._files.open(path, "wb") as stream, _writer(stream, kind) as writer:
                for start in range(0, len(codes), step):
                    stop = start + step
                    writer.write_table(_table(kind, passage_ids[start:stop], codes[start:stop]))
        # An implementation of fsspec raises what the library below it does, whose text may hold signed addresses.
        except Exception as error:
            if self._is_remote:
                raise NotReady(
                    f"{self._files.unstrip_protocol(path)!r} cannot be written ({type(error).__name__}); check the "
                    "store, and the credentials in the environment"
                ) from None
            if not isinstance(error, OSError):
                raise
            if error.errno in _FULL:
                raise StorageFull(
                    f"no space is left to write {path!r}; free some and give the command again"
                ) from error
            raise NotReady(
                f"{path!r} cannot be written ({type(error).__name__}); check the folder for bulk imports"
            ) from error

    def remove(self, file: str) -> None:
        """Delete a file; what cannot be deleted is left."""
        with contextlib.suppress(Exception if self._is_remote else OSError):
            self._files.rm_file(f"{self._place}/{file}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkTask:
    """An import as the server tells of it.

    task_id: its number. state: whether it goes on. rows: imported. progress: changes while it does go on. files: of the
    server's names, empty where it does not say (2.3.5 does). reason: in the server's words, why it failed.
    """

    task_id: int
    state: Literal["running", "done", "failed"]
    rows: int
    progress: tuple[int, str]
    files: tuple[str, ...]
    reason: str


def submit(link: MilvusLink, collection: str, file: str, *, timeout_seconds: float | None = None) -> int:
    """Ask for a file to be imported, once; the number of the task.

    Raises:
        Incompatible: the server refuses, in its own words.
        NotFound: there is no such collection.
        NotReady, Overloaded: the server is down, or takes no more tasks; after NotReady it may have taken this one.
    """
    request = milvus_pb2.ImportRequest(collection_name=collection, files=[file])
    answer = link.call("Import", request, link.deadline(timeout_seconds), patient=True, repeatable=False)
    if len(answer.tasks) != 1:
        raise Incompatible(f"{link.name} made {len(answer.tasks)} tasks of one file; use upserts with this version")
    return int(answer.tasks[0])


def task(link: MilvusLink, task_id: int, deadline: float) -> BulkTask | None:
    """What became of a task; None if the server knows it no longer, which 2.3.5 does for a day.

    Raises:
        NotReady: the server is down.
    """
    request = milvus_pb2.GetImportStateRequest(task=task_id)
    try:
        return _task(task_id, link.call("GetImportState", request, deadline, patient=True))
    except Incompatible:
        return None


def tasks(link: MilvusLink, collection: str, deadline: float) -> list[BulkTask]:
    """Every task of a collection that the server remembers.

    Raises:
        NotReady: the server is down.
    """
    request = milvus_pb2.ListImportTasksRequest(collection_name=collection)
    answer = link.call("ListImportTasks", request, deadline, patient=True)
    return [_task(found.id, found) for found in answer.tasks]


def wait(link: MilvusLink, task_ids: Sequence[int], *, stall_seconds: float) -> list[BulkTask | None]:
    """What became of tasks, once each has ended or made no progress for so long; the latter are still `running`.

    A server that was killed at the wrong moment may never end a task that it had almost done: 2.3.5 does so.

    Raises:
        NotReady: the server is down.
    """
    ended = []
    for task_id in task_ids:
        deadline, seen = link.deadline(stall_seconds), None
        while (found := task(link, task_id, deadline)) is not None and found.state == "running":
            if found.progress != seen:
                deadline, seen = link.deadline(stall_seconds), found.progress
            try:
                link.pause(_POLL_SECONDS, deadline, f"import {task_id}")
            except NotReady:
                break
        ended.append(found)
    return ended


def refusal(link: MilvusLink, folder: BulkFolder, kind: CodeKind, *, timeout_seconds: float = 60.0) -> str | None:
    """Why the server imports no file of codes of that kind, in its words; None if it does.

    A file of three codes is imported into a collection of its own, which must then find each of them.

    Raises:
        NotReady: the server is down, or takes longer, or the folder cannot be written.
    """
    name = f"trackstar_probe_{secrets.token_hex(8)}"
    spec = CodeSpec(kind=kind, size=64, seed=0)
    codes: NDArray[Any] = np.arange(24, dtype=np.uint8).reshape(3, 8)
    if kind == "prefix":
        codes = np.eye(3, 64, dtype=np.float32)
    ids = np.array([5, 1 << 40, 7])
    file = f"{name}.parquet"
    index = MilvusServerIndex.create(link, name, spec=spec, dim=64)
    try:
        folder.write(file, kind, ids, codes)
        [ended] = wait(link, [submit(link, name, folder.server_name(file))], stall_seconds=timeout_seconds)
        if ended is None or ended.state == "running":
            return f"{link.name} took a file of three codes to import and does not say that it has"
        if ended.state == "failed":
            return ended.reason
        make_visible(link, index, timeout_seconds=timeout_seconds)
        found = index.search(codes, 1)[0] if index.count() == len(ids) else None
        if found is None or found[:, 0].tolist() != ids.tolist():
            return f"{link.name} imported a file of three codes and does not find them"
        return None
    except Incompatible as error:
        return str(error)
    finally:
        folder.remove(file)
        drop(link, name)


def _task(task_id: int, found: Any) -> BulkTask:
    infos = {info.key: info.value for info in found.infos}
    state: Literal["running", "done", "failed"] = "running"
    if found.state == common_pb2.ImportCompleted:
        state = "done"
    elif found.state in (common_pb2.ImportFailed, common_pb2.ImportFailedAndCleaned):
        state = "failed"
    files = tuple(filter(None, infos.get("files", "").split(",")))
    reason = infos.get("failed_reason", "")
    progress = (found.state, infos.get("progress_percent", ""))
    return BulkTask(task_id=task_id, state=state, rows=found.row_count, progress=progress, files=files, reason=reason)


def _schema(kind: CodeKind) -> Any:
    # Milvus's own writer makes lists of uint8 of bits; the server takes both, and reads this seven times as fast.
    return pa.schema([(ID, pa.int64()), (CODE, pa.binary() if kind == "bits" else pa.list_(pa.float32()))])


def _writer(stream: Any, kind: CodeKind) -> Any:
    # Codes look like noise: nothing shrinks them.
    return pq.ParquetWriter(stream, _schema(kind), compression="none", use_dictionary=False, write_statistics=False)


def _table(kind: CodeKind, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> Any:
    num, width = codes.shape
    starts = np.arange(num + 1, dtype=np.int32) * width
    flat = np.ascontiguousarray(codes).reshape(-1)
    if kind == "bits":
        column = pa.Array.from_buffers(pa.binary(), num, [None, pa.py_buffer(starts), pa.py_buffer(flat)])
    else:
        column = pa.ListArray.from_arrays(pa.array(starts), pa.array(flat))
    return pa.table({ID: pa.array(passage_ids), CODE: column}, schema=_schema(kind))

"""Where the files of an index lie: a local folder, or below a URL of an object store.

    location("/data/index")            a `pathlib.Path`
    location("s3://bucket/prefix")     a `RemotePath`: the part of a path's methods that an index needs

Code does not ask which of both it has, except where many small reads of a store are better made at once (`each`), and
for a Milvus Lite database, which needs a local folder (`local`). Files are written by `storage.publish`.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from trackstar.errors import InvalidRequest, NotFound
from trackstar.object_store import REQUEST_BYTES, ObjectStore, open_filesystem

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_PAGE_BYTES = 4096


class RemotePath:
    """A place in an object store, with the methods of `pathlib.Path` that an index needs."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self.store = store
        self.key = key.rstrip("/")

    def __str__(self) -> str:
        return self.store.url(self.key)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that gets it opens the store anew, with credentials of its own environment.
        return location, (str(self),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self.store, self.key) == (other.store, other.key)

    def __hash__(self) -> int:
        return hash((self.store, self.key))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The folder it lies in."""
        return RemotePath(self.store, self.key.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same name with another ending."""
        return self.parent / f"{os.path.splitext(self.name)[0]}{suffix}"

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            # Not its size: to tell a folder from nothing, some file systems list, and fail where there is no bucket.
            self.store.read_ranges([(self.key, 0, 1)])
        except NotFound:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether anything lies below it."""
        return bool(self.store.names(self.key))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies below it: "*" for everything, "*/NAME" for the files of that name one folder deeper."""
        star, _, name = pattern.partition("/")
        assert star == "*", pattern
        below = [self / found for found in self.store.names(self.key)]
        if not name:
            return iter(below)
        files = [folder / name for folder in below]
        return (file for file, there in zip(files, each(self, RemotePath.is_file, files), strict=True) if there)

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self.store.read(self.key)

    def write_bytes(self, data: bytes) -> None:
        """Put the whole object."""
        self.store.write(self.key, data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Take the object away; a missing one is as good."""
        self.store.delete(self.key)

    def read_text(self, encoding: str) -> str:
        """The whole object, decoded."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file that fetches a page at a time; see `ranged` for large reads."""
        assert mode == "rb", mode
        return io.BufferedReader(self.ranged(), _PAGE_BYTES)

    def ranged(self, size: int | None = None) -> io.RawIOBase:
        """The object as a file of which every read is one request; its `size` in bytes is asked for if not given."""
        return _RangedFile(self, self.store.size(self.key) if size is None else size)


Location = Path | RemotePath


def location(
    root: str | Location,
    *,
    timeout_seconds: float = 10.0,
    concurrency: int = 16,
    storage_options: dict[str, Any] | None = None,
) -> Location:
    """The place that a path or URL names; nothing is read yet.

    Args:
        root: a path, a URL that fsspec knows, or a location, which is returned as it is.
        timeout_seconds: for each request to a store, its retries included.
        concurrency: requests at once for every calling thread; with their answers they hold 8 MiB each.
        storage_options: for the file system of fsspec; what is not given comes from the environment, such as
            AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

    Raises:
        InvalidRequest: the URL's scheme is unknown, or its package is not installed.
    """
    if isinstance(root, RemotePath):
        return root
    parts = urlsplit(str(root))
    if isinstance(root, Path) or not parts.scheme or "://" not in root:
        return Path(root)
    if parts.scheme == "file":
        return Path(parts.path)
    # Credentials belong in the environment; in a URL they would be in every message.
    plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if parts.username or parts.password or parts.query:
        raise InvalidRequest(f"{plain!r} was given with credentials or a query; give those in the environment")
    try:
        filesystem = open_filesystem(parts.scheme, timeout_seconds, storage_options or {})
        key = filesystem._strip_protocol(plain)
    except (ValueError, ImportError) as error:
        raise InvalidRequest(
            f"{plain!r} cannot be opened: {str(error).rstrip('.')}; object stores need `pip install trackstar[s3]`"
        ) from error
    return RemotePath(ObjectStore(filesystem, plain, timeout_seconds=timeout_seconds, concurrency=concurrency), key)


def local(place: Location) -> Path:
    """The folder, where one is needed.

    Raises:
        InvalidRequest: it lies in an object store.
    """
    if isinstance(place, RemotePath):
        raise InvalidRequest(f"{str(place)!r} lies in an object store; give a local folder")
    return place


def each(where: Location, work: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """`work` of every item in order: one after the other for local files, several at once for an object store.

    The first error is raised; what had not begun by then is not begun.
    """
    items = list(items)
    if isinstance(where, Path) or len(items) < 2:
        return [work(item) for item in items]
    failed = threading.Event()

    def unless_failed(item: Item) -> list[Answer]:
        if failed.is_set():
            return []
        try:
            return [work(item)]
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(where.store.concurrency, len(items)), thread_name_prefix="blobs") as pool:
        futures = [pool.submit(unless_failed, item) for item in items]
    for future in futures:
        if (error := future.exception()) is not None:
            raise error
    return [answer for future in futures for answer in future.result()]


class _RangedFile(io.RawIOBase):
    def __init__(self, path: RemotePath, size: int) -> None:
        self._path = path
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._bytes(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        return self._bytes(self._size if size is None or size < 0 else size)

    def _bytes(self, count: int) -> bytes:
        stop = min(self._size, self._at + count)
        starts = range(self._at, stop, REQUEST_BYTES)
        ranges = [(self._path.key, start, min(stop, start + REQUEST_BYTES)) for start in starts]
        data = b"".join(self._path.store.read_ranges(ranges)) if ranges else b""
        self._at += len(data)
        return data

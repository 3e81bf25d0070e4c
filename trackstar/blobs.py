"""Where the files of an index lie: a local folder, or below a URL of an object store.

    location("/data/index")            a `pathlib.Path`
    location("s3://bucket/prefix")     a `RemotePath`: the part of a path's methods that reading an index needs

A `RemotePath` reads through an `ObjectStore`: any fsspec file system, and obstore for S3, Google Cloud Storage and
Azure. Nothing but the bytes asked for is moved, in requests of at most 8 MiB, at most `concurrency` at once for every
calling thread. A request with its retries ends within `timeout_seconds`: what is missing is `NotFound`, a store that
does not answer or refuses is `NotReady`, and both name the URL without credentials. What a store's library says is left
out on purpose: it may hold signed addresses.

Safe to use from several threads. A forked child must not use what its parent opened: spawn instead.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import io
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
import fsspec.asyn

from trackstar.errors import InvalidRequest, NotFound, NotReady

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Range = tuple[str, int, int]
"""Key, first byte, and the byte after the last."""

REQUEST_BYTES = 8 << 20
_PAGE_BYTES = 4096
# A request that hangs leaves time for two more.
_ATTEMPTS = 3
_FIRST_PAUSE_SECONDS = 0.05
_OBSTORE = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
# Asking again gives the same answer; obstore's refusals are known by name, so that it need not be installed.
_FINAL = (PermissionError, ValueError, TypeError, NotImplementedError)
_FINAL_NAMES = ("PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError")


class ObjectStore:
    """Reads objects of one fsspec file system.

    Args:
        filesystem: of fsspec, asynchronous or not.
        url: of the folder it is used for, for messages.
        timeout_seconds: for each request, its retries included.
        concurrency: requests at once for every calling thread.
    """

    def __init__(self, filesystem: Any, url: str, *, timeout_seconds: float, concurrency: int) -> None:
        self._filesystem = filesystem
        self._scheme = urlsplit(url).scheme
        self._loop = filesystem.loop if filesystem.async_impl else fsspec.asyn.get_loop()
        self.timeout_seconds = timeout_seconds
        self.concurrency = concurrency

    def url(self, key: str) -> str:
        """How messages name an object."""
        return key if "://" in key else f"{self._scheme}://{key.lstrip('/')}"

    def read(self, key: str) -> bytes:
        """A whole object.

        Raises:
            NotFound: there is none.
            NotReady: the store does not answer in time.
        """
        head = self.read_ranges([(key, 0, REQUEST_BYTES)])[0]
        if len(head) < REQUEST_BYTES:
            return head
        return b"".join([head, *self.chunks(key, REQUEST_BYTES)])

    def chunks(self, key: str, first: int = 0) -> Iterator[bytes]:
        """The bytes from `first` on, in order; `concurrency` requests are held at a time."""
        size, step = self.size(key), REQUEST_BYTES
        for start in range(first, size, step * self.concurrency):
            stops = range(start, min(size, start + step * self.concurrency), step)
            yield from self.read_ranges([(key, at, min(size, at + step)) for at in stops])

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, fewer where the object ends before; one request each.

        Raises:
            NotFound: an object is missing.
            NotReady: the store does not answer in time.
        """
        return self._wait(self._all([partial(self._range, *wanted) for wanted in ranges], ranges))

    def size(self, key: str) -> int:
        """Bytes of an object; raises as `read`."""
        return self._wait(self._all([lambda: self._size(key)], [(key, 0, 0)]))[0]

    def names(self, key: str) -> list[str]:
        """Names of what lies right below a folder, sorted; none if there is no such folder."""
        try:
            found = self._wait(self._all([lambda: self._ls(key)], [(key, 0, 0)]))[0]
        except NotFound:
            return []
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in found})

    async def _range(self, key: str, start: int, stop: int) -> bytes:
        try:
            found: bytes = await self._call("cat_file", key, start=start, end=stop)
        except FileNotFoundError:
            raise
        except Exception:
            # Some stores refuse a range behind the end. Any other failure stands.
            size = await self._size(key)
            if size >= stop:
                raise
            found = await self._call("cat_file", key, start=start, end=size) if size > start else b""
        return found

    async def _size(self, key: str) -> int:
        info = await self._call("info", key)
        if info["type"] != "file":
            raise FileNotFoundError(key)
        return int(info["size"])

    async def _ls(self, key: str) -> list[str]:
        found: list[str] = await self._call("ls", key, detail=False)
        return found

    async def _call(self, verb: str, key: str, **arguments: Any) -> Any:
        if self._filesystem.async_impl:
            return await getattr(self._filesystem, f"_{verb}")(key, **arguments)
        return await asyncio.to_thread(getattr(self._filesystem, verb), key, **arguments)

    async def _all(self, calls: Sequence[Callable[[], Awaitable[Answer]]], ranges: Sequence[Range]) -> list[Answer]:
        slots = asyncio.Semaphore(self.concurrency)

        async def one(call: Callable[[], Awaitable[Answer]], key: str) -> Answer:
            async with slots:
                return await self._patiently(call, key)

        tasks = [asyncio.ensure_future(one(call, key)) for call, (key, _, _) in zip(calls, ranges, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _patiently(self, call: Callable[[], Awaitable[Answer]], key: str) -> Answer:
        """The call's answer, trying again after what may pass, until the time is over."""
        pause, reason = _FIRST_PAUSE_SECONDS, "no answer"
        try:
            async with asyncio.timeout(self.timeout_seconds):
                while True:
                    try:
                        async with asyncio.timeout(self.timeout_seconds / _ATTEMPTS):
                            return await call()
                    except FileNotFoundError:
                        raise NotFound(f"there is no {self.url(key)!r}") from None
                    # An implementation of fsspec raises what the library below it does.
                    except Exception as error:
                        reason = type(error).__name__
                        if isinstance(error, _FINAL) or reason in _FINAL_NAMES:
                            raise NotReady(
                                f"{self.url(key)!r} cannot be read: the store refuses it ({reason}); check the "
                                "credentials and settings of the store in the environment"
                            ) from None
                    await asyncio.sleep(pause)
                    pause *= 2
        except TimeoutError:
            raise NotReady(
                f"{self.url(key)!r} cannot be read: the store gave no answer within {self.timeout_seconds:g} seconds "
                f"({reason}); the same request can succeed once it does"
            ) from None

    def _wait(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()


class RemotePath:
    """A place in an object store, with the methods of `pathlib.Path` that reading an index needs."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self.store = store
        self.key = key.rstrip("/")

    def __str__(self) -> str:
        return self.store.url(self.key)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

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
            self.store.size(self.key)
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
        filesystem = _filesystem(parts.scheme, timeout_seconds, storage_options or {})
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
        raise InvalidRequest(f"{str(place)!r} lies in an object store, which is read only; give a local folder")
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


def _filesystem(scheme: str, timeout_seconds: float, storage_options: dict[str, Any]) -> Any:
    if scheme not in _OBSTORE or importlib.util.find_spec("obstore") is None:
        return fsspec.filesystem(scheme, **storage_options)
    store_class: Any = importlib.import_module("obstore.fsspec").FsspecStore
    given = dict(storage_options)
    endpoint = str(given.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or "")
    client = {
        "timeout": f"{timeout_seconds:g}s",
        "connect_timeout": f"{timeout_seconds / _ATTEMPTS:g}s",
        "allow_http": endpoint.startswith("http://"),
        **given.pop("client_options", {}),
    }
    # Retries are ours.
    retry = given.pop("retry_config", {"max_retries": 0})
    return store_class(scheme, client_options=client, retry_config=retry, **given)


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

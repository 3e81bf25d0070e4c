"""Reads and writes objects of a store: whole, by ranges, sizes and names, within limits of time and memory.

Any file system of fsspec will do; S3, Google Cloud Storage and Azure go through obstore. Nothing but the bytes asked
for is moved, in requests of at most 8 MiB, at most `concurrency` at once for every calling thread. A request with its
retries ends within `timeout_seconds`: what is missing is `NotFound`, a store that does not answer or refuses is
`NotReady`, and both name the URL without credentials. What a store's library says is left out on purpose: it may hold
signed addresses. Writing puts whole objects, so that a reader sees the old one or the new; a large one gets more time.

Safe to use from several threads. A forked child must not use what its parent opened: spawn instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn

from trackstar.errors import NotFound, NotReady

Answer = TypeVar("Answer")
Range = tuple[str, int, int]
"""Key, first byte, and the byte after the last."""

REQUEST_BYTES = 8 << 20
# What a store is trusted to take in each second, at the least.
_WRITTEN_BYTES_PER_SECOND = 4 << 20
# A request that hangs leaves time for two more.
_ATTEMPTS = 3
_FIRST_PAUSE_SECONDS = 0.05
OBSTORE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss")
# Asking again gives the same answer; obstore's refusals are known by name, so that it need not be installed.
_FINAL = (PermissionError, ValueError, TypeError, NotImplementedError)
_FINAL_NAMES = ("PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError")


class ObjectStore:
    """Objects of one fsspec file system.

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
        self._process = os.getpid()
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

    def write(self, key: str, data: bytes) -> None:
        """Put a whole object; one that is there is replaced.

        Raises:
            NotReady: the store refuses it, or does not answer in time.
        """
        extra_seconds = len(data) / _WRITTEN_BYTES_PER_SECOND
        self._wait(self._all([lambda: self._call("pipe_file", key, data)], [(key, 0, 0)], extra_seconds=extra_seconds))

    def delete(self, key: str) -> None:
        """Take an object away; one that is missing is as good."""
        with contextlib.suppress(NotFound):
            self._wait(self._all([lambda: self._call("rm_file", key)], [(key, 0, 0)]))

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

    async def _call(self, verb: str, key: str, *values: Any, **arguments: Any) -> Any:
        if self._filesystem.async_impl:
            return await getattr(self._filesystem, f"_{verb}")(key, *values, **arguments)
        return await asyncio.to_thread(getattr(self._filesystem, verb), key, *values, **arguments)

    async def _all(
        self, calls: Sequence[Callable[[], Awaitable[Answer]]], ranges: Sequence[Range], *, extra_seconds: float = 0.0
    ) -> list[Answer]:
        slots = asyncio.Semaphore(self.concurrency)

        async def one(call: Callable[[], Awaitable[Answer]], key: str) -> Answer:
            async with slots:
                return await self._patiently(call, key, self.timeout_seconds + extra_seconds)

        tasks = [asyncio.ensure_future(one(call, key)) for call, (key, _, _) in zip(calls, ranges, strict=True)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _patiently(self, call: Callable[[], Awaitable[Answer]], key: str, seconds: float) -> Answer:
        """The call's answer, trying again after what may pass, until the time is over."""
        pause, reason = _FIRST_PAUSE_SECONDS, "no answer"
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        async with asyncio.timeout(seconds / _ATTEMPTS):
                            return await call()
                    except FileNotFoundError:
                        raise NotFound(f"there is no {self.url(key)!r}") from None
                    # An implementation of fsspec raises what the library below it does.
                    except Exception as error:
                        reason = type(error).__name__
                        if isinstance(error, _FINAL) or reason in _FINAL_NAMES:
                            raise NotReady(
                                f"{self.url(key)!r} cannot be reached: the store refuses it ({reason}); check the "
                                "credentials and settings of the store in the environment"
                            ) from None
                    await asyncio.sleep(pause)
                    pause *= 2
        except TimeoutError:
            raise NotReady(
                f"{self.url(key)!r} cannot be reached: the store gave no answer within {seconds:g} seconds "
                f"({reason}); the same request can succeed once it does"
            ) from None

    def _wait(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        if os.getpid() != self._process:
            # The thread that would do it is the parent's.
            work.close()
            raise NotReady(
                f"the object store of {self._scheme}:// was opened before this process was forked; start processes by "
                "spawn and open it there"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()


def store_errors() -> tuple[type[Exception], ...]:
    """What obstore raises beside the errors of Python; nothing where it is not installed."""
    if importlib.util.find_spec("obstore") is None:
        return ()
    found: type[Exception] = importlib.import_module("obstore.exceptions").BaseError
    return (found,)


def refused(what: str, error: Exception) -> NotReady:
    """The error about a store that did not do what was asked; its own words stay away, they may hold addresses."""
    return NotReady(
        f"{what} cannot be reached: the store refuses it or does not answer ({type(error).__name__}); check the "
        "credentials and settings of the store in the environment"
    )


def open_filesystem(scheme: str, timeout_seconds: float, storage_options: dict[str, Any]) -> Any:
    """The file system of a scheme: obstore's where that is installed and knows it, else the one fsspec names.

    Raises:
        ValueError, ImportError: the scheme is unknown, or its package is not installed.
    """
    if scheme not in OBSTORE_SCHEMES or importlib.util.find_spec("obstore") is None:
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
    # Another environment or other options are another store, which the cache of fsspec does not see.
    return store_class(scheme, client_options=client, retry_config=retry, skip_instance_cache=True, **given)

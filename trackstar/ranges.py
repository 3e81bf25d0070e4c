"""Reads pieces of many files into memory that the caller owns: rows, wherever they lie.

    LocalRanges     positioned reads without read-ahead, of a bounded number of open files
    RemoteRanges    ranged requests to an object store: neighbours joined, large pieces split, several at once

Contract: a piece is (file, offset, writable memory); the answer is how many bytes each got, fewer where a file ends
before. Both are safe to use from several threads, but not while `close` runs. They check nothing that is in the bytes.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from trackstar.blobs import RemotePath
from trackstar.errors import NotFound, NotReady
from trackstar.object_store import REQUEST_BYTES, ObjectStore

Place = TypeVar("Place", contravariant=True)
# At most so many unwanted bytes between two pieces that one request reads; less than a round trip costs.
_GAP_BYTES = 256 << 10
# Files that stay open; a reader has one for rows, and other readers may have theirs in the same process.
_OPEN_FILES = 256


class RangeReader(Protocol[Place]):
    """Reads pieces of files."""

    def read_into(self, pieces: Sequence[tuple[Place, int, memoryview]]) -> list[int]:
        """Fill every piece's memory from its file and offset; returns the bytes that each got.

        Raises:
            NotFound: a file is missing.
            NotReady: the store does not answer in time, or the disk not at all.
        """

    def close(self) -> None:
        """Close the open files."""


@dataclass(slots=True)
class _OpenFile:
    """A descriptor, and how many threads read from it now."""

    descriptor: int
    readers: int = 0


class LocalRanges:
    """Positioned reads; files stay open, but of many only those that were read last.

    Systems give a process a thousand open files or so, and an index may have a million shards.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, pieces: Sequence[tuple[Path, int, memoryview]]) -> list[int]:
        """See `RangeReader.read_into`."""
        return [self._read_one(path, offset, view) for path, offset, view in pieces]

    def close(self) -> None:
        """Close the open files."""
        with self._lock:
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()

    def _read_one(self, path: Path, offset: int, view: memoryview) -> int:
        try:
            with self._opened(path) as descriptor:
                return os.preadv(descriptor, [view], offset)
        except FileNotFoundError as error:
            raise NotFound(f"there is no {str(path)!r}") from error
        except OSError as error:
            raise NotReady(
                f"{str(path)!r} cannot be read now ({error.strerror}); the same request can succeed once it can be"
            ) from error

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        """A descriptor of a file, open for the time of the block at least."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                file.readers += 1
                self._files.move_to_end(path)
        if file is None:
            # Not under the lock, which would keep others from what is open already.
            file = self._kept(path, self._open(path))
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.readers -= 1

    def _kept(self, path: Path, descriptor: int) -> _OpenFile:
        """The file's place among the open ones, in use; those that were not used longest make room."""
        with self._lock:
            file = self._files.setdefault(path, _OpenFile(descriptor))
            if file.descriptor != descriptor:
                # Another thread was faster.
                os.close(descriptor)
            file.readers += 1
            self._files.move_to_end(path)
            idle = [old for old in self._files if not self._files[old].readers]
            for old in idle[: max(0, len(self._files) - _OPEN_FILES)]:
                os.close(self._files.pop(old).descriptor)
            return file

    @staticmethod
    def _open(path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        # Candidates are scattered; read-ahead would fetch 30 times the bytes.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor


@dataclass(slots=True, kw_only=True)
class _Request:
    """One ranged request: the bytes it asks for, how many of them are wanted, and the pieces they are for."""

    key: str
    start: int
    stop: int
    wanted: int
    parts: list[tuple[int, int, memoryview]] = field(default_factory=list)  # piece, offset, memory


class RemoteRanges:
    """Ranged requests to one object store; at most twice the bytes asked for are moved."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def read_into(self, pieces: Sequence[tuple[RemotePath, int, memoryview]]) -> list[int]:
        """See `RangeReader.read_into`."""
        filled = [0] * len(pieces)
        requests = _requests([(path.key, offset, view) for path, offset, view in pieces])
        # A round of requests at a time, so that memory does not grow with what is asked for.
        for first in range(0, len(requests), self._store.concurrency):
            round_ = requests[first : first + self._store.concurrency]
            answers = self._store.read_ranges([(request.key, request.start, request.stop) for request in round_])
            for request, answer in zip(round_, answers, strict=True):
                for piece, offset, view in request.parts:
                    data = memoryview(answer)[offset - request.start : offset - request.start + len(view)]
                    view[: len(data)] = data
                    filled[piece] += len(data)
        return filled

    def close(self) -> None:
        """Nothing: connections belong to the file system."""


def _requests(pieces: Sequence[tuple[str, int, memoryview]]) -> list[_Request]:
    """The fewest requests within the limits on a request's size, on a gap, and on all that is not wanted."""
    parts = [
        (key, offset + at, piece, view[at : at + REQUEST_BYTES])
        for piece, (key, offset, view) in enumerate(pieces)
        for at in range(0, len(view), REQUEST_BYTES)
    ]
    requests: list[_Request] = []
    for key, offset, piece, view in sorted(parts, key=lambda part: part[:3]):
        stop = offset + len(view)
        last = requests[-1] if requests else None
        # The same row twice adds no wanted bytes.
        added = len(view) if last is None else max(0, stop - max(last.stop, offset))
        if (
            last is not None
            and last.key == key
            and offset - last.stop <= _GAP_BYTES
            and stop - last.start <= REQUEST_BYTES
            and max(last.stop, stop) - last.start <= 2 * (last.wanted + added)
        ):
            last.stop = max(last.stop, stop)
            last.wanted += added
        else:
            last = _Request(key=key, start=offset, stop=stop, wanted=len(view))
            requests.append(last)
        last.parts.append((piece, offset, view))
    return requests

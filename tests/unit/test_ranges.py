"""Pieces of files: every byte wanted comes to its place, in requests within the limits, from threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trackstar import ranges
from trackstar.blobs import RemotePath, each, location
from trackstar.errors import NotFound
from trackstar.ranges import LocalRanges, RangeReader, RemoteRanges

SIZE = 5000
CONTENT = {name: np.random.Generator(np.random.Philox(key=ord(name))).bytes(SIZE) for name in "ab"}
# File, offset and length; some reach behind the end.
WANTED = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, SIZE + 50), st.integers(0, 300)), max_size=30)


@pytest.fixture(scope="module")
def remote() -> Iterator[RemotePath]:
    memory = fsspec.filesystem("memory")
    for name, data in CONTENT.items():
        memory.pipe_file(f"/ranges/{name}", data)
    place = location("memory://ranges", timeout_seconds=5, concurrency=3)
    assert isinstance(place, RemotePath)
    yield place
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranges")
    for name, data in CONTENT.items():
        (found / name).write_bytes(data)
    return found


def check(reader: RangeReader[Any], place: Any, wanted: list[tuple[str, int, int]]) -> None:
    buffers = [bytearray(length) for _, _, length in wanted]
    pieces = [(place / name, offset, memoryview(into)) for (name, offset, _), into in zip(wanted, buffers, strict=True)]
    expected = [CONTENT[name][offset : offset + length] for name, offset, length in wanted]
    assert reader.read_into(pieces) == [len(part) for part in expected]
    for part, buffer in zip(expected, buffers, strict=True):
        assert buffer[: len(part)] == part
        assert not any(buffer[len(part) :])


@settings(max_examples=60)
@given(WANTED)
def test_local_pieces_are_slices(folder: Path, wanted: list[tuple[str, int, int]]) -> None:
    reader = LocalRanges()
    check(reader, folder, wanted)
    reader.close()


@settings(max_examples=60)
@given(WANTED, st.sampled_from([7, 256, 8 << 20]))
def test_remote_pieces_are_slices(remote: RemotePath, wanted: list[tuple[str, int, int]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "REQUEST_BYTES", limit)
        check(RemoteRanges(remote.store), remote, wanted)


@settings(max_examples=100)
@given(WANTED, st.sampled_from([7, 256, 8 << 20]))
def test_requests_keep_their_limits(wanted: list[tuple[str, int, int]], limit: int) -> None:
    """Every byte wanted is in a request; at most as many others; and never more in one request than it may hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "REQUEST_BYTES", limit)
        found = ranges._requests([(name, offset, memoryview(bytearray(length))) for name, offset, length in wanted])
    bytes_wanted = {(name, at) for name, offset, length in wanted for at in range(offset, offset + length)}
    bytes_asked = [(request.key, at) for request in found for at in range(request.start, request.stop)]
    assert bytes_wanted <= set(bytes_asked)
    assert all(0 < request.stop - request.start <= limit for request in found)
    if limit > SIZE:
        assert len(bytes_asked) <= 2 * len(bytes_wanted)


def test_a_missing_file_is_not_found(folder: Path, remote: RemotePath) -> None:
    for reader, place in ((LocalRanges(), folder), (RemoteRanges(remote.store), remote)):
        with pytest.raises(NotFound, match=f"there is no '{place}/c'"):
            reader.read_into([(place / "c", 0, memoryview(bytearray(1)))])  # type: ignore[list-item]


def test_threads_open_every_local_file_once(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader, threads = LocalRanges(), 8
    together = threading.Barrier(threads)

    def work(_: int) -> None:
        together.wait()
        check(reader, folder, [("a", 10, 20), ("b", 0, SIZE)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_local_files_are_bounded_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_OPEN_FILES", 3)
    for number in range(20):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 10)
    before = len(os.listdir("/proc/self/fd"))
    reader, threads = LocalRanges(), 8

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 20, 200).tolist():
            buffer = bytearray(4)
            assert reader.read_into([(tmp_path / f"{number}", 2, memoryview(buffer))]) == [4]
            assert buffer == bytes([number]) * 4

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    work(0)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_each_keeps_the_order_and_stops_at_the_first_error(remote: RemotePath, folder: Path) -> None:
    for place in (remote, folder):
        assert each(place, lambda item: item * item, range(50)) == [item * item for item in range(50)]
        begun: list[int] = []

        def work(item: int, begun: list[int] = begun) -> int:
            begun.append(item)
            raise KeyError(item)

        with pytest.raises(KeyError):
            each(place, work, range(50))
        assert len(begun) <= 3

"""The alias on a real Milvus server: made, moved while searches run, kept over a restart, dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.milvus_process import MilvusProcess
from trackstar.codes import CodeSpec
from trackstar.errors import Incompatible, InvalidRequest, NotFound
from trackstar.milvus_alias import AliasPointer
from trackstar.milvus_collection import collections, drop
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_server import MilvusServerIndex

DIM = 100
BITS = CodeSpec(kind="bits", size=128, seed=0)
# Every collection holds ids that no other one holds.
FIRST = {"aliased_a": 1000, "aliased_b": 2000}


@pytest.fixture(scope="module")
def link(milvus: MilvusProcess) -> Iterator[MilvusLink]:
    with MilvusLink(milvus.access) as link:
        yield link


@pytest.fixture(scope="module")
def indexes(link: MilvusLink) -> dict[str, MilvusServerIndex]:
    codes = np.random.default_rng(0).integers(0, 256, (50, BITS.row_bytes), dtype=np.uint8)
    made = {name: MilvusServerIndex.create(link, name, spec=BITS, dim=DIM) for name in FIRST}
    for name, index in made.items():
        index.add(np.arange(FIRST[name], FIRST[name] + len(codes)), codes)
        # Loads it.
        assert index.count() == len(codes)
    return made


@pytest.fixture
def pointer(link: MilvusLink, indexes: dict[str, MilvusServerIndex]) -> Iterator[AliasPointer]:
    pointer = AliasPointer(link, "active")
    yield pointer
    pointer.drop()


def test_made_moved_and_dropped(pointer: AliasPointer) -> None:
    assert pointer.get() is None
    pointer.drop()
    for name in ("aliased_a", "aliased_a", "aliased_b", "aliased_a"):
        pointer.set(name)
        assert pointer.get() == name
    pointer.drop()
    pointer.drop()
    assert pointer.get() is None


def test_refusals_leave_it_where_it_was(pointer: AliasPointer, link: MilvusLink) -> None:
    with pytest.raises(NotFound, match="absent"):
        pointer.set("absent")
    assert pointer.get() is None
    pointer.set("aliased_a")
    with pytest.raises(NotFound, match="absent"):
        pointer.set("absent")
    assert pointer.get() == "aliased_a"
    with pytest.raises(Incompatible, match="aliased_b"):
        AliasPointer(link, "aliased_b").set("aliased_a")
    for name in ("", "a b", "1st"):
        with pytest.raises(InvalidRequest, match="no name"):
            AliasPointer(link, name)
        with pytest.raises(InvalidRequest, match="no name"):
            pointer.set(name)


def test_what_it_points_to_is_not_deleted(pointer: AliasPointer, link: MilvusLink) -> None:
    pointer.set("aliased_a")
    with pytest.raises(InvalidRequest, match="alias 'active' points to"):
        drop(link, "aliased_a")
    assert collections(link, "aliased_") == ["aliased_a", "aliased_b"]


def test_it_moves_while_searches_run(
    pointer: AliasPointer, link: MilvusLink, indexes: dict[str, MilvusServerIndex]
) -> None:
    """Whoever resolves it gets one collection or the other, and all of that one's answers."""
    query = np.zeros((1, BITS.row_bytes), dtype=np.uint8)
    ended = threading.Event()
    seen: set[str] = set()

    def search() -> int:
        done = 0
        while not ended.is_set() or done == 0:
            name = pointer.get()
            assert name is not None
            ids, _ = indexes[name].search(query, 50)
            assert ids.shape == (1, 50)
            assert {int(i) // 1000 * 1000 for i in ids[0]} == {FIRST[name]}
            seen.add(name)
            done += 1
        return done

    pointer.set("aliased_a")
    with ThreadPoolExecutor(3) as threads:
        searches = [threads.submit(search) for _ in range(3)]
        try:
            for turn in range(1000):
                if turn >= 30 and seen == set(FIRST):
                    break
                name = ("aliased_b", "aliased_a")[turn % 2]
                pointer.set(name)
                # What was set is what is read, at once.
                assert pointer.get() == name
        finally:
            ended.set()
        assert all(search.result() > 0 for search in searches)
    assert seen == set(FIRST)


def test_many_set_it_at_once(pointer: AliasPointer) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(pointer.set, ["aliased_a", "aliased_b"] * 4))
    assert pointer.get() in FIRST


@pytest.mark.slow
def test_it_outlives_a_killed_server(pointer: AliasPointer, milvus: MilvusProcess) -> None:
    pointer.set("aliased_b")
    milvus.kill()
    milvus.start()
    with MilvusLink(milvus.access) as link:
        assert AliasPointer(link, "active").get() == "aliased_b"

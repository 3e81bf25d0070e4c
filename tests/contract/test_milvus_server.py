"""The coarse index on a real Milvus server beyond the common contract: opening, limits, faults."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymilvus.grpc_gen import milvus_pb2

from tests.milvus_process import MilvusProcess
from trackstar.breaker import BreakerState, CircuitBreaker
from trackstar.coarse import MemoryIndex
from trackstar.codes import CodeKind, CodeSpec
from trackstar.errors import Incompatible, InvalidRequest, NotFound, NotReady
from trackstar.milvus_collection import check_fits, collections, drop, largest_code
from trackstar.milvus_link import MilvusAccess, MilvusLink, RetryPolicy
from trackstar.milvus_server import MAX_CANDIDATES, MilvusServerIndex

DIM = 1000
BITS = CodeSpec(kind="bits", size=256, seed=0)
NUM = 20_000


def codes_of(num: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num, BITS.row_bytes), dtype=np.uint8)


@pytest.fixture(scope="module")
def link(milvus: MilvusProcess) -> Iterator[MilvusLink]:
    with MilvusLink(milvus.access) as link:
        yield link


@pytest.fixture(scope="module")
def full(link: MilvusLink) -> MilvusServerIndex:
    """An index of `NUM` passages whose codes are `codes_of(NUM)`."""
    index = MilvusServerIndex.create(link, "faults", spec=BITS, dim=DIM)
    index.add(np.arange(NUM), codes_of(NUM))
    index.flush()
    assert index.count() == NUM
    return index


@pytest.fixture(scope="module")
def memory() -> MemoryIndex:
    index = MemoryIndex(BITS, DIM)
    index.add(np.arange(NUM), codes_of(NUM))
    return index


def assert_same(server: MilvusServerIndex, memory: MemoryIndex, limit: int, queries: NDArray[Any]) -> None:
    ids, cosines = server.search(queries, limit)
    expected_ids, expected = memory.search(queries, limit)
    np.testing.assert_array_equal(cosines, expected)
    np.testing.assert_array_equal(ids, expected_ids)


def test_order_is_that_of_memory_to_the_bit(full: MilvusServerIndex, memory: MemoryIndex) -> None:
    for limit in (1, 10, 1000, MAX_CANDIDATES - 2000):
        assert_same(full, memory, limit, codes_of(3, seed=1))
    # At the largest limit, places tied with the last are the server's choice.
    ids, cosines = full.search(codes_of(1, seed=1), MAX_CANDIDATES)
    expected_ids, expected = memory.search(codes_of(1, seed=1), MAX_CANDIDATES)
    np.testing.assert_array_equal(cosines, expected)
    above = cosines[0] > cosines[0, -1]
    np.testing.assert_array_equal(ids[0, above], expected_ids[0, above])
    with pytest.raises(InvalidRequest, match="16,384"):
        full.search(codes_of(1), MAX_CANDIDATES + 1)


def test_threads_may_search_at_once(full: MilvusServerIndex, memory: MemoryIndex) -> None:
    queries = codes_of(16, seed=2)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda query: full.search(query[None], 50), queries))
    expected_ids, _ = memory.search(queries, 50)
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in found]), expected_ids)


def test_another_opens_what_was_made(full: MilvusServerIndex, memory: MemoryIndex, milvus: MilvusProcess) -> None:
    with MilvusLink(milvus.access) as link:
        index = MilvusServerIndex.open(link, full.collection, spec=BITS, dim=DIM)
        assert_same(index, memory, 100, codes_of(2, seed=3))
        assert index.count() == NUM
        with pytest.raises(InvalidRequest, match="already"):
            MilvusServerIndex.create(link, full.collection, spec=BITS, dim=DIM)
        for spec, dim in ((BITS, DIM - 1), (replace(BITS, size=128), DIM), (replace(BITS, seed=1), DIM)):
            with pytest.raises(Incompatible, match="256 bits of 1000 dimensions with seed 0, not"):
                MilvusServerIndex.open(link, full.collection, spec=spec, dim=dim)
    with pytest.raises(InvalidRequest, match="closed"):
        index.count()


def test_what_is_not_there_or_not_ours_is_refused(link: MilvusLink) -> None:
    with pytest.raises(NotFound, match="no collection 'absent'"):
        MilvusServerIndex.open(link, "absent", spec=BITS, dim=DIM)
    for name in ("", "a b", "1st", "x" * 256, 'a";drop'):
        with pytest.raises(InvalidRequest, match="no name of a collection"):
            MilvusServerIndex.open(link, name, spec=BITS, dim=DIM)
    index = MilvusServerIndex.create(link, "gone", spec=BITS, dim=DIM)
    drop(link, "gone")
    drop(link, "gone")
    with pytest.raises(NotFound):
        index.add(np.arange(3), codes_of(3))
    with pytest.raises(NotFound):
        index.search(codes_of(1), 1)


def test_a_server_is_asked_what_it_can_hold(link: MilvusLink) -> None:
    assert link.version().startswith("v2.3.5")
    # Of this version.
    kind: CodeKind
    assert largest_code(link, "bits") == largest_code(link, "prefix") == 32_768
    for kind, unit in (("bits", "bits"), ("prefix", "floats")):
        with pytest.raises(Incompatible, match=f"takes codes of up to 32,768 {unit}, not 65,536; build"):
            check_fits(link, kind, 65_536)
        with pytest.raises(Incompatible, match=f"takes codes of up to 32,768 {unit}, not 65,536; build"):
            MilvusServerIndex.create(link, "large", spec=CodeSpec(kind=kind, size=65_536, seed=0), dim=65_536)
        check_fits(link, kind, 32_768)
    assert collections(link, "trackstar_probe_") == []
    with pytest.raises(NotFound):
        MilvusServerIndex.open(link, "large", spec=replace(BITS, size=65_536), dim=65_536)


def test_other_credentials_are_refused_and_not_shown(milvus: MilvusProcess) -> None:
    for access in (
        replace(milvus.access, password="wrong-secret"),
        replace(milvus.access, user="", password="", token="root:wrong-secret"),
        replace(milvus.access, user="", password=""),
    ):
        with MilvusLink(access) as link:
            with pytest.raises(NotReady, match="refuses the credentials") as caught:
                MilvusServerIndex.open(link, "faults", spec=BITS, dim=DIM)
            for shown in (str(caught.value), repr(access), repr(link)):
                assert "wrong-secret" not in shown
    token = f"{milvus.access.user}:{milvus.access.password}"
    with MilvusLink(replace(milvus.access, user="", password="", token=token)) as link:
        assert link.version()


def test_what_is_deleted_is_not_found_again(link: MilvusLink) -> None:
    codes = codes_of(30_000, seed=7)
    index = MilvusServerIndex.create(link, "thinned", spec=BITS, dim=DIM)
    index.add(np.arange(len(codes)), codes)
    # In several requests, and some twice or not there.
    gone = np.arange(0, 50_000, 2)
    index.delete(gone)
    # At once, by this index and by count.
    assert not np.isin(index.search(codes[:4], 1000)[0], gone).any()
    assert index.count() == 15_000
    index.delete(gone[:3])
    index.delete(gone[:0])
    assert index.count() == 15_000
    # What is added again is there again.
    index.add(gone[:5], codes[gone[:5]])
    assert index.search(codes[4:5], 1)[0].tolist() == [[4]]
    assert index.count() == 15_005
    with pytest.raises(InvalidRequest, match="twice"):
        index.delete(np.array([1, 1]))
    drop(link, "thinned")


def test_a_released_collection_is_loaded_again(full: MilvusServerIndex, memory: MemoryIndex, link: MilvusLink) -> None:
    request = milvus_pb2.ReleaseCollectionRequest(collection_name=full.collection)
    link.call("ReleaseCollection", request, link.deadline())
    with pytest.raises(NotReady, match=r"in time|within"):
        full.search(codes_of(1), 5, timeout_seconds=0.3)
    assert_same(full, memory, 20, codes_of(1, seed=4))


def test_a_hanging_server_ends_at_the_time_given(
    full: MilvusServerIndex, memory: MemoryIndex, milvus: MilvusProcess
) -> None:
    with milvus.paused(), pytest.raises(NotReady, match="did not answer Search within"):
        full.search(codes_of(1), 5, timeout_seconds=1)
    assert_same(full, memory, 20, codes_of(1, seed=5))


def test_a_server_that_was_killed_is_found_again_and_nothing_is_lost_or_doubled(milvus: MilvusProcess) -> None:
    states: list[BreakerState] = []
    retries: list[str] = []
    breaker = CircuitBreaker("Milvus", reset_seconds=0.5, on_change=states.append)
    link = MilvusLink(
        milvus.access, breaker=breaker, on_retry=lambda method, reason: retries.append(f"{method} {reason}")
    )
    codes, ids = codes_of(NUM), np.arange(NUM)
    with link:
        index = MilvusServerIndex.create(link, "killed", spec=BITS, dim=DIM)
        index.add(ids[:1000], codes[:1000])
        assert index.search(codes[7:8], 1)[0].tolist() == [[7]]

        def add_slowly(index: MilvusServerIndex, timeout_seconds: float | None) -> None:
            for start in range(0, NUM, 100):
                stop = start + 100
                index.add(ids[start:stop], codes[start:stop], timeout_seconds=timeout_seconds)

        with MilvusLink(milvus.access) as other, ThreadPoolExecutor(2) as threads:
            # One who waits for the server, and one who does not.
            waiting = threads.submit(add_slowly, index, None)
            hasty = threads.submit(add_slowly, MilvusServerIndex.open(other, "killed", spec=BITS, dim=DIM), 0.5)
            milvus.kill()
            with pytest.raises(NotReady):
                hasty.result(30)
            assert not waiting.done()
            with pytest.raises(NotReady):
                index.search(codes[:1], 1, timeout_seconds=5)
            assert "open" in states
            # At once, without asking.
            asked = len(retries)
            with pytest.raises(NotReady, match="does not answer"):
                index.search(codes[:1], 1, timeout_seconds=0.01)
            milvus.start()
            waiting.result(60)
        assert breaker.state == "closed"
        assert len(retries) >= asked
        assert index.count() == NUM
        add_slowly(index, None)
        assert index.count() == NUM
        memory = MemoryIndex(BITS, DIM)
        memory.add(ids, codes)
        assert_same(index, memory, 100, codes_of(2, seed=6))
        drop(link, "killed")


@pytest.mark.slow
def test_a_restart_is_waited_for_and_shows_no_half_read_log(milvus: MilvusProcess) -> None:
    codes, ids = codes_of(NUM), np.arange(NUM)
    memory = MemoryIndex(BITS, DIM)
    memory.add(ids, codes)
    with MilvusLink(milvus.access) as link, MilvusLink(milvus.access) as other:
        writer = MilvusServerIndex.create(link, "restarted", spec=BITS, dim=DIM)
        writer.add(ids, codes)
        reader = MilvusServerIndex.open(other, "restarted", spec=BITS, dim=DIM)
        assert writer.count() == NUM
        for end in (milvus.kill, milvus.stop):
            end()
            milvus.launch()
            answered: set[MilvusServerIndex] = set()
            # What is answered is right, from the first answer on.
            while len(answered) < 2:
                for index in (writer, reader):
                    try:
                        assert_same(index, memory, 100, codes_of(2, seed=6))
                        answered.add(index)
                    except NotReady:
                        time.sleep(0.05)
            assert writer.count() == reader.count() == NUM
        drop(link, "restarted")


def test_nobody_there() -> None:
    with MilvusLink(MilvusAccess(address="127.0.0.1:1"), policy=RetryPolicy(timeout_seconds=3)) as link:
        with pytest.raises(NotReady, match="does not answer"):
            MilvusServerIndex.open(link, "faults", spec=BITS, dim=DIM)
        assert link.breaker.state == "open"
        with pytest.raises(NotReady, match="tried again in"):
            link.version()


def test_it_needs_no_torch() -> None:
    code = "import sys, trackstar.milvus_server, trackstar.code_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

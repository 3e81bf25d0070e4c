"""The contract of `CoarseIndex`, the same for every implementation, against a brute-force ranking in float64."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymilvus.grpc_gen import milvus_pb2

from tests.milvus_process import MilvusProcess
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.codes import CodeSpec, negate
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady, StorageFull
from trackstar.milvus import MAX_CANDIDATES, MilvusLiteIndex
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_server import MilvusServerIndex

DIM = 1000  # padded to 1024
# Not a multiple of 64: the last word of a bits code is padding in part.
SIZE = 72
BITS = CodeSpec(kind="bits", size=SIZE, seed=0)
PREFIX = CodeSpec(kind="prefix", size=SIZE, seed=0)


class Case:
    """One implementation with the codes it takes."""

    def __init__(self, index: CoarseIndex, spec: CodeSpec) -> None:
        self.index = index
        self.spec = spec

    def codes(self, num: int, seed: int = 0) -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        if self.spec.kind == "bits":
            return rng.integers(0, 256, (num, SIZE // 8), dtype=np.uint8)
        prefixes: NDArray[Any] = (rng.standard_normal((num, SIZE)) / np.sqrt(1024)).astype(np.float32)
        return prefixes

    def cosines(self, queries: NDArray[Any], codes: NDArray[Any]) -> NDArray[np.float64]:
        if self.spec.kind == "prefix":
            scores: NDArray[np.float64] = queries.astype(np.float64) @ codes.astype(np.float64).T * (1024 / SIZE)
        else:
            differing = np.unpackbits(queries, axis=1)[:, None] != np.unpackbits(codes, axis=1)[None]
            scores = np.cos(np.pi * differing.sum(2) / SIZE)
        return scores


def memory_prefix(_: Path) -> Case:
    return Case(MemoryIndex(PREFIX, DIM), PREFIX)


def memory_bits(_: Path) -> Case:
    return Case(MemoryIndex(BITS, DIM), BITS)


def milvus_lite(folder: Path) -> Case:
    return Case(MilvusLiteIndex.create(folder / "coarse", dim=DIM, size=SIZE), PREFIX)


ON_A_SERVER = [pytest.param(BITS, id="milvus_bits"), pytest.param(PREFIX, id="milvus_prefix")]


@pytest.fixture(params=[memory_prefix, memory_bits, milvus_lite, *ON_A_SERVER])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    if isinstance(request.param, CodeSpec):
        case = request.getfixturevalue("server_cases")(request.param)
    else:
        case = request.param(tmp_path)
    with closing(case.index):
        yield case


@pytest.fixture(scope="module")
def server_cases(milvus: MilvusProcess) -> Iterator[Callable[[CodeSpec], Case]]:
    """An empty index on the server for codes of a kind; of each kind one collection, because loading takes seconds."""
    with MilvusLink(milvus.access) as link:

        def make(spec: CodeSpec) -> Case:
            name = f"contract_{spec.kind}"
            try:
                index = MilvusServerIndex.open(link, name, spec=spec, dim=DIM)
            except NotFound:
                return Case(MilvusServerIndex.create(link, name, spec=spec, dim=DIM), spec)
            request = milvus_pb2.DeleteRequest(collection_name=name, expr="passage_id >= 0")
            link.call("Delete", request, link.deadline())
            while index.count():
                time.sleep(0.05)
            return Case(index, spec)

        yield make


def test_search_equals_brute_force(case: Case) -> None:
    codes, queries = case.codes(300), case.codes(7, seed=1)
    ids = np.random.default_rng(2).permutation(10_000)[:300].astype(np.int64)
    for start, stop in ((0, 1), (1, 120), (120, 300)):
        case.index.add(ids[start:stop], codes[start:stop])
        assert case.index.count() == stop
    found, cosines = case.index.search(queries, 40)
    assert found.shape == cosines.shape == (7, 40)
    assert found.dtype == np.int64
    assert cosines.dtype == np.float32
    expected = case.cosines(queries, codes)
    for query in range(7):
        order = np.lexsort((ids, -expected[query].round(12)))[:40]
        np.testing.assert_array_equal(found[query], ids[order])
        np.testing.assert_allclose(cosines[query], expected[query, order], rtol=1e-4, atol=1e-5)


def test_what_is_added_after_a_search_is_found(case: Case) -> None:
    codes = case.codes(20)
    case.index.add(np.arange(10), codes[:10])
    case.index.search(codes[:1], 3)
    case.index.add(np.arange(10, 20), codes[10:])
    assert case.index.search(codes[15:16], 1)[0].tolist() == [[15]]


def test_equal_cosines_are_ordered_by_id_and_cut_at_the_smallest(case: Case) -> None:
    codes = np.repeat(case.codes(2), 30, axis=0)
    query = case.codes(1)
    if case.spec.kind == "prefix":
        # Small integers, whose products are exact whatever the order of summation.
        codes, query = np.sign(codes) * np.float32(2), np.sign(query)
    ids = np.random.default_rng(3).permutation(60).astype(np.int64)
    case.index.add(ids, codes)
    near, far = (np.sort(ids[group : group + 30]) for group in (0, 30))
    for limit in (1, 7, 30, 45, 60):
        found, cosines = case.index.search(query, limit)
        assert found[0].tolist() == [*near, *far][:limit]
        assert (np.diff(cosines[0]) <= 0).all()


def test_limit_above_count_gives_everything_once(case: Case) -> None:
    case.index.add(np.arange(5), case.codes(5))
    found, cosines = case.index.search(case.codes(2, seed=1), 100)
    assert cosines.shape == (2, 5)
    assert np.sort(found, axis=1).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_negated_query_turns_the_ranking_round(case: Case) -> None:
    codes, query = case.codes(50), case.codes(1, seed=1)
    case.index.add(np.arange(50), codes)
    nearest, cosines = case.index.search(query, 50)
    furthest, opposite = case.index.search(negate(case.spec, query), 50)
    np.testing.assert_allclose(opposite[0], -cosines[0, ::-1], atol=1e-5)
    if len(np.unique(cosines)) == 50:
        assert furthest[0].tolist() == nearest[0, ::-1].tolist()


def test_adding_an_id_again_replaces_its_code(case: Case) -> None:
    codes = case.codes(30)
    case.index.add(np.arange(20), codes[:20])
    case.index.search(codes[:1], 1)
    case.index.add(np.arange(15, 25), codes[20:])
    assert case.index.count() == 25
    found, _ = case.index.search(codes[[3, 15, 20, 22]], 25)
    assert found[:, 0].tolist()[0] == 3
    assert found[:, 0].tolist()[2:] == [15, 17]
    assert all(len(set(row.tolist())) == 25 for row in found)


def test_empty_index_finds_nothing(case: Case) -> None:
    assert case.index.count() == 0
    found, cosines = case.index.search(case.codes(3), 10)
    assert found.shape == cosines.shape == (3, 0)
    case.index.add(np.empty(0, dtype=np.int64), case.codes(0))
    assert case.index.count() == 0


def test_no_query_gives_no_answer(case: Case) -> None:
    case.index.add(np.arange(3), case.codes(3))
    assert case.index.search(case.codes(0), 2)[0].shape == (0, 2)


def test_the_caller_keeps_its_arrays(case: Case) -> None:
    ids, codes = np.arange(10), case.codes(10)
    query = codes[4:5].copy()
    case.index.add(ids, codes)
    ids += 100
    codes[:] = 0
    assert case.index.search(query, 1)[0].tolist() == [[4]]


def test_what_does_not_fit_is_refused(case: Case) -> None:
    codes = case.codes(4)
    refused: list[Callable[[], object]] = [
        lambda: case.index.add(np.arange(4), codes[:, :-1]),
        lambda: case.index.add(np.arange(4), codes.astype(np.float64)),
        lambda: case.index.add(np.arange(3), codes),
        lambda: case.index.add(np.arange(4).astype(np.int32), codes),
        lambda: case.index.add(np.array([0, 1, 2, 1]), codes),
        lambda: case.index.add(np.array([0, 1, 2, -1]), codes),
        lambda: case.index.search(codes[:, :-1], 1),
        lambda: case.index.search(codes[0], 1),
        lambda: case.index.search(codes, 0),
    ]
    if case.spec.kind == "prefix":
        refused.append(lambda: case.index.add(np.arange(4), np.full_like(codes, np.nan)))
    for call in refused:
        with pytest.raises(InvalidRequest):
            call()
    assert case.index.count() == 0


def test_closed_index_refuses_everything(case: Case) -> None:
    codes = case.codes(4)
    case.index.add(np.arange(4), codes)
    case.index.close()
    case.index.close()
    calls: tuple[Callable[[], object], ...] = (
        case.index.count,
        lambda: case.index.search(codes, 1),
        lambda: case.index.add(np.arange(4), codes),
    )
    for call in calls:
        with pytest.raises(InvalidRequest, match="closed"):
            call()


@pytest.mark.parametrize("spec", [BITS, PREFIX])
def test_memory_index_refuses_a_code_larger_than_the_rotation(spec: CodeSpec) -> None:
    with pytest.raises(InvalidRequest, match="between 1 and 64"):
        MemoryIndex(spec, 64)


def test_milvus_lite_keeps_codes_on_disk(tmp_path: Path) -> None:
    case = milvus_lite(tmp_path)
    codes = case.codes(50)
    case.index.add(np.arange(50), codes)
    case.index.close()
    with closing(MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)) as index:
        assert index.count() == 50
        found, _ = index.search(codes[[7, 31]], 1)
        assert found.tolist() == [[7], [31]]
        index.add(np.arange(50, 60), case.codes(10, seed=5))
        assert index.count() == 60


def add_and_hang(folder: Path, codes: NDArray[Any], done: Any) -> None:
    # A killed process cannot clear its socket away.
    tempfile.tempdir = str(folder.parent)
    index = MilvusLiteIndex.create(folder, dim=DIM, size=SIZE)
    index.add(np.arange(len(codes)), codes)
    done.set()
    signal.pause()


def test_milvus_lite_survives_a_kill_and_tells_who_holds_it(tmp_path: Path) -> None:
    codes = Case(MemoryIndex(PREFIX, DIM), PREFIX).codes(40)
    context = multiprocessing.get_context("spawn")
    done = context.Event()
    writer = context.Process(target=add_and_hang, args=(tmp_path / "coarse", codes, done))
    writer.start()
    assert done.wait(60)
    with pytest.raises(NotReady, match="open already"):
        MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)
    writer.kill()
    writer.join()
    with closing(MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)) as index:
        assert index.count() == 40
        assert index.search(codes[8:9], 1)[0].tolist() == [[8]]


def test_milvus_lite_is_held_once_within_a_process_too(tmp_path: Path) -> None:
    with closing(milvus_lite(tmp_path).index), pytest.raises(NotReady, match="open already"):
        MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)


def test_milvus_lite_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no coarse index"):
        MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)
    assert not (tmp_path / "coarse").exists()
    with pytest.raises(NotFound, match="does not exist"):
        MilvusLiteIndex.create(tmp_path / "no" / "coarse", dim=DIM, size=SIZE)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is a file"):
        MilvusLiteIndex.create(tmp_path / "file", dim=DIM, size=SIZE)
    milvus_lite(tmp_path).index.close()
    with pytest.raises(InvalidRequest, match="already"):
        milvus_lite(tmp_path)
    for dim, size in ((DIM - 1, SIZE), (DIM, SIZE + 8)):
        with pytest.raises(Incompatible, match=f"72 of 1000 coordinates, not {size} of {dim}"):
            MilvusLiteIndex.open(tmp_path / "coarse", dim=dim, size=size)


def test_milvus_lite_tells_when_it_cannot_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(NotReady, match="TMPDIR"):
        milvus_lite(tmp_path)
    assert list(deep.iterdir()) == []
    monkeypatch.undo()
    # What failed let go of the folder.
    milvus_lite(tmp_path).index.close()


def test_milvus_lite_answers_no_more_than_milvus_would(tmp_path: Path) -> None:
    case = milvus_lite(tmp_path)
    with closing(case.index), pytest.raises(InvalidRequest, match="16,384"):
        case.index.search(case.codes(1), MAX_CANDIDATES + 1)


def test_milvus_lite_tells_of_a_damaged_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = milvus_lite(tmp_path)
    case.index.add(np.arange(50), case.codes(50))
    case.index.close()
    (data,) = (tmp_path / "coarse").rglob("data_*.parquet")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CorruptArtifact, match="cannot be used"):
        MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)
    # The engine's own tracebacks stay out of sight, and the folder is let go of.
    assert capfd.readouterr().err == ""
    with pytest.raises(CorruptArtifact):
        MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)


# The engine forgets to close its log after a failed write.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_milvus_lite_loses_nothing_when_the_disk_is_full(tmp_path: Path) -> None:
    case = milvus_lite(tmp_path)
    codes = case.codes(2000)
    case.index.add(np.arange(1000), codes[:1000])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(StorageFull, match="disk is full"):
            case.index.add(np.arange(1000, 2000), codes[1000:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(InvalidRequest, match="closed"):
        case.index.search(codes[:1], 1)
    gc.collect()
    with closing(MilvusLiteIndex.open(tmp_path / "coarse", dim=DIM, size=SIZE)) as index:
        assert index.count() >= 1000
        index.add(np.arange(1000, 2000), codes[1000:])
        assert index.count() == 2000
        assert index.search(codes[[3, 1003]], 1)[0].tolist() == [[3], [1003]]

"""An index in an object store gives what the same index gives from a folder; and what the store does wrong is said."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from tests.s3_server import BUCKET, PROGRAM, S3Server
from tests.unit.test_index import built as built
from tests.unit.test_index import settings
from tests.unit.test_rows import COUNTS, DIM, PER_SHARD, TOTAL, equal, flip, passage, write
from trackstar.blobs import Location, RemotePath, local, location
from trackstar.build import build_index, make_config
from trackstar.cli import main
from trackstar.describe import describe_index
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound, NotReady, TrackstarError
from trackstar.index import Index, load_correction
from trackstar.reranker import Reranker
from trackstar.results import Query
from trackstar.row_shards import complete_part, finished_shards, write_shard
from trackstar.rows import RowStore
from trackstar.storage import file_digest
from trackstar.tracer import Tracer

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="needs moto's server; `make env` installs it")

TIMEOUT_SECONDS = 3.0
# A test that waits longer than this has found a hang, not a slow machine.
HANG_SECONDS = 10 * TIMEOUT_SECONDS


class Counting:
    """A file system that counts what it moves; everything is asked of the real one."""

    async_impl = True

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self.loop = filesystem.loop
        self.reset()

    def reset(self) -> None:
        self.ranges: list[tuple[str, int]] = []

    def bytes_of(self, suffix: str) -> int:
        return sum(count for key, count in self.ranges if key.endswith(suffix))

    async def _cat_file(self, key: str, start: int, end: int) -> bytes:
        data: bytes = await self._filesystem._cat_file(key, start=start, end=end)
        self.ranges.append((key, len(data)))
        return data

    async def _info(self, key: str) -> Any:
        return await self._filesystem._info(key)

    async def _ls(self, key: str, detail: bool) -> Any:
        return await self._filesystem._ls(key, detail=detail)


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    running = S3Server()
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "rows"
    write(folder)
    return folder


def opened(server: S3Server, url: str, **options: Any) -> RemotePath:
    place = location(url, **{"timeout_seconds": TIMEOUT_SECONDS, "storage_options": server.storage_options, **options})
    assert isinstance(place, RemotePath)
    return place


@pytest.fixture(scope="module", params=["s3", "memory"])
def copy(request: pytest.FixtureRequest, server: S3Server) -> Iterator[Callable[[Path], RemotePath]]:
    """Copies a folder into a store: moto's, or any fsspec file system that is not asynchronous."""
    memory = fsspec.filesystem("memory")

    def into(folder: Path) -> RemotePath:
        prefix = folder.parent.name
        if request.param == "s3":
            return opened(server, server.upload(folder, prefix))
        memory.put(f"{folder}/", f"/{prefix}/", recursive=True)
        return opened(server, f"memory://{prefix}", storage_options={})

    yield into
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


# --- the same answers --------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_folder(rows: Path, copy: Callable[[Path], RemotePath]) -> None:
    remote = copy(rows)
    here, there = RowStore(rows), RowStore(remote)
    assert finished_shards(remote) == finished_shards(rows) == [receipt.shard for receipt in there.receipts]
    assert there.receipts == here.receipts
    assert there.digest == here.digest
    generator = np.random.Generator(np.random.Philox(key=1))
    for ids in ([], [5], [616, 0, 616, 301], range(TOTAL), generator.integers(0, TOTAL, 50)):
        assert torch.equal(there.read(ids), here.read(ids))
    assert all(
        equal(one, passage(each)) for one, each in zip(there.passages([616, 3, 299]), [616, 3, 299], strict=True)
    )
    for name in ("doc_id", "source", "metadata", "loss", "crc32"):
        assert there.column(name).tolist() == here.column(name).tolist()
    for verify in (False, True):
        pairs = list(zip(there.batches(verify=verify), here.batches(verify=verify), strict=True))
        assert len(pairs) == len(COUNTS)
        assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)
    there.verify(1)
    assert file_digest(remote / "000001.parquet") == file_digest(rows / "000001.parquet")
    for action in (there.read, there.passages):
        with pytest.raises(NotFound, match=f"no passage {TOTAL}"):
            action([TOTAL])
    here.close()
    there.close()


def rankings(root: Location) -> list[Any]:
    """What a reranker gives for a query, from four threads at once."""
    index = Index(root)
    store = index.rows()
    generation = index.generation(rows=store)
    reranker = Reranker(store, generation)
    dual_d = torch.randn(index.layout.dim, generator=torch.Generator().manual_seed(3))
    ids = np.array([0, 2, 3, 4], dtype=np.int64)

    def once(sign: float) -> list[Any]:
        found = [reranker.rerank(dual_d, ids, sign=sign, k=3), *reranker.scan(dual_d[None], signs=[sign], k=5)[0]]
        numbers = [part.tolist() for ranking in found for part in (ranking.ids, ranking.scores)]
        return [*numbers, reranker.background(dual_d), reranker.block_shares(dual_d, ids).tolist()]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(once, [1.0, -1.0] * 4))
    code = np.ones((1, generation.spec.size // 8), np.uint8)
    answers.append([part.tolist() for part in generation.coarse.search(code, limit=5)[0]])
    store.close()
    return answers


def test_rankings_are_those_of_the_folder(built: Path, copy: Callable[[Path], RemotePath]) -> None:
    remote = copy(built / "index")
    assert rankings(remote) == rankings(built / "index")
    here, there = Index(built / "index"), Index(remote)
    assert there.generation_names() == here.generation_names()
    assert there.catalog.describe(there.active()) == here.catalog.describe(here.active())
    theirs = load_correction(remote / "correction.safetensors")
    assert theirs.keys() == load_correction(built / "index" / "correction.safetensors").keys()


def test_a_url_and_the_environment_are_enough(built: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = server.upload(built / "index", "by-url")
    query = Query(query_id="q", prompt="The river", target=" runs")
    found = []
    for root in (url, str(built / "index")):
        with contextlib.closing(Tracer.open(root)) as tracer:
            trace = tracer.trace(query, k=3)
        found.append([(hit.passage.text, hit.score, hit.z_score) for hit in trace.proponents])
    assert found[0] == found[1]
    assert len(found[0]) == 3


def test_what_needs_a_folder_says_so(built: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = server.upload(built / "index", "folder")
    with pytest.raises(InvalidRequest, match=r"'s3://indexes/folder.*give a local folder"):
        local(Index(opened(server, url)).root)
    with pytest.raises(InvalidRequest, match="give a local folder"):
        describe_index(url)


def stored_corpus(built: Path, tmp_path: Path, server: S3Server) -> str:
    (tmp_path / "corpus").mkdir()
    shutil.copy(built / "corpus.jsonl", tmp_path / "corpus")
    return server.upload(tmp_path / "corpus", f"corpora/{tmp_path.name}")


def test_an_index_is_built_there_from_a_corpus_there(
    built: Path, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials come from the environment, as they do on a cluster."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    corpus = stored_corpus(built, tmp_path, server)
    here = Index(built / "index")
    wanted = settings(built, corpus={"paths": [corpus]})
    generation = build_index(make_config(wanted), "s3://indexes/made")
    generation.close()
    there = Index("s3://indexes/made")
    assert there.active() == generation.name
    assert torch.equal(there.rows().read([0, 1, 2]), here.rows().read([0, 1, 2]))
    assert [one.text for one in there.rows().passages([2, 0])] == [one.text for one in here.rows().passages([2, 0])]
    # Given again it does nothing; another damping codes anew.
    assert build_index(make_config(wanted), "s3://indexes/made").name == generation.name
    other = build_index(make_config({**wanted, "mix": {"damping": 0.7}}), "s3://indexes/made")
    assert there.active() == other.name != generation.name
    assert main(["audit", "s3://indexes/made", "--sample", "8"]) == 0


def test_wrong_credentials_are_named_without_being_shown(
    built: Path, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    corpus = stored_corpus(built, tmp_path, server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    config = make_config(settings(built, corpus={"paths": [corpus]}))
    with pytest.raises(TrackstarError) as caught:
        build_index(config, "s3://indexes/refused")
    assert "secret-of-the-test" not in str(caught.value)
    assert "s3://" in str(caught.value)


# --- only what is wanted -----------------------------------------------------------------------------------------

WIDE, WIDE_DIM = 256, 8192


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> str:
    """The URL of one shard of rows of 16 KiB."""
    folder = tmp_path_factory.mktemp("wide") / "rows"
    rows_ND = torch.randn(WIDE, WIDE_DIM, generator=torch.Generator().manual_seed(0))
    passages = [passage(row) for row in range(WIDE)]
    receipt = write_shard(folder, 0, passages, rows_ND, torch.zeros(WIDE), dtype="bfloat16")
    complete_part(folder, 0, [receipt], first_shard=0, shard_passages=WIDE, dim=WIDE_DIM, dtype="bfloat16", corpus={})
    return server.upload(folder, "wide")


@pytest.mark.parametrize(
    ("ids", "most_requests", "most_bytes"),
    [
        (range(0, WIDE, 13), 20, 2.0),  # scattered: 20 rows
        (range(100, 120), 1, 1.0),  # side by side
        (range(100, 140, 2), 1, 2.0),  # every other one: cheaper together
        ([7] * 20, 1, 0.05),  # one row often
    ],
)
def test_only_the_rows_wanted_are_moved(
    ids: Sequence[int], most_requests: int, most_bytes: float, wide: str, server: S3Server
) -> None:
    remote = opened(server, wide)
    counting = Counting(remote.store._filesystem)
    remote.store._filesystem = counting
    store = RowStore(remote)
    assert counting.bytes_of(".safetensors") <= 4096
    counting.reset()
    assert store.read(ids).shape == (len(ids), WIDE_DIM)
    moved = [count for key, count in counting.ranges if key.endswith(".safetensors")]
    assert len(moved) <= most_requests
    assert sum(moved) <= most_bytes * len(ids) * WIDE_DIM * 2
    # Its footer, and the checksums.
    assert counting.bytes_of(".parquet") < 70_000
    counting.reset()
    store.read(ids)
    assert counting.bytes_of(".parquet") == 0


def test_a_scan_moves_every_byte_once(wide: str, server: S3Server) -> None:
    remote = opened(server, wide)
    counting = Counting(remote.store._filesystem)
    remote.store._filesystem = counting
    store = RowStore(remote)
    counting.reset()
    store.shard(0, verify=True)
    whole = WIDE * WIDE_DIM * 2
    assert whole < counting.bytes_of(".safetensors") < whole + 200


def test_norms_are_read_without_the_codes(tmp_path: Path, built: Path, server: S3Server) -> None:
    """Of a generation whose codes are searched elsewhere."""
    copied = Path(shutil.copytree(built / "index", tmp_path / "index"))
    index = Index(copied)
    facts = copied / "generations" / index.active() / "generation.json"
    facts.write_text(facts.read_text().replace('"memory"', '"milvus-lite"').replace('"bits"', '"prefix"'))
    remote = opened(server, server.upload(copied, "norms"))
    counting = Counting(remote.store._filesystem)
    remote.store._filesystem = counting
    generation = Index(remote).generation()
    assert generation.norms_N.tolist() == index.generation().norms_N.tolist()
    with pytest.raises(NotReady, match="no coarse index"):
        _ = generation.coarse
    assert not [key for key, _ in counting.ranges if "/codes/" in key]


# --- damage ------------------------------------------------------------------------------------------------------


def test_altered_objects_are_corrupt(rows: Path, tmp_path: Path, server: S3Server) -> None:
    damaged = Path(shutil.copytree(rows, tmp_path / "rows"))
    path = damaged / "000001.safetensors"
    flip(path, path.stat().st_size - PER_SHARD * DIM * 4 + 150 * DIM * 4 + 13)
    sidecar = damaged / "000002.parquet"
    flip(sidecar, sidecar.stat().st_size // 3)
    store = RowStore(opened(server, server.upload(damaged, "altered")))
    with pytest.raises(CorruptArtifact, match=r"s3://indexes/altered/000001\.safetensors.*row 150 \(passage 450\)"):
        store.read([3, 450])
    with pytest.raises(CorruptArtifact, match=r"s3://indexes/altered/000001\.safetensors.*digest"):
        store.shard(1, verify=True)
    for action in (lambda: store.shard(2, verify=True), lambda: store.passages([610])):
        with pytest.raises(CorruptArtifact, match=r"s3://indexes/altered/000002\.parquet"):
            action()
    assert torch.equal(store.read([3, 449]), RowStore(rows).read([3, 449]))


def test_objects_cut_or_removed_are_corrupt(rows: Path, server: S3Server) -> None:
    url = server.upload(rows, "cut")
    store = RowStore(opened(server, url))
    whole = (rows / "000000.safetensors").read_bytes()
    server.put("cut/000000.safetensors", whole[:-5])
    with pytest.raises(CorruptArtifact, match=r"row 299 \(passage 299\)"):
        store.read([299])
    with pytest.raises(CorruptArtifact, match="holds 28,795 bytes of rows, 28,800 expected"):
        store.shard(0)
    server.put("cut/000000.safetensors", whole[:1000])
    with pytest.raises(CorruptArtifact, match=r"row 299 \(passage 299\)"):
        store.read([299])
    with pytest.raises(CorruptArtifact, match=r"000000\.safetensors.*1,000 bytes, .* expected"):
        RowStore(opened(server, url))
    server.remove("cut/000000.safetensors")
    with pytest.raises(CorruptArtifact, match=r"000000\.safetensors"):
        store.read([299])
    with pytest.raises(CorruptArtifact, match=r"000000\.safetensors.*missing"):
        RowStore(opened(server, url))
    server.remove("cut/000001.parquet")
    with pytest.raises(CorruptArtifact, match=r"000001\.parquet.*missing"):
        store.passages([300])


def test_altered_parts_of_a_generation_are_corrupt(built: Path, tmp_path: Path, server: S3Server) -> None:
    index = Index(built / "index")
    home = f"generations/{index.active()}"
    for number, name in enumerate(["whitener.safetensors", "background.safetensors", "codes/000001.safetensors"]):
        copied = Path(shutil.copytree(built / "index", tmp_path / str(number)))
        path = copied / home / name
        flip(path, path.stat().st_size - 1)
        remote = Index(opened(server, server.upload(copied, f"altered-{number}")))
        with pytest.raises(CorruptArtifact, match=rf"s3://.*{name}' is not what was written"):
            remote.generation()
    server.remove(f"altered-0/{home}/codes/000001.safetensors")
    server.put(f"altered-0/{home}/whitener.safetensors", (built / "index" / home / "whitener.safetensors").read_bytes())
    with pytest.raises(CorruptArtifact, match=r"codes/000001\.safetensors' is missing"):
        Index(opened(server, f"s3://{BUCKET}/altered-0")).generation()


def test_no_index_is_not_found(server: S3Server) -> None:
    for url in (f"s3://{BUCKET}/nothing", "s3://no-such-bucket/nothing"):
        with pytest.raises(NotFound, match=f"'{url}' holds no index"):
            Index(opened(server, url))
    with pytest.raises(NotReady, match=f"s3://{BUCKET}/nothing.*not complete"):
        RowStore(opened(server, f"s3://{BUCKET}/nothing"))


# --- a store that does not answer --------------------------------------------------------------------------------


def refused(action: Callable[[], Any], match: str) -> None:
    began = time.monotonic()
    with pytest.raises(NotReady, match=match):
        action()
    assert time.monotonic() - began < HANG_SECONDS


def test_a_store_that_stops_is_not_ready_until_it_is_back(rows: Path) -> None:
    server = S3Server()
    server.start()
    try:
        url = server.upload(rows, "rows")
        store = RowStore(opened(server, url, timeout_seconds=1.0))
        expected = store.read([0, 310])
        named = rf"'{url}/.* cannot be reached: the store gave no answer within 1 seconds"
        server.pause()
        refused(lambda: store.read([0, 310]), named)
        refused(lambda: store.passages([0, 310]), named)
        server.resume()
        assert torch.equal(store.read([0, 310]), expected)
        server.stop()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda ids: refused(lambda: store.read(ids), named), [[0], [310], [0, 310], [610]]))
        refused(lambda: RowStore(opened(server, url, timeout_seconds=1.0)), named)
        refused(lambda: Index(opened(server, url, timeout_seconds=1.0)), named)
        server.start()
        server.upload(rows, "rows")
        assert torch.equal(store.read([0, 310]), expected)
        assert len(store.passages([0, 310])) == 2
    finally:
        server.stop()


class Scripted(http.server.ThreadingHTTPServer):
    """Answers every request with the next status of a script, the last one for ever, and a body full of secrets."""

    def __init__(self, statuses: Sequence[int], body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses, self.body = list(statuses), body
        self.asked = 0

    def __enter__(self) -> Scripted:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def storage_options(self) -> dict[str, str]:
        return {
            "endpoint": f"http://127.0.0.1:{self.server_port}",
            "region": "us-east-1",
            "access_key_id": "KEYKEYKEY",
            "secret_access_key": "hush-hush",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        status = self.server.statuses[min(self.server.asked, len(self.server.statuses) - 1)]
        self.server.asked += 1
        body = self.server.body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        if status == 206:
            self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_busy_store_is_asked_again() -> None:
    with Scripted([503, 500, 429, 503, 206], b"content") as server:
        place = location("s3://bucket/name", timeout_seconds=HANG_SECONDS, storage_options=server.storage_options)
        assert isinstance(place, RemotePath)
        assert place.read_bytes() == b"content"
        assert server.asked >= 5


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_asked_again_and_tells_no_secret(status: int) -> None:
    with Scripted([status], b"<Error>hush-hush KEYKEYKEY</Error>") as server:
        place = location("s3://bucket/name", timeout_seconds=HANG_SECONDS, storage_options=server.storage_options)
        assert isinstance(place, RemotePath)
        with pytest.raises(NotReady, match=r"'s3://bucket/name' .* refuses it .*; check the credentials") as caught:
            place.read_bytes()
        assert server.asked <= 2
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "hush" not in str(caught.value)
    assert "KEYKEY" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://KEYKEY:hush@bucket/name", "s3://bucket/name?sig=hush"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'s3://bucket/name' was given with credentials") as caught:
        Index(url)
    assert "hush" not in str(caught.value)
    assert "KEYKEY" not in str(caught.value)


def test_an_unknown_scheme_is_said() -> None:
    with pytest.raises(InvalidRequest, match="'nothing://bucket/name' cannot be opened"):
        Index("nothing://bucket/name")


def test_what_is_no_url_is_a_path(tmp_path: Path) -> None:
    assert location(str(tmp_path)) == location(tmp_path) == location(f"file://{tmp_path}") == tmp_path
    assert location("a:b") == Path("a:b")


def test_a_forked_child_is_told_to_be_spawned(rows: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that does the requests stays with the parent; without a check the child would wait for ever."""
    store = RowStore(opened(server, server.upload(rows, "forked")))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(NotReady, match="before this process was forked; start processes by spawn"):
        store.read([0])

"""Importing a generation's codes into a real Milvus server: upserts and bulk files, crashes on both sides, counts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from tests.milvus_process import MilvusProcess, milvus_server
from tests.s3_server import BUCKET, PROGRAM, S3Server
from trackstar.blobs import location
from trackstar.coarse import MemoryIndex
from trackstar.code_store import CodeShard
from trackstar.codes import CodeSpec
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound, NotReady
from trackstar.milvus_alias import AliasPointer
from trackstar.milvus_bulk import BulkFolder, refusal, submit, tasks, wait
from trackstar.milvus_collection import collections, drop
from trackstar.milvus_import import CollectionImport
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_memory import needed_bytes, query_nodes, stored_bytes
from trackstar.milvus_server import MilvusServerIndex
from trackstar.storage import publish_json

DIM = 1000
BITS = CodeSpec(kind="bits", size=512, seed=0)
PREFIX = CodeSpec(kind="prefix", size=48, seed=0)
SHARDS, SHARD = 4, 1500


def shard_of(number: int, spec: CodeSpec = BITS, size: int = SHARD) -> CodeShard:
    random = np.random.default_rng(number)
    codes: NDArray[Any] = random.integers(0, 256, (size, spec.row_bytes), dtype=np.uint8)
    if spec.kind == "prefix":
        codes = random.normal(size=(size, spec.size)).astype(np.float32)
    passage_ids = number * SHARD + np.arange(size, dtype=np.int64)
    return CodeShard(passage_ids=passage_ids, codes=codes, norms=np.ones(size, dtype=np.float32))


def digest_of(shard: CodeShard) -> str:
    return hashlib.sha256(shard.codes.tobytes()).hexdigest()


def memory_of(spec: CodeSpec = BITS, shards: int = SHARDS) -> MemoryIndex:
    memory = MemoryIndex(spec, DIM)
    for number in range(shards):
        memory.add(shard_of(number, spec).passage_ids, shard_of(number, spec).codes)
    return memory


def run(work: CollectionImport, spec: CodeSpec = BITS, shards: int = SHARDS) -> None:
    work.prepare()
    for number in work.missing(range(shards)):
        work.add(number, shard_of(number, spec), digest_of(shard_of(number, spec)))
    work.finish(shards * SHARD)


def assert_holds(link: MilvusLink, collection: str, spec: CodeSpec = BITS, shards: int = SHARDS) -> None:
    """Every code, and nothing else: as many as in memory, and the same answers to the bit."""
    server, memory = MilvusServerIndex.open(link, collection, spec=spec, dim=DIM), memory_of(spec, shards)
    assert server.count() == memory.count()
    queries = shard_of(99, spec).codes[:3]
    ids, cosines = server.search(queries, 2000)
    expected_ids, expected = memory.search(queries, 2000)
    if spec.kind == "bits":
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(cosines, expected)
    else:
        # Dot products are summed in another order.
        np.testing.assert_array_equal(np.sort(ids), np.sort(expected_ids))
        np.testing.assert_allclose(cosines, expected, rtol=1e-5)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def link(milvus: MilvusProcess) -> Iterator[MilvusLink]:
    with MilvusLink(milvus.access) as link:
        yield link


@pytest.fixture
def bulk(milvus: MilvusProcess) -> BulkFolder:
    """A folder that the server, whose storage is a disk, finds under the same name."""
    folder = milvus.folder / "data" / "imports"
    return BulkFolder(folder, str(folder))


def test_each_shard_once_and_twice_changes_nothing(link: MilvusLink, tmp_path: Path) -> None:
    work = CollectionImport(link, "imported", spec=BITS, dim=DIM, receipts=tmp_path / "receipts")
    with pytest.raises(InvalidRequest, match="not prepared"):
        work.missing([0])
    work.prepare()
    assert work.missing(range(SHARDS)) == [0, 1, 2, 3]
    work.add(2, shard_of(2), digest_of(shard_of(2)))
    assert work.missing([3, 2, 1]) == [3, 1]
    for number in (0, 1, 3):
        work.add(number, shard_of(number), digest_of(shard_of(number)))
    steps: list[str] = []
    work.finish(SHARDS * SHARD, on_wait=steps.append)
    assert steps == ["write out", "index", "load", "count"]
    assert_holds(link, "imported")
    # A few bytes of each file are its frame, or may be saved by packing.
    stored = stored_bytes(link, "imported")
    assert stored is not None
    assert 0.5 < stored / needed_bytes(BITS, SHARDS * SHARD) < 2
    assert needed_bytes(BITS, 10, replicas=2) == 2 * 10 * (64 + 8)
    assert all(0 < node.used_bytes < node.total_bytes for node in query_nodes(link))
    assert len(query_nodes(link)) == 1
    found = files(tmp_path / "receipts")
    assert sorted(found) == ["000000.json", "000001.json", "000002.json", "000003.json", "complete.json"]
    assert json.loads(found["complete.json"])["count"] == SHARDS * SHARD
    assert json.loads(found["complete.json"])["collection"] == "imported"
    assert json.loads(found["000002.json"])["count"] == SHARD
    assert json.loads(found["000002.json"])["digest"] == digest_of(shard_of(2))
    run(work)
    run(CollectionImport(link, "imported", spec=BITS, dim=DIM, receipts=tmp_path / "receipts"))
    # Without receipts too.
    run(CollectionImport(link, "imported", spec=BITS, dim=DIM, receipts=tmp_path / "others"))
    assert_holds(link, "imported")
    assert files(tmp_path / "receipts") == found == files(tmp_path / "others")
    # Codes that changed are imported again; codes that do not fit are refused.
    other = replace_codes(shard_of(1), ~shard_of(1).codes)
    work.add(1, other, digest_of(other))
    index = MilvusServerIndex.open(link, "imported", spec=BITS, dim=DIM)
    assert index.count() == SHARDS * SHARD
    np.testing.assert_array_equal(index.search(other.codes[:1], 1)[0], [[SHARD]])
    with pytest.raises(InvalidRequest, match="bits codes"):
        work.add(5, shard_of(5, PREFIX), "")
    drop(link, "imported")
    with pytest.raises(NotFound, match="no collection 'imported'"):
        stored_bytes(link, "imported")


def replace_codes(shard: CodeShard, codes: NDArray[Any]) -> CodeShard:
    return replace(shard, codes=codes)


def test_other_codes_and_too_large_ones_are_refused(link: MilvusLink, tmp_path: Path) -> None:
    MilvusServerIndex.create(link, "others", spec=BITS, dim=DIM)
    for spec in (PREFIX, replace(BITS, seed=1)):
        with pytest.raises(Incompatible, match="holds 512 bits of 1000 dimensions with seed 0, not"):
            CollectionImport(link, "others", spec=spec, dim=DIM, receipts=tmp_path).prepare()
    drop(link, "others")
    large = replace(BITS, size=65_536)
    with pytest.raises(Incompatible, match="up to 32,768 bits, not 65,536"):
        CollectionImport(link, "others", spec=large, dim=65_536, receipts=tmp_path).prepare()
    assert collections(link, "others") == []
    with pytest.raises(InvalidRequest, match="no name"):
        CollectionImport(link, "1st", spec=BITS, dim=DIM, receipts=tmp_path)
    with pytest.raises(InvalidRequest, match="keeps between"):
        CollectionImport(link, "others", spec=large, dim=DIM, receipts=tmp_path)


def test_a_wrong_count_begins_anew(link: MilvusLink, tmp_path: Path) -> None:
    work = CollectionImport(link, "miscounted", spec=BITS, dim=DIM, receipts=tmp_path)
    run(work)
    AliasPointer(link, "miscounted_alias").set("miscounted")
    MilvusServerIndex.open(link, "miscounted", spec=BITS, dim=DIM).add(np.array([10**9]), shard_of(9).codes[:1])
    # What is in use is not deleted.
    with pytest.raises(InvalidRequest, match="miscounted_alias"):
        work.finish(SHARDS * SHARD)
    AliasPointer(link, "miscounted_alias").drop()
    with pytest.raises(CorruptArtifact, match=r"'miscounted'.* holds 6,001 codes, not 6,000; .*again"):
        work.finish(SHARDS * SHARD)
    assert files(tmp_path) == {}
    assert collections(link, "miscounted") == []
    with pytest.raises(NotFound):
        work.add(0, shard_of(0), "")
    run(work)
    assert_holds(link, "miscounted")
    # Receipts of a collection that is there no longer are none.
    drop(link, "miscounted")
    run(CollectionImport(link, "miscounted", spec=BITS, dim=DIM, receipts=tmp_path))
    assert_holds(link, "miscounted")
    drop(link, "miscounted")


@pytest.mark.parametrize(
    "spec", [pytest.param(BITS, id="bits"), pytest.param(PREFIX, id="prefix", marks=pytest.mark.slow)]
)
def test_files_are_imported_in_bulk(
    spec: CodeSpec, link: MilvusLink, bulk: BulkFolder, milvus: MilvusProcess, tmp_path: Path
) -> None:
    name = f"bulk_{spec.kind}"
    work = CollectionImport(link, name, spec=spec, dim=DIM, receipts=tmp_path, bulk=bulk)
    run(work, spec)
    assert work.bulk_refusal is None
    done = tasks(link, name, link.deadline())
    assert [(one.state, one.rows) for one in done] == [("done", SHARD)] * SHARDS
    assert_holds(link, name, spec)
    assert list((milvus.folder / "data" / "imports").iterdir()) == []
    assert not [path for path in tmp_path.iterdir() if "started" in path.name]
    # Again, with and without receipts of the shards: no file is imported a second time over the first.
    run(work, spec)
    assert len(tasks(link, name, link.deadline())) == SHARDS
    drop(link, name)


def test_what_a_crash_leaves_is_mended(link: MilvusLink, bulk: BulkFolder, tmp_path: Path) -> None:
    work = CollectionImport(link, "mended", spec=BITS, dim=DIM, receipts=tmp_path, bulk=bulk)
    work.prepare()
    work.add(3, shard_of(3), digest_of(shard_of(3)))
    facts = {key: json.loads((tmp_path / "000003.json").read_text())[key] for key in ("collection", "collection_id")}

    def left(number: int, **content: Any) -> None:
        publish_json(tmp_path / f"{number:06d}.started.json", {**facts, **content})

    # Killed before the file was written.
    left(0, file="mended-0.parquet")
    # Killed after the import was asked for, and before its number was noted; it goes on.
    left(1, file="mended-1.parquet")
    bulk.write("mended-1.parquet", "bits", shard_of(1).passage_ids, shard_of(1).codes)
    submit(link, "mended", bulk.server_name("mended-1.parquet"))
    # Killed when it was imported, and before the receipt.
    bulk.write("mended-2.parquet", "bits", shard_of(2).passage_ids, shard_of(2).codes)
    task_id = submit(link, "mended", bulk.server_name("mended-2.parquet"))
    left(2, file="mended-2.parquet", task=task_id)
    wait(link, [task_id], stall_seconds=60)
    # Killed in the middle of upserts.
    left(4)
    part = slice(0, SHARD // 3)
    MilvusServerIndex.open(link, "mended", spec=BITS, dim=DIM, load=False).add(
        shard_of(4).passage_ids[part], shard_of(4).codes[part]
    )
    # A task that the server remembers no longer, and a file that is no JSON.
    left(5, file="mended-5.parquet", task=1)
    (tmp_path / "000006.json").write_text("{")
    again = CollectionImport(link, "mended", spec=BITS, dim=DIM, receipts=tmp_path, bulk=bulk)
    again.prepare()
    assert again.missing(range(7)) == [0, 1, 2, 4, 5, 6]
    run(again, shards=7)
    assert_holds(link, "mended", shards=7)
    assert not [path for path in tmp_path.iterdir() if "started" in path.name]
    drop(link, "mended")


def test_an_import_that_hangs_on_the_server_begins_anew(link: MilvusLink, bulk: BulkFolder, tmp_path: Path) -> None:
    """It could add its codes at any time: no count would be the last word."""
    impatient = CollectionImport(link, "hanging", spec=BITS, dim=DIM, receipts=tmp_path, bulk=bulk, timeout_seconds=0.3)
    impatient.prepare()
    impatient.add(1, replace_codes(shard_of(1, size=0), shard_of(1).codes[:0]), "none")
    facts = {key: json.loads((tmp_path / "000001.json").read_text())[key] for key in ("collection", "collection_id")}
    bulk.write("hanging.parquet", "bits", shard_of(0).passage_ids, shard_of(0).codes)
    # Takes some two seconds, most of them without a change.
    task_id = submit(link, "hanging", bulk.server_name("hanging.parquet"))
    publish_json(tmp_path / "000000.started.json", {**facts, "file": "hanging.parquet", "task": task_id})
    with pytest.raises(CorruptArtifact, match=r"'hanging'.* whose import does not end; .* give the command again"):
        impatient.add(0, shard_of(0), digest_of(shard_of(0)))
    assert collections(link, "hanging") == []
    assert files(tmp_path) == {}
    run(CollectionImport(link, "hanging", spec=BITS, dim=DIM, receipts=tmp_path))
    assert_holds(link, "hanging")
    drop(link, "hanging")


@pytest.mark.slow
def test_doubled_rows_are_noticed(link: MilvusLink, bulk: BulkFolder, tmp_path: Path) -> None:
    """What the count is for: a file imported twice behind our back is found once and counted twice."""
    work = CollectionImport(link, "doubled", spec=BITS, dim=DIM, receipts=tmp_path, bulk=bulk)
    run(work, shards=2)
    bulk.write("doubled.parquet", "bits", shard_of(1).passage_ids, shard_of(1).codes)
    [ended] = wait(link, [submit(link, "doubled", bulk.server_name("doubled.parquet"))], stall_seconds=60)
    assert ended is not None
    assert ended.state == "done"
    bulk.remove("doubled.parquet")
    with pytest.raises(CorruptArtifact, match="holds 4,500 codes, not 3,000"):
        work.finish(2 * SHARD)
    run(work, shards=2)
    assert_holds(link, "doubled", shards=2)
    drop(link, "doubled")


def test_where_the_server_finds_no_file_codes_are_upserted(link: MilvusLink, tmp_path: Path) -> None:
    unseen = BulkFolder(tmp_path / "unseen", "nowhere")
    reason = refusal(link, unseen, "bits")
    assert reason is not None
    # The server's own words.
    assert "failed to get file size of 'nowhere/" in reason
    work = CollectionImport(link, "unseen", spec=BITS, dim=DIM, receipts=tmp_path / "receipts", bulk=unseen)
    run(work)
    assert "no such file" in str(work.bulk_refusal)
    assert tasks(link, "unseen", link.deadline()) == []
    assert_holds(link, "unseen")
    assert collections(link, "trackstar_probe_") == []
    drop(link, "unseen")
    with pytest.raises(InvalidRequest, match="cannot be opened"):
        BulkFolder("unknown-scheme://bucket/imports", "imports")


@pytest.mark.parametrize("kind", ["bits", "prefix"])
def test_files_hold_what_was_written(kind: str, tmp_path: Path) -> None:
    spec = {"bits": BITS, "prefix": PREFIX}[kind]
    shard = shard_of(0, spec)
    for place in (tmp_path / "files", f"memory://imports-{kind}"):
        BulkFolder(place, "").write("one.parquet", spec.kind, shard.passage_ids, shard.codes)
        with fsspec.open(f"{place}/one.parquet", "rb") as stream:
            table = pq.read_table(stream)
        np.testing.assert_array_equal(table["passage_id"].to_numpy(), shard.passage_ids)
        rows = table["code"].to_pylist()
        found = np.stack(
            [np.array(row, np.float32) if spec is PREFIX else np.frombuffer(row, np.uint8) for row in rows]
        )
        np.testing.assert_array_equal(found, shard.codes)
        BulkFolder(place, "").remove("one.parquet")
        BulkFolder(place, "").remove("one.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotReady, match="cannot be written"):
        BulkFolder(tmp_path / "file", "").write("one.parquet", spec.kind, shard.passage_ids, shard.codes)


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.exists(), reason="needs moto's server; `make env` installs it")
def test_files_are_imported_from_a_bucket(tmp_path: Path) -> None:
    """The server stores in a bucket, and we write into the same one by its URL."""
    store = S3Server()
    store.start()
    key, secret = (store.environment[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    settings = {
        "address": "127.0.0.1",
        "port": int(store.endpoint.rsplit(":", 1)[1]),
        "accessKeyID": key,
        "secretAccessKey": secret,
        "bucketName": BUCKET,
        "rootPath": "milvus",
        "useSSL": False,
    }
    try:
        with milvus_server(settings) as server, MilvusLink(server.access) as link:
            bulk = BulkFolder(f"s3://{BUCKET}/imports", "imports", storage_options=store.storage_options)
            work = CollectionImport(link, "bucket", spec=BITS, dim=DIM, receipts=tmp_path, bulk=bulk)
            run(work)
            assert work.bulk_refusal is None
            done = tasks(link, "bucket", link.deadline())
            assert [(one.state, one.rows) for one in done] == [("done", SHARD)] * SHARDS
            assert_holds(link, "bucket")
            left = location(f"s3://{BUCKET}/imports", storage_options=store.storage_options)
            assert not left.is_dir()
    finally:
        store.stop()
    with pytest.raises(NotReady, match=f"'s3://{BUCKET}/imports/one.parquet' cannot be written") as caught:
        bulk.write("one.parquet", "bits", shard_of(0).passage_ids, shard_of(0).codes)
    assert secret not in str(caught.value)
    bulk.remove("one.parquet")


CHILD = """
import sys
from pathlib import Path
from tests.contract.test_milvus_import import BITS, DIM, digest_of, shard_of
from trackstar.milvus_bulk import BulkFolder
from trackstar.milvus_import import CollectionImport
from trackstar.milvus_link import MilvusAccess, MilvusLink

address, user, password, name, receipts, folder, *numbers = sys.argv[1:]
bulk = BulkFolder(folder, folder) if folder else None
with MilvusLink(MilvusAccess(address=address, user=user, password=password)) as link:
    work = CollectionImport(link, name, spec=BITS, dim=DIM, receipts=Path(receipts), bulk=bulk)
    work.prepare()
    print("prepared", flush=True)
    for number in work.missing([int(number) for number in numbers]):
        work.add(number, shard_of(number), digest_of(shard_of(number)))
"""


def child(milvus: MilvusProcess, name: str, receipts: Path, folder: str, numbers: range) -> subprocess.Popen[str]:
    access = milvus.access
    arguments = [access.address, access.user, access.password, name, str(receipts), folder, *map(str, numbers)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["upserts", "bulk"])
def test_processes_are_killed_anywhere(how: str, link: MilvusLink, milvus: MilvusProcess, tmp_path: Path) -> None:
    """Two processes with different shards, killed at different times until nothing is missing."""
    name, folder = f"killed_{how}", str(milvus.folder / "data" / "imports") if how == "bulk" else ""
    shards = 40 if how == "upserts" else 8
    work = CollectionImport(link, name, spec=BITS, dim=DIM, receipts=tmp_path)
    work.prepare()
    kills = 0
    for attempt in range(20):
        missing = work.missing(range(shards))
        if not missing:
            break
        children = [child(milvus, name, tmp_path, folder, range(first, shards, 2)) for first in (0, 1)]
        for one in children:
            assert one.stdout is not None
            assert one.stdout.readline() == "prepared\n"
        # Asking whether files are imported takes a while, so it is the progress that says when.
        while work.missing(missing) == missing and any(one.poll() is None for one in children):
            time.sleep(0.005)
        time.sleep((0.005 if how == "upserts" else 0.6) * (attempt % 4))
        for one in children:
            kills += one.poll() is None
            one.kill()
            one.communicate()
    assert kills > 0
    assert work.missing(range(shards)) == []
    work.finish(shards * SHARD)
    assert_holds(link, name, shards=shards)
    drop(link, name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["upserts", "bulk"])
def test_a_server_that_is_killed_in_the_middle(
    how: str, bulk: BulkFolder, milvus: MilvusProcess, tmp_path: Path
) -> None:
    """The import waits for its return and goes on; the collection is that of an import without interruption."""
    shards, name = 20 if how == "upserts" else 8, f"survivor_{how}"
    with MilvusLink(milvus.access) as link:
        work = CollectionImport(
            link,
            name,
            spec=BITS,
            dim=DIM,
            receipts=tmp_path,
            bulk=bulk if how == "bulk" else None,
            timeout_seconds=30,
        )
        work.prepare()

        def command(numbers: range) -> None:
            """Given again while it says so."""
            for _ in range(10):
                try:
                    work.prepare()
                    for number in work.missing(numbers):
                        work.add(number, shard_of(number), digest_of(shard_of(number)))
                    return
                except (NotReady, CorruptArtifact):
                    continue

        for part in (range(shards // 2), range(shards // 2, shards)):
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(command, part)
                while len(work.missing(part)) > len(part) - 2 and not running.done():
                    time.sleep(0.002)
                # In the middle of the third shard, as a rule.
                time.sleep(1.0 if how == "bulk" else 0.0)
                milvus.kill()
                milvus.start()
                running.result(300)
        command(range(shards))
        work.finish(shards * SHARD)
        whole = CollectionImport(link, f"{name}_whole", spec=BITS, dim=DIM, receipts=tmp_path / "whole")
        run(whole, shards=shards)
        for collection in (name, f"{name}_whole"):
            assert_holds(link, collection, shards=shards)
            drop(link, collection)


def test_it_needs_no_torch() -> None:
    code = "import sys, trackstar.milvus_import, trackstar.milvus_alias; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

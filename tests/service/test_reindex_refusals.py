"""Jobs that cannot go on: one sentence that names the thing, what answers goes on as it was, and the same job finishes
once the cause is gone."""

from __future__ import annotations

import http.server
import multiprocessing
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle

from services.reindex import config as reindex_config
from services.reindex.job import Outcome, run_job
from services.reindex.progress import JobReporter
from tests import tiny
from tests.milvus_process import MilvusProcess
from tests.unit.test_derived import QUERY, documents, ids_of, settings
from trackstar.build import Silent
from trackstar.engine import Answer, Item, LocalEngine, Report, Stage
from trackstar.errors import (
    CorruptArtifact,
    Incompatible,
    InvalidRequest,
    NotFound,
    NotReady,
    StorageFull,
    TrackstarError,
)
from trackstar.index import Index
from trackstar.jobs import JobProgress
from trackstar.tombstones import delete_documents
from trackstar.tracer import Tracer

# Neither has annotations.
_dumps: Callable[[Any], bytes] = cloudpickle.dumps
_loads: Callable[[bytes], Any] = cloudpickle.loads


class Interrupted(Exception):
    """Ends a job as a signal would."""


class EngineElsewhere(LocalEngine):
    """Works as if in other processes: nothing of the job's own memory reaches a worker.

    Args:
        before: a stage, and what happens before its item number `after`.
    """

    def __init__(self, before: Stage | None = None, happens: Callable[[], None] = lambda: None, *, after: int = 0):
        self._before, self._happens, self._after = before, happens, after

    def map(
        self,
        stage: Stage,
        make: Callable[[Report], Callable[[Item], Answer]],
        items: Sequence[Item],
        *,
        report: Report | None = None,
    ) -> Iterator[Answer]:
        """See `Engine.map`."""
        made: Any = _loads(_dumps(make))
        if stage == self._before and items:
            yield from super().map(stage, made, items[: self._after], report=report)
            self._happens()
            made = _loads(_dumps(make))
            items = items[self._after :]
        yield from super().map(stage, made, items, report=report)


class World:
    """A model, corpora, and an index with a generation that answers."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root, self.index = root, root / "index"
        self.progress: JobProgress | None = None
        tiny.save_model(root / "model", "gpt2")
        (root / "one.jsonl").write_text(documents(0, 13))
        (root / "two.jsonl").write_text(documents(13, 12))
        self.active = self.run(append=()).generation
        self._kept = self._files()
        self._answer = self.traced()

    def content(self, **changes: Any) -> dict[str, Any]:
        """The configuration of a job that appends, and whitens anew."""
        job: dict[str, Any] = {key: changes.pop(key) for key in ("verify", "milvus", "index") if key in changes}
        build = settings(
            self.root,
            **{
                "append": [{"paths": [str(self.root / "two.jsonl")]}],
                "refit": True,
                "audit": {"queries": 4, "codes": 8, "k": 3},
                **changes,
            },
        )
        return {"index": str(self.index), "build": build, **job}

    def run(self, engine: LocalEngine | None = None, **changes: Any) -> Outcome:
        """Run a job to its end."""
        reporter = JobReporter(None, "job", Silent())
        try:
            return run_job(reindex_config.make(self.content(**changes)), reporter, engine=engine or EngineElsewhere())
        finally:
            self.progress = reporter.progress

    def refused(self, kind: type[TrackstarError], says: str, engine: LocalEngine | None = None, **changes: Any) -> None:
        """A job ends with one sentence, and touches nothing that answers."""
        with pytest.raises(kind, match=says) as caught:
            self.run(engine, **changes)
        self.check(str(caught.value))

    def interrupted(self, before: Stage, *, after: int = 0, **changes: Any) -> None:
        """A job is killed."""

        def stop() -> None:
            raise Interrupted

        with pytest.raises(Interrupted):
            self.run(EngineElsewhere(before, stop, after=after), **changes)
        self.check("interrupted")

    def check(self, sentence: str) -> None:
        """What was active answers as it did, from the same bytes."""
        assert "\n" not in sentence
        assert not sentence.endswith(".")
        assert self._files() == self._kept
        assert self.traced() == self._answer

    def finishes(self, **changes: Any) -> str:
        """A job comes to its end, and what it made answers; returns its name."""
        outcome = self.run(**changes)
        assert outcome.is_active
        assert Index(self.index).active() == outcome.generation != self.active
        assert {passage_id for passage_id, _ in self.traced(k=25)} == set(range(25))
        return outcome.generation

    def traced(self, k: int = 5) -> list[tuple[int, float]]:
        """What the active generation answers."""
        tracer = Tracer.open(str(self.index), model=str(self.root / "model"))
        try:
            found = tracer.trace(QUERY, k=k, candidates=25, evidence=False)
            assert ids_of(found)
            return [(item.passage.passage_id, item.score) for item in (*found.proponents, *found.opponents)]
        finally:
            tracer.close()

    def _files(self) -> dict[str, bytes]:
        """The pointer, and all that the generation stands on."""
        names = ["active.json", "index.json", "correction.safetensors"]
        paths = [self.index / name for name in names]
        paths += (self.index / "generations" / self.active).rglob("*")
        paths += [path for path in (self.index / "rows").iterdir() if path.name[:6] in ("000000", "000001", "000002")]
        paths += (self.index / "rows").glob("part-000.*")
        return {str(path.relative_to(self.index)): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- another configuration ---------------------------------------------------------------------------------------


def test_a_config_that_contradicts_what_is_half_built(world: World) -> None:
    world.interrupted("encoding", after=1)
    (world.root / "three.jsonl").write_text(documents(40, 6))
    world.refused(
        Incompatible,
        r"index' was started with append\.0\.fingerprint = '\w+', this command has '\w+'; use the same or",
        append=[{"paths": [str(world.root / "three.jsonl")]}],
    )
    world.refused(
        Incompatible,
        r"was started with append\.0\.text_field = 'text', this command has 'id'",
        append=[{"paths": [str(world.root / "two.jsonl")], "text_field": "id"}],
    )
    for key, then, now, changes in (
        (r"blocks\.0\.cols", "4", "8", {"projection": {"layer_blocks": 2, "rows": 4, "cols": 8}}),
        ("row_dtype", "'float32'", "'bfloat16'", {"row_dtype": "bfloat16"}),
        ("shard_passages", "5", "6", {"shard_passages": 6}),
        (r"corpus\.fingerprint", r"'\w+'", r"'\w+'", {"corpus": {"paths": [str(world.root / "two.jsonl")]}}),
    ):
        world.refused(Incompatible, f"was started with {key} = {then}, this command has {now}; use the same", **changes)
    world.finishes()


def test_settings_that_no_job_can_have(world: World) -> None:
    for changes, says in (
        ({"code": {"store": "milvus"}}, "the config's settings: .*codes with the store 'milvus' need milvus.address"),
        ({"dampning": 1}, r"unknown key 'build\.dampning'; remove it or correct its name"),
        ({"mix": {"damping": -1}}, r"the config's build\.mix\.damping: "),
    ):
        world.refused(InvalidRequest, says, **changes)
    world.refused(InvalidRequest, "a task mix needs task queries; give them with", mix={"kind": "task"})
    world.refused(InvalidRequest, r"a code of 128 bits .*|128", code={"kind": "bits", "size": 128, "store": "memory"})
    world.finishes()


# --- another checkpoint ------------------------------------------------------------------------------------------


@contextmanager
def swapped(world: World) -> Iterator[None]:
    """Other weights under the same name."""
    file = world.root / "model" / "model.safetensors"
    other = tiny.save_model(world.root / "other", "gpt2", seed=7)
    kept = file.read_bytes()
    file.write_bytes((other / "model.safetensors").read_bytes())
    try:
        yield
    finally:
        file.write_bytes(kept)


def test_a_checkpoint_swapped_between_two_runs(world: World) -> None:
    world.interrupted("encoding", after=1)
    with (
        swapped(world),
        pytest.raises(
            Incompatible, match=r"was started with model\.digest = '\w+', this command has '\w+'; use the same"
        ),
    ):
        world.run()
    world.check("")
    world.finishes()


@pytest.mark.parametrize("after", [0, 1])
def test_a_checkpoint_swapped_while_a_job_runs(world: World, after: int) -> None:
    held = swapped(world)
    engine = EngineElsewhere("encoding", held.__enter__, after=after)
    try:
        with pytest.raises(
            Incompatible,
            match=r"model' has digest \w{12}, the index was built with checkpoint \w{12}; give the checkpoint",
        ):
            world.run(engine)
    finally:
        held.__exit__(None, None, None)
    world.check("")
    world.finishes()


# --- damage ------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Turn a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("stage", ["statistics", "coding"])
@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_a_shard_damaged_before_it_is_used_is_made_again(world: World, stage: Stage, suffix: str) -> None:
    world.interrupted(stage)
    shard = world.index / "rows" / f"000004{suffix}"
    whole = shard.read_bytes()
    flip(shard)
    world.finishes()
    assert shard.read_bytes() == whole
    assert world.progress is not None
    assert world.progress.note == "building shard 4 again, its files are not what was written"


def test_a_shard_damaged_after_the_end_is_found_and_made_again_when_told(world: World) -> None:
    made = world.run(activate=False).generation
    shard = world.index / "rows" / "000004.safetensors"
    whole = shard.read_bytes()
    flip(shard)
    world.refused(CorruptArtifact, r"000004\.safetensors' is not what was written: .* the job with verify: true")
    assert shard.read_bytes() != whole
    assert world.finishes(verify=True) == made
    assert shard.read_bytes() == whole


def test_codes_damaged_after_the_end_are_found_and_made_again(world: World) -> None:
    made = world.run(activate=False).generation
    home = world.index / "generations" / made
    flip(home / "codes" / "000004.safetensors")
    world.refused(CorruptArtifact, r"000004\.safetensors' is not what was written; delete .* and give")
    flip(home / "whitener.safetensors")
    world.refused(CorruptArtifact, r"whitener\.safetensors' is not what was written; delete")
    for path in sorted(home.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    home.rmdir()
    assert world.finishes() == made


def test_a_purged_shard_that_is_damaged_is_purged_again(world: World) -> None:
    delete_documents(world.index, Index(world.index).rows(), ["d6"])
    made = world.run(purge=True, activate=False).generation
    (shard,) = (world.index / "rows").glob("000001-*.safetensors")
    whole = shard.read_bytes()
    flip(shard)
    with pytest.raises(CorruptArtifact, match=r"000001-\w+\.safetensors' is not what was written"):
        world.run(purge=True)
    assert world.run(purge=True, verify=True).generation == made
    assert shard.read_bytes() == whole


# --- no space ----------------------------------------------------------------------------------------------------


def child(content: dict[str, Any], file_bytes: int, said: str) -> None:
    """A job in a process that may write no file longer than this."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        run_job(reindex_config.make(content), JobReporter(None, "job", Silent()), engine=LocalEngine())
    except TrackstarError as error:
        Path(said).write_text(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)


@pytest.mark.parametrize(("file_bytes", "file"), [(2000, r"rows/000003\.\w+"), (6000, r"(statistics|generations)/.*")])
def test_a_full_disk(world: World, file_bytes: int, file: str) -> None:
    said = world.root / "said"
    process = multiprocessing.get_context("spawn").Process(target=child, args=(world.content(), file_bytes, str(said)))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == StorageFull.exit_code, said.read_text() if said.exists() else process.exitcode
    sentence = said.read_text()
    assert sentence.startswith("StorageFull: no space is left to write ")
    assert sentence.endswith("free some and give the same command again, what is finished is kept")
    world.check(sentence)
    world.finishes()


# --- who may not -------------------------------------------------------------------------------------------------


def test_credentials_of_milvus_that_are_missing_or_wrong(world: World, milvus: MilvusProcess) -> None:
    secret = world.root / "secret"
    access = milvus.access
    asked: dict[str, Any] = {
        "code": {"kind": "bits", "size": 32, "store": "milvus"},
        "milvus": {"address": access.address, "token_file": str(secret), "collection_prefix": "refusals_"},
    }
    # Before a single row is made.
    world.refused(NotFound, r"there is no token file '.*secret'", **asked)
    secret.write_text("")
    world.refused(InvalidRequest, "secret' holds no token", **asked)
    secret.write_text("root:not-the-password-of-this-server")
    world.refused(NotReady, rf"{access.address}' refuses the credentials it is given .*; correct them", **asked)
    assert not (world.index / "rows" / "000003.json").exists()
    secret.write_text(f"{access.user}:{access.password}")
    name = world.finishes(**asked)
    assert world.progress is not None
    assert world.progress.collection == f"refusals_{name}"


def test_a_milvus_server_that_is_not_there(world: World) -> None:
    asked: dict[str, Any] = {
        "code": {"kind": "bits", "size": 32, "store": "milvus"},
        "milvus": {"address": "127.0.0.1:9", "timeout_seconds": 1.0},
    }
    world.refused(NotReady, r"127\.0\.0\.1:9", **asked)
    assert not (world.index / "rows" / "000003.json").exists()


class _Refusing(http.server.BaseHTTPRequestHandler):
    """An object store that lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_an_object_store_that_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        world.refused(NotReady, r"'s3://bucket/index.* refuses it .*; check the credentials", index="s3://bucket/index")
        world.refused(TrackstarError, r"s3://bucket/more\.jsonl.*", append=[{"paths": ["s3://bucket/more.jsonl"]}])
    finally:
        server.shutdown()
        server.server_close()
    world.finishes()


# --- two at once -------------------------------------------------------------------------------------------------


def test_two_jobs_on_one_index(world: World) -> None:
    begun, go_on = threading.Event(), threading.Event()
    outcomes: list[Outcome] = []

    def wait() -> None:
        begun.set()
        assert go_on.wait(60)

    first = threading.Thread(target=lambda: outcomes.append(world.run(EngineElsewhere("coding", wait))))
    first.start()
    try:
        assert begun.wait(60)
        both: list[dict[str, Any]] = [{}, {"mix": {"damping": 0.5}}]
        for changes in both:
            world.refused(NotReady, "another process builds in '.*index' now; wait until it ends", **changes)
    finally:
        go_on.set()
        first.join(60)
    assert Index(world.index).active() == outcomes[0].generation
    assert world.finishes() == outcomes[0].generation


def test_an_audit_that_fails_keeps_the_old_generation(world: World) -> None:
    asked: dict[str, Any] = {
        "code": {"kind": "bits", "size": 8, "store": "memory"},
        "audit": {"queries": 8, "codes": 8, "k": 2, "candidates": 2, "min_recall": 0.9},
    }
    world.refused(NotReady, r"generation '\w+' does not become active: coarse search and rerank find", **asked)
    world.finishes()

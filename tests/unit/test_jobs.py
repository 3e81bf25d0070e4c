"""Records of jobs in a folder."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from trackstar.blobs import location
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.jobs import PIPELINE_STATES, JobEnd, JobProgress, JobStore, job_id_of

_PROGRESS = JobProgress(
    job_id="job-1",
    state="PLANNED",
    shards={"planned": 4, "encoded": 0, "coded": 0, "imported": 0},
    started_seconds=10.0,
    updated_seconds=11.0,
)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path)


@pytest.fixture(params=["folder", "object store"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> JobStore:
    return JobStore(tmp_path if request.param == "folder" else location(f"memory://jobs{tmp_path}"))


def test_a_job_is_written_down_once(anywhere: JobStore) -> None:
    store = anywhere
    assert store.list() == []
    assert store.create("job-1", {"refit": True}, "a: 1\n", request_id="r", caller="me", created_seconds=5.0)
    assert not store.create("job-1", {"refit": True}, "a: 2\n", request_id="r", caller="you", created_seconds=6.0)
    with pytest.raises(InvalidRequest, match="'job-1' exists and was asked for something else"):
        store.create("job-1", {"refit": False}, "a: 1\n")
    assert store.create("job-0", {}, "")
    assert store.list() == ["job-0", "job-1"]
    found = store.spec("job-1")
    assert (found.asked, found.caller, found.created_seconds) == ({"refit": True}, "me", 5.0)
    assert store.config("job-1").read_text(encoding="utf-8") == "a: 1\n"
    assert sorted(path.name for path in store.home("job-1").parent.glob("*")) == ["job-0", "job-1"]


def test_many_at_once_make_one_job(store: JobStore) -> None:
    made: list[bool] = []
    refused: list[str] = []
    begin = threading.Barrier(16)

    def create(number: int) -> None:
        begin.wait()
        try:
            made.append(store.create("job-1", {"of": number % 2}, f"of: {number % 2}\n"))
        except InvalidRequest as error:
            refused.append(str(error))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made.count(True), made.count(False), len(refused)) == (1, 7, 8)
    of = store.spec("job-1").asked["of"]
    assert store.config("job-1").read_text(encoding="utf-8") == f"of: {of}\n"


def test_progress_is_what_was_written(anywhere: JobStore) -> None:
    store = anywhere
    store.create("job-1", {}, "")
    assert store.progress("job-1") is None
    for state in PIPELINE_STATES:
        told = replace(_PROGRESS, state=state, tokens_total=7, recall=0.9, remaining_seconds=1.5, generation="g")
        store.write_progress(told)
        assert store.progress("job-1") == told
    with pytest.raises(InvalidRequest, match="shards are counted as"):
        store.write_progress(replace(_PROGRESS, shards={"planned": 1}))


def test_the_first_end_is_believed(anywhere: JobStore) -> None:
    store = anywhere
    store.create("job-1", {}, "")
    assert store.end("job-1") is None
    end = JobEnd(state="failed", error="the disk is full", ended_seconds=9.0)
    store.write_end("job-1", end)
    store.write_end("job-1", JobEnd(state="succeeded", error="", ended_seconds=10.0))
    assert store.end("job-1") == end
    assert not store.submitted("job-1")
    store.write_submitted("job-1", 1.0)
    store.write_cancelled("job-1", "me", 2.0)
    assert store.submitted("job-1")
    assert store.cancelled("job-1")
    assert not [path for path in store.home("job-1").glob("*") if path.name.startswith(".")]


def test_of_many_ends_at_once_one_is_believed(store: JobStore) -> None:
    store.create("job-1", {}, "")
    begin = threading.Barrier(8)
    seen: list[JobEnd | None] = []

    def end(number: int) -> None:
        begin.wait()
        store.write_end("job-1", JobEnd(state="succeeded", error="", ended_seconds=float(number)))
        seen.append(store.end("job-1"))

    threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1


def test_what_is_missing_broken_or_elsewhere_is_said(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no job 'job-1'"):
        store.spec("job-1")
    for bad in ("", "../x", ".hidden", "a/b", "a" * 129):
        with pytest.raises(InvalidRequest, match="cannot name a job"):
            store.home(bad)
    store.create("job-1", {}, "")
    for content in ("{", "[]", json.dumps({"job_id": "job-1", "state": "DANCING"})):
        (tmp_path / "jobs/job-1/progress.json").write_text(content)
        with pytest.raises(CorruptArtifact):
            store.progress("job-1")


def test_a_request_names_its_job() -> None:
    assert job_id_of("a") == job_id_of("a") != job_id_of("b")
    assert job_id_of("a") == "job-ca978112ca1b"

"""What becomes of jobs whose runner refuses, is silent, or forgets."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.gateway.job_config import JobConfiguration
from services.gateway.job_ledger import Job, JobLedger
from services.gateway.job_runners import Run
from services.gateway.jobs import totals
from trackstar.errors import NotReady, TrackstarError
from trackstar.jobs import JobProgress, JobStore


@dataclass
class Cluster:
    """A runner that can be told to refuse, to be silent and to forget."""

    runs: dict[str, Run] = field(default_factory=dict)
    failure: TrackstarError | None = None
    stops: list[str] = field(default_factory=list)
    asked: int = 0

    def submit(self, job_id: str, config: str) -> None:
        self._fail()
        self.runs.setdefault(job_id, Run(state="running"))

    def state(self, job_id: str) -> Run | None:
        self.asked += 1
        self._fail()
        return self.runs.get(job_id)

    def stop(self, job_id: str) -> None:
        self._fail()
        self.stops.append(job_id)
        if job_id in self.runs:
            self.runs[job_id] = Run(state="stopped")

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class Place:
    """A ledger over such a cluster."""

    def __init__(self, root: Path) -> None:
        (root / "base.yaml").write_text(json.dumps({"build": {"corpus": {"paths": ["a"]}}}))
        self.root = root
        self.store = JobStore(root)
        self.cluster = Cluster()
        self.ledger = self.another()

    def another(self, fresh_seconds: float = 0.0) -> JobLedger:
        configuration = JobConfiguration(self.root / "base.yaml", [], self.root)
        return JobLedger(
            self.store, self.cluster, configuration, fresh_seconds=fresh_seconds, clock=lambda: 100.0, max_unfinished=50
        )

    def create(self, job_id: str = "job-1") -> Job:
        return self.ledger.create(job_id, {}, request_id="r", caller="me")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_job_that_is_refused_for_good_has_failed(place: Place) -> None:
    place.cluster.failure = TrackstarError("the command is unknown")
    place.store.create("job-1", {}, "")
    place.ledger._submit("job-1")
    place.cluster.failure = None
    job = place.create()
    assert (job.state, job.error, place.cluster.runs) == ("failed", "the command is unknown", {})


def test_a_silent_runner_is_asked_again_later(place: Place) -> None:
    place.cluster.failure = NotReady("no answer")
    with pytest.raises(NotReady):
        place.create()
    assert place.ledger.get("job-1").state == "pending"
    with pytest.raises(NotReady):
        place.ledger.look("job-1")
    place.cluster.failure = None
    place.ledger.look("job-1")
    assert place.ledger.get("job-1").state == "running"
    place.cluster.failure = NotReady("no answer")
    _tell(place.store, "job-1")
    assert place.ledger.get("job-1").state == "running"
    asked, patient = place.cluster.asked, place.another(fresh_seconds=60.0)
    assert [patient.get("job-1").state for _ in range(5)] == ["running"] * 5
    assert place.cluster.asked == asked + 1


def test_a_wish_to_end_reaches_the_runner_in_the_end(place: Place) -> None:
    place.create()
    place.cluster.failure = NotReady("no answer")
    with pytest.raises(NotReady):
        place.ledger.cancel("job-1", caller="me")
    place.cluster.failure = None
    ledger = place.another()
    ledger.look("job-1")
    assert place.cluster.stops == ["job-1"]
    assert ledger.get("job-1").state == "cancelled"
    assert place.create().state == "cancelled"


def test_a_job_that_is_cancelled_while_it_is_handed_over_is_stopped(place: Place) -> None:
    place.store.create("job-1", {}, "")
    submit = place.cluster.submit

    def slow(job_id: str, config: str) -> None:
        place.another().cancel(job_id, caller="me")
        submit(job_id, config)

    place.cluster.submit = slow  # type: ignore[method-assign]
    assert place.create().state == "cancelled"
    assert place.cluster.runs["job-1"].state == "stopped"


def test_what_the_runner_forgets_has_failed_unless_it_had_ended(place: Place) -> None:
    place.create("job-1")
    place.create("job-2")
    place.cluster.runs["job-2"] = Run(state="succeeded")
    assert place.ledger.get("job-2").state == "succeeded"
    place.cluster.runs.clear()
    lost = place.another().get("job-1")
    assert (lost.state, lost.updated_seconds) == ("failed", 100.0)
    assert "no longer knows it" in lost.error
    assert place.another().get("job-2").state == "succeeded"
    assert place.cluster.runs == {}


def test_totals_are_of_those_that_run(place: Place) -> None:
    for job_id in ("job-1", "job-2", "job-3"):
        place.create(job_id)
        _tell(place.store, job_id, remaining=7.0 if job_id == "job-1" else 9.0)
    place.cluster.runs["job-3"] = Run(state="succeeded")
    place.cluster.failure = None
    jobs = [place.ledger.get(job_id) for job_id in place.ledger.ids()]
    found = totals(jobs)
    assert found.jobs == {"pending": 0, "running": 2, "succeeded": 1, "failed": 0, "cancelled": 0}
    assert found.shards == {"planned": 8, "encoded": 4, "coded": 2, "imported": 0}
    assert (found.tokens_per_second, found.remaining_seconds) == (20.0, 9.0)
    _tell(place.store, "job-2", remaining=None)
    assert totals([place.ledger.get(job_id) for job_id in place.ledger.ids()]).remaining_seconds is None
    assert totals([]).remaining_seconds == 0


def _tell(store: JobStore, job_id: str, remaining: float | None = 7.0) -> None:
    store.write_progress(
        JobProgress(
            job_id=job_id,
            state="CODING",
            shards={"planned": 4, "encoded": 2, "coded": 1, "imported": 0},
            tokens_per_second=10.0,
            remaining_seconds=remaining,
            started_seconds=1.0,
            updated_seconds=2.0,
        )
    )

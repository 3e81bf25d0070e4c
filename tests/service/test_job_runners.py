"""Jobs as processes: started once, found again, stopped, and what is told of their end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway.job_runners import ProcessJobRunner, Run, last_error
from tests.service.job_stand_in import COMMAND
from trackstar.jobs import JobStore
from trackstar.storage import read_json


class Home:
    """A folder of jobs that ends what still runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = JobStore(root)
        self.runner = self.runner_of()

    def runner_of(self, **options: Any) -> ProcessJobRunner:
        return ProcessJobRunner(self.root / "jobs", **{"command": COMMAND, "stop_seconds": 5.0, **options})

    def job(self, **asked: Any) -> str:
        job_id = f"job-{len(self.store.list())}"
        self.store.create(job_id, {}, yaml.safe_dump(asked))
        return job_id

    def submit(self, job_id: str) -> None:
        self.runner.submit(job_id, str(self.store.config(job_id)))

    def starts(self, job_id: str) -> int:
        path = self.root / "jobs" / job_id / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def pid(self, job_id: str) -> int:
        pid: int = read_json(self.root / "jobs" / job_id / "process/process.json")["pid"]
        return pid

    def ended(self, job_id: str) -> Run:
        run: Run = until(lambda: (run := self.runner.state(job_id)) and run.state != "running" and run)
        return run


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    made = Home(tmp_path)
    yield made
    for job_id in made.store.list():
        made.runner_of(stop_seconds=0.0).stop(job_id)
        if made.runner.state(job_id) is not None:
            made.ended(job_id)


def test_a_job_runs_to_its_end(home: Home) -> None:
    job_id = home.job()
    assert home.runner.state(job_id) is None
    home.runner.stop(job_id)
    home.submit(job_id)
    assert home.ended(job_id) == Run(state="succeeded")
    progress = home.store.progress(job_id)
    assert progress is not None
    assert progress.state == "AUDITED"
    home.submit(job_id)
    assert home.runner.state(job_id) == Run(state="succeeded")
    assert home.starts(job_id) == 1


def test_many_submissions_start_one_process(home: Home) -> None:
    job_id = home.job(wait=True)
    threads = [
        threading.Thread(target=home.runner_of().submit, args=(job_id, str(home.store.config(job_id))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        home.runner.state(job_id)
    for thread in threads:
        thread.join()
    until(lambda: home.store.progress(job_id))
    assert home.runner_of().state(job_id) == Run(state="running")
    home.runner.stop(job_id)
    assert home.ended(job_id) == Run(state="stopped")
    assert home.starts(job_id) == 1


def test_the_sentence_of_a_failure_is_passed_on(home: Home) -> None:
    job_id = home.job(fail_at="CODING", fail_with="the disk is full")
    home.submit(job_id)
    assert home.ended(job_id) == Run(state="failed", message="the disk is full")
    runner = home.runner_of(command=("/nowhere/command", "{config}"))
    job_id = home.job()
    runner.submit(job_id, "x")
    assert home.ended(job_id).message == "'/nowhere/command' cannot be run: No such file or directory"
    runner = home.runner_of(command=(sys.executable, "-c", "raise SystemExit(7)"))
    job_id = home.job()
    runner.submit(job_id, "x")
    assert home.ended(job_id).message == "the command ended with code 7"
    assert last_error("error: a\nerror: b\n  c\n") == "b"


def test_a_killed_job_has_failed(home: Home) -> None:
    job_id = home.job(wait=True)
    home.submit(job_id)
    until(lambda: home.store.progress(job_id))
    os.killpg(home.pid(job_id), signal.SIGKILL)
    assert home.ended(job_id).message == "the job was killed, or the machine has restarted"


def test_a_job_that_lost_its_supervisor_runs_and_can_be_stopped(home: Home) -> None:
    job_id = home.job(wait=True)
    home.submit(job_id)
    until(lambda: home.store.progress(job_id))
    os.kill(home.pid(job_id), signal.SIGKILL)
    time.sleep(0.1)
    assert home.runner.state(job_id) == Run(state="running")
    home.runner.stop(job_id)
    assert home.ended(job_id).state == "failed"


def test_a_job_that_does_not_want_to_end_is_ended(home: Home) -> None:
    job_id = home.job(wait=True, stubborn=True)
    runner = home.runner_of(stop_seconds=0.3)
    runner.submit(job_id, str(home.store.config(job_id)))
    until(lambda: home.store.progress(job_id))
    runner.stop(job_id)
    runner.stop(job_id)
    assert home.ended(job_id) == Run(state="stopped")

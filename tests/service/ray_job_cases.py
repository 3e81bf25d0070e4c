"""Jobs on a Ray cluster with token authentication: its dashboard's job API, a gateway that uses it, a real client.

Run by `test_ray.py`, in a network of its own where that is possible.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.gateway.job_ray import RayJobRunner
from services.gateway.job_runners import Run
from tests.service.honest import make_index
from tests.service.honest_jobs import GatewayProcess
from tests.service.job_stand_in import COMMAND
from tests.service.ray_process import free_port
from trackstar.client import Client
from trackstar.client_retry import RetryPolicy
from trackstar.errors import InvalidRequest, NotReady
from trackstar.jobs import job_id_of

_TOKEN = "a-token-of-this-cluster-alone-0123456789"
_ROOT = Path(__file__).resolve().parents[2]


class RayHead:
    """`ray start --head` with a dashboard that wants a token."""

    def __init__(self) -> None:
        # Sockets lie below it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="tsj", dir="/tmp"))
        self.token_file = self.folder / "token"
        self.token_file.write_text(f"{_TOKEN}\n")
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
        command += ["--node-ip-address", "127.0.0.1", "--port", str(free_port()), "--temp-dir", str(self.folder / "r")]
        command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.port), "--disable-usage-stats"]
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.log = self.folder / "log"
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Until it takes jobs."""
        headers = {"Authorization": f"Bearer {_TOKEN}"}
        until = time.monotonic() + 120
        while True:
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)).close()
                return
            except OSError:
                assert time.monotonic() < until, self.log.read_text()[-3000:]
                time.sleep(0.5)

    def kill(self) -> None:
        """End it and all it started, at once."""
        everything = [*psutil.Process(self._process.pid).children(recursive=True), psutil.Process(self._process.pid)]
        for process in everything:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(everything, timeout=20)

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray() -> Iterator[RayHead]:
    started = RayHead()
    try:
        started.wait()
        yield started
    finally:
        started.close()


class _Greeter(http.server.BaseHTTPRequestHandler):
    """Answers everything with a greeting."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.2)
    return found


def _runner(ray: RayHead, *command: str, **options: Any) -> RayJobRunner:
    return RayJobRunner(
        ray.address, command=command, **{"token_file": ray.token_file, "timeout_seconds": 60.0, **options}
    )


def _ended(runner: RayJobRunner, job_id: str) -> Run:
    run: Run = _until(lambda: (run := runner.state(job_id)) and run.state not in ("pending", "running") and run)
    return run


def test_a_job_is_submitted_once(ray: RayHead, tmp_path: Path) -> None:
    # Words are quoted: nothing of them is the shell's.
    script = 'echo "$0" "$MARK" >> "$1"; test "$2" = "a b; exit 3"'
    runner = _runner(ray, "sh", "-c", script, "{job_id}", "{config}", "a b; exit 3", environment={"MARK": "marked"})
    assert runner.state("job-once") is None
    runner.stop("job-once")
    ran = tmp_path / "it's ran"
    for _ in range(3):
        runner.submit("job-once", str(ran))
    assert _ended(runner, "job-once") == Run(state="succeeded")
    runner.submit("job-once", str(ran))
    runner.stop("job-once")
    assert ran.read_text() == "job-once marked\n"


def test_failures_and_stops_are_told(ray: RayHead) -> None:
    runner = _runner(ray, "sh", "-c", "echo before; echo 'error: the disk is full'; exit 9")
    runner.submit("job-fails", "x")
    assert _ended(runner, "job-fails") == Run(state="failed", message="the disk is full")
    runner = _runner(ray, "sh", "-c", "exit 7")
    runner.submit("job-seven", "x")
    assert "exit code 7" in _ended(runner, "job-seven").message
    runner = _runner(ray, "sleep", "600")
    runner.submit("job-sleeps", "x")
    _until(lambda: runner.state("job-sleeps") == Run(state="running"))
    runner.stop("job-sleeps")
    assert _ended(runner, "job-sleeps") == Run(state="stopped")


def test_who_may_not_and_what_is_no_ray(ray: RayHead, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another-token-than-the-cluster-has")
    for token_file in (None, wrong):
        with pytest.raises(NotReady, match="does not take this gateway's token"):
            _runner(ray, "true", token_file=token_file).submit("job-denied", "x")
    with pytest.raises(NotReady, match=r"cannot be asked: .*nowhere"):
        _runner(ray, "true", token_file=tmp_path / "nowhere").state("job-denied")
    with pytest.raises(NotReady, match="cannot be asked"):
        RayJobRunner(f"http://127.0.0.1:{free_port()}", command=("true",)).state("job-denied")
    with http.server.HTTPServer(("127.0.0.1", 0), _Greeter) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(NotReady, match="does not answer like Ray's job API"):
            RayJobRunner(f"http://127.0.0.1:{other.server_port}", command=("true",)).state("job-denied")
        other.shutdown()
    for bad in ("ray://127.0.0.1:1", "127.0.0.1:8265", "http://"):
        with pytest.raises(InvalidRequest, match="is not http"):
            RayJobRunner(bad, command=("true",))
    assert _runner(ray, "true").state("job-denied") is None


def test_a_gateway_s_jobs_run_on_ray(ray: RayHead, tmp_path: Path) -> None:
    make_index(tmp_path, "alpha", active="alpha")
    settings: Any = {
        "REINDEX__RUNNER": "ray",
        "REINDEX__RAY_ADDRESS": ray.address,
        "REINDEX__TOKEN_FILE": str(ray.token_file),
        "REINDEX__ENTRYPOINT": json.dumps(COMMAND),
        "REINDEX__ENVIRONMENT": json.dumps({"PYTHONPATH": str(_ROOT)}),
        "REINDEX__POLL_SECONDS": "0.2",
        "REINDEX__TIMEOUT_SECONDS": "60",
        "REINDEX__MAX_UNFINISHED": "4",
    }
    gateway = GatewayProcess(tmp_path, {"pause_seconds": 0.3}, **settings)
    try:
        with Client(gateway.address) as client:
            job = client.create_reindex_job("r", activate=True)
            seen = list(client.watch_job(job.job_id, timeout_seconds=120))
            assert (seen[-1].state, seen[-1].pipeline_state) == ("succeeded", "ACTIVE"), seen[-1]
            assert len({item.pipeline_state for item in seen}) > 3
        assert (tmp_path / "jobs" / job.job_id / "starts").read_text() == "started\n"
    finally:
        assert gateway.close() == 0
    gateway = GatewayProcess(tmp_path, {"wait": True}, **settings)
    try:
        with Client(gateway.address) as client:
            assert client.create_reindex_job("r", activate=True) == seen[-1]
            job = client.create_reindex_job("other")
            _until(lambda: client.job(job.job_id).pipeline_state)
            client.cancel_job(job.job_id)
            assert list(client.watch_job(job.job_id, timeout_seconds=120))[-1].state == "cancelled"
            waiting = client.create_reindex_job("waiting")
            _until(lambda: client.job(waiting.job_id).pipeline_state)
        ray.kill()
        with Client(gateway.address, retry=RetryPolicy(attempts=1)) as client:
            # As far as anybody knows.
            assert client.job(waiting.job_id).state == "running"
            with pytest.raises(NotReady, match="cannot be asked"):
                client.create_reindex_job("late")
            assert client.job(job_id_of("late")).state == "pending"
    finally:
        assert gateway.close() == 0

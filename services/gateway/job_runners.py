"""What runs jobs: processes of this machine, or Ray (`job_ray`).

Contract: a runner knows a job by its id and starts it once, however often it is asked to, whoever asks and whatever has
restarted in between. It runs one command, which the operator has set and in which `{config}` stands for the job's
configuration and `{job_id}` for its id; nothing of a caller becomes a part of it. Methods block and are called in
threads; what may succeed later is `NotReady`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from trackstar.errors import NotFound, NotReady
from trackstar.storage import read_json

# How the command line begins the sentence that it ends with.
_ERROR = "error: "
_LOG_BYTES = 1 << 14
_START_SECONDS = 30.0
# In which a job's supervisor hears of a signal.
_STOP_SECONDS = 2.0
_PROBE_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A job as its runner knows it. `message`: one sentence on why it failed, "" otherwise."""

    state: Literal["pending", "running", "succeeded", "failed", "stopped"]
    message: str = ""


class JobRunner(Protocol):
    """Runs jobs."""

    def submit(self, job_id: str, config: str) -> None:
        """Start a job, unless it has been started already.

        Raises:
            NotReady: it could not be started now.
            TrackstarError: it never can.
        """

    def state(self, job_id: str) -> Run | None:
        """What a job does; None if it was never started, or has been forgotten.

        Raises:
            NotReady: nobody can tell now.
        """

    def stop(self, job_id: str) -> None:
        """Have a job end; nothing happens if it does not run.

        Raises:
            NotReady: it could not be told now.
        """


def command_of(words: Sequence[str], job_id: str, config: str) -> list[str]:
    """The words of a command with what stands in braces filled in."""
    return [word.replace("{job_id}", job_id).replace("{config}", config) for word in words]


def last_error(log: str) -> str:
    """The sentence that a command of ours ended with, "" if it said none."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line.removeprefix(_ERROR) for line in reversed(lines) if line.startswith(_ERROR)), "")


def first_line(text: str) -> str:
    """The first line that holds something, "" if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def last_line(text: str) -> str:
    """The last line that holds something."""
    return first_line("\n".join(reversed(text.splitlines()))) or "without a word"


class ProcessJobRunner:
    """Runs jobs as processes of this machine, each in a session of its own, so that they outlive this process.

    A job's folder `<folder>/<job_id>/process` holds `lock`, which is held while the job runs, `process.json` with its
    id, `exit.json` with how it ended, and `log` with what it said. The lock tells whether it runs, not the id: the
    kernel lets go of it however the job ends, and it cannot be mistaken for another process that got the id later.

    Args:
        folder: of all jobs.
        command: words of the command.
        environment: variables of the job, besides those of this process.
        stop_seconds: time between asking a job to end and ending it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stop_seconds: float = 30.0,
    ) -> None:
        self._folder = folder
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._stop_seconds = stop_seconds

    def submit(self, job_id: str, config: str) -> None:
        """See `JobRunner.submit`."""
        home = self._home(job_id)
        home.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + _START_SECONDS
        while not (home / "process.json").is_file():
            with _locked(home) as lock:
                # Whoever else holds it starts the job, or only looks.
                if lock is not None and not (home / "process.json").is_file():
                    self._start(home, lock, command_of(self._command, job_id, config))
                    return
            if time.monotonic() > until:
                raise NotReady(f"job {job_id!r} is being started, and that takes long")
            time.sleep(_PROBE_SECONDS)

    def state(self, job_id: str) -> Run | None:
        """See `JobRunner.state`."""
        home = self._home(job_id)
        if not (home / "process.json").is_file():
            return None
        with _locked(home) as lock:
            if lock is None:
                return Run(state="running")
        try:
            exit = read_json(home / "exit.json")
        except NotFound:
            return Run(state="failed", message="the job was killed, or the machine has restarted")
        code = int(exit["code"])
        if code == 0:
            return Run(state="succeeded")
        if exit["stopped"]:
            return Run(state="stopped")
        return Run(state="failed", message=last_error(_tail(home / "log")) or f"the command ended with code {code}")

    def stop(self, job_id: str) -> None:
        """See `JobRunner.stop`."""
        home = self._home(job_id)
        if (run := self.state(job_id)) is None or run.state != "running":
            return
        pid = int(read_json(home / "process.json")["pid"])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + _STOP_SECONDS
        while not (home / "stopping").exists() and (run := self.state(job_id)) is not None and run.state == "running":
            if time.monotonic() > until:
                # What looks after the job has been killed; the job is alone in its group, which keeps the id taken.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGTERM)
                return
            time.sleep(_PROBE_SECONDS)

    def _home(self, job_id: str) -> Path:
        return self._folder / job_id / "process"

    def _start(self, home: Path, lock: int, command: list[str]) -> None:
        supervisor = [sys.executable, "-m", "services.gateway.job_supervisor", str(home), str(lock)]
        # Commands of this environment are found although it may not be activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        with (home / "log").open("ab") as log:
            try:
                started = subprocess.run(
                    [*supervisor, str(self._stop_seconds), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PATH": path, **self._environment},
                    pass_fds=[lock],
                    start_new_session=True,
                    timeout=_START_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise NotReady("the job cannot be started: this machine is too slow now") from error
        if started.returncode != 0:
            raise NotReady(f"the job cannot be started: {last_line(_tail(home / 'log'))}")


@contextmanager
def _locked(home: Path) -> Iterator[int | None]:
    """The lock of a job as an open file; None if it is held elsewhere."""
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
    finally:
        os.close(lock)


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _LOG_BYTES))
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""

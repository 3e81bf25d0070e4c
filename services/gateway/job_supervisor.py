"""Looks after one job that runs as a process: starts it, passes a wish to end on, and writes down how it ended.

    python -m services.gateway.job_supervisor FOLDER LOCK STOP_SECONDS COMMAND...

The first process ends as soon as FOLDER/process.json names the second, which leads a session of its own and belongs to
nobody. LOCK is an open file that is locked; this process and the job hold it as long as either of them lives.
SIGTERM is passed on to the job, FOLDER/stopping says so, and after STOP_SECONDS everything in the session is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

from trackstar.storage import publish_json

_NOT_STARTED = 127


class _Job:
    """The command as a process."""

    def __init__(self, home: Path, stop_seconds: float) -> None:
        self._home = home
        self._stop_seconds = stop_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGALRM, self._kill)

    def run(self, command: list[str], lock: int) -> None:
        """Run it to its end, and write that down."""
        code = _NOT_STARTED
        if not self._stopped.is_set():
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[lock])
            except OSError as error:
                print(f"error: {command[0]!r} cannot be run: {error.strerror}", flush=True)
            else:
                if self._stopped.is_set():
                    self._process.terminate()
                code = self._process.wait()
        self._ended(code)

    def _ended(self, code: int) -> None:
        publish_json(self._home / "exit.json", {"code": code, "stopped": self._stopped.is_set()})

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        (self._home / "stopping").touch()
        signal.setitimer(signal.ITIMER_REAL, max(self._stop_seconds, 0.001))
        if self._process is not None:
            self._process.terminate()

    def _kill(self, _number: int, _frame: FrameType | None) -> None:
        self._ended(-signal.SIGKILL)
        os.killpg(0, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Run a job; see the module."""
    home, lock, stop_seconds, *command = arguments
    second = os.fork()
    if second:
        publish_json(Path(home) / "process.json", {"pid": second})
        os._exit(0)
    os.setsid()
    _Job(Path(home), float(stop_seconds)).run(command, int(lock))


if __name__ == "__main__":
    main(sys.argv[1:])

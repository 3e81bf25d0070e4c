"""Runs `ray_cases` and `ray_job_cases`, each in a process and, where that is possible, a network and process tree of
its own.

Serve's gRPC proxy and the Milvus server listen on every interface and cannot be told otherwise; in there the loopback
is the only one, and nothing outlives the test.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent
_SECONDS = 600


@pytest.mark.parametrize("cases", ["ray_cases.py", "ray_job_cases.py"])
def test_the_whole_service_as_processes(cases: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(_FOLDER / cases)]
    isolated = ["unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child"]
    if os.geteuid() == 0 and _works([*isolated, "ip", "link", "set", "lo", "up"]):
        command = [*isolated, "sh", "-c", f"ip link set lo up && exec {shlex.join(command)}"]
    found = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SECONDS, check=False
    )
    assert found.returncode == 0, found.stdout[-6000:]
    assert " passed" in found.stdout


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False

"""A gateway with jobs as a process of its own: `python -m tests.service.honest_jobs INDEX`, and a runner without any.

The process serves the real services over honest backends; settings come from the environment, and it says its port and
that of its metrics on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.gateway.assembly import serving
from services.gateway.command import Parts, Served, run_gateway
from services.gateway.config import PREFIX, load
from services.gateway.job_config import JobConfiguration
from services.gateway.job_ledger import JobLedger
from services.gateway.job_runners import Run
from services.gateway.jobs import Jobs
from services.gateway.server import Ports
from tests.service.honest import CountedIndex, HonestEncoder, HonestReranker
from tests.service.job_stand_in import COMMAND
from trackstar.catalog import Catalog
from trackstar.jobs import JobStore

BASE: dict[str, Any] = {
    "build": {
        "corpus": {"paths": ["/data/first.jsonl"], "text_field": "words"},
        "model": "the-operator-s",
        "mix": {"kind": "train", "damping": 0.1},
        "code": {"kind": "prefix", "size": 16},
        "refit": True,
    }
}


class InstantRunner:
    """A runner whose jobs have ended when they are submitted."""

    def __init__(self) -> None:
        self.submitted: list[str] = []

    def submit(self, job_id: str, config: str) -> None:
        self.submitted.append(job_id)

    def state(self, job_id: str) -> Run | None:
        return Run(state="succeeded") if job_id in self.submitted else None

    def stop(self, job_id: str) -> None:
        pass


def instant_jobs(root: Path) -> Jobs:
    """Jobs that end at once; nothing looks at them by itself."""
    base = root / "base.yaml"
    base.write_text(json.dumps(BASE))
    configuration = JobConfiguration(base, ["/data/corpus"], root)
    return Jobs(JobLedger(JobStore(root), InstantRunner(), configuration, max_unfinished=1000))


class GatewayProcess:
    """Serves an index until it is ended.

    Args:
        index: its folder.
        base: what the operator's configuration adds.
        port: to listen on; a free one if 0.
        settings: of the gateway, as `SECTION__KEY`.
    """

    def __init__(self, index: Path, base: dict[str, Any] | None = None, *, port: int = 0, **settings: str) -> None:
        file = index / "base.yaml"
        if base is not None or not file.exists():
            file.write_text(json.dumps({**BASE, **(base or {})}))
        defaults = {
            "LISTEN__ADDRESS": f"127.0.0.1:{port}",
            "LISTEN__METRICS_ADDRESS": "127.0.0.1:0",
            "REINDEX__CONFIG_FILE": str(file),
            "REINDEX__ENTRYPOINT": json.dumps(COMMAND),
            "REINDEX__ALLOWED_PATHS": '["/data/corpus"]',
            "REINDEX__POLL_SECONDS": "0.05",
            "REINDEX__MAX_UNFINISHED": "4",
            "NOTICE_SECONDS": "0",
            "LOG_LEVEL": "warning",
        }
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            **{f"{PREFIX}{key}": value for key, value in {**defaults, **settings}.items()},
        }
        command = [sys.executable, "-m", "tests.service.honest_jobs", str(index)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline().split()
        assert said, "the gateway did not start"
        self.port, self.metrics_port = int(said[0]), int(said[1])
        self.address = f"127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels, as Prometheus writes them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def kill(self) -> None:
        """End it as the kernel would."""
        self._process.send_signal(signal.SIGKILL)
        self._wait()

    def close(self) -> int:
        """Ask it to drain; returns its exit code."""
        self._process.terminate()
        return self._wait()

    def _wait(self) -> int:
        code = self._process.wait(timeout=25)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


@asynccontextmanager
async def _services(parts: Parts) -> AsyncIterator[Served]:
    async with serving(
        parts,
        Catalog(sys.argv[1]),
        HonestEncoder(),
        HonestReranker(),
        lambda facts: CountedIndex(facts.name),
    ) as served:
        yield served


def _told(ports: Ports) -> None:
    print(ports.grpc, ports.metrics, flush=True)


if __name__ == "__main__":
    sys.exit(run_gateway(load(None, os.environ), _services, started=_told))

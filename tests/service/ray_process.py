"""A Serve cluster of one node as a process: what `serve run` makes of a config file, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from services.serve.config import SERVICER_FUNCTIONS

_STOP_SECONDS = 60.0


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RayProcess:
    """`serve run` with some applications.

    Args:
        applications: by name, their arguments.
    """

    def __init__(self, applications: Mapping[str, Mapping[str, Any]]) -> None:
        # Sockets lie below it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="tsr", dir="/tmp"))
        self.grpc_port = free_port()
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": free_port()},
            "grpc_options": {"port": self.grpc_port, "grpc_servicer_functions": SERVICER_FUNCTIONS},
            "applications": [
                {
                    "name": name,
                    "route_prefix": f"/{name}",
                    "import_path": "services.serve.app:application",
                    "args": dict(arguments),
                }
                for name, arguments in applications.items()
            ],
        }
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(config))
        self._environment = {
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "OMP_NUM_THREADS": "1",
        }
        self.log = self.folder / "log"
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                [Path(sys.executable).with_name("serve"), "run", "serve.yaml"],
                cwd=self.folder,
                env={**os.environ, **self._environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def address(self) -> str:
        """Of Serve's gRPC proxy."""
        return f"127.0.0.1:{self.grpc_port}"

    def metrics(self) -> list[str]:
        """What each exporter of the node tells, as Prometheus would read it."""
        found = json.loads((self.folder / "ray" / "prom_metrics_service_discovery.json").read_text())
        texts = []
        for address in (address for group in found for address in group["targets"]):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
                texts.append(response.read().decode())
        return texts

    def run(self, code: str) -> None:
        """Run a few lines of Python on the cluster, as a job of its own."""
        environment = {**os.environ, **self._environment}
        subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=environment, check=True, timeout=120)

    def pids(self, title: str) -> Sequence[int]:
        """Processes of this cluster whose title begins so, such as `ray::ServeReplica:trackstar:Encoder`."""
        descendants = psutil.Process(self._process.pid).children(recursive=True)
        return [process.pid for process in descendants if _title(process).startswith(title)]

    def kill(self, title: str) -> int:
        """End one of them as the kernel would; returns its id."""
        pid = self.pids(title)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def check(self) -> None:
        """Fail if it has ended."""
        assert self._process.poll() is None, self.log.read_text()[-3000:]

    def close(self) -> None:
        """End it and all it started."""
        everything = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(everything, timeout=10)
        for process in alive:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class GatewayProcess:
    """`trackstar gateway` over a Serve application, in a process of its own."""

    def __init__(self, index: Path, ray: RayProcess, application: str, **settings: str) -> None:
        self.port = free_port()
        self.metrics_port = free_port()
        environment = {
            **os.environ,
            "TRACKSTAR_GATEWAY__BACKENDS__ENCODER_ADDRESS": ray.address,
            "TRACKSTAR_GATEWAY__BACKENDS__RERANKER_ADDRESS": ray.address,
            "TRACKSTAR_GATEWAY__BACKENDS__APPLICATION": application,
            "TRACKSTAR_GATEWAY__READINESS_SECONDS": "0.5",
            **{f"TRACKSTAR_GATEWAY__{key}": value for key, value in settings.items()},
        }
        command = [str(Path(sys.executable).with_name("trackstar")), "gateway", "--index", str(index)]
        command += ["--address", self.address, "--metrics-address", f"127.0.0.1:{self.metrics_port}"]
        self.log = ray.folder / f"gateway-{self.port}.log"
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        while b"serving on" not in self.log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > until:
                raise AssertionError(self.log.read_text()[-3000:])
            time.sleep(0.1)

    @property
    def address(self) -> str:
        """Of gRPC."""
        return f"127.0.0.1:{self.port}"

    def terminate(self) -> None:
        """Ask it to drain."""
        self._process.terminate()

    def close(self) -> int:
        """End it; returns its exit code."""
        self._process.terminate()
        return self._process.wait(timeout=60)

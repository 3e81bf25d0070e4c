"""`trackstar serve` or `trackstar gateway` as a process of its own on loopback, ended by the test that started it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class ServeProcess:
    """Serves an index until `close`.

    Args:
        index: its folder.
        folder: where the log goes.
        role: the command.
        settings: of the gateway, as `SECTION__KEY`.
    """

    def __init__(self, index: Path, folder: Path, role: str = "serve", **settings: str) -> None:
        command = [str(Path(sys.executable).with_name("trackstar")), role, "--index", str(index)]
        command += ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
        environment = {**os.environ, **{f"TRACKSTAR_GATEWAY__{key}": value for key, value in settings.items()}}
        self.log = folder / f"serve-{len(list(folder.glob('serve-*')))}.log"
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        until = time.monotonic() + 180
        while (found := re.search(r"serving on (\S+); metrics on port (\d+)", self.log.read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > until:
                self._process.kill()
                self._process.wait()
                raise AssertionError(self.log.read_text()[-3000:])
            time.sleep(0.05)
        self.address, self.metrics_port = found.group(1), int(found.group(2))

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels, as Prometheus writes them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def terminate(self) -> None:
        """Ask it to drain."""
        self._process.terminate()

    def close(self) -> int:
        """End it; returns its exit code."""
        self._process.terminate()
        return self._process.wait(timeout=60)

"""moto's S3 server for tests: one process on a free port of the loopback, in an environment of its own (.venv/moto).

It holds everything in memory, so what is started again is empty.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

PROGRAM = Path(sys.prefix) / "moto" / "bin" / "moto_server"
BUCKET = "indexes"
_START_SECONDS = 30.0


class S3Server:
    """A server that can be stopped, started again on the same port, and paused."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._bucket = S3Store(BUCKET, client_options={"allow_http": True}, **self.storage_options)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client of it finds in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key-of-the-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        }

    @property
    def storage_options(self) -> dict[str, Any]:
        """The same as options."""
        names = {"AWS_ENDPOINT_URL": "endpoint"}
        return {names.get(name, name.removeprefix("AWS_").lower()): value for name, value in self.environment.items()}

    def start(self) -> None:
        """Start it, empty but for the bucket."""
        command = [str(PROGRAM), "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
                with urllib.request.urlopen(request, timeout=10):
                    return
            except urllib.error.URLError:
                if time.monotonic() > until or self._process.poll() is not None:
                    self.stop()
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        """End it by its process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it accept connections and never answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def put(self, name: str, data: bytes) -> None:
        """Write one object of the bucket."""
        obstore.put(self._bucket, name, data)

    def remove(self, name: str) -> None:
        """Delete one object of the bucket."""
        obstore.delete(self._bucket, name)

    def upload(self, folder: Path, prefix: str) -> str:
        """Write every file below a folder; returns the URL of the copy."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

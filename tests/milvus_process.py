"""A real Milvus server for tests: the binary of the package `milvus` as one process, in one folder, on free ports.

The package's own launcher is not used: it leaves the server running when it is ended itself, and fixes a port of etcd,
so that only one server fits on a machine. Milvus 2.3.5 listens on every interface, and no setting changes that (etcd
alone is kept to the loopback); so it asks for a password, drawn at random.
"""

from __future__ import annotations

import base64
import contextlib
import lzma
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pymilvus.grpc_gen import milvus_pb2

from trackstar.errors import TrackstarError
from trackstar.milvus_link import MilvusAccess, MilvusLink

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_FIRST_PASSWORD = "Milvus"
_PARTS = ("rootCoord", "queryCoord", "queryNode", "indexNode", "dataCoord", "dataNode")


class MilvusProcess:
    """One Milvus server that can be started, stopped, killed, paused and started again on the same port and data.

    Args:
        folder: where its binary, configuration, data and logs go; some 500 MB.
        bucket: of an S3 server where it stores, as Milvus's setting "minio"; the folder if not given.
    """

    def __init__(self, folder: Path, bucket: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self._password = secrets.token_hex(16)
        self._has_password = False
        with contextlib.ExitStack() as held:
            names = ["proxy", "proxy_internal", "metrics", "etcd", "etcd_peer", *_PARTS]
            self._ports = {name: _free_port(held) for name in names}
        self._process: subprocess.Popen[bytes] | None = None
        _unpack(folder)
        _configure(folder, self._ports, bucket)

    @property
    def access(self) -> MilvusAccess:
        """Where it is, and its password."""
        return MilvusAccess(address=f"127.0.0.1:{self._ports['proxy']}", user="root", password=self._password)

    @property
    def is_running(self) -> bool:
        """Whether the process exists, paused or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def process_id(self) -> int:
        """Of the running server."""
        if self._process is None:
            raise RuntimeError("the server does not run")
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it says that it is healthy."""
        self.launch()
        self.wait()

    def wait(self) -> None:
        """Wait until a launched server says that it is healthy."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_healthy():
            if not self.is_running or time.monotonic() > deadline:
                raise RuntimeError(f"Milvus did not start; see {str(self.folder / 'logs')!r}")
            time.sleep(0.1)

    def launch(self) -> None:
        """Start the server without waiting."""
        if self.is_running:
            raise RuntimeError("the server runs already")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder / "bin"),
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(self._ports["metrics"]),
        }
        with (self.folder / "logs" / "output.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.folder / "bin" / "milvus", "run", "standalone"],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """End the server politely, and by force where that takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the server at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Let the server hang: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause for the time of a block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError("the server does not run")
        self._process.send_signal(number)

    def _is_healthy(self) -> bool:
        access = self.access if self._has_password else replace(self.access, password=_FIRST_PASSWORD)
        with MilvusLink(access) as link:
            try:
                health = link.call("CheckHealth", milvus_pb2.CheckHealthRequest(), link.deadline(2))
                if health.isHealthy and not self._has_password:
                    request = milvus_pb2.UpdateCredentialRequest(
                        username=access.user,
                        oldPassword=base64.b64encode(_FIRST_PASSWORD.encode()).decode(),
                        newPassword=base64.b64encode(self._password.encode()).decode(),
                    )
                    link.call("UpdateCredential", request, link.deadline(10))
                    self._has_password = True
            except TrackstarError:
                return False
        return bool(health.isHealthy)


@contextlib.contextmanager
def milvus_server(bucket: dict[str, Any] | None = None) -> Iterator[MilvusProcess]:
    """A running server in a temporary folder, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="trackstar-milvus-") as folder:
        server = MilvusProcess(Path(folder), bucket)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def _free_port(held: contextlib.ExitStack) -> int:
    """A port that is free now; held until the stack is closed, so that the next one is another."""
    listener = held.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    return port


def _package() -> Path:
    spec = find_spec("milvus")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package 'milvus' is not installed")
    return Path(spec.origin).parent / "data"


def _unpack(folder: Path) -> None:
    for name in ("bin", "configs", "data", "logs"):
        (folder / name).mkdir(parents=True)
    for packed in (_package() / "bin").glob("*.lzma"):
        path = folder / "bin" / packed.stem
        with lzma.open(packed) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        path.chmod(0o700)
    shutil.copy(_package() / "glog.conf", folder / "configs")


def _configure(folder: Path, ports: dict[str, int], bucket: dict[str, Any] | None) -> None:
    """Write milvus.yaml from the package's template, and etcd's own configuration, which alone can move its ports."""
    template = (_package() / "config.yaml.template").read_text()
    defaults = re.sub(r"\{\{ \w+(?:\(\w+\))?(?:: ([^}]*))? \}\}", lambda match: match.group(1) or "''", template)
    config: dict[str, Any] = yaml.safe_load(defaults)
    for part in _PARTS:
        config[part].update(ip="127.0.0.1", port=ports[part])
    config["proxy"].update(ip="127.0.0.1", port=ports["proxy"], internalPort=ports["proxy_internal"])
    config["etcd"]["endpoints"] = f"127.0.0.1:{ports['etcd']}"
    config["etcd"]["config"] = {"path": str(folder / "configs" / "etcd.yaml")}
    config["etcd"]["data"]["dir"] = str(folder / "data" / "etcd")
    config["localStorage"]["path"] = str(folder / "data")
    if bucket is not None:
        config["common"]["storageType"] = "minio"
        config["minio"].update(bucket)
    config["rocksmq"]["path"] = str(folder / "data" / "rocksmq")
    config["log"]["file"]["rootPath"] = str(folder / "logs")
    config["log"]["level"] = "warn"
    # A server that was killed and comes back waits for its former self's sessions to end.
    config["common"]["session"]["ttl"] = 5
    config["common"]["security"]["authorizationEnabled"] = True
    # A load waits for several of these in turn, and one that is refreshed for the last, in seconds.
    config["queryCoord"].update(checkInterval=100, distPullInterval=100, updateNextTargetInterval=1)
    (folder / "configs" / "milvus.yaml").write_text(yaml.safe_dump(config))
    client, peer = (f"http://127.0.0.1:{ports[name]}" for name in ("etcd", "etcd_peer"))
    etcd = {
        "name": "default",
        "data-dir": str(folder / "data" / "etcd"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "initial-cluster-state": "new",
        "log-level": "warn",
    }
    (folder / "configs" / "etcd.yaml").write_text(yaml.safe_dump(etcd))

"""Pods with a network, a file system and a user of their own, as a cluster's nodes give them; for a test that is root.

Must run in a network, mount and process namespace of its own (`isolated`), where it makes a bridge; each `PodNode` is
an address on it. Nothing of a manifest is rewritten: `/` is a read-only overlay of this machine's in which the pod's
volumes lie at their mount paths, this repository at /opt/trackstar and the environment that runs the tests at
/opt/venv, and a name server on the bridge knows the Services. Of the security context, user, groups, read-only root,
dropped capabilities and no new privileges hold; seccomp, limits of resources and network policies do not.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.charts.rendering import ROOT, Object

_BRIDGE = "10.77.0.1"
_NAMESPACE = "prod"
# Whoever reads what is mounted needs the way to it.
_INTERPRETER = Path(sys.base_prefix).resolve()


def isolated(command: Sequence[str]) -> list[str]:
    """The words that run a command in namespaces of its own, all of which end with it."""
    script = f"ip link set lo up && exec {shlex.join(command)}"
    return ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "sh", "-c", script]


def is_possible() -> bool:
    """Whether this process may make such pods."""
    if os.geteuid() != 0:
        return False
    script = """
        ip link add bridge0 type bridge && ip link add pod0 type veth peer name pod1
        mount -t tmpfs tmpfs "$0" && mkdir "$0/upper" "$0/work" "$0/root"
        mount -t overlay overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" "$0/root"
        chroot "$0/root" setpriv --reuid 10001 true
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = subprocess.run(["unshare", "-n", "-m", "sh", "-ec", script, folder], check=False)
        except FileNotFoundError:
            return False
        return found.returncode == 0


class Network:
    """The bridge, and a name server on it for names of Services in the namespace `prod`; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        domains = f"{_NAMESPACE}.svc.cluster.local svc.cluster.local cluster.local"
        (folder / "resolv.conf").write_text(f"nameserver {_BRIDGE}\nsearch {domains}\noptions ndots:5\n")
        self._given = 1
        for words in (
            ["link", "add", "pods", "type", "bridge"],
            ["addr", "add", f"{_BRIDGE}/24", "dev", "pods"],
            ["link", "set", "pods", "up"],
        ):
            subprocess.run(["ip", *words], check=True)
        self._names: dict[str, str] = {}
        self._server = socketserver.UDPServer((_BRIDGE, 53), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        names = self._names

        class Handler(socketserver.BaseRequestHandler):
            """Answers one question (RFC 1035) for IPv4 addresses; of other kinds it knows that there are none."""

            def handle(self) -> None:
                packet, connection = self.request
                labels, end = [], 12
                while length := packet[end]:
                    labels.append(packet[end + 1 : end + 1 + length].decode())
                    end += 1 + length
                question = packet[12 : end + 5]
                found = names.get(".".join(labels).lower())
                is_known = found is not None and question[-4:-2] == b"\0\1"
                flags = b"\x85\x80" if found is not None else b"\x85\x83"
                answer = packet[:2] + flags + b"\0\1" + (b"\0\1" if is_known else b"\0\0") + b"\0\0\0\0" + question
                if found is not None and is_known:
                    answer += b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + socket.inet_aton(found)
                connection.sendto(answer, self.client_address)

        return Handler

    @property
    def outside(self) -> str:
        """The address of what runs beside the pods, on this machine."""
        return _BRIDGE

    @property
    def files(self) -> list[Path]:
        """What /etc of a pod has for it."""
        return [self._folder / "hosts", self._folder / "resolv.conf"]

    def name(self, service: str, address: str) -> None:
        """Let a Service be that address, for pods that run too."""
        self._names[f"{service}.{_NAMESPACE}.svc.cluster.local"] = address

    def address(self) -> tuple[int, str]:
        """Another one."""
        self._given += 1
        return self._given, f"10.77.0.{self._given}"


class PodNode:
    """Where one pod runs.

    Args:
        network: that it is on.
        folder: where its file system is put together.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self._network, self._folder = network, folder
        folder.mkdir(parents=True)
        self._started = 0
        number, self.ip = network.address()
        self._holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        self._namespace = f"/proc/{self._holder.pid}/ns/net"
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(self._namespace) == own:
            assert self._holder.poll() is None
        inside = ["nsenter", f"--net={self._namespace}", "ip"]
        pair = [f"pod{number}", "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid)]
        for words in (
            ["ip", "link", "add", *pair],
            ["ip", "link", "set", f"pod{number}", "master", "pods", "up"],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "addr", "add", f"{self.ip}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            # Whoever asks which way the world is finds the pod's address.
            [*inside, "route", "add", "default", "via", _BRIDGE],
        ):
            subprocess.run(words, check=True)

    def text(self, text: str, mounts: Mapping[str, Path]) -> str:
        """As it stands."""
        return text

    def address(self, port: int) -> str:
        """On the bridge."""
        return f"{self.ip}:{port}"

    def workdir(self, mounts: Mapping[str, Path]) -> Path:
        """Of the command that puts the file system together."""
        return Path("/")

    def prepare(self, folder: Path, volume: Object, security: Object) -> None:
        """Memory is a tmpfs; everything belongs to the pod's group."""
        source = volume.get("emptyDir", {})
        if source.get("medium") == "Memory":
            size = source["sizeLimit"].removesuffix("i")
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        group = security["fsGroup"]
        for path in (folder, *folder.rglob("*")):
            os.chown(path, -1, group)
            path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))

    def command(self, words: Sequence[str], mounts: Mapping[str, tuple[Path, bool]], security: Object) -> list[str]:
        """A new root, and in it the container's user and command."""
        self._started += 1
        base = self._folder / f"root-{self._started}"
        base.mkdir()
        root = base / "root"
        seen = {
            "/opt/trackstar": (ROOT, False),
            "/opt/venv": (Path(sys.prefix), False),
            sys.prefix: (Path(sys.prefix), False),
            str(_INTERPRETER): (_INTERPRETER, False),
        }
        places = {**seen, **dict(sorted(mounts.items()))}
        lines = [
            ["mount", "-t", "tmpfs", "tmpfs", str(base)],
            ["mkdir", str(base / "upper"), str(base / "work"), str(root)],
            [
                "mount",
                "-t",
                "overlay",
                "overlay",
                "-o",
                f"lowerdir=/,upperdir={base}/upper,workdir={base}/work",
                str(root),
            ],
            ["mkdir", "-p", *(f"{root}{path}" for path in places if not path.startswith("/dev/"))],
            ["chmod", "go+rx", *(f"{root}{folder}" for folder in list(_INTERPRETER.parents)[:-1])],
            *(["mount", "--rbind", name, f"{root}{name}"] for name in ("/proc", "/sys", "/dev")),
            ["cp", "--remove-destination", *map(str, self._network.files), f"{root}/etc/"],
        ]
        for path, (folder, may_write) in places.items():
            lines.append(["mount", "--bind", str(folder), f"{root}{path}"])
            if not may_write:
                lines.append(["mount", "-o", "remount,bind,ro", f"{root}{path}"])
        if security["readOnlyRootFilesystem"]:
            lines.append(["mount", "-o", "remount,ro", str(root)])
        user = ["setpriv", f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}"]
        user += [f"--groups={security['fsGroup']}"]
        if not security["allowPrivilegeEscalation"]:
            user += ["--no-new-privs"]
        if security["capabilities"]["drop"] == ["ALL"]:
            user += ["--bounding-set=-all", "--inh-caps=-all"]
        run = ["exec", "chroot", str(root), *user, "env", "-C", "/tmp", *words]
        script = "\n".join(shlex.join(line) for line in [*lines, run])
        return ["nsenter", f"--net={self._namespace}", "unshare", "-m", "sh", "-ec", script]

    def close(self) -> None:
        """End every process of the pod."""
        space = os.readlink(self._namespace)
        while mine := [process for process in psutil.process_iter() if _space(process.pid) == space]:
            for process in mine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(mine, timeout=10)
            self._holder.poll()
        # Dead since its namespace is empty.
        self._holder.wait()


def _space(process_id: int) -> str:
    try:
        return os.readlink(f"/proc/{process_id}/ns/net")
    except OSError:
        return ""

"""A small kubelet for tests: what a rendered pod would start on a node is started here, as processes.

A pod's ConfigMaps, Secrets and volumes are laid out as files; each container gets the command, arguments, environment
of its manifest over those of the image (`deploy/Dockerfile`) and nothing of this process's own; its probes are asked as
the kubelet asks them, and it is ended by SIGTERM within the pod's grace period. An image is stood in for by this
repository, in place of `/opt/trackstar`, and by the environment that runs the tests, in place of `/opt/venv`. Two
variables are added: PYTHONPATH names the repository, whose packages the image has installed; OMP_NUM_THREADS is 1.

What a container sees depends on its node. `pod_network.PodNode` gives it the manifest's own paths and ports, user and
read-only root. `LocalNode`, which needs no rights, rewrites, in command, arguments, environment and ConfigMaps alike,
and nothing else:

- each mount path of the pod, and `/opt/trackstar` and `/opt/venv`, to the folder that stands for it;
- `0.0.0.0:PORT` of a port that the container names to a free port of 127.0.0.1, in probes too;
- `SERVICE:PORT` of a Service rendered with the pod to that port of the pod behind it.

Its containers are this user's, with this machine's root file system.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.charts.rendering import ROOT, Object, of_kind
from tests.service.ray_process import free_port

PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
_WORKDIR = "/tmp"
_LOOK_SECONDS = 0.2
_RESTARTS = 2


@dataclass(kw_only=True, slots=True)
class Cluster:
    """What pods refer to.

    Args:
        objects: as rendered.
        secrets: by name, their keys.
        claims: by name, the folder that a PersistentVolumeClaim holds.
        source: what is at /opt/trackstar of the image.
        addresses: `host:port` of what is elsewhere or was started before, by `service:port`.
    """

    objects: Sequence[Object]
    secrets: Mapping[str, Mapping[str, str]]
    claims: Mapping[str, Path] = field(default_factory=dict)
    source: Path = ROOT
    addresses: dict[str, str] = field(default_factory=dict)

    def config_map(self, name: str) -> dict[str, str]:
        """Its keys."""
        (found,) = [item for item in of_kind(list(self.objects), "ConfigMap") if item["metadata"]["name"] == name]
        data: dict[str, str] = found["data"]
        return data


class Node(Protocol):
    """Where a container runs."""

    def text(self, text: str, mounts: Mapping[str, Path]) -> str:
        """What stands in a manifest, as it holds here."""

    def prepare(self, folder: Path, volume: Object, security: Object) -> None:
        """Make a volume what the pod's security context wants it to be."""

    def command(self, words: Sequence[str], mounts: Mapping[str, tuple[Path, bool]], security: Object) -> list[str]:
        """The words that start a container; `mounts` are its folders, and whether it may write."""

    def workdir(self, mounts: Mapping[str, Path]) -> Path:
        """Where it is started, seen from here."""

    def address(self, port: int) -> str:
        """`host:port` of a port of the pod, seen from here."""


class LocalNode:
    """This machine's loopback; see the module's docstring for what is rewritten."""

    def __init__(self, cluster: Cluster, template: Object) -> None:
        named = [port for item in template["spec"]["containers"] for port in item.get("ports", [])]
        self._ports = {port["containerPort"]: free_port() for port in named}
        self._cluster = cluster
        numbers = {port["name"]: port["containerPort"] for port in named}
        labels = template["metadata"]["labels"].items()
        for service in of_kind(list(cluster.objects), "Service"):
            if service["spec"]["selector"].items() <= labels and named:
                for port in service["spec"]["ports"]:
                    target = port["targetPort"]
                    cluster.addresses[f"{service['metadata']['name']}:{port['port']}"] = self.address(
                        numbers.get(target, target)
                    )

    def text(self, text: str, mounts: Mapping[str, Path]) -> str:
        addresses = {**{f"0.0.0.0:{port}": self.address(port) for port in self._ports}, **self._cluster.addresses}
        paths = {
            **{path: str(folder) for path, folder in mounts.items()},
            "/opt/trackstar": str(self._cluster.source),
            "/opt/venv": sys.prefix,
        }
        # All at once: what comes out is not looked at again.
        longest = sorted({**addresses, **paths}, key=len, reverse=True)
        places = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, longest))})(?![\w.-])")
        return places.sub(lambda found: {**addresses, **paths}[found.group()], text)

    def prepare(self, folder: Path, volume: Object, security: Object) -> None:
        pass

    def command(self, words: Sequence[str], mounts: Mapping[str, tuple[Path, bool]], security: Object) -> list[str]:
        return list(words)

    def workdir(self, mounts: Mapping[str, Path]) -> Path:
        return mounts[_WORKDIR]

    def address(self, port: int) -> str:
        return f"127.0.0.1:{self._ports[port]}"


def image_environment() -> dict[str, str]:
    """ENV of the stage that every image of `deploy/Dockerfile` begins with."""
    stage = re.search(r"^FROM \S+ AS runtime\n(.*?)^FROM", (ROOT / "deploy/Dockerfile").read_text(), re.S | re.M)
    assert stage is not None
    lines = re.search(r"^ENV (.*?)(?<!\\)$", stage.group(1), re.S | re.M)
    assert lines is not None
    found = dict(re.findall(r"(\w+)=(\S+)", lines.group(1)))
    assert f"WORKDIR {_WORKDIR}\n" in stage.group(1)
    return {**found, "PATH": found["PATH"].replace("$PATH", os.environ["PATH"])}


class Container:
    """One container of a pod; its output is `log`."""

    def __init__(self, pod: Pod, spec: Object) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.log = pod.folder / f"{self.name}.log"
        self._pod = pod
        self._process: subprocess.Popen[bytes] | None = None
        # How often its end was made good by another start.
        self.restarts = 0

    def start(self) -> None:
        """Start its command."""
        pod = self._pod
        mounts = {
            item["mountPath"]: (pod.volumes[item["name"]], not item.get("readOnly", False)) for item in self._mounts()
        }
        folders = {path: folder for path, (folder, _) in mounts.items()}
        security = {**pod.template["spec"]["securityContext"], **self.spec["securityContext"]}
        words = [*self.spec["command"], *self.spec.get("args", [])]
        # Kubernetes fills $(NAME) in, from what stands before.
        environment: dict[str, str] = {}
        for name, value in self._environment().items():
            environment[name] = re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), value)
        words = [re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), word) for word in words]
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                pod.node.command([pod.node.text(word, folders) for word in words], mounts, security),
                cwd=pod.node.workdir(folders),
                env={name: pod.node.text(value, folders) for name, value in environment.items()},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def _mounts(self) -> list[Object]:
        found: list[Object] = self.spec.get("volumeMounts", [])
        return found

    def _environment(self) -> dict[str, str]:
        cluster = self._pod.cluster
        found = {**image_environment(), "PYTHONPATH": "/opt/trackstar", "OMP_NUM_THREADS": "1"}
        for source in self.spec.get("envFrom", []):
            found |= cluster.secrets[source["secretRef"]["name"]]
        for item in self.spec["env"]:
            if "value" in item:
                found[item["name"]] = item["value"]
            elif "secretKeyRef" in item["valueFrom"]:
                reference = item["valueFrom"]["secretKeyRef"]
                found[item["name"]] = cluster.secrets[reference["name"]][reference["key"]]
            else:
                found[item["name"]] = self._pod.fields[item["valueFrom"]["fieldRef"]["fieldPath"]]
        return found

    @property
    def process_id(self) -> int:
        """Of its command."""
        assert self._process is not None
        return self._process.pid

    def said(self) -> str:
        """Its output."""
        return self.log.read_text(errors="replace")[-6000:]

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs after {seconds:.0f} s: {self.said()}") from None

    def terminate(self) -> None:
        """Send SIGTERM."""
        assert self._process is not None
        self._process.terminate()

    def kill(self) -> None:
        """End it, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def probe(self, kind: str) -> str:
        """Ask one of its probes once: what the kubelet would hold against it; empty if it passes."""
        probe = self.spec[kind]
        seconds = probe.get("timeoutSeconds", 1)
        if "grpc" in probe:
            return self._ask_grpc(probe["grpc"]["port"], probe["grpc"].get("service", ""), seconds)
        return self._get(probe["httpGet"]["port"], probe["httpGet"]["path"], seconds)

    def _ask_grpc(self, port: int, service: str, seconds: float) -> str:
        with grpc.insecure_channel(self._pod.node.address(port)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds).status
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"
        return "" if status == health_pb2.HealthCheckResponse.SERVING else _name(status)

    def _get(self, port: int | str, path: str, seconds: float) -> str:
        numbers = {item["name"]: item["containerPort"] for item in self.spec.get("ports", [])}
        number = numbers[port] if isinstance(port, str) else port
        try:
            # Nothing is sent but the path, as the kubelet does it.
            urllib.request.urlopen(f"http://{self._pod.node.address(number)}{path}", timeout=seconds).close()
        except urllib.error.HTTPError as error:
            said = f"{error.code} {error.read().decode(errors='replace')}"
            error.close()
            return said
        except OSError as error:
            return str(error)
        return ""

    def wait_for(self, kind: str) -> None:
        """Until a probe passes; at most as long as the kubelet waits, or ten minutes where it waits for ever."""
        probe = self.spec[kind]
        patience = probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10) if kind == "startupProbe" else 600
        until = time.monotonic() + patience
        while said := self.probe(kind):
            self.keep()
            assert time.monotonic() < until, f"{kind} of {self.name}: {said}\n{self.said()}"
            time.sleep(_LOOK_SECONDS)

    def keep(self) -> None:
        """Start it again if it has ended and its pod wants that; not for ever."""
        assert self._process is not None
        if self._process.poll() is None:
            return
        assert self._pod.template["spec"].get("restartPolicy", "Always") == "Always", self.said()
        assert self.restarts < _RESTARTS, self.said()
        self.restarts += 1
        self.start()

    def drain(self) -> None:
        """SIGTERM; readiness must say NOT_SERVING, the exit code be 0 within the grace period, and nothing has failed
        before."""
        assert self.restarts == 0, self.said()
        probe = self.spec["readinessProbe"]["grpc"]
        began = time.monotonic()
        grace: int = self._pod.template["spec"].get("terminationGracePeriodSeconds", 30)
        with grpc.insecure_channel(self._pod.node.address(probe["port"])) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            statuses = stub.Watch(health_pb2.HealthCheckRequest(service=probe.get("service", "")), timeout=grace + 30)
            assert _name(next(statuses).status) == "SERVING"
            self.terminate()
            assert _name(next(statuses).status) == "NOT_SERVING"
            statuses.cancel()
        # Not the watch alone: the probe itself, while the process lives; later it is not there to answer.
        said = self.probe("readinessProbe")
        assert said.startswith(("NOT_SERVING", "UNAVAILABLE")), said
        assert self.wait(grace - (time.monotonic() - began)) == 0, self.said()


class Pod:
    """A pod: its files are laid out at once, its processes started when they are told to.

    Args:
        cluster: what it refers to.
        template: its metadata and spec.
        folder: where files and logs go.
        node: where it runs; on this machine if not given.
        fields: by path, what `fieldRef` gives.
    """

    def __init__(
        self,
        cluster: Cluster,
        template: Object,
        folder: Path,
        node: Node | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster, self.template, self.folder = cluster, template, folder
        self.node: Node = LocalNode(cluster, template) if node is None else node
        self.fields = dict(fields or {})
        folder.mkdir(parents=True)
        spec = template["spec"]
        self.init = [Container(self, item) for item in spec.get("initContainers", [])]
        self.containers = [Container(self, item) for item in spec["containers"]]
        self.volumes = {item["name"]: self._folder(item) for item in spec.get("volumes", [])}
        mounts = [mount for item in (*self.init, *self.containers) for mount in item.spec.get("volumeMounts", [])]
        folders = {item["mountPath"]: self.volumes[item["name"]] for item in mounts}
        for item in spec.get("volumes", []):
            self.node.prepare(self.volumes[item["name"]], item, spec["securityContext"])
            self._fill(item, folders)

    def _folder(self, volume: Object) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.cluster.claims[volume["persistentVolumeClaim"]["claimName"]]
        path: Path = self.folder / "volumes" / volume["name"]
        path.mkdir(parents=True)
        return path

    def _fill(self, volume: Object, folders: Mapping[str, Path]) -> None:
        path = self.volumes[volume["name"]]
        if "configMap" in volume:
            source = volume["configMap"]
            content = {k: self.node.text(v, folders) for k, v in self.cluster.config_map(source["name"]).items()}
        elif "secret" in volume:
            source = volume["secret"]
            content = dict(self.cluster.secrets[source["secretName"]])
        else:
            assert {"emptyDir", "persistentVolumeClaim"} & volume.keys(), volume
            return
        items = source.get("items", [{"key": key, "path": key} for key in content])
        for item in items:
            made = path / item["path"]
            made.write_text(content[item["key"]])
            made.chmod(source.get("defaultMode", 0o644))

    def run_init(self, seconds: float = 600) -> None:
        """Run the init containers, one after the other."""
        for container in self.init:
            container.start()
            assert container.wait(seconds) == 0, container.said()

    def start(self) -> Container:
        """Start the containers; returns the first."""
        for container in self.containers:
            container.start()
        return self.containers[0]

    def run(self) -> list[int]:
        """Run a pod of a job to its end; the exit codes of its containers."""
        self.run_init()
        self.start()
        seconds = self.template["spec"].get("activeDeadlineSeconds", 600)
        return [container.wait(seconds) for container in self.containers]

    def close(self) -> None:
        """End what runs."""
        for container in (*self.init, *self.containers):
            container.kill()


def _name(status: int) -> str:
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return name

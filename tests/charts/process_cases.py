"""The distributed service as pods: Milvus, a RayJob that builds, Ray Serve, a gateway, and the jobs around them.

Run by `test_processes`, in namespaces of its own; pods are `pod_network.PodNode`s, so that manifests hold as rendered.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway.auth import digest_of_token
from tests import tiny
from tests.charts import kuberay
from tests.charts.pod_network import Network, PodNode
from tests.charts.processes import PROBES, Cluster, Container, Pod
from tests.charts.rendering import MINIMAL, Object, gateway_pod, merged, one, preset, render
from tests.milvus_process import MilvusProcess
from tests.service import demo_index
from trackstar.storage import read_json

_TOKEN = "a-token-of-a-principal-0123456789"
_RAY_TOKEN = "a-token-of-this-ray-cluster-0123456789"
_SMALL = {"cpus": 0.2, "gpus": 0}


def values(milvus_port: int) -> dict[str, Any]:
    """The chart's defaults over a tiny index, with everything that it can run, and nothing that needs a GPU."""
    group = {"name": "encoders", "minReplicas": 1, "maxReplicas": 1}
    group |= {"resources": {"requests": {"cpu": "2", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}}
    head = {"resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}}
    return merged(
        MINIMAL,
        {
            "checkpoint": {"path": "/models/checkpoint", "claim": "checkpoint"},
            "milvus": {"address": f"milvus:{milvus_port}", "tokenSecret": "milvus"},
            "networkPolicy": {"egress": [{"to": [], "ports": [{"port": milvus_port, "protocol": "TCP"}]}]},
            "ray": {"autoscaling": False, "sharedMemory": "256Mi", "head": head},
            "serve": {
                "workers": [group],
                "application": {
                    "device": "cpu",
                    "encoder": {**_SMALL, "max_replicas": 1},
                    "reranker": {"cpus": 0.2, "max_replicas": 1},
                    "ingress": {"cpus": 0.1, "min_replicas": 1, "max_replicas": 1},
                },
            },
            "reindex": {
                "enabled": True,
                "suspend": False,
                "head": head,
                "workers": [group],
                "config": {
                    "build": {
                        **{key: value for key, value in demo_index.settings(Path("/data")).items() if key != "model"},
                        "model": "/models/checkpoint",
                        "code": {"store": "milvus", "kind": "bits", "size": 256},
                    },
                    "workers": {
                        name: {"cpus": 0.2} for name in ("readers", "encoders", "scanners", "whitener", "importers")
                    },
                },
            },
            "collect": {"enabled": True, "apply": True},
            "test": {"tokenSecret": "token"},
        },
    )


@dataclass(kw_only=True)
class Site:
    """The cluster, and the pods on it."""

    cluster: Cluster
    network: Network
    folder: Path
    index: Path
    running: dict[str, tuple[Pod, PodNode]] = field(default_factory=dict)

    def pod(self, name: str, template: Object, fields: dict[str, str] | None = None) -> Pod:
        """A pod that has not started yet."""
        node = PodNode(self.network, self.folder / f"{name}-root")
        made = Pod(self.cluster, template, self.folder / name, node, fields)
        self.running[name] = (made, node)
        return made

    def ip(self, name: str) -> str:
        """Of a pod."""
        return self.running[name][1].ip

    def run(self, name: str, template: Object) -> str:
        """Run a pod of a job to its end, which must be a good one; what it said."""
        pod = self.pod(name, template)
        try:
            codes = pod.run()
            said = "\n".join(container.said() for container in pod.containers)
            assert codes == [0] * len(codes), said
            return said
        finally:
            self.end(name)

    def end(self, name: str) -> None:
        """End all of a pod."""
        pod, node = self.running.pop(name)
        pod.close()
        node.close()

    def ray(self, spec: Object, cluster: str, origin: str) -> tuple[Container, Container]:
        """Head and worker of a Ray cluster, each passing what its startup needs."""
        group = spec["workerGroupSpecs"][0]["groupName"]
        template = kuberay.ray_pod(spec, cluster, "head", origin)
        pod = self.pod(f"{cluster}-head", template, kuberay.fields(cluster, "headgroup", f"{cluster}-head"))
        self.network.name(f"{cluster}-head-svc", self.ip(f"{cluster}-head"))
        head = pod.start()
        head.wait_for("readinessProbe")
        head.wait_for("livenessProbe")
        # GCS answers before the rest of the head has started, which a busy machine may let it fail at.
        until = time.monotonic() + 300
        while "Ray runtime started" not in head.log.read_text():
            head.keep()
            assert time.monotonic() < until, head.said()
            time.sleep(0.5)
        template = kuberay.ray_pod(spec, cluster, "worker", origin)
        pod = self.pod(f"{cluster}-worker", template, kuberay.fields(cluster, group, f"{cluster}-worker"))
        pod.run_init(300)
        worker = pod.start()
        worker.wait_for("livenessProbe")
        return head, worker

    def dashboard(self, cluster: str, path: str, content: Any = None, token: str | None = _RAY_TOKEN) -> bytes:
        """Ask a head's dashboard as KubeRay does."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"http://{self.ip(f'{cluster}-head')}:8265{path}", data=data)
        request.method = "GET" if data is None else "PUT"
        request.add_header("Content-Type", "application/json")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: bytes = response.read()
            return answer


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with Network(tmp_path_factory.mktemp("network")) as network:
        yield network


@pytest.fixture(scope="module")
def site(network: Network, tmp_path_factory: pytest.TempPathFactory, milvus: MilvusProcess) -> Iterator[Site]:
    """A volume with a corpus and no index, one with a checkpoint, a Milvus server, and the Secrets."""
    root = tmp_path_factory.mktemp("site")
    for name in ("index", "checkpoint"):
        (root / name).mkdir()
    demo_index.write_corpus(root / "index" / "corpus.jsonl", 0, demo_index.NUM_PASSAGES)
    tiny.save_model(root / "checkpoint" / "checkpoint", "llama", scale=2.0)
    port = int(milvus.access.address.rpartition(":")[2])
    network.name("milvus", network.outside)
    principals = {"principals": [{"name": "tester", "token_sha256": [digest_of_token(_TOKEN)]}]}
    cluster = Cluster(
        objects=render(values(port)),
        secrets={
            "trackstar-principals": {"principals.yaml": yaml.safe_dump(principals)},
            "trackstar-ray-token": {"auth_token": _RAY_TOKEN},
            "token": {"token": _TOKEN},
            "milvus": {"token": f"{milvus.access.user}:{milvus.access.password}"},
        },
        claims={"index": root / "index", "checkpoint": root / "checkpoint"},
    )
    found = Site(cluster=cluster, network=network, folder=root / "pods", index=root / "index" / "index")
    try:
        yield found
    finally:
        for name in list(found.running):
            found.end(name)


def test_a_ray_job_builds_the_index(site: Site) -> None:
    job = one(list(site.cluster.objects), "RayJob")
    name = f"{job['metadata']['name']}-abcde"
    site.ray(job["spec"]["rayClusterSpec"], name, "RayJob")
    with pytest.raises(urllib.error.HTTPError) as refused:
        site.dashboard(name, "/api/jobs/", token=None)
    refused.value.close()
    assert refused.value.code == 401
    template = kuberay.submitter_pod(job["spec"], "reindex-1", f"{name}-head-svc:8265")
    said = site.run("submitter", template)
    found = json.loads(site.dashboard(name, "/api/jobs/reindex-1"))
    assert found["status"] == "SUCCEEDED", said
    generation = read_json(site.index / "active.json")["generation"]
    assert f"generation {generation} is active" in said
    for part in ("worker", "head"):
        site.end(f"{name}-{part}")


def test_ray_serve_and_a_gateway_answer(site: Site) -> None:
    objects = list(site.cluster.objects)
    service = one(objects, "RayService")
    name = f"{service['metadata']['name']}-abcde"
    head, worker = site.ray(service["spec"]["rayClusterConfig"], name, "RayService")
    # No replica, no proxy: the pod gets no calls yet.
    assert worker.probe("readinessProbe")
    site.dashboard(name, "/api/serve/applications/", yaml.safe_load(service["spec"]["serveConfigV2"]))
    site.network.name(service["spec"]["serveService"]["metadata"]["name"], site.ip(f"{name}-worker"))
    worker.wait_for("readinessProbe")
    until = time.monotonic() + 300
    while (state := _application(site, name))["status"] != "RUNNING":
        assert state["status"] in ("NOT_STARTED", "DEPLOYING"), state
        assert time.monotonic() < until, state
        time.sleep(1)
    pod = site.pod("gateway", gateway_pod(objects))
    site.network.name(one(objects, "Deployment")["metadata"]["name"], site.ip("gateway"))
    gateway = pod.start()
    for kind in PROBES:
        gateway.wait_for(kind)
    assert "proponents of 'Ottawa'" in site.run("test", one(objects, "Pod"))
    for container in (head, worker):
        for kind in ("livenessProbe", "readinessProbe"):
            container.wait_for(kind)
    gateway.drain()
    site.end("gateway")
    for part in ("worker", "head"):
        site.end(f"{name}-{part}")


def _application(site: Site, name: str) -> dict[str, Any]:
    found = json.loads(site.dashboard(name, "/api/serve/applications/"))["applications"]
    application: dict[str, Any] = found.get("trackstar", {"status": "NOT_STARTED"})
    return application


@pytest.mark.parametrize(("name", "expected"), [("audit", "passed"), ("collect", "0 collections were deleted")])
def test_maintenance_runs(site: Site, name: str, expected: str) -> None:
    job = one(list(site.cluster.objects), "CronJob", name)
    said = site.run(name, job["spec"]["jobTemplate"]["spec"]["template"])
    assert expected in said


def test_the_laptop_preset_makes_the_whole_demo(network: Network, tmp_path: Path) -> None:
    secrets = {"token": _TOKEN}
    secrets["principals.yaml"] = yaml.safe_dump(
        {"principals": [{"name": "me", "token_sha256": [digest_of_token(_TOKEN)]}]}
    )
    cluster = Cluster(objects=render(preset("laptop")), secrets={"trackstar-principals": secrets})
    objects = list(cluster.objects)
    with contextlib.ExitStack() as held:
        nodes = [PodNode(network, tmp_path / name) for name in ("one", "two")]
        for node in nodes:
            held.callback(node.close)
        pod = Pod(cluster, gateway_pod(objects), tmp_path / "gateway", nodes[0])
        network.name(one(objects, "Deployment")["metadata"]["name"], nodes[0].ip)
        pod.run_init()
        gateway = pod.start()
        for kind in PROBES:
            gateway.wait_for(kind)
        asked = Pod(cluster, one(objects, "Pod"), tmp_path / "test", nodes[1])
        assert asked.run() == [0], asked.containers[0].said()
        assert "proponents of 'Ottawa'" in asked.containers[0].said()
        gateway.drain()

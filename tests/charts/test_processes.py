"""The processes that the chart starts, started here from the rendered manifests themselves; see `processes`."""

from __future__ import annotations

import gzip
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from services.gateway.auth import digest_of_token
from tests.charts import pod_network
from tests.charts.processes import PROBES, Cluster, Pod
from tests.charts.rendering import ROOT, gateway_pod, one, preset, render

_TOKEN = "a-token-of-the-laptop-preset-0123456789"
_DEMO = Path("examples/demo")


def small_demo(folder: Path) -> Path:
    """/opt/trackstar of the image with the demo's model, and of its corpus what tells of Ottawa and some others."""
    demo = folder / _DEMO
    demo.mkdir(parents=True)
    shutil.copytree(ROOT / _DEMO / "model", demo / "model")
    with (
        gzip.open(ROOT / _DEMO / "corpus.jsonl.gz", "rt") as corpus,
        gzip.open(demo / "corpus.jsonl.gz", "wt") as small,
    ):
        others = itertools.count()
        small.writelines(line for line in corpus if "Ottawa" in line or next(others) < 150)
    # Packages, which the real image has in its environment.
    for name in ("trackstar", "services"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def principals(token: str) -> str:
    """What `docs/operations.md` has people put into the Secret."""
    return yaml.safe_dump({"principals": [{"name": "me", "token_sha256": [digest_of_token(token)]}]})


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Pod]]:
    """The preset's only pod, its init container done. The image has a smaller corpus; the manifest is as rendered."""
    root = tmp_path_factory.mktemp("laptop")
    cluster = Cluster(
        objects=render(preset("laptop")),
        secrets={"trackstar-principals": {"token": _TOKEN, "principals.yaml": principals(_TOKEN)}},
        source=small_demo(root / "image"),
    )
    pod = Pod(cluster, gateway_pod(list(cluster.objects)), root / "gateway")
    try:
        pod.run_init()
        yield cluster, pod
    finally:
        pod.close()


def test_the_laptop_preset_from_init_to_drain(laptop: tuple[Cluster, Pod], tmp_path: Path) -> None:
    cluster, pod = laptop
    # The gateway is not shown the token beside the principals.
    assert [path.name for path in pod.volumes["principals"].iterdir()] == ["principals.yaml"]
    gateway = pod.start()
    for kind in PROBES:
        gateway.wait_for(kind)
    test = one(list(cluster.objects), "Pod")
    asked = Pod(cluster, test, tmp_path / "test")
    assert asked.run() == [0], asked.containers[0].said()
    assert "proponents of 'Ottawa'" in asked.containers[0].said()
    # A token that no principal has.
    wrong = deepcopy(cluster)
    wrong.secrets = {"trackstar-principals": {**cluster.secrets["trackstar-principals"], "token": _TOKEN + "x"}}
    refused = Pod(wrong, test, tmp_path / "wrong")
    assert refused.run() == [1]
    assert "Ottawa" not in refused.containers[0].said()
    assert "token" in refused.containers[0].said()
    assert gateway.probe("livenessProbe") == ""
    gateway.drain()


@pytest.mark.slow
@pytest.mark.skipif(not pod_network.is_possible(), reason="pods with a network of their own need root")
def test_the_distributed_service_as_pods() -> None:
    cases = str(Path(__file__).with_name("process_cases.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--durations=0", "-p", "no:cacheprovider", cases]
    found = subprocess.run(
        pod_network.isolated(command),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-8000:]
    assert " passed" in found.stdout
    print(found.stdout)

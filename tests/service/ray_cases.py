"""The whole service as processes: Ray Serve with one actor and with a gang, a Milvus server, gateways, a real client.

Run by `test_ray.py`, in a network of its own where that is possible: Serve and Milvus listen on every interface.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.coarse_milvus import fill_collection
from services.gateway.config import MilvusConfig
from tests.charts.series import RAY, RAY_JOB
from tests.milvus_process import MilvusProcess
from tests.service import demo_index
from tests.service.ray_process import GatewayProcess, RayProcess
from trackstar.catalog import Catalog
from trackstar.client import Client
from trackstar.client_retry import RetryPolicy
from trackstar.client_types import Answer, DonePart, RankedPart
from trackstar.errors import NotReady, TrackstarError
from trackstar.results import Query, Trace
from trackstar.tracer import Tracer

SMALL: dict[str, Any] = {
    "encoder": {"cpus": 0.2},
    "reranker": {"cpus": 0.2},
    "ingress": {"cpus": 0.1, "max_ongoing_requests": 512},
    "health_check_seconds": 1.0,
}
OPTIONS: dict[str, Any] = {"k": 6, "candidates": 20}
ONCE = RetryPolicy(attempts=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Everything that runs, and the library's own answers."""

    index: Path
    ray: RayProcess
    milvus: MilvusProcess
    gateway: GatewayProcess
    expected: list[Trace]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, milvus: MilvusProcess) -> Iterator[System]:
    root = tmp_path_factory.mktemp("ray")
    # With as many key-value heads as ranks, so that it can be cut.
    index = demo_index.build(root, architecture="gpt_neox")
    tracer = Tracer.open(str(index))
    expected = [
        tracer.trace(Query(query_id=str(number), prompt=prompt, target=target), **OPTIONS)
        for number, (prompt, target) in enumerate(demo_index.QUERIES)
    ]
    tracer.close()
    arguments = {**SMALL, "index": str(index)}
    gang = {**arguments, "gang": {"ranks": 2, "strategy": "tensor", "cpus": 0.2}}
    ray = RayProcess({"trackstar": arguments, "gang": gang})
    try:
        secret = root / "milvus-token"
        secret.write_text(f"{milvus.access.user}:{milvus.access.password}")
        config = MilvusConfig(address=milvus.access.address, token_file=secret)
        catalog = Catalog(index)
        fill_collection(config, catalog, catalog.active())
        on_milvus = {"MILVUS__ADDRESS": milvus.access.address, "MILVUS__TOKEN_FILE": str(secret)}
        gateway = GatewayProcess(index, ray, "trackstar", **on_milvus)
        try:
            wait_until_answered(gateway, ray, seconds=180)
            yield System(index=index, ray=ray, milvus=milvus, gateway=gateway, expected=expected)
        finally:
            gateway.close()
    finally:
        ray.close()


@pytest.fixture(scope="module")
def gang(system: System) -> Iterator[GatewayProcess]:
    """A gateway to the application whose encoder is a gang."""
    gateway = GatewayProcess(system.index, system.ray, "gang")
    try:
        wait_until_answered(gateway, system.ray, seconds=120)
        yield gateway
    finally:
        gateway.close()


def wait_until_answered(gateway: GatewayProcess, ray: RayProcess, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    with Client(gateway.address, timeout_seconds=20) as client:
        while True:
            ray.check()
            try:
                client.trace(*demo_index.QUERIES[0], **OPTIONS)
                return
            except TrackstarError as error:
                if time.monotonic() > until:
                    raise AssertionError(ray.log.read_text()[-4000:]) from error
                time.sleep(0.5)


def check(answer: Answer, expected: Trace) -> None:
    """Ids equal, scores within 1e-5, evidence as close."""
    for found, mine in ((answer.trace.proponents, expected.proponents), (answer.trace.opponents, expected.opponents)):
        assert [item.passage.passage_id for item in found] == [item.passage.passage_id for item in mine]
        assert [item.score for item in found] == pytest.approx([item.score for item in mine], abs=1e-5)
        for theirs, ours in zip(found, mine, strict=True):
            assert theirs.evidence is not None
            assert ours.evidence is not None
            shares = [share for _, share in theirs.evidence.tokens]
            assert shares == pytest.approx([share for _, share in ours.evidence.tokens], abs=1e-5)
    assert answer.trace.loss == pytest.approx(expected.loss, rel=1e-5)


def check_all(gateway: GatewayProcess, system: System) -> None:
    with Client(gateway.address, timeout_seconds=60) as client:
        for query, expected in zip(demo_index.QUERIES, system.expected, strict=True):
            check(client.trace(*query, **OPTIONS), expected)


class Load:
    """Clients that ask again and again until told to stop; each answer is compared, each failure kept."""

    def __init__(self, gateway: GatewayProcess, system: System, clients: int = 3) -> None:
        self._gateway, self._system = gateway, system
        self._stop = threading.Event()
        self.answers = 0
        self.failures: list[Exception] = []
        self._threads = ThreadPoolExecutor(max_workers=clients)
        self._running = [self._threads.submit(self._ask, number) for number in range(clients)]

    def _ask(self, first: int) -> None:
        with Client(self._gateway.address, timeout_seconds=60) as client:
            for number in itertools.count(first):
                if self._stop.is_set():
                    return
                which = number % len(demo_index.QUERIES)
                try:
                    check(client.trace(*demo_index.QUERIES[which], **OPTIONS), self._system.expected[which])
                    self.answers += 1
                except Exception as error:
                    self.failures.append(error)

    def wait_for(self, answers: int, *, seconds: float = 60) -> None:
        """Until so many more answers have come."""
        goal, until = self.answers + answers, time.monotonic() + seconds
        while self.answers < goal and not self.failures:
            assert time.monotonic() < until, f"{self.answers} of {goal} answers"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; nothing may have failed."""
        self._stop.set()
        for task in self._running:
            task.result(timeout=90)
        self._threads.shutdown()
        assert not self.failures, self.failures[:3]


def test_the_answer_is_the_librarys_streamed_or_not(system: System) -> None:
    check_all(system.gateway, system)
    with Client(system.gateway.address, timeout_seconds=60) as client:
        for query, expected in zip(demo_index.QUERIES, system.expected, strict=True):
            parts = list(client.trace_stream(*query, **OPTIONS))
            assert any(isinstance(part, RankedPart) and part.final for part in parts)
            assert isinstance(parts[-1], DonePart)
            check(parts[-1].answer, expected)


def test_a_gang_gives_the_same_answer(gang: GatewayProcess, system: System) -> None:
    assert len(system.ray.pids("ray::Member")) == 2
    check_all(gang, system)


def test_passages_are_verified_through_ray_by_one_actor_and_by_a_gang(gang: GatewayProcess, system: System) -> None:
    found = []
    for gateway in (system.gateway, gang):
        with Client(gateway.address, timeout_seconds=60) as client:
            effects = client.verify(*demo_index.QUERIES[0], [3, 5]).effects
            assert [effect.passage_id for effect in effects] == [3, 5]
            found.append([effect.loss_after for effect in effects])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("title", ["ray::ServeReplica:trackstar:Encoder", "ray::ServeReplica:trackstar:Reranker"])
def test_a_killed_replica_costs_no_call(title: str, system: System) -> None:
    load = Load(system.gateway, system)
    load.wait_for(6)
    killed = system.ray.kill(title)
    load.wait_for(12, seconds=90)
    load.stop()
    assert killed not in system.ray.pids(title)


def test_a_killed_member_replaces_the_gang_and_costs_no_call(gang: GatewayProcess, system: System) -> None:
    before = set(system.ray.pids("ray::Member"))
    load = Load(gang, system)
    load.wait_for(6)
    system.ray.kill("ray::Member")
    load.wait_for(12, seconds=90)
    load.stop()
    after = set(system.ray.pids("ray::Member"))
    assert len(after) == 2
    assert not before & after


def test_milvus_stopped_and_started(system: System) -> None:
    system.milvus.kill()
    with Client(system.gateway.address, timeout_seconds=8, retry=ONCE) as client:
        began = time.monotonic()
        with pytest.raises(NotReady):
            client.trace(*demo_index.QUERIES[0], **OPTIONS)
        assert time.monotonic() - began < 10
        # What needs no coarse search is answered meanwhile.
        exhaustive = client.trace(*demo_index.QUERIES[0], k=6, exactness="exhaustive")
        assert exhaustive.trace.exact
    system.milvus.start()
    wait_until_answered(system.gateway, system.ray, seconds=90)
    check_all(system.gateway, system)


def test_the_last_call_is_answered_before_the_gateway_ends(system: System) -> None:
    gateway = GatewayProcess(system.index, system.ray, "trackstar")
    outcomes: list[str] = []

    def ask() -> None:
        with Client(gateway.address, timeout_seconds=60, retry=ONCE) as client:
            try:
                check(client.trace(*demo_index.QUERIES[0], **OPTIONS), system.expected[0])
                outcomes.append("answered")
            except NotReady:
                outcomes.append("refused")

    ask()
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    gateway.terminate()
    for thread in threads:
        thread.join(timeout=60)
    assert gateway.close() == 0
    assert len(outcomes) == 9
    assert outcomes.count("answered") > 1


def test_metrics_of_gateway_and_replicas(system: System) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{system.gateway.metrics_port}/metrics") as response:
        text = response.read().decode()
    for name in (
        'trackstar_rpc_handled_total{code="OK",method="Trace",service="trackstar.v1.TraceService"}',
        'trackstar_stage_duration_seconds_count{stage="search"}',
        "trackstar_generation_info{",
        'trackstar_breaker_state{backend="milvus"} 0.0',
    ):
        assert name in text
    assert "trackstar_defects_total 0.0" in text


# A job's gauges are there as long as its process is: until somebody has seen them.
JOB = """
import time
from pathlib import Path

import ray
from services.reindex.metrics import RayProgressMetrics
from trackstar.jobs import SHARD_STATES, JobProgress

ray.init(address="auto", log_to_driver=False)
metrics = RayProgressMetrics()
shards = dict.fromkeys(SHARD_STATES, 1)
metrics.show(JobProgress(job_id="j", state="CODING", shards=shards, recall=0.9, started_seconds=0, updated_seconds=0))
until = time.monotonic() + 100
while not Path("seen").exists() and time.monotonic() < until:
    time.sleep(0.2)
"""


def test_ray_tells_of_the_series_that_dashboards_show(system: System) -> None:
    """Those that a call leaves, one that is given up among them, and those of a job."""
    with Client(system.gateway.address, timeout_seconds=60, retry=ONCE) as client, ThreadPoolExecutor(1) as pool:
        job = pool.submit(system.ray.run, JOB)
        missing: set[str] = set()
        until = time.monotonic() + 90
        while time.monotonic() < until:
            client.trace(*demo_index.QUERIES[0], **OPTIONS)
            with contextlib.suppress(TrackstarError):
                client.trace(*demo_index.QUERIES[0], **OPTIONS, timeout_seconds=0.03)
            missing = min((untold(text) for text in system.ray.metrics()), key=len)
            if not missing:
                break
            time.sleep(1)
        (system.ray.folder / "seen").touch()
        job.result()
    assert not missing


def untold(text: str) -> set[str]:
    """Series that an exporter does not tell of with the labels that are used of them."""
    told: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    return {
        name for name, labels in {**RAY, **RAY_JOB}.items() if name not in told or not told[name].issuperset(labels)
    }

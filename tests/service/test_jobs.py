"""Jobs over a gateway that is a process, with the real client; a script stands in for the command that a job runs."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from services.gateway.auth import digest_of_token
from services.gateway.job_runners import ProcessJobRunner
from tests.service.honest import make_index
from tests.service.honest_jobs import GatewayProcess
from tests.service.job_stand_in import COMMAND
from trackstar.cli import main
from trackstar.client import AsyncClient, Client
from trackstar.client_job_types import JobInfo
from trackstar.client_retry import RetryPolicy
from trackstar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    TrackstarError,
)
from trackstar.jobs import PIPELINE_STATES, JobStore, job_id_of
from trackstar.v1 import job_pb2, job_pb2_grpc

_ONCE = RetryPolicy(attempts=1)


class Place:
    """An index, its gateways, and its jobs, all of which end with the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = JobStore(root)
        make_index(root, "alpha", active="alpha")
        self._gateways: list[GatewayProcess] = []

    def gateway(self, base: dict[str, Any] | None = None, *, port: int = 0, **settings: str) -> GatewayProcess:
        started = GatewayProcess(self.root, base, port=port, **settings)
        self._gateways.append(started)
        return started

    def starts(self, job_id: str) -> int:
        path = self.root / "jobs" / job_id / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def config(self, job_id: str) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((self.root / "jobs" / job_id / "config.yaml").read_text())
        return content

    def go(self, job_id: str) -> None:
        """Let a job that waits go on."""
        (self.root / "jobs" / job_id / "go").touch()

    def close(self) -> None:
        for gateway in self._gateways:
            gateway.close()
        runner = ProcessJobRunner(self.root / "jobs", command=(), stop_seconds=0.0)
        for job_id in self.store.list():
            runner.stop(job_id)
            while (run := runner.state(job_id)) is not None and run.state == "running":
                time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return found


def running(client: Client, job_id: str) -> JobInfo:
    """The job, once it runs and has told something."""

    def found() -> JobInfo | None:
        job = client.job(job_id)
        return job if job.state == "running" and job.pipeline_state else None

    job: JobInfo = until(found)
    return job


def test_a_job_is_watched_to_its_end(place: Place) -> None:
    gateway = place.gateway({"pause_seconds": 0.1})
    with Client(gateway.address) as client:
        asked: Any = {"mix": "task", "weight": 0.25, "damping": 0.5, "code": "bits", "refit": True, "activate": True}
        job = client.create_reindex_job("r1", append_paths=["/data/corpus/new.jsonl"], **asked)
        assert (job.job_id, job.request_id, job.caller) == (job_id_of("r1"), "r1", "anonymous")
        assert job.spec == {"append_paths": ("/data/corpus/new.jsonl",), **asked}
        seen = list(client.watch_job(job.job_id))
        stages = [item.pipeline_state for item in seen if item.pipeline_state]
        assert [state for state, _ in itertools.groupby(stages)] == [
            state for state in PIPELINE_STATES if state in stages
        ]
        assert len(set(stages)) > 4
        assert all(before != after for before, after in itertools.pairwise(seen))
        assert [item.ended for item in seen] == [False] * (len(seen) - 1) + [True]
        last = seen[-1]
        assert (last.state, last.pipeline_state, last.generation, last.recall) == ("succeeded", "ACTIVE", "beta", 0.97)
        assert last.shards == {"planned": 3, "encoded": 3, "coded": 3, "imported": 3}
        assert (last.tokens_done, last.tokens_total, last.passages_total) == (300, 300, 30)
        assert last.error == ""
        assert last.update_time_seconds > last.create_time_seconds > 1.7e9
        assert client.job(job.job_id) == last
        assert list(client.watch_job(job.job_id)) == [last]
    config = place.config(job.job_id)
    assert config["index"] == str(place.root)
    build = config["build"]
    assert build["model"] == "the-operator-s"
    assert build["mix"] == {"kind": "task", "weight": 0.25, "damping": 0.5}
    # The operator's size is one of prefixes.
    assert build["code"] == {"kind": "bits"}
    assert build["append"] == [{"paths": ["/data/corpus/new.jsonl"], "text_field": "words"}]
    assert (build["refit"], build["purge"], build["activate"]) == (True, False, True)


def test_asyncio_and_pages(place: Place) -> None:
    gateway = place.gateway(REINDEX__MAX_UNFINISHED="100")

    async def work() -> None:
        async with AsyncClient(gateway.address) as client:
            made = [await client.create_reindex_job(f"r{number}", purge=True) for number in range(5)]
            for job in made:
                assert [item async for item in client.watch_job(job.job_id)][-1].state == "succeeded"
            listed = await client.jobs()
            assert [job.job_id for job in listed] == [job.job_id for job in reversed(made)]
            assert await client.job(made[0].job_id) == listed[-1]
            assert await client.cancel_job(made[0].job_id) == listed[-1]
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub: Any = job_pb2_grpc.JobServiceStub(channel)
            request, seen = job_pb2.JobServiceListRequest(page_size=2), []
            while True:
                page = await stub.List(request)
                seen.append([job.job_id for job in page.jobs])
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
            assert [len(ids) for ids in seen] == [2, 2, 1]
            assert list(itertools.chain(*seen)) == [job.job_id for job in listed]

    asyncio.run(work())


def test_one_request_is_one_job(place: Place) -> None:
    gateway = place.gateway({"wait": True}, REINDEX__MAX_UNFINISHED="2")
    other = place.gateway()
    with Client(gateway.address) as client, Client(other.address) as second, ThreadPoolExecutor(12) as pool:
        asks = [pool.submit((client, second)[i % 2].create_reindex_job, "same", mix="none") for i in range(12)]
        assert {ask.result().job_id for ask in asks} == {job_id_of("same")}
        job = running(client, job_id_of("same"))
        assert place.starts(job.job_id) == 1
        assert [item.job_id for item in client.jobs()] == [job.job_id]
        with pytest.raises(InvalidRequest, match="asked for something else") as refused:
            client.create_reindex_job("same", mix="train")
        assert refused.value.field == "request_id"
        # What the operator changes later does not count for a job that is there.
        (place.root / "base.yaml").write_text("[]")
        assert client.create_reindex_job("same", mix="none").job_id == job.job_id
        with pytest.raises(TrackstarError, match="no job can be made now"):
            client.create_reindex_job("another")
        place.go(job.job_id)
        assert list(second.watch_job(job.job_id))[-1].state == "succeeded"
        assert client.create_reindex_job("same", mix="none").state == "succeeded"
    assert place.starts(job.job_id) == 1


def test_a_job_is_cancelled(place: Place) -> None:
    gateway = place.gateway({"wait": True})
    with Client(gateway.address) as client:
        job = client.create_reindex_job("r")
        running(client, job.job_id)
        client.cancel_job(job.job_id)
        last = list(client.watch_job(job.job_id))[-1]
        assert (last.state, last.error, last.pipeline_state) == ("cancelled", "", "PLANNED")
        assert client.cancel_job(job.job_id) == client.create_reindex_job("r") == last
        for call in (client.job, client.cancel_job, lambda job_id: list(client.watch_job(job_id))):
            with pytest.raises(NotFound) as missing:
                call("job-none")
            assert (missing.value.kind, missing.value.name) == ("job", "job-none")
            with pytest.raises(InvalidRequest) as refused:
                call("../x")
            assert refused.value.field == "job_id"
    assert place.starts(job.job_id) == 1


def test_a_cancelled_job_that_was_never_started_is_not(place: Place) -> None:
    place.store.create(job_id_of("r"), {}, "{}", request_id="r", created_seconds=1.0)
    place.store.write_cancelled(job_id_of("r"), "me", 2.0)
    gateway = place.gateway()
    with Client(gateway.address) as client:
        assert client.create_reindex_job("r").state == "cancelled"
    assert place.starts(job_id_of("r")) == 0


@pytest.mark.parametrize("told", ["", "the model is gone"])
def test_why_a_job_failed_is_told(place: Place, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = place.gateway({"fail_at": "CODING", "fail_with": "no space is left", "told": told})
    with Client(gateway.address) as client:
        job = client.create_reindex_job("r")
        last = list(client.watch_job(job.job_id))[-1]
    sentence = told or "no space is left"
    assert (last.state, last.error, last.pipeline_state) == ("failed", sentence, "CODING")
    assert main(["jobs", "--address", gateway.address, "watch", job.job_id]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: job {job.job_id} failed: {sentence}"


def test_a_gateway_that_dies_in_between_is_made_up_for(place: Place) -> None:
    # Written down, and the gateway died before it could hand the job over.
    for name in ("again", "nobody"):
        place.store.create(job_id_of(name), {}, "{}", request_id=name, created_seconds=1.0)
    # Handed over, and it died before it could write that down.
    job_id = job_id_of("started")
    place.store.create(job_id, {}, json.dumps({"wait": True}), request_id="started", created_seconds=1.0)
    runner = ProcessJobRunner(place.root / "jobs", command=COMMAND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        runner.submit(job_id, str(place.store.config(job_id)))
    gateway = place.gateway()
    with Client(gateway.address) as client:
        assert client.create_reindex_job("again").job_id == job_id_of("again")
        assert running(client, job_id).request_id == "started"
        place.go(job_id)
        for name in ("again", "nobody", "started"):
            assert list(client.watch_job(job_id_of(name)))[-1].state == "succeeded"
            assert place.starts(job_id_of(name)) == 1


def test_a_watch_outlives_the_gateway(place: Place) -> None:
    gateway = place.gateway({"wait": True})
    seen: list[JobInfo] = []
    # More patient than a new process takes to start.
    patient = RetryPolicy(attempts=100, first_seconds=0.05, longest_seconds=0.5)
    with Client(gateway.address, timeout_seconds=30, retry=patient) as client:
        job = client.create_reindex_job("r")
        running(client, job.job_id)
        watching = threading.Thread(target=lambda: seen.extend(client.watch_job(job.job_id)))
        watching.start()
        gateway.kill()
        assert place.starts(job.job_id) == 1
        anew = place.gateway(port=gateway.port)
        assert running(client, job.job_id).job_id == job.job_id
        place.go(job.job_id)
        watching.join(30)
        assert seen[-1].state == "succeeded"
        assert place.starts(job.job_id) == 1
        assert anew.close() == 0


def test_a_gateway_that_shuts_down_does_not_wait_for_watches(place: Place) -> None:
    gateway = place.gateway({"wait": True}, DRAIN_SECONDS="3600", ADMISSION__MAX_IN_FLIGHT="1")
    with Client(gateway.address) as client, grpc.insecure_channel(gateway.address) as channel:
        job = client.create_reindex_job("r")
        stub = job_pb2_grpc.JobServiceStub(channel)
        watch: Any = stub.Watch(job_pb2.JobServiceWatchRequest(job_id=job.job_id), timeout=60)
        next(watch)
        # The watch has taken no one's place.
        running(client, job.job_id)
        assert gateway.close() == 0
        with pytest.raises(grpc.RpcError) as ended:
            list(watch)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_watch_ends_in_time_and_is_one_of_few(place: Place) -> None:
    gateway = place.gateway({"wait": True}, REINDEX__MAX_WATCHERS="1")
    with Client(gateway.address, retry=_ONCE, timeout_seconds=0.5) as client:
        job = client.create_reindex_job("r", timeout_seconds=20)
        watch = client.watch_job(job.job_id, timeout_seconds=1.5)
        next(watch)
        with pytest.raises(Overloaded, match="1 callers watch jobs already"):
            next(client.watch_job(job.job_id))
        # It is asked again whenever the client's half second is over.
        with pytest.raises(DeadlineExceeded, match="it goes on"):
            list(watch)
        assert next(iter(client.watch_job(job.job_id))).state == "running"


def test_no_more_jobs_than_may_wait(place: Place) -> None:
    gateway = place.gateway({"wait": True}, REINDEX__MAX_UNFINISHED="1")
    with Client(gateway.address, retry=_ONCE) as client:
        first = client.create_reindex_job("1")
        with pytest.raises(Overloaded, match="1 jobs have not ended"):
            client.create_reindex_job("2")
        place.go(first.job_id)
        list(client.watch_job(first.job_id))
        assert client.create_reindex_job("2").request_id == "2"


def test_jobs_are_for_those_that_may(place: Place, tmp_path: Path) -> None:
    tokens = {name: f"the-token-of-{name}-and-more" for name in ("reader", "activator", "operator")}
    principals = [
        {"name": "reader", "token_sha256": [digest_of_token(tokens["reader"])]},
        {"name": "activator", "token_sha256": [digest_of_token(tokens["activator"])], "may_activate": True},
        {"name": "operator", "token_sha256": [digest_of_token(tokens["operator"])], "may_reindex": True},
    ]
    file = tmp_path / "principals.json"
    file.write_text(json.dumps({"principals": principals}))
    gateway = place.gateway(AUTH__PRINCIPALS_FILE=str(file))
    with Client(gateway.address, token=tokens["operator"]) as client:
        job = client.create_reindex_job("r")
        assert job.caller == "operator"
        last = list(client.watch_job(job.job_id))[-1]
    for name in ("reader", "activator"):
        with Client(gateway.address, token=tokens[name]) as client:
            for call in _calls(client, job.job_id):
                with pytest.raises(PermissionDenied, match=f"'{name}' may not reindex"):
                    call()
    with Client(gateway.address, token=tokens["operator"]) as client:
        assert client.jobs() == [last]


def test_a_gateway_without_a_configuration_has_no_jobs(place: Place) -> None:
    gateway = place.gateway(REINDEX__CONFIG_FILE="null")
    with Client(gateway.address) as client:
        for call in _calls(client, "job-1"):
            with pytest.raises(TrackstarError, match=r"^this gateway starts no jobs: its settings name no reindex"):
                call()
        assert client.generations()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"append_paths": ["/etc/passwd"]}, "spec.append_paths"),
        ({"append_paths": ["/data/corpus/../secret"]}, "spec.append_paths"),
        ({"append_paths": ["/data/corpus/a::file:///etc/passwd"]}, "spec.append_paths"),
        ({"append_paths": ["/data/corpus-of-others/a"]}, "spec.append_paths"),
        ({"append_paths": ["/data/corpus/a", "/data/corpus/a"]}, "spec.append_paths"),
        ({"append_paths": [""]}, "spec.append_paths"),
        ({"append_paths": [f"/data/corpus/{number}" for number in range(101)]}, "spec.append_paths"),
        ({"task_queries": "s3://elsewhere/queries.jsonl"}, "spec.task_queries"),
        ({"task_queries": "/data/corpus/\x00"}, "spec.task_queries"),
        ({"task_queries": "/data/corpus/" + "x" * 5000}, "spec.task_queries"),
        ({"mix": "train", "weight": 0.5}, "spec.mix.weight"),
        ({"mix": "none", "weight": "crossing"}, "spec.mix.crossing"),
        ({"weight": 1.5}, "spec.mix.weight"),
        ({"weight": float("nan")}, "spec.mix.weight"),
        ({"damping": -0.1}, "spec.mix.damping"),
        ({"damping": float("inf")}, "spec.mix.damping"),
        ({"code_size": 7}, "spec.code.size"),
        ({"code_size": 1 << 21}, "spec.code.size"),
    ],
)
def test_what_cannot_be_asked_names_its_field(refusing: Client, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        refusing.create_reindex_job("r", **options)
    assert refused.value.field == field
    assert refusing.jobs() == []


@pytest.mark.parametrize("request_id", ["", "x" * 129, "é", "a\nb"])
def test_a_request_must_have_a_name(refusing: Client, request_id: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        refusing.create_reindex_job(request_id)
    assert refused.value.field == "request_id"


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a gateway that is asked for nothing it does."""
    made = Place(tmp_path_factory.mktemp("refusing"))
    with Client(made.gateway().address) as client:
        yield client
    made.close()


def test_metrics_and_the_command_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = place.gateway({"wait": True, "steps": 4})
    jobs = ["jobs", "--address", gateway.address]
    assert main([*jobs, "list"]) == 0
    assert capsys.readouterr().err == "there are no jobs\n"
    assert main([*jobs, "create", "--request-id", "r", "--mix", "task", "--weight", "crossing", "--refit"]) == 0
    shown = capsys.readouterr().out
    job_id = job_id_of("r")
    assert job_id in shown
    assert "mix: task, weight: crossing, refit: yes" in shown
    metrics = until(lambda: (found := gateway.metrics()).get('trackstar_reindex_shards{state="planned"}') and found)
    assert metrics['trackstar_reindex_shards{state="planned"}'] == 4
    assert metrics['trackstar_reindex_shards{state="encoded"}'] == 0
    assert metrics['trackstar_reindex_jobs{state="running"}'] == 1
    assert metrics["trackstar_reindex_tokens_per_second"] == 250
    assert metrics["trackstar_reindex_remaining_seconds"] == 7
    assert metrics['trackstar_rpc_handled_total{code="OK",method="CreateReindexJob",service="trackstar.v1.JobService"}']
    assert main([*jobs, "get", job_id]) == 0
    line = "running PLANNED, 0 encoded, 0 coded, 0 imported of 4 shards, 250 tokens/s, 7 s left"
    assert line in " ".join(capsys.readouterr().out.split())
    place.go(job_id)
    assert main([*jobs, "watch", job_id, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("succeeded AUDITED, 4 encoded, 4 coded, 4 imported of 4 shards, recall")
    assert json.loads(said.out)["state"] == "succeeded"
    assert main([*jobs, "list", "--json"]) == 0
    assert [job["job_id"] for job in json.loads(capsys.readouterr().out)] == [job_id]
    assert main([*jobs, "cancel", job_id]) == 0
    ended = until(lambda: (found := gateway.metrics())['trackstar_reindex_jobs{state="succeeded"}'] and found)
    assert ended['trackstar_reindex_jobs{state="running"}'] == 0
    assert ended['trackstar_reindex_shards{state="planned"}'] == 0
    assert ended["trackstar_reindex_tokens_per_second"] == 0
    assert main([*jobs, "create", "--mix", "half"]) == 2
    assert main([*jobs, "create", "--weight", "much"]) == 2
    assert main([*jobs, "get", "job-none"]) == 3


def _calls(client: Client, job_id: str) -> list[Callable[[], Any]]:
    return [
        lambda: client.create_reindex_job("another"),
        lambda: client.job(job_id),
        client.jobs,
        lambda: client.cancel_job(job_id),
        lambda: list(client.watch_job(job_id)),
    ]

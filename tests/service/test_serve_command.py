"""`trackstar serve` on a real index through the real client: the library's answers, and faults that end well."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.auth import digest_of_token
from tests.service import demo_index
from tests.service.job_stand_in import COMMAND
from tests.service.messages import messages
from tests.service.serve_process import ServeProcess
from trackstar.client import Client
from trackstar.client_retry import RetryPolicy
from trackstar.client_types import Answer, DonePart, Filter, Own, Span
from trackstar.encode import Example
from trackstar.errors import (
    CorruptArtifact,
    DeadlineExceeded,
    NotReady,
    PermissionDenied,
    TrackstarError,
    Unauthenticated,
)
from trackstar.index import Index
from trackstar.queries import tokenize
from trackstar.results import Influence, Query, Trace
from trackstar.tail_patch import PatchStep, TailPatcher
from trackstar.tracer import Tracer
from trackstar.v1 import trace_pb2, trace_pb2_grpc

STORES = [("memory", "bits"), ("milvus-lite", "prefix")]
ONCE = RetryPolicy(attempts=1)


@pytest.fixture(scope="module", params=STORES, ids=[store for store, _ in STORES])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServeProcess, dict[str, list[Trace]], Path]]:
    """A server, what the library answers to every query by generation, and the index."""
    store, kind = request.param
    root = tmp_path_factory.mktemp("served")
    index = demo_index.build(root, store=store, kind=kind)
    expected = {name: traces(index, name) for name in (Index(index).active(), demo_index.other_generation(index))}
    base = root / "reindex.yaml"
    base.write_text("{steps: 2, build: {corpus: {paths: [a]}}}")
    jobs = {
        "REINDEX__CONFIG_FILE": str(base),
        "REINDEX__ENTRYPOINT": yaml.safe_dump(list(COMMAND)),
        "REINDEX__ENVIRONMENT": yaml.safe_dump({"PYTHONPATH": str(Path(__file__).resolve().parents[2])}),
    }
    server = ServeProcess(index, root, **jobs)
    yield server, expected, index
    assert server.close() == 0


def traces(index: Path, generation: str, **options: Any) -> list[Trace]:
    tracer = Tracer.open(str(index), generation=generation)
    found = [
        tracer.trace(Query(query_id="q", prompt=prompt, target=target), **{"k": 6, "candidates": 20, **options})
        for prompt, target in demo_index.QUERIES
    ]
    tracer.close()
    return found


def ids(ranking: tuple[Influence, ...]) -> list[int]:
    return [item.passage.passage_id for item in ranking]


def check(found: Trace, expected: Trace) -> None:
    for theirs, ours in ((found.proponents, expected.proponents), (found.opponents, expected.opponents)):
        assert ids(theirs) == ids(ours)
        for item, mine in zip(theirs, ours, strict=True):
            assert item.score == pytest.approx(mine.score, abs=1e-5)
            assert item.z_score == pytest.approx(mine.z_score, abs=1e-3)
            assert item.passage.text == mine.passage.text
            assert item.evidence is not None
            assert mine.evidence is not None
            for part in ("tokens", "blocks"):
                shares, expected_shares = (dict(enumerate(getattr(side.evidence, part))) for side in (item, mine))
                assert [name for name, _ in shares.values()] == [name for name, _ in expected_shares.values()]
                assert [share for _, share in shares.values()] == pytest.approx(
                    [share for _, share in expected_shares.values()], abs=1e-6
                )
            assert item.evidence.overlap == pytest.approx(mine.evidence.overlap)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.background_std == pytest.approx(expected.background_std, rel=1e-5)


def test_answers_are_the_librarys_streamed_paged_or_whole(
    served: tuple[ServeProcess, dict[str, list[Trace]], Path],
) -> None:
    server, expected, index = served
    with Client(server.address) as client:
        for name, answers in expected.items():
            for query, trace in zip(demo_index.QUERIES, answers, strict=True):
                answer = client.trace(*query, k=6, candidates=20, generation=name)
                assert answer.provenance.generation == name
                assert answer.provenance.exactness == "cascade"
                check(answer.trace, trace)
                last = list(client.trace_stream(*query, k=6, candidates=20, generation=name))[-1]
                assert isinstance(last, DonePart)
                check(last.answer.trace, trace)
        active = Index(index).active()
        exact = traces(index, active, exact=True)[0]
        query = demo_index.QUERIES[0]
        check(client.trace(*query, k=6, exactness="exhaustive").trace, exact)
        pages: list[Answer] = []
        token = ""
        while not pages or token:
            page = client.trace(*query, k=6, candidates=20, page_size=4, page_token=token)
            pages.append(page)
            token = page.next_page_token
        assert [item for page in pages for item in ids(page.trace.proponents)] == ids(expected[active][0].proponents)


def test_spans_own_words_filters_passages_and_verification(
    served: tuple[ServeProcess, dict[str, list[Trace]], Path],
) -> None:
    server, _, index = served
    tracer = Tracer.open(str(index))
    prompt, target = demo_index.QUERIES[0]
    with Client(server.address) as client:
        own = client.trace(prompt, Own(), k=2)
        assert own.explained.text == tracer.predict(prompt)
        span = client.trace(prompt, Span(completion=f"{target} and more", start=0, end=len(target)), k=3)
        whole = client.trace(prompt, target, k=3)
        assert ids(span.trace.proponents) == ids(whole.trace.proponents)
        everything = tracer.trace(Query(query_id="q", prompt=prompt, target=target), k=120, exact=True, evidence=False)
        wanted = [item for item in ids(everything.proponents) if item % 3 == 1 and item % 4][:9]
        kept = client.trace(prompt, target, k=9, filter=Filter(sources=["web"], metadata={"language": ["en"]}))
        assert ids(kept.trace.proponents) == wanted
        assert [item.passage_id for item in client.passages([7, 2]).passages] == [7, 2]
        effects = client.verify(prompt, target, wanted[:2], learning_rate=0.05).effects
        facts = tracer.index.facts
        example = tokenize(
            Query(query_id="q", prompt=prompt, target=target),
            tracer.loaded.tokenizer,
            add_bos=facts["add_bos"],
            max_tokens=tracer.loaded.max_tokens,
        )
        passages = [Example(tokens=passage.tokens) for passage in tracer.rows.passages(wanted[:2])]
        steps = TailPatcher(tracer.loaded.model).measure(example, passages, PatchStep(learning_rate=0.05))
        assert [effect.loss_after for effect in effects] == pytest.approx([step.loss_after for step in steps], rel=1e-5)
    tracer.close()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_arrives_is_answered_or_refused_by_field(
    data: st.DataObject, served: tuple[ServeProcess, dict[str, list[Trace]], Path]
) -> None:
    server, _, _ = served
    kinds: list[tuple[str, type[Message]]] = [
        ("Trace", trace_pb2.TraceRequest),
        ("GetPassages", trace_pb2.GetPassagesRequest),
        ("Verify", trace_pb2.VerifyRequest),
    ]
    method, kind = data.draw(st.sampled_from(kinds))
    with grpc.insecure_channel(server.address) as channel:
        call = getattr(trace_pb2_grpc.TraceServiceStub(channel), method).future(data.draw(messages(kind)), timeout=30)
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert server.metrics()["trackstar_defects_total"] == 0


def test_generations_switched_under_load_cost_no_call(
    served: tuple[ServeProcess, dict[str, list[Trace]], Path],
) -> None:
    server, expected, _ = served
    names = list(expected)

    def ask(number: int) -> Answer:
        with Client(server.address, retry=ONCE) as client:
            return client.trace(*demo_index.QUERIES[number % 5], k=6, candidates=20)

    with ThreadPoolExecutor(4) as pool, Client(server.address) as client:
        running = [pool.submit(ask, number) for number in range(40)]
        for name in [*names[::-1], *names[::-1], *names[::-1], names[0]]:
            client.activate(name)
            time.sleep(0.1)
        answers = [task.result() for task in running]
    for number, answer in enumerate(answers):
        check(answer.trace, expected[answer.provenance.generation][number % 5])
    assert len({answer.provenance.generation for answer in answers}) == 2


def test_a_deadline_holds_and_the_server_goes_on(served: tuple[ServeProcess, dict[str, list[Trace]], Path]) -> None:
    server, expected, _ = served
    with Client(server.address, retry=ONCE) as client:
        for seconds in (0.001, 0.01, 0.02):
            began = time.monotonic()
            with contextlib.suppress(DeadlineExceeded):
                client.trace(*demo_index.QUERIES[0], k=6, candidates=20, timeout_seconds=seconds)
            assert time.monotonic() - began < seconds + 1.0
        check(client.trace(*demo_index.QUERIES[0], k=6, candidates=20).trace, next(iter(expected.values()))[0])


def test_every_metric_is_there(served: tuple[ServeProcess, dict[str, list[Trace]], Path]) -> None:
    server, expected, _ = served
    found = server.metrics()
    labels = 'method="Trace",service="trackstar.v1.TraceService"'
    assert found[f'trackstar_rpc_handled_total{{code="OK",{labels}}}'] > 10
    assert found[f"trackstar_rpc_duration_seconds_count{{{labels}}}"] > 10
    for stage in ("encode", "search", "rerank", "evidence"):
        assert found[f'trackstar_stage_duration_seconds_count{{stage="{stage}"}}'] > 10
    for name in ("trackstar_candidates_count", "trackstar_encode_tokens_total", "trackstar_row_bytes_read_total"):
        assert found[name] > 0
    for name in ("batch_examples", "batch_tokens", "batch_duration_seconds"):
        assert found[f"trackstar_encode_{name}_count"] > 0
    (info,) = [name for name in found if name.startswith("trackstar_generation_info{")]
    assert f'generation="{next(iter(expected))}"' in info
    assert found["trackstar_defects_total"] == 0
    assert found["trackstar_rpc_in_flight"] == 0
    assert any(name.startswith("trackstar_rejected_total{") for name in found)


@pytest.fixture(scope="module")
def own_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index that a test may damage and restore."""
    return demo_index.build(tmp_path_factory.mktemp("own"))


def until_answered(ask: Callable[[], Answer], expected: Trace, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            check(ask().trace, expected)
            return
        except TrackstarError:
            assert time.monotonic() < until
            time.sleep(0.2)


def test_damaged_and_missing_rows_are_never_a_wrong_answer(own_index: Path, tmp_path: Path) -> None:
    (expected, *_) = traces(own_index, Index(own_index).active(), exact=True)
    server = ServeProcess(own_index, tmp_path)
    shard = own_index / "rows" / "000001.safetensors"
    whole = shard.read_bytes()
    with Client(server.address, retry=ONCE) as client:

        def ask() -> Answer:
            return client.trace(*demo_index.QUERIES[0], k=6, candidates=50, exactness="cascade", timeout_seconds=20)

        (cascade, *_) = traces(own_index, Index(own_index).active(), candidates=50)
        check(ask().trace, cascade)
        damaged = bytearray(whole)
        damaged[-len(whole) // 2 :] = os.urandom(len(whole) // 2)
        # In place: the server holds the file open.
        with shard.open("r+b") as stream:
            stream.write(damaged)
        with pytest.raises(CorruptArtifact, match="000001"):
            ask()
        with shard.open("r+b") as stream:
            stream.write(whole)
        until_answered(ask, cascade)
        # The store as a whole out of reach, and back.
        away = own_index.with_name("away")
        (own_index / "rows").rename(away)
        with contextlib.suppress(NotReady, CorruptArtifact):
            check(ask().trace, cascade)
        away.rename(own_index / "rows")
        until_answered(ask, cascade)
        check(client.trace(*demo_index.QUERIES[0], k=6, exactness="exhaustive").trace, expected)
    assert server.metrics()["trackstar_defects_total"] == 0
    assert server.close() == 0


def test_callers_see_their_own_generations_only(own_index: Path, tmp_path: Path) -> None:
    active, other = Index(own_index).active(), demo_index.other_generation(own_index)
    principals = tmp_path / "principals.yaml"
    principals.write_text(
        yaml.safe_dump(
            {
                "principals": [
                    {
                        "name": "one",
                        "token_sha256": [digest_of_token("first-token-0123456789")],
                        "generations": [active],
                    },
                    {
                        "name": "two",
                        "token_sha256": [digest_of_token("second-token-0123456789")],
                        "generations": [other],
                        "may_activate": True,
                    },
                ]
            }
        )
    )
    server = ServeProcess(own_index, tmp_path, AUTH__PRINCIPALS_FILE=str(principals))
    query = demo_index.QUERIES[0]
    with Client(server.address, retry=ONCE) as nobody, pytest.raises(Unauthenticated):
        nobody.trace(*query)
    with Client(server.address, token="first-token-0123456789", retry=ONCE) as one:
        assert one.trace(*query, k=2).provenance.generation == active
        assert [item.name for item in one.generations()] == [active]
        with pytest.raises(PermissionDenied):
            one.trace(*query, generation=other)
        with pytest.raises(PermissionDenied):
            one.activate(active)
    with Client(server.address, token="second-token-0123456789", retry=ONCE) as two:
        with pytest.raises(PermissionDenied):
            two.trace(*query)
        assert two.activate(other)[1] == active
        assert two.trace(*query, k=2).provenance.generation == other
    with Client(server.address, token="first-token-0123456789", retry=ONCE) as one, pytest.raises(PermissionDenied):
        one.trace(*query)
    assert "first-token-0123456789" not in server.log.read_text()
    assert server.close() == 0


def test_calls_that_have_begun_are_answered_before_the_server_ends(own_index: Path, tmp_path: Path) -> None:
    server = ServeProcess(own_index, tmp_path)
    expected = traces(own_index, Index(own_index).active())
    counter, outcomes, lock = itertools.count(), [], threading.Lock()
    stop = threading.Event()

    def ask() -> None:
        with Client(server.address, retry=ONCE) as client:
            while not stop.is_set():
                number = next(counter) % 5
                try:
                    check(client.trace(*demo_index.QUERIES[number], k=6, candidates=20).trace, expected[number])
                    outcome = "answered"
                except NotReady:
                    outcome = "refused"
                except Exception as error:
                    outcome = repr(error)
                with lock:
                    outcomes.append(outcome)
                if outcome != "answered":
                    return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    code = server.close()
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    assert code == 0
    assert set(outcomes) <= {"answered", "refused"}, outcomes
    assert outcomes.count("answered") > 4


def test_a_reindex_job_runs_beside_the_server(served: tuple[ServeProcess, dict[str, list[Trace]], Path]) -> None:
    with Client(served[0].address) as client:
        job = client.create_reindex_job("beside")
        assert list(client.watch_job(job.job_id))[-1].state == "succeeded"
        assert client.trace(*demo_index.QUERIES[0], k=2).trace.proponents

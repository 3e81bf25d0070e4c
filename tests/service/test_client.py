"""The clients and their command line against a gateway over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.service import honest
from tests.service.honest import HonestEncoder, HonestReranker, make_index, serving
from trackstar.cli import main
from trackstar.client import AsyncClient, Client
from trackstar.client_retry import Attempts, RetryPolicy
from trackstar.client_types import CoarsePart, DonePart, EncodedPart, EvidencePart, Filter, Own, RankedPart, Span, Tls
from trackstar.errors import (
    CorruptArtifact,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    TrackstarError,
)
from trackstar.results import Influence

_FAST = RetryPolicy(first_seconds=0.01)


@dataclass
class Served:
    """A gateway that runs in a thread with a loop of its own."""

    address: str
    encoder: HonestEncoder
    reranker: HonestReranker


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    catalog = make_index(tmp_path, "alpha", "beta", active="alpha")
    encoder, reranker = HonestEncoder(), HonestReranker()
    ready: list[Any] = []
    begun = threading.Event()

    async def serve() -> None:
        async with serving(catalog, encoder=encoder, reranker=reranker) as gateway:
            stop = asyncio.Event()
            ready.extend((gateway.address, asyncio.get_running_loop(), stop))
            begun.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert begun.wait(20)
    address, loop, stop = ready
    yield Served(address=address, encoder=encoder, reranker=reranker)
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


def test_a_trace_is_the_library_s_own_value(served: Served) -> None:
    with Client(served.address) as client:
        answer = client.trace("The capital is", "Paris", k=5, query_id="q1", complete=True, request_id="r1")
    scores = honest.scores_of("alpha", "Paris")
    trace = answer.trace
    assert (trace.query.query_id, trace.query.prompt, trace.query.target) == ("q1", "The capital is", "Paris")
    assert [item.rank for item in trace.proponents] == [1, 2, 3, 4, 5]
    for item in (*trace.proponents, *trace.opponents):
        assert item.score == float(scores[item.passage.passage_id])
        assert item.passage.text == f"text of passage {item.passage.passage_id}"
        assert item.evidence is not None
        assert item.evidence.tokens == ((f"token {item.passage.passage_id}", 0.5),)
        assert item.evidence.blocks == (("layers 0-1", 0.25),)
    assert (trace.loss, trace.generation, trace.exact, trace.examined) == (1.5, "alpha", True, honest.NUM)
    assert trace.seconds.keys() == {"encode", "rerank", "evidence"}
    assert (answer.explained.model_completion, answer.request_id) == ("more", "r1")
    assert answer.provenance.exactness == "exhaustive"
    assert answer.provenance.checkpoint_digest == honest.CHECKPOINT


def test_spans_own_words_filters_and_ends(served: Served) -> None:
    with Client(served.address) as client:
        span = client.trace("", Span(completion="in Paris now", start=3, end=8), ends="opponents", evidence=())
        assert span.explained.text == "Paris"
        assert span.trace.proponents == ()
        assert span.trace.opponents[0].evidence is None
        own = client.trace("x", Own(), filter=Filter(sources=["web"], date_from="2012"), exactness="cascade")
        assert own.trace.query.target == "own words"
        assert {item.passage.source for item in own.trace.proponents} == {"web"}


def test_pages_passages_verify_and_generations(served: Served) -> None:
    with Client(served.address) as client:
        whole = client.trace("", "Paris", k=25, candidates=50)
        found: list[Influence] = []
        token = ""
        while True:
            page = client.trace("", "Paris", k=25, candidates=50, page_size=10, page_token=token)
            found += page.trace.proponents
            if not (token := page.next_page_token):
                break
        assert [item.score for item in found] == [item.score for item in whole.trace.proponents]
        passages = client.passages([7, 3])
        assert [item.passage_id for item in passages.passages] == [7, 3]
        assert passages.passages[0].metadata["parity"] == "1"
        listed = client.passages(doc_id="doc-2", page_size=4)
        assert [item.passage_id for item in listed.passages] == [20, 21, 22, 23]
        rest = client.passages(doc_id="doc-2", page_token=listed.next_page_token)
        assert [item.passage_id for item in rest.passages] == list(range(24, 30))
        verified = client.verify("", "Paris", [4, 2], optimizer="adamw")
        assert [effect.passage_id for effect in verified.effects] == [4, 2]
        assert verified.learning_rate == 1e-5
        assert [(item.name, item.state) for item in client.generations()] == [("alpha", "active"), ("beta", "ready")]
        switched, before = client.activate("beta")
        assert (switched.name, switched.state, before) == ("beta", "active", "alpha")
        assert client.generation().name == "beta"


def test_a_stream_ends_with_the_whole_answer(served: Served) -> None:
    with Client(served.address) as client:
        parts = list(client.trace_stream("", "Paris", k=30, candidates=200))
        kinds = [type(part) for part in parts]
        assert kinds == [EncodedPart, CoarsePart] + [RankedPart] * 3 + [EvidencePart] * 2 + [DonePart]
        done = parts[-1]
        assert isinstance(done, DonePart)
        whole = client.trace("", "Paris", k=30, candidates=200).trace
        assert [(item.rank, item.score) for item in done.answer.trace.proponents] == [
            (item.rank, item.score) for item in whole.proponents
        ]
        assert done.answer.trace.opponents[0].evidence == whole.opponents[0].evidence
        # Leaving a stream early leaves nothing behind.
        for part in client.trace_stream("", "Paris"):
            assert isinstance(part, EncodedPart)
            break


def test_the_asyncio_client_answers_the_same(served: Served) -> None:
    async def work() -> None:
        async with AsyncClient(served.address) as client:
            answer, passages, verified, generations = await asyncio.gather(
                client.trace("", "Paris", k=3),
                client.passages([1]),
                client.verify("", "Paris", [1]),
                client.generations(),
            )
            parts = [part async for part in client.trace_stream("", "Paris", k=3)]
            assert isinstance(parts[-1], DonePart)
            assert [item.score for item in parts[-1].answer.trace.proponents] == [
                item.score for item in answer.trace.proponents
            ]
            assert passages.passages[0].passage_id == verified.effects[0].passage_id == 1
            assert len(generations) == 2
            assert (await client.generation()).name == "alpha"
            with pytest.raises(InvalidRequest) as caught:
                await client.trace("", " ")
            assert caught.value.field == "query.target"

    asyncio.run(work())


def test_what_may_succeed_later_is_tried_again(served: Served) -> None:
    with Client(served.address, retry=_FAST) as client:
        for failure in (NotReady("a replica was lost", retry_after_seconds=0.01), Overloaded(retry_after_seconds=0.02)):
            served.reranker.fail["rerank"] = failure
            assert client.trace("", "Paris", k=2).trace.proponents
            served.encoder.fail = failure
            assert isinstance(list(client.trace_stream("", "Rome", k=2))[-1], DonePart)
            # Once a part has come, the caller has to know.
            served.reranker.fail["rerank"] = failure
            with pytest.raises(type(failure)):
                list(client.trace_stream("", "Rome", k=2))
        served.reranker.fail["rerank"] = CorruptArtifact("row 7 is not what was written")
        with pytest.raises(CorruptArtifact, match="row 7"):
            client.trace("", "Paris")
        # A pause that outlasts the time is not begun.
        served.reranker.fail["rerank"] = NotReady("restarting", retry_after_seconds=30)
        began = time.monotonic()
        with pytest.raises(NotReady, match="restarting"):
            client.trace("", "Paris", timeout_seconds=5)
        assert time.monotonic() - began < 4


def test_errors_are_the_library_s(served: Served) -> None:
    with Client(served.address) as client:
        with pytest.raises(NotFound) as missing:
            client.trace("", "Paris", generation="gamma")
        assert (missing.value.kind, missing.value.name) == ("generation", "gamma")
        with pytest.raises(InvalidRequest) as refused:
            client.trace("", "Paris", k=1001)
        assert refused.value.field == "k"
        with pytest.raises(InvalidRequest):
            client.trace("", "Paris", k=-1)
        with pytest.raises(InvalidRequest):
            client.trace("\ud800", "Paris")
        served.encoder.delay = 5
        with pytest.raises(DeadlineExceeded):
            client.trace("", "Paris", timeout_seconds=0.2)


def test_nobody_there_is_not_ready() -> None:
    with Client("127.0.0.1:1", retry=RetryPolicy(attempts=2, first_seconds=0.01)) as client, pytest.raises(NotReady):
        client.generations(timeout_seconds=5)


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        ("gateway.example:443", True),
        ("10.0.0.1:50051", True),
        ("localhost:50051", False),
        ("127.0.0.9:50051", False),
        ("[::1]:50051", False),
        ("ipv4:127.0.0.1:50051", True),
        ("unix:/run/trackstar", False),
    ],
)
def test_a_token_is_not_sent_readable_by_others(address: str, refused: bool) -> None:
    with pytest.raises(InvalidRequest, match="use TLS") if refused else contextlib.nullcontext():
        Client(address, token="secret").close()
    Client(address, token="secret", tls=Tls()).close()
    Client(address, token="secret", plaintext_token=True).close()


@pytest.mark.parametrize("token", ["a\nb", "é", "a\x00"])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequest, match="token"):
        Client("localhost:1", token=token)


class _Failure(grpc.RpcError):
    pass


@pytest.mark.parametrize("asked", [None, 0.5])
def test_pauses_grow_or_are_what_the_server_asked_for(asked: float | None) -> None:
    now = 0.0
    attempts = Attempts(RetryPolicy(first_seconds=1, longest_seconds=3), 100, clock=lambda: now, spread=lambda: 1.0)
    failure = NotReady("x", retry_after_seconds=asked)
    pauses = [attempts.pause_after_error(failure) for _ in range(3)]
    assert pauses == ([1, 2, 3] if asked is None else [asked] * 3)
    with pytest.raises(NotReady):
        attempts.pause_after_error(failure)
    assert attempts.seconds_left() == 100
    now = 101
    with pytest.raises(DeadlineExceeded):
        attempts.seconds_left()
    with pytest.raises(TrackstarError):
        Attempts(RetryPolicy(), 1).pause_after(_Failure())


def test_the_command_line_traces_through_a_gateway(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--address", served.address, "--prompt", "The capital is", "--target", "Paris"]) == 0
    table = capsys.readouterr()
    assert "Proponents" in table.out
    assert "Opponents" in table.out
    assert "generation alpha" in table.out
    assert main(["trace", "--address", served.address, "--prompt", "x", "--json", "--k", "3"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["query"]["target"] == "own words"
    assert found["prediction"] == "more"
    assert len(found["proponents"]) == 3
    assert "explaining the model's own continuation" in printed.err
    assert main(["generations", "--address", served.address, "--json"]) == 0
    assert [item["name"] for item in json.loads(capsys.readouterr().out)] == ["alpha", "beta"]
    assert main(["generations", "--address", served.address, "--activate", "beta"]) == 0
    assert "beta (active)" in capsys.readouterr().out


def test_the_command_line_traces_a_file_in_its_order(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "facts.jsonl"
    words = [f"word {number}" for number in range(20)]
    queries.write_text("".join(json.dumps({"prompt": "x", "target": word, "fact_id": word}) + "\n" for word in words))
    output = tmp_path / "records.jsonl"
    command = ["trace", "--address", served.address, "--queries", str(queries), "--output", str(output), "--k", "2"]
    assert main([*command, "--concurrency", "5"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["targets_plaintext"] for record in records] == words
    assert [record["fact_id"] for record in records] == words
    for record in records:
        scores = honest.scores_of("alpha", record["targets_plaintext"])
        best = sorted(range(honest.NUM), key=lambda i: (-scores[i], i))[:2]
        assert record["trackstar"]["proponent_passage_ids"] == best
    capsys.readouterr()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x", "target": "y" * 70_000}) + "\n")
    assert main(["trace", "--address", served.address, "--queries", str(bad), "--output", str(output)]) == 2
    assert len(output.read_text().splitlines()) == 20, "a failure before the first answer leaves the file alone"


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "--prompt", "x"],
        ["trace", "--prompt", "x", "--index", "a", "--address", "b:1"],
        ["trace", "--prompt", "x", "--address", "b:1", "--model", "m"],
        ["trace", "--prompt", "x", "--address", "b:1", "--target", " "],
        ["trace", "--prompt", "x", "--address", "b:1", "--token-file", "/nowhere"],
        ["trace", "--prompt", "x", "--address", "b:1", "--tls-ca", "/nowhere"],
    ],
)
def test_the_command_line_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (2, 3)
    assert capsys.readouterr().err.startswith("error: ")


def test_client_and_gateway_import_no_torch() -> None:
    modules = "trackstar.client, trackstar.cli, trackstar.cli_remote, services.gateway.trace_service"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

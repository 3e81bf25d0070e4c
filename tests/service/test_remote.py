"""Backends over gRPC: the time that is left, what is tried again, and what a caller hears."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from services.backends import TIMEOUT_KEY
from services.gateway.errors import status_of
from services.gateway.remote import BackendLink, RemoteEncoder, RemoteReranker
from services.gateway.request import Principal, RequestContext, enter
from services.vectors import to_vector
from tests.service import honest
from trackstar.breaker import CircuitBreaker
from trackstar.client_retry import RetryPolicy
from trackstar.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    TrackstarError,
)
from trackstar.v1 import encoder_pb2, encoder_pb2_grpc, reranker_pb2, reranker_pb2_grpc, trace_pb2

_REQUEST = encoder_pb2.EncodeRequest(generation="alpha", query=trace_pb2.Query(target="Paris"))
_FAST = RetryPolicy(attempts=6, first_seconds=0.02, longest_seconds=0.1)


class _Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    """An honest encoder that answers as it is told; `script` holds what the next calls fail with."""

    def __init__(self) -> None:
        self.honest = honest.HonestEncoder()
        self.script: list[TrackstarError | grpc.StatusCode] = []
        self.metadata: list[dict[str, Any]] = []

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Any) -> encoder_pb2.EncodeResponse:
        self.metadata.append({**dict(context.invocation_metadata()), "left": context.time_remaining()})
        if self.script:
            failure = self.script.pop(0)
            if isinstance(failure, TrackstarError):
                await context.abort_with_status(status_of(failure, request_id="r"))
            else:
                await context.abort(failure, "said by a proxy")
        return await self.honest.encode(request, timeout_seconds=10)

    async def TailPatch(self, request: encoder_pb2.TailPatchRequest, context: Any) -> encoder_pb2.TailPatchResponse:
        return await self.honest.tail_patch(request, timeout_seconds=10)


class _Reranker(reranker_pb2_grpc.RerankerServiceServicer):
    def __init__(self) -> None:
        self.honest = honest.HonestReranker()

    async def Rerank(self, request: reranker_pb2.RerankRequest, context: Any) -> reranker_pb2.RerankResponse:
        return await self.honest.rerank(request, timeout_seconds=10)

    async def Explain(self, request: reranker_pb2.ExplainRequest, context: Any) -> reranker_pb2.ExplainResponse:
        return await self.honest.explain(request, timeout_seconds=10)

    async def ReadPassages(
        self, request: reranker_pb2.ReadPassagesRequest, context: Any
    ) -> reranker_pb2.ReadPassagesResponse:
        return await self.honest.read_passages(request, timeout_seconds=10)


async def _serve(encoder: _Encoder, port: int = 0) -> tuple[grpc.aio.Server, int]:
    # A port that is shared could be answered by a server that is about to end.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 24)])
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoder, server)
    reranker_pb2_grpc.add_RerankerServiceServicer_to_server(_Reranker(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, port


@asynccontextmanager
async def _linked(**options: Any) -> AsyncIterator[tuple[_Encoder, BackendLink]]:
    enter(RequestContext(request_id="r1", principal=Principal(name="p"), deadline=time.monotonic() + 60))
    encoder = _Encoder()
    server, port = await _serve(encoder)
    link = BackendLink(f"127.0.0.1:{port}", name="encoder", policy=_FAST, **options)
    try:
        yield encoder, link
    finally:
        await link.close()
        await server.stop(None)


def _state(breaker: CircuitBreaker) -> str:
    return breaker.state


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_every_verb_is_passed_on_with_what_it_needs() -> None:
    async def work() -> None:
        async with _linked(application="trackstar") as (encoder, link):
            remote, reranker = RemoteEncoder(link), RemoteReranker(link)
            found = await remote.encode(_REQUEST, timeout_seconds=50)
            assert found == await encoder.honest.encode(_REQUEST, timeout_seconds=5)
            told = encoder.metadata[0]
            assert (told["application"], told["x-request-id"]) == ("trackstar", "r1")
            assert 30 < float(told[TIMEOUT_KEY]) <= 50
            assert 30 < told["left"] <= 51  # gRPC rounds up
            patch = encoder_pb2.TailPatchRequest(passages=[encoder_pb2.TokenSequence(passage_id=3, tokens=[1])])
            assert (await remote.tail_patch(patch, timeout_seconds=5)).effects[0].passage_id == 3
            dual = to_vector(honest.query_vector("Paris"))
            rerank = reranker_pb2.RerankRequest(generation="alpha", dual=dual, ends=[reranker_pb2.RerankEnd()], k=3)
            assert (await reranker.rerank(rerank, timeout_seconds=5)).matching == honest.NUM
            explain = reranker_pb2.ExplainRequest(generation="alpha", dual=dual, passage_ids=[4, 2], tokens=True)
            explained = await reranker.explain(explain, timeout_seconds=5)
            assert [item.passage.passage_id for item in explained.passages] == [4, 2]
            read = reranker_pb2.ReadPassagesRequest(generation="alpha", passage_ids=[9], tokens=True)
            assert list((await reranker.read_passages(read, timeout_seconds=5)).passages[0].tokens) == [9, 1, 2]
            await link.ready()

    _run(work())


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (InvalidRequest("zero gradient", field="query"), InvalidRequest),
        (NotFound("no generation"), NotFound),
        (Overloaded("too many wait"), Overloaded),
        (Incompatible("another checkpoint"), Incompatible),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.UNIMPLEMENTED, Incompatible),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    ],
)
def test_what_trying_again_would_not_change_comes_at_once(said: Any, heard: type[TrackstarError]) -> None:
    async def work() -> None:
        async with _linked() as (encoder, link):
            encoder.script = [said] * 2
            with pytest.raises(heard) as caught:
                await RemoteEncoder(link).encode(_REQUEST, timeout_seconds=5)
            assert len(encoder.metadata) == 1
            if isinstance(said, InvalidRequest):
                assert getattr(caught.value, "field", None) == "query"

    _run(work())


@pytest.mark.parametrize(
    "said",
    [
        NotReady("the replica was lost", retry_after_seconds=0.01),
        grpc.StatusCode.UNAVAILABLE,
        # A proxy that does not know the application yet, and one whose replica died under the call.
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
    ],
)
def test_what_passes_by_itself_is_tried_again(said: Any) -> None:
    async def work() -> None:
        retries: list[None] = []
        async with _linked(on_retry=lambda: retries.append(None)) as (encoder, link):
            encoder.script = [said] * 3
            found = await RemoteEncoder(link).encode(_REQUEST, timeout_seconds=10)
            assert found.target.text == "Paris"
            assert len(encoder.metadata) == 4
            assert len(retries) == 3
            # Each attempt is told what is left then.
            left = [float(told[TIMEOUT_KEY]) for told in encoder.metadata]
            assert left == sorted(left, reverse=True)
            encoder.script = [said] * 50
            with pytest.raises(NotReady):
                await RemoteEncoder(link).encode(_REQUEST, timeout_seconds=10)

    _run(work())


def test_a_backend_that_restarts_costs_no_call() -> None:
    async def work() -> None:
        enter(RequestContext(request_id="r1", principal=Principal(name="p"), deadline=time.monotonic() + 60))
        encoder = _Encoder()
        server, port = await _serve(encoder)
        breaker = CircuitBreaker("the encoder", failure_threshold=1000)
        link = BackendLink(
            f"127.0.0.1:{port}", name="encoder", breaker=breaker, policy=RetryPolicy(attempts=60, first_seconds=0.05)
        )
        remote = RemoteEncoder(link)
        calls = [asyncio.create_task(remote.encode(_REQUEST, timeout_seconds=20)) for _ in range(5)]
        await server.stop(0)
        calls += [asyncio.create_task(remote.encode(_REQUEST, timeout_seconds=20)) for _ in range(5)]
        await asyncio.sleep(0.3)
        with pytest.raises(NotReady):
            await link.ready()
        server, _ = await _serve(encoder, port)
        for found in await asyncio.gather(*calls):
            assert found.target.text == "Paris"
        await link.close()
        await server.stop(None)

    _run(work())


def test_while_nobody_answers_calls_fail_at_once_and_later_succeed_again() -> None:
    async def work() -> None:
        now = 0.0
        breaker = CircuitBreaker("the encoder", failure_threshold=3, reset_seconds=2, clock=lambda: now)
        async with _linked(breaker=breaker) as (encoder, link):
            remote = RemoteEncoder(link)
            encoder.script = [grpc.StatusCode.UNAVAILABLE] * 3
            with pytest.raises(NotReady):
                await remote.encode(_REQUEST, timeout_seconds=10)
            assert _state(breaker) == "open"
            with pytest.raises(NotReady) as caught:
                await remote.encode(_REQUEST, timeout_seconds=10)
            assert caught.value.retry_after_seconds == pytest.approx(2)
            assert len(encoder.metadata) == 3
            now = 2.5
            assert (await remote.encode(_REQUEST, timeout_seconds=10)).target.text == "Paris"
            assert _state(breaker) == "closed"

    _run(work())


def test_what_a_backend_says_itself_does_not_open_the_breaker() -> None:
    async def work() -> None:
        breaker = CircuitBreaker("the encoder", failure_threshold=2)
        async with _linked(breaker=breaker) as (encoder, link):
            encoder.script = [NotReady("being built", retry_after_seconds=0.001)] * 5
            assert (await RemoteEncoder(link).encode(_REQUEST, timeout_seconds=10)).target.text == "Paris"
            assert breaker.state == "closed"

    _run(work())


def test_a_backend_that_hangs_takes_no_longer_than_it_may() -> None:
    async def work() -> None:
        async with _linked() as (encoder, link):
            encoder.honest.delay = 20
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await RemoteEncoder(link).encode(_REQUEST, timeout_seconds=0.3)
            assert time.monotonic() - began < 5

    _run(work())


def test_long_vectors_pass() -> None:
    async def work() -> None:
        async with _linked() as (_, link):
            long = to_vector(np.zeros(1 << 21, dtype=np.float32))
            request = reranker_pb2.ExplainRequest(generation="alpha", dual=long, passage_ids=[1])
            assert len((await RemoteReranker(link).explain(request, timeout_seconds=10)).passages) == 1
            request.dual.CopyFrom(to_vector(np.zeros(1 << 23, dtype=np.float32)))
            with pytest.raises(Incompatible, match="raise its limit"):
                await RemoteReranker(link).explain(request, timeout_seconds=10)

    _run(work())

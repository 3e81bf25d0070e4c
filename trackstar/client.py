"""Asks a running gateway: `Client`, and `AsyncClient` for asyncio.

    with Client("localhost:50051") as client:
        answer = client.trace("The capital of France is", "Paris", k=5)
        for item in answer.trace.proponents:
            print(item.score, item.passage.text)

Contract: answers are the library's own values (`results.Trace` and those of `client_types`), failures its errors. Each
call has a deadline over all its tries; what may succeed later is tried again (see `client_retry`). It needs neither
torch nor transformers: `pip install 'trackstar[client]'`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Unpack

import grpc

from trackstar import client_messages as messages
from trackstar.client_connection import ConnectionOptions
from trackstar.client_jobs import AsyncJobCalls, JobCalls
from trackstar.client_types import (
    Answer,
    Filter,
    GenerationInfo,
    Optimizer,
    Own,
    PassagePage,
    Span,
    TraceOptions,
    TracePart,
    Verification,
)
from trackstar.rpc_errors import from_call
from trackstar.v1 import generation_pb2, generation_pb2_grpc, trace_pb2, trace_pb2_grpc


class Client(JobCalls):
    """Blocking client; may be used from several threads.

    Args:
        address: `host:port`, or `unix:/path`.
        options: see `ConnectionOptions`.

    Raises:
        InvalidRequest: a token would be sent in the clear, or is none.
    """

    def __init__(self, address: str, **options: Unpack[ConnectionOptions]) -> None:
        super().__init__(address, **options)
        self._traces = trace_pb2_grpc.TraceServiceStub(self._channel)
        self._generations = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def trace(
        self,
        prompt: str,
        target: str | Span | Own,
        *,
        query_id: str = "",
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> Answer:
        """Find the passages that pushed the model towards the target, and those that pushed it away.

        Args:
            prompt: what the model was given.
            target: what it said; a `Span` of a longer completion, or `Own` for the model's own words.
            query_id: id of the answer's query; the request's id if empty.
            page_size: passages per ranking in this answer, all k if 0.
            page_token: the page, with everything else as it was.
            timeout_seconds: instead of the client's.
            options: see `TraceOptions`.

        Raises:
            TrackstarError: by what went wrong; see `trackstar.errors`.
        """
        request = messages.trace_message(prompt, target, page_size=page_size, page_token=page_token, **options)
        response = self._call(self._traces.Trace, request, timeout_seconds)
        return messages.to_answer(response, query_id=query_id, prompt=prompt)

    def trace_stream(
        self,
        prompt: str,
        target: str | Span | Own,
        *,
        query_id: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> Iterator[TracePart]:
        """The same answer in parts, each as soon as its stage has finished; the last is a `DonePart`.

        Once a part has come, a failure is not tried again.
        """
        request = trace_pb2.TraceStreamRequest(trace=messages.trace_message(prompt, target, **options))
        assembly = messages.Assembly(query_id=query_id, prompt=prompt)
        attempts = self._attempts(timeout_seconds)
        while True:
            begun = False
            call = self._traces.TraceStream(request, timeout=attempts.seconds_left(), metadata=self._metadata)
            try:
                for message in call:
                    begun = True
                    if (part := assembly.add(message)) is not None:
                        yield part
                return
            except grpc.RpcError as error:
                if begun:
                    raise from_call(error) from error
                time.sleep(attempts.pause_after(error))
            finally:
                call.cancel()

    def passages(
        self,
        passage_ids: Sequence[int] = (),
        *,
        doc_id: str = "",
        filter: Filter | None = None,
        generation: str = "",
        page_size: int = 0,
        page_token: str = "",
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> PassagePage:
        """Passages by their ids, or a page of those of a document and of those that pass a filter."""
        request = messages.passages_message(
            passage_ids,
            generation=generation,
            doc_id=doc_id,
            filter=filter,
            page_size=page_size,
            page_token=page_token,
            request_id=request_id,
        )
        return messages.to_passages(self._call(self._traces.GetPassages, request, timeout_seconds))

    def verify(
        self,
        prompt: str,
        target: str | Span | Own,
        passage_ids: Sequence[int],
        *,
        generation: str = "",
        optimizer: Optimizer = "sgd",
        learning_rate: float = 0.0,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> Verification:
        """What one training step on each passage does to the target; the optimizer's own rate if 0."""
        request = messages.verify_message(
            prompt,
            target,
            passage_ids,
            generation=generation,
            optimizer=optimizer,
            learning_rate=learning_rate,
            request_id=request_id,
        )
        return messages.to_verification(self._call(self._traces.Verify, request, timeout_seconds))

    def generations(self, *, timeout_seconds: float | None = None) -> list[GenerationInfo]:
        """All generations that the caller may ask."""
        found: list[GenerationInfo] = []
        request = generation_pb2.ListRequest()
        while True:
            response = self._call(self._generations.List, request, timeout_seconds)
            found += [messages.to_generation(item) for item in response.generations]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def generation(self, name: str = "", *, timeout_seconds: float | None = None) -> GenerationInfo:
        """One generation, the active one without a name."""
        response = self._call(self._generations.Get, generation_pb2.GetRequest(name=name), timeout_seconds)
        return messages.to_generation(response.generation)

    def activate(self, name: str, *, timeout_seconds: float | None = None) -> tuple[GenerationInfo, str]:
        """Make a generation the one that answers; returns it, and the name of the one before ("" if none)."""
        response = self._call(self._generations.Activate, generation_pb2.ActivateRequest(name=name), timeout_seconds)
        return messages.to_generation(response.generation), response.previous


class AsyncClient(AsyncJobCalls):
    """Client for asyncio; used in one event loop. See `Client` for its arguments and for what its methods do."""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def trace(
        self,
        prompt: str,
        target: str | Span | Own,
        *,
        query_id: str = "",
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> Answer:
        """See `Client.trace`."""
        request = messages.trace_message(prompt, target, page_size=page_size, page_token=page_token, **options)
        response = await self._call(self._traces.Trace, request, timeout_seconds)
        return messages.to_answer(response, query_id=query_id, prompt=prompt)

    async def trace_stream(
        self,
        prompt: str,
        target: str | Span | Own,
        *,
        query_id: str = "",
        timeout_seconds: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> AsyncIterator[TracePart]:
        """See `Client.trace_stream`."""
        request = trace_pb2.TraceStreamRequest(trace=messages.trace_message(prompt, target, **options))
        assembly = messages.Assembly(query_id=query_id, prompt=prompt)
        attempts = self._attempts(timeout_seconds)
        while True:
            begun = False
            call = self._traces.TraceStream(request, timeout=attempts.seconds_left(), metadata=self._metadata)
            try:
                async for message in call:
                    begun = True
                    if (part := assembly.add(message)) is not None:
                        yield part
                return
            except grpc.RpcError as error:
                if begun:
                    raise from_call(error) from error
                await asyncio.sleep(attempts.pause_after(error))
            finally:
                call.cancel()

    async def passages(
        self,
        passage_ids: Sequence[int] = (),
        *,
        doc_id: str = "",
        filter: Filter | None = None,
        generation: str = "",
        page_size: int = 0,
        page_token: str = "",
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> PassagePage:
        """See `Client.passages`."""
        request = messages.passages_message(
            passage_ids,
            generation=generation,
            doc_id=doc_id,
            filter=filter,
            page_size=page_size,
            page_token=page_token,
            request_id=request_id,
        )
        return messages.to_passages(await self._call(self._traces.GetPassages, request, timeout_seconds))

    async def verify(
        self,
        prompt: str,
        target: str | Span | Own,
        passage_ids: Sequence[int],
        *,
        generation: str = "",
        optimizer: Optimizer = "sgd",
        learning_rate: float = 0.0,
        request_id: str = "",
        timeout_seconds: float | None = None,
    ) -> Verification:
        """See `Client.verify`."""
        request = messages.verify_message(
            prompt,
            target,
            passage_ids,
            generation=generation,
            optimizer=optimizer,
            learning_rate=learning_rate,
            request_id=request_id,
        )
        return messages.to_verification(await self._call(self._traces.Verify, request, timeout_seconds))

    async def generations(self, *, timeout_seconds: float | None = None) -> list[GenerationInfo]:
        """See `Client.generations`."""
        found: list[GenerationInfo] = []
        request = generation_pb2.ListRequest()
        while True:
            response = await self._call(self._generations.List, request, timeout_seconds)
            found += [messages.to_generation(item) for item in response.generations]
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def generation(self, name: str = "", *, timeout_seconds: float | None = None) -> GenerationInfo:
        """See `Client.generation`."""
        response = await self._call(self._generations.Get, generation_pb2.GetRequest(name=name), timeout_seconds)
        return messages.to_generation(response.generation)

    async def activate(self, name: str, *, timeout_seconds: float | None = None) -> tuple[GenerationInfo, str]:
        """See `Client.activate`."""
        request = generation_pb2.ActivateRequest(name=name)
        response = await self._call(self._generations.Activate, request, timeout_seconds)
        return messages.to_generation(response.generation), response.previous

    @property
    def _traces(self) -> trace_pb2_grpc.TraceServiceAsyncStub:
        return trace_pb2_grpc.TraceServiceStub(self._channel)

    @property
    def _generations(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self._channel)

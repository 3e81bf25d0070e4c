"""`trackstar.v1.TraceService` on grpc.aio: requests are checked, a generation is held, and the cascade answers.

Contract: every failure is a `TrackstarError`; interceptors make a status of it. They also make the `RequestContext`, so
each handler knows its caller and its deadline. A generation is checked against the caller before anything is told of
it, and held from there to the end of the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from services.backends import EncoderBackend, RerankerBackend
from services.gateway import pages, validate
from services.gateway.cascade import Cascade, Page
from services.gateway.generations import Generations, ServedGeneration
from services.gateway.request import RequestContext, current
from services.gateway.stages import StageObserver, Stages, provenance
from trackstar.errors import InvalidRequest
from trackstar.v1 import encoder_pb2, reranker_pb2, trace_pb2, trace_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TraceService(trace_pb2_grpc.TraceServiceServicer):
    """See the protos.

    Args:
        generations: the switchboard.
        encoder: reads queries and takes training steps.
        reranker: scores, explains and reads passages.
        observer: hears of every trace's stages.
    """

    def __init__(
        self,
        generations: Generations,
        encoder: EncoderBackend,
        reranker: RerankerBackend,
        *,
        observer: StageObserver | None = None,
    ) -> None:
        self._generations = generations
        self._encoder = encoder
        self._reranker = reranker
        self._observer = observer
        self._cascade = Cascade(encoder, reranker, observer=observer)

    async def Trace(self, request: trace_pb2.TraceRequest, context: Context) -> trace_pb2.TraceResponse:
        """The parts of a trace, put together; one page of it."""
        asked = validate.trace(request)
        name, offset = _place(asked.page_token, asked.generation, asked.digest)
        call = current()
        response = trace_pb2.TraceResponse(request_id=asked.request_id or call.request_id)
        page = Page(offset=offset)
        async with self._held(name, call) as generation:
            parts = self._cascade.parts(asked, generation, call, page=page)
            async with aclosing(parts):
                async for part in parts:
                    match part.WhichOneof("part"):
                        case "evidence":
                            response.proponents.extend(part.evidence.proponents)
                            response.opponents.extend(part.evidence.opponents)
                        case "done":
                            response.target.CopyFrom(part.done.target)
                            response.background.CopyFrom(part.done.background)
                            response.provenance.CopyFrom(part.done.provenance)
        if page.more:
            response.next_page_token = pages.PageToken(
                generation=response.provenance.generation, digest=asked.digest, offset=offset + asked.page_size
            ).encode()
        return response

    async def TraceStream(
        self, request: trace_pb2.TraceStreamRequest, context: Context
    ) -> AsyncIterator[trace_pb2.TraceStreamResponse]:
        """The parts of a trace."""
        asked = validate.trace_stream(request)
        call = current()
        async with self._held(asked.generation, call) as generation:
            parts = self._cascade.parts(asked, generation, call, best_so_far=True)
            async with aclosing(parts):
                async for part in parts:
                    yield part

    async def GetPassages(
        self, request: trace_pb2.GetPassagesRequest, context: Context
    ) -> trace_pb2.GetPassagesResponse:
        """Passages by id, or a page of those that a document or a filter names."""
        asked = validate.passages(request)
        name, first_id = _place(asked.page_token, asked.generation, asked.digest)
        call = current()
        async with self._held(name, call) as generation:
            question = reranker_pb2.ReadPassagesRequest(
                generation=generation.name,
                passage_ids=asked.passage_ids,
                doc_id=asked.doc_id,
                filter=asked.filter,
                first_id=first_id,
                limit=asked.page_size,
            )
            found = await Stages(call, self._observer).run(
                "passages",
                "reading the passages",
                lambda seconds: self._reranker.read_passages(question, timeout_seconds=seconds),
            )
        response = trace_pb2.GetPassagesResponse(
            passages=[item.passage for item in found.passages], generation=generation.name
        )
        if not asked.passage_ids and found.next_id >= 0:
            response.next_page_token = pages.PageToken(
                generation=generation.name, digest=asked.digest, offset=found.next_id
            ).encode()
        return response

    async def Verify(self, request: trace_pb2.VerifyRequest, context: Context) -> trace_pb2.VerifyResponse:
        """What one training step on each passage does to the target."""
        asked = validate.verify(request)
        call = current()
        async with self._held(asked.generation, call) as generation:
            stages = Stages(call, self._observer)
            wanted = reranker_pb2.ReadPassagesRequest(
                generation=generation.name, passage_ids=asked.passage_ids, tokens=True
            )
            found = await stages.run(
                "passages",
                "reading the passages",
                lambda seconds: self._reranker.read_passages(wanted, timeout_seconds=seconds),
            )
            question = encoder_pb2.TailPatchRequest(
                generation=generation.name,
                query=asked.query,
                passages=[
                    encoder_pb2.TokenSequence(passage_id=item.passage.passage_id, tokens=item.tokens)
                    for item in found.passages
                ],
                optimizer=asked.optimizer,
                learning_rate=asked.learning_rate,
            )
            try:
                patched = await stages.run(
                    "verify",
                    "taking a training step on every passage",
                    lambda seconds: self._encoder.tail_patch(question, timeout_seconds=seconds),
                )
            except InvalidRequest as error:
                raise InvalidRequest(str(error), field=error.field or "query") from error
        tried = {effect.passage_id for effect in patched.effects}
        missed = [str(passage_id) for passage_id in asked.passage_ids if passage_id not in tried]
        left_out = [f"passages {', '.join(missed)}: there was no time for them"] if missed else []
        return trace_pb2.VerifyResponse(
            request_id=asked.request_id or call.request_id,
            effects=patched.effects,
            provenance=provenance(generation, stages, left_out=left_out),
            learning_rate=asked.learning_rate,
        )

    @asynccontextmanager
    async def _held(self, name: str, call: RequestContext) -> AsyncIterator[ServedGeneration]:
        """A generation that the caller may ask, "" for the active one."""
        if name:
            call.check_generation(name)
        async with self._generations.hold(name, timeout_seconds=call.seconds_left()) as generation:
            call.check_generation(generation.name)
            yield generation


def _place(page_token: str, generation: str, digest: bytes) -> tuple[str, int]:
    """The generation to ask and where to go on: a token's, or what the request names and the beginning."""
    if not page_token:
        return generation, 0
    token = pages.decode(page_token, generation=generation, digest=digest)
    return token.generation, token.offset

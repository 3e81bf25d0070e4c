"""Backends that compute honestly in numpy from rows given by a seed, and a gateway of the real servicers around them.

Whitening is the identity and the coarse code is the first coordinates of the vector, so that the right answer to every
question can be written down in a few lines of numpy.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_reflection.v1alpha.reflection import SERVICE_NAME, enable_server_reflection
from numpy.typing import NDArray

from services.gateway.errors import status_of
from services.gateway.generation_service import GenerationService
from services.gateway.generations import Generations
from services.gateway.job_service import JobService
from services.gateway.jobs import Jobs
from services.gateway.request import Principal, RequestContext, enter
from services.gateway.trace_service import TraceService
from services.vectors import to_array, to_vector
from tests.audits import audited
from trackstar.catalog import FORMAT, Catalog, GenerationFacts
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.codes import CodeSpec
from trackstar.errors import DeadlineExceeded, InvalidRequest, NotFound, TrackstarError
from trackstar.v1 import (
    common_pb2,
    encoder_pb2,
    generation_pb2_grpc,
    job_pb2_grpc,
    reranker_pb2,
    trace_pb2,
    trace_pb2_grpc,
)

DIM, SIZE, NUM = 64, 16, 600
SPEC = CodeSpec(kind="prefix", size=SIZE, seed=0)
CHECKPOINT = "c" * 64
SOURCES = ("books", "news", "web")
YEARS = 10


def rows_of(generation: str) -> NDArray[np.float32]:
    """Rows [N, d] of a generation; some are equal, so that rankings have ties."""
    seed = int.from_bytes(hashlib.sha256(generation.encode()).digest()[:8], "big")
    rows = np.random.default_rng(seed).standard_normal((NUM, DIM), dtype=np.float32)
    rows[NUM // 2 : NUM // 2 + 20] = rows[:20]
    return rows


def query_vector(text: str) -> NDArray[np.float32]:
    """The unit gradient of a query."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(DIM, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def scores_of(generation: str, text: str) -> NDArray[np.float32]:
    """Scores [N] of every passage, each summed by itself."""
    rows = rows_of(generation)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores: NDArray[np.float32] = (unit * query_vector(text)).sum(axis=1)
    return scores


def passes(passage_id: int, chosen: common_pb2.Filter) -> bool:
    """Whether a passage passes a filter."""
    date = f"{2010 + passage_id % YEARS}-06-15"
    conditions = {condition.field: condition.values for condition in chosen.metadata}
    return (
        (not chosen.sources or SOURCES[passage_id % 3] in chosen.sources)
        and (not chosen.date_from or date >= chosen.date_from)
        and (not chosen.date_until or date[: len(chosen.date_until)] <= chosen.date_until)
        and all(field == "parity" and str(passage_id % 2) in values for field, values in conditions.items())
    )


def passage(passage_id: int) -> common_pb2.Passage:
    """A passage; document 7 has the windows 70 to 79."""
    return common_pb2.Passage(
        passage_id=passage_id,
        doc_id=f"doc-{passage_id // 10}",
        text=f"text of passage {passage_id}",
        source=SOURCES[passage_id % 3],
        metadata={"date": f"{2010 + passage_id % YEARS}-06-15", "parity": str(passage_id % 2)},
        token_start=3 * passage_id,
        token_end=3 * passage_id + 3,
    )


@dataclass
class HonestEncoder:
    """`delay`: seconds that encoding takes. `checkpoint`: what it says it runs. `fail`: raised by the next encoding."""

    delay: float = 0.0
    checkpoint: str = CHECKPOINT
    patched: int | None = None
    calls: int = 0
    fail: TrackstarError | None = None

    async def encode(self, request: encoder_pb2.EncodeRequest, *, timeout_seconds: float) -> encoder_pb2.EncodeResponse:
        self.calls += 1
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        await asyncio.sleep(self.delay)
        text = text_of(request.query)
        if text == "certain":
            raise InvalidRequest("the query's gradient is zero: the model is already certain of the target")
        vector = query_vector(text)
        return encoder_pb2.EncodeResponse(
            target=trace_pb2.ExplainedTarget(
                text=text,
                loss=1.5,
                probability=float(np.exp(-1.5)),
                num_tokens=3,
                model_completion="more" if request.complete else "",
            ),
            code=to_vector(vector[:SIZE]),
            dual=to_vector(vector),
            checkpoint_digest=self.checkpoint,
        )

    async def tail_patch(
        self, request: encoder_pb2.TailPatchRequest, *, timeout_seconds: float
    ) -> encoder_pb2.TailPatchResponse:
        return encoder_pb2.TailPatchResponse(
            effects=[
                trace_pb2.PatchEffect(
                    passage_id=item.passage_id,
                    probability_before=0.25,
                    probability_after=0.25 + 1e-6 * sum(item.tokens),
                    loss_before=1.0,
                    loss_after=1.0 - request.learning_rate,
                )
                for item in request.passages[: self.patched]
            ]
        )


@dataclass
class HonestReranker:
    """`explain_delay`: seconds that explaining takes, and not reading alone. `fail`: raised by the next call of that
    verb. `deleted`: in no answer of a search or a reading by id; `deleted_after`: deleted when a ranking has been made.
    """

    explain_delay: float = 0.0
    fail: dict[str, TrackstarError] = field(default_factory=dict)
    reranked: list[reranker_pb2.RerankRequest] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    deleted_after: set[int] = field(default_factory=set)

    async def rerank(
        self, request: reranker_pb2.RerankRequest, *, timeout_seconds: float
    ) -> reranker_pb2.RerankResponse:
        self._maybe_fail("rerank")
        self.reranked.append(request)
        rows = rows_of(request.generation)
        dual = to_array(request.dual, common_pb2.DTYPE_FLOAT32, dim=DIM, name="dual")[0]
        scores = (rows / np.linalg.norm(rows, axis=1, keepdims=True) * dual).sum(axis=1)
        allowed = np.array([i not in self.deleted and passes(i, request.filter) for i in range(NUM)])
        response = reranker_pb2.RerankResponse(
            background=common_pb2.Background(mean=float(scores.mean()), std=float(scores.std())),
            matching=int(allowed.sum()),
        )
        seen: set[int] = set()
        for end in request.ends:
            ids = np.arange(NUM, dtype=np.int64)
            if end.HasField("candidates"):
                ids = to_array(end.candidates, common_pb2.DTYPE_INT64, dim=None, name="candidates").ravel()
            ids = ids[allowed[ids]]
            seen.update(ids.tolist())
            order = np.lexsort((ids, scores[ids] if end.opponents else -scores[ids]))[: request.k]
            response.ends.append(
                reranker_pb2.RankedEnd(ids=to_vector(ids[order]), scores=to_vector(scores[ids[order]]))
            )
        response.examined = len(seen)
        self.deleted |= self.deleted_after
        return response

    async def explain(
        self, request: reranker_pb2.ExplainRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ExplainResponse:
        if request.tokens or request.blocks or request.overlap:
            self._maybe_fail("explain")
            if self.explain_delay > timeout_seconds:
                await asyncio.sleep(timeout_seconds)
                raise DeadlineExceeded("explaining takes too long")
            await asyncio.sleep(self.explain_delay)
        return reranker_pb2.ExplainResponse(
            passages=[
                reranker_pb2.ExplainedPassage(passage=passage(i), evidence=evidence_of(i, request))
                for i in request.passage_ids
            ]
        )

    async def read_passages(
        self, request: reranker_pb2.ReadPassagesRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ReadPassagesResponse:
        self._maybe_fail("read_passages")
        response = reranker_pb2.ReadPassagesResponse(next_id=-1)
        ids = list(request.passage_ids)
        if not ids:
            listed = [
                i
                for i in range(request.first_id, NUM)
                if request.doc_id in ("", passage(i).doc_id) and passes(i, request.filter)
            ]
            ids = listed[: request.limit]
            response.next_id = listed[request.limit] if len(listed) > request.limit else -1
        if bad := [i for i in ids if i >= NUM]:
            raise NotFound(f"there is no passage {bad[0]}")
        if gone := self.deleted.intersection(ids):
            raise NotFound(f"passage {min(gone)} was deleted")
        for i in ids:
            response.passages.add(passage=passage(i), tokens=[i, 1, 2] if request.tokens else None)
        return response

    def _maybe_fail(self, verb: str) -> None:
        if verb in self.fail:
            raise self.fail.pop(verb)


def evidence_of(passage_id: int, request: reranker_pb2.ExplainRequest) -> common_pb2.Evidence:
    """The evidence that was asked for."""
    evidence = common_pb2.Evidence()
    if request.tokens:
        evidence.tokens.add(text=f"token {passage_id}", contribution=0.5)
    if request.blocks:
        evidence.blocks.add(block="layers 0-1", contribution=0.25)
    if request.overlap:
        evidence.overlap = float(str(passage_id) in request.query_text.split())
    return evidence


def text_of(query: trace_pb2.Query) -> str:
    """The words that are explained."""
    match query.WhichOneof("explained"):
        case "span":
            return query.span.completion[query.span.start : query.span.end]
        case "own":
            return "own words"
    return query.target


class CountedIndex:
    """A memory index that counts its searches and tells whether it is closed."""

    def __init__(self, generation: str) -> None:
        self.index = MemoryIndex(SPEC, DIM)
        rows = rows_of(generation)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self.index.add(np.arange(NUM, dtype=np.int64), np.ascontiguousarray(unit[:, :SIZE]))
        self.batches: list[int] = []
        self.closed = False
        self.hold: Callable[[], Any] = lambda: None

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        self.index.add(passage_ids, codes)

    def search(
        self, codes: NDArray[Any], limit: int, *, timeout_seconds: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert not self.closed
        self.batches.append(len(codes))
        self.hold()
        return self.index.search(codes, limit)

    def count(self) -> int:
        return self.index.count()

    def close(self) -> None:
        self.closed = True
        self.index.close()


def make_index(root: Path, *generations: str, active: str | None = None) -> Catalog:
    """An index folder as far as a catalog reads it."""
    facts = {
        "format": FORMAT,
        "model": {"digest": CHECKPOINT},
        "corpus": {"fingerprint": "f" * 64},
        "dim": DIM,
    }
    _write(root / "index.json", facts)
    for name in generations:
        add_generation(root, name)
    catalog = Catalog(root)
    if active:
        catalog.activate(active)
    return catalog


def add_generation(root: Path, name: str) -> None:
    """One more finished generation."""
    content = {
        "name": name,
        "num_passages": NUM,
        "num_codes": NUM,
        "mix": {"kind": "train", "damping": 0.1},
        "weight": 0.0,
        "code": {"kind": SPEC.kind, "size": SPEC.size, "store": "memory", "seed": SPEC.seed},
    }
    _write(root / f"generations/{name}/generation.json", content)
    audited(root, name, NUM)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


class Contexts(grpc.aio.ServerInterceptor):
    """Makes the request's context and turns errors into statuses; the caller's name comes as metadata."""

    def __init__(self, principals: dict[str, Principal]) -> None:
        self._principals = principals

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/trackstar."):
            return handler
        name = dict(details.invocation_metadata).get("caller", "anyone")
        principal = self._principals.get(name, Principal(name=name, may_activate=True, may_reindex=True))

        def begin(context: Any) -> None:
            left = context.time_remaining()
            enter(RequestContext(request_id="made-up", principal=principal, deadline=time.monotonic() + (left or 60)))

        if handler.response_streaming:

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                begin(context)
                try:
                    async for part in handler.unary_stream(request, context):
                        yield part
                except TrackstarError as error:
                    await context.abort_with_status(status_of(error, request_id="made-up"))

            return grpc.unary_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )

        async def unary(request: Any, context: Any) -> Any:
            begin(context)
            try:
                return await handler.unary_unary(request, context)
            except TrackstarError as error:
                await context.abort_with_status(status_of(error, request_id="made-up"))

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)


@dataclass
class Gateway:
    """A running gateway and what it is made of."""

    address: str
    catalog: Catalog
    generations: Generations
    encoder: HonestEncoder
    reranker: HonestReranker
    indexes: dict[str, list[CountedIndex]]
    observed: Observed
    trace: Any
    generation: Any


@dataclass
class Observed:
    """What the observer heard."""

    stages: list[str] = field(default_factory=list)
    examined: list[int] = field(default_factory=list)
    z_scores: list[float] = field(default_factory=list)

    def stage(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(name)

    def candidates(self, count: int) -> None:
        self.examined.append(count)

    def best_z_score(self, z_score: float) -> None:
        self.z_scores.append(z_score)

    def span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


@asynccontextmanager
async def serving(
    catalog: Catalog,
    *,
    encoder: HonestEncoder | None = None,
    reranker: HonestReranker | None = None,
    principals: dict[str, Principal] | None = None,
    poll_seconds: float = 60.0,
    reflection: bool = False,
    jobs: Jobs | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway over real gRPC on a port of the loopback."""
    indexes: dict[str, list[CountedIndex]] = {}

    def open_coarse(facts: GenerationFacts) -> CoarseIndex:
        made = CountedIndex(facts.name)
        indexes.setdefault(facts.name, []).append(made)
        return made

    encoder, reranker, observed = encoder or HonestEncoder(), reranker or HonestReranker(), Observed()
    generations = Generations(catalog, open_coarse, poll_seconds=poll_seconds)
    await generations.start()
    server = grpc.aio.server(interceptors=[Contexts(principals or {})])
    trace_pb2_grpc.add_TraceServiceServicer_to_server(
        TraceService(generations, encoder, reranker, observer=observed), server
    )
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(generations), server)
    job_pb2_grpc.add_JobServiceServicer_to_server(JobService(jobs), server)
    if reflection:
        names = ("trackstar.v1.TraceService", "trackstar.v1.GenerationService", "trackstar.v1.JobService")
        enable_server_reflection((*names, SERVICE_NAME), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield Gateway(
                address=address,
                catalog=catalog,
                generations=generations,
                encoder=encoder,
                reranker=reranker,
                indexes=indexes,
                observed=observed,
                trace=trace_pb2_grpc.TraceServiceStub(channel),
                generation=generation_pb2_grpc.GenerationServiceStub(channel),
            )
    finally:
        await server.stop(None)
        await generations.close()

"""The encoder service itself: queries become duals and codes, passages get their token shares, steps are tried.

    query ─ tokenise (complete it first if asked) ─► batch by tokens ─► model ─► whiten ─► code and dual

It knows messages and the model, but no network: `services.serve` and `services.embedded` put it behind one. The model
runs one call at a time; while it runs, the next batch collects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from services.encoder.batching import TokenBatcher
from services.encoder.model import ModelBackend, Rows, Shares
from services.generations import OpenedGenerations
from services.timing import within
from services.vectors import to_vector
from trackstar.complete import Completion, line_of, stop_tokens_of
from trackstar.dual import Dual, make_code, make_duals
from trackstar.encode import Example
from trackstar.errors import InvalidRequest, Overloaded
from trackstar.generation import Generation
from trackstar.index import Index
from trackstar.queries import tokenize, tokenize_prompt, tokenize_span
from trackstar.results import Query
from trackstar.tail_patch import PatchStep
from trackstar.v1 import encoder_pb2, trace_pb2

DEFAULT_NEW_TOKENS = 8
# Upper bounds of histogram buckets, for whoever measures batches.
BATCH_EXAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCH_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_OPTIMIZERS: dict[trace_pb2.PatchOptimizer.ValueType, Literal["sgd", "adamw"]] = {
    trace_pb2.PATCH_OPTIMIZER_UNSPECIFIED: "sgd",
    trace_pb2.PATCH_OPTIMIZER_SGD: "sgd",
    trace_pb2.PATCH_OPTIMIZER_ADAMW: "adamw",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShares:
    """Shares of one passage and the text of each of its tokens."""

    texts: tuple[str, ...]
    shares: Shares


class EncoderObserver(Protocol):
    """Hears what the encoder does."""

    def batch(self, examples: int, tokens: int, seconds: float) -> None:
        """A batch of queries was encoded."""


class Unobserved:
    """An observer that ignores everything."""

    def batch(self, examples: int, tokens: int, seconds: float) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    generation: Generation
    example: Example


class EncoderCore:
    """See `services.backends.EncoderBackend`.

    Args:
        index: the index whose rows queries are compared with.
        tokenizer: the checkpoint's.
        max_tokens: the model's window.
        model: the checkpoint.
        max_waiting_tokens: queries of more tokens than this in the queue are refused.
        observer: hears of every batch.
    """

    def __init__(
        self,
        index: Index,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        model: ModelBackend,
        *,
        max_waiting_tokens: int = 65_536,
        max_waiting_passages: int = 4096,
        observer: EncoderObserver | None = None,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._model = model
        self._observer = observer or Unobserved()
        # Which generations are served is for the gateway to say: calls may hold one that was retired a moment ago.
        self._generations = OpenedGenerations(lambda name: index.generation(name, searched=False, retired=True))
        self._batcher: TokenBatcher[_Job, tuple[Dual, NDArray[np.generic]]] = TokenBatcher(
            self._run, max_tokens=index.facts["max_batch_tokens"], max_waiting_tokens=max_waiting_tokens
        )
        self._explaining = 0
        self._max_waiting_passages = max_waiting_passages

    async def close(self) -> None:
        """Finish what runs, refuse what waits, and let go of the model."""
        await self._batcher.close()
        await self._model.close()

    async def encode(self, request: encoder_pb2.EncodeRequest, *, timeout_seconds: float) -> encoder_pb2.EncodeResponse:
        """See `EncoderBackend.encode`."""
        async with within(timeout_seconds, "encoding the query"):
            generation = await self._generations.get(request.generation)
            completion = await self._completion(request.query, wanted=request.complete)
            example, text = self._read(request.query, completion)
            job = _Job(generation=generation, example=example)
            dual, code = await self._batcher.submit(job, tokens=len(example.tokens))
        return encoder_pb2.EncodeResponse(
            target=trace_pb2.ExplainedTarget(
                text=text,
                loss=dual.loss,
                probability=float(np.exp(-dual.loss)),
                num_tokens=example.num_targets,
                model_completion=completion,
            ),
            code=to_vector(code[0]),
            dual=to_vector(dual.dual_d.numpy()),
            checkpoint_digest=self._index.facts["model"]["digest"],
        )

    async def tail_patch(
        self, request: encoder_pb2.TailPatchRequest, *, timeout_seconds: float
    ) -> encoder_pb2.TailPatchResponse:
        """See `EncoderBackend.tail_patch`."""
        until = time.monotonic() + timeout_seconds
        step = PatchStep(optimizer=_OPTIMIZERS[request.optimizer], learning_rate=request.learning_rate)
        response = encoder_pb2.TailPatchResponse()
        async with within(timeout_seconds, "verifying the passages"):
            query, _ = self._read(request.query, await self._completion(request.query, wanted=False))
            slowest = 0.0
            for passage in request.passages:
                began = time.monotonic()
                if response.effects and began + slowest > until:
                    break
                example = Example(tokens=np.array(passage.tokens, dtype=np.int32))
                effect = await self._model.call("tail_patch", query, example, step)
                response.effects.append(
                    trace_pb2.PatchEffect(
                        passage_id=passage.passage_id,
                        probability_before=effect.probability_before,
                        probability_after=effect.probability_after,
                        loss_before=effect.loss_before,
                        loss_after=effect.loss_after,
                    )
                )
                slowest = max(slowest, time.monotonic() - began)
        return response

    async def contributions(
        self, passages: Sequence[NDArray[np.int32]], dual_d: NDArray[np.float32], *, timeout_seconds: float
    ) -> list[TokenShares]:
        """How much every token of each passage adds to <row, dual>.

        Args:
            passages: token ids int32 [T] each.
            dual_d: float32 [d].
            timeout_seconds: what is left.

        Raises:
            Overloaded: too many passages wait to be explained.
            DeadlineExceeded: it took longer.
        """
        if self._explaining and self._explaining + len(passages) > self._max_waiting_passages:
            raise Overloaded(f"{self._explaining:,} passages wait to be explained already; try again later")
        self._explaining += len(passages)
        try:
            async with within(timeout_seconds, "explaining the passages"):
                examples = [Example(tokens=tokens) for tokens in passages]
                found: list[Shares] = await self._model.call("contributions", examples, dual_d)
        finally:
            self._explaining -= len(passages)
        return [
            TokenShares(texts=tuple(self._decode([token]) for token in tokens.tolist()), shares=shares)
            for tokens, shares in zip(passages, found, strict=True)
        ]

    async def _completion(self, query: trace_pb2.Query, *, wanted: bool) -> str:
        """The model's own continuation up to the end of the line; empty unless it is wanted or is to be explained."""
        if not wanted and query.WhichOneof("explained") != "own":
            return ""
        given = tokenize_prompt(
            query.prompt, self._tokenizer, add_bos=self._index.facts["add_bos"], max_tokens=self._max_tokens
        )
        longest = min(query.own.max_new_tokens or DEFAULT_NEW_TOKENS, self._max_tokens - len(given))
        found: Completion = await self._model.call("complete", given, longest, stop_tokens_of(self._tokenizer))
        return line_of(found, self._tokenizer)

    def _read(self, query: trace_pb2.Query, completion: str) -> tuple[Example, str]:
        """Tokens of a query with its loss on what is to be explained, and those words."""
        kind = query.WhichOneof("explained")
        if kind == "span":
            span = query.span
            found = tokenize_span(
                query.prompt,
                span.completion,
                span.start,
                span.end,
                self._tokenizer,
                add_bos=self._index.facts["add_bos"],
                max_tokens=self._max_tokens,
            )
            return found.example, span.completion[found.start : found.end]
        if kind == "own" and not completion:
            raise InvalidRequest("the model says nothing after the prompt; give a target to explain", field="query.own")
        text = completion if kind == "own" else query.target
        return self._tokenize(Query(query_id="query", prompt=query.prompt, target=text)), text

    def _tokenize(self, query: Query) -> Example:
        return tokenize(query, self._tokenizer, add_bos=self._index.facts["add_bos"], max_tokens=self._max_tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    async def _run(self, jobs: Sequence[_Job]) -> Sequence[tuple[Dual, NDArray[np.generic]] | Exception]:
        """One batch through the model, then each generation's queries through its whitener."""
        began = time.monotonic()
        rows: Rows = await self._model.call("encode", [job.example for job in jobs])
        found = await asyncio.to_thread(_whiten, jobs, rows)
        tokens = sum(len(job.example.tokens) for job in jobs)
        self._observer.batch(len(jobs), tokens, time.monotonic() - began)
        return found


def _whiten(jobs: Sequence[_Job], rows: Rows) -> list[tuple[Dual, NDArray[np.generic]] | Exception]:
    found: list[tuple[Dual, NDArray[np.generic]] | Exception] = [InvalidRequest()] * len(jobs)
    for generation in {job.generation.name: job.generation for job in jobs}.values():
        where = [index for index, job in enumerate(jobs) if job.generation is generation]
        chosen = torch.from_numpy(rows.rows_Nd)[where], torch.from_numpy(rows.loss_N)[where]
        for index, dual in zip(where, make_duals(generation.whitener, *chosen), strict=True):
            found[index] = (
                dual
                if isinstance(dual, InvalidRequest)
                else (dual, make_code(generation.spec, generation.rotation, dual))
            )
    return found

"""The reranker service itself: exact scores beside the rows, passages, and the evidence for their scores.

It knows messages and rows, but no network and no model: token shares come from an `Explainer`, the encoder. Reading
runs in a few threads, so that several calls wait for the disk at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from services.encoder.core import TokenShares
from services.generations import OpenedGenerations
from services.timing import within
from services.vectors import to_array, to_vector
from trackstar import evidence
from trackstar.errors import InvalidRequest, NotFound
from trackstar.filters import FilterIndex, PassageFilter
from trackstar.index import Index
from trackstar.passages import Passage
from trackstar.ranking import Ranking
from trackstar.reranker import Reranker
from trackstar.row_shards import ROW_DTYPES
from trackstar.rows import RowStore
from trackstar.tombstones import Tombstones
from trackstar.v1 import common_pb2, reranker_pb2

Answer = TypeVar("Answer")

_THREADS = 4


class Explainer(Protocol):
    """Tells how much every token of a passage adds to a score."""

    async def contributions(
        self, passages: Sequence[NDArray[np.int32]], dual_d: NDArray[np.float32], *, timeout_seconds: float
    ) -> list[TokenShares]:
        """See `services.encoder.core.EncoderCore.contributions`."""


class RerankerObserver(Protocol):
    """Hears what the reranker does."""

    def scored(self, passages: int, row_bytes: int) -> None:
        """Passages were scored; so many bytes of rows were read for them."""


class Unobserved:
    """An observer that ignores everything."""

    def scored(self, passages: int, row_bytes: int) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A generation, and the rows it stands on."""

    rows: RowStore
    filters: FilterIndex
    reranker: Reranker


class RerankerCore:
    """See `services.backends.RerankerBackend`.

    Args:
        index: whose rows are read.
        explainer: gives token shares.
        observer: hears of every ranking.
    """

    def __init__(self, index: Index, explainer: Explainer, *, observer: RerankerObserver | None = None) -> None:
        self._index = index
        self._explainer = explainer
        self._observer = observer or Unobserved()
        self._dim: int = index.facts["dim"]
        self._row_bytes = self._dim * ROW_DTYPES[index.facts["row_dtype"]].itemsize
        self._deleted = Tombstones(index.root)
        # Generations of the same rows share them.
        self._stores: dict[str, tuple[RowStore, FilterIndex]] = {}
        self._opening = threading.Lock()
        self._generations = OpenedGenerations(self._open)
        self._block_names = [block.name for block in index.layout.blocks]
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="rows")

    async def close(self) -> None:
        """Finish what runs and close the files."""
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        for rows, _ in self._stores.values():
            rows.close()

    async def rerank(
        self, request: reranker_pb2.RerankRequest, *, timeout_seconds: float
    ) -> reranker_pb2.RerankResponse:
        """See `RerankerBackend.rerank`."""
        async with within(timeout_seconds, "scoring the passages"):
            opened = await self._generations.get(request.generation)
            return await self._in_thread(lambda: self._rerank(opened, request))

    async def explain(
        self, request: reranker_pb2.ExplainRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ExplainResponse:
        """See `RerankerBackend.explain`."""
        async with within(timeout_seconds, "explaining the passages"):
            opened = await self._generations.get(request.generation)
            dual_d = self._dual(request.dual)
            ids = np.array(request.passage_ids, dtype=np.int64)
            _check_ids(ids, opened.rows.num_passages)
            # Of a call that has begun: what is deleted meanwhile may still be in its answer.
            passages = await self._in_thread(lambda: opened.rows.passages(ids))
            shares: Sequence[TokenShares | None] = [None] * len(passages)
            blocks_Nb = np.empty((len(passages), 0))
            if request.tokens:
                shares = await self._explainer.contributions(
                    [passage.tokens for passage in passages], dual_d, timeout_seconds=timeout_seconds
                )
            elif request.blocks:
                blocks_Nb = await self._in_thread(
                    lambda: opened.reranker.block_shares(torch.from_numpy(dual_d.copy()), ids)
                )
            words = evidence.words_of(request.query_text)
            return reranker_pb2.ExplainResponse(
                passages=[
                    reranker_pb2.ExplainedPassage(
                        passage=to_message(passage),
                        evidence=self._evidence(request, opened.reranker, passage, item, blocks_b, words),
                    )
                    for passage, item, blocks_b in zip(passages, shares, blocks_Nb, strict=True)
                ]
            )

    async def read_passages(
        self, request: reranker_pb2.ReadPassagesRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ReadPassagesResponse:
        """See `RerankerBackend.read_passages`."""
        async with within(timeout_seconds, "reading the passages"):
            opened = await self._generations.get(request.generation)
            return await self._in_thread(lambda: self._read_passages(opened, request))

    def _open(self, name: str) -> _Opened:
        # Which generations are served is for the gateway to say: calls may hold one that was retired a moment ago.
        rows = self._index.rows(name, retired=True)
        with self._opening:
            if rows.digest in self._stores:
                rows.close()
            rows, filters = self._stores.setdefault(rows.digest, (rows, FilterIndex(rows)))
        generation = self._index.generation(name, rows=rows, searched=False, retired=True)
        return _Opened(rows=rows, filters=filters, reranker=Reranker(rows, generation))

    async def _in_thread(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _dual(self, vector: common_pb2.Vector) -> NDArray[np.float32]:
        found = to_array(vector, common_pb2.DTYPE_FLOAT32, dim=self._dim, name="dual")
        if len(found) != 1:
            raise InvalidRequest(f"dual: holds {len(found)} vectors, one is expected", field="dual")
        dual_d: NDArray[np.float32] = found[0]
        return dual_d

    def _rerank(self, opened: _Opened, request: reranker_pb2.RerankRequest) -> reranker_pb2.RerankResponse:
        dual_d = torch.from_numpy(self._dual(request.dual).copy())
        mask_N = self._mask(opened, to_filter(request.filter))
        reranker, num_passages = opened.reranker, opened.rows.num_passages
        signs = [-1.0 if end.opponents else 1.0 for end in request.ends]
        proposed = [
            to_array(end.candidates, common_pb2.DTYPE_INT64, dim=None, name="candidates").ravel()
            if end.HasField("candidates")
            else None
            for end in request.ends
        ]
        matching = num_passages if mask_N is None else int(mask_N.sum())
        rankings: list[Ranking] = []
        if any(ids is None for ids in proposed):
            rankings = reranker.scan(dual_d[None], signs=signs, k=request.k, mask_N=mask_N)[0]
            examined = matching
        else:
            seen: list[NDArray[np.int64]] = []
            for ids, sign in zip(proposed, signs, strict=True):
                assert ids is not None
                _check_ids(ids, num_passages)
                kept = ids if mask_N is None else ids[mask_N[ids]]
                rankings.append(reranker.rerank(dual_d, kept, sign=sign, k=request.k))
                seen.append(kept)
            examined = len(np.unique(np.concatenate(seen))) if seen else 0
        self._observer.scored(examined, examined * self._row_bytes)
        mean, std = reranker.background(dual_d)
        return reranker_pb2.RerankResponse(
            ends=[
                reranker_pb2.RankedEnd(ids=to_vector(ranking.ids), scores=to_vector(ranking.scores))
                for ranking in rankings
            ],
            background=common_pb2.Background(mean=mean, std=std),
            examined=examined,
            matching=matching,
            row_bytes_read=examined * self._row_bytes,
        )

    def _mask(self, opened: _Opened, wanted: PassageFilter) -> NDArray[np.bool_] | None:
        """Which passages match and are not deleted, bool [N]; None for all."""
        deleted_N = self._deleted.now().mask(opened.rows.num_passages)
        if wanted.is_empty:
            return deleted_N
        mask_N = opened.filters.mask(wanted)
        return mask_N if deleted_N is None else mask_N & deleted_N

    def _passages(self, opened: _Opened, ids: NDArray[np.int64]) -> list[Passage]:
        """Passages by id.

        Raises:
            NotFound: there is no such passage, or it was deleted.
        """
        _check_ids(ids, opened.rows.num_passages)
        kept = self._deleted.now().without(ids)
        if len(kept) < len(ids):
            gone = int(np.setdiff1d(ids, kept)[0])
            raise NotFound(f"passage {gone} was deleted", kind="passage", name=str(gone))
        return opened.rows.passages(ids)

    def _evidence(
        self,
        request: reranker_pb2.ExplainRequest,
        reranker: Reranker,
        passage: Passage,
        item: TokenShares | None,
        blocks_b: NDArray[np.float64],
        words: frozenset[str],
    ) -> common_pb2.Evidence:
        message = common_pb2.Evidence()
        if request.overlap:
            message.overlap = evidence.overlap(words, passage.text)
        if item is not None:
            found = evidence.make_evidence(
                by_token_Tb=item.shares.by_token_Tb,
                unplaced_b=item.shares.unplaced_b,
                norm=float(reranker.generation.norms_N[passage.passage_id]),
                token_texts=item.texts,
                block_names=self._block_names,
                overlap=0.0,
            )
            message.tokens.extend(common_pb2.TokenShare(text=text, contribution=share) for text, share in found.tokens)
            blocks: Sequence[tuple[str, float]] = found.blocks
        else:
            blocks = list(zip(self._block_names, blocks_b.tolist(), strict=True)) if len(blocks_b) else []
        if request.blocks:
            message.blocks.extend(common_pb2.BlockShare(block=name, contribution=share) for name, share in blocks)
        return message

    def _read_passages(
        self, opened: _Opened, request: reranker_pb2.ReadPassagesRequest
    ) -> reranker_pb2.ReadPassagesResponse:
        if request.passage_ids:
            ids = np.array(request.passage_ids, dtype=np.int64)
            following = -1
        else:
            mask_N = self._mask(opened, to_filter(request.filter, doc_id=request.doc_id))
            if mask_N is None:
                found = np.arange(request.first_id, min(request.first_id + request.limit + 1, opened.rows.num_passages))
            else:
                found = request.first_id + np.flatnonzero(mask_N[request.first_id :])
            ids = found[: request.limit]
            following = int(found[request.limit]) if len(found) > request.limit else -1
        return reranker_pb2.ReadPassagesResponse(
            passages=[
                reranker_pb2.StoredPassage(
                    passage=to_message(passage), tokens=passage.tokens.tolist() if request.tokens else None
                )
                for passage in self._passages(opened, ids)
            ],
            next_id=following,
        )


def _check_ids(ids: NDArray[np.int64], num_passages: int) -> None:
    bad = ids[(ids < 0) | (ids >= num_passages)]
    if len(bad):
        raise NotFound(
            f"there is no passage {bad[0]}; the index holds passages 0 to {num_passages - 1}",
            kind="passage",
            name=str(bad[0]),
        )


def to_message(passage: Passage) -> common_pb2.Passage:
    """A passage as a message, without its tokens."""
    return common_pb2.Passage(
        passage_id=passage.passage_id,
        doc_id=passage.doc_id,
        text=passage.text,
        source=passage.source,
        metadata=passage.metadata,
        token_start=passage.token_start,
        token_end=passage.token_end,
    )


def to_filter(message: common_pb2.Filter, *, doc_id: str = "") -> PassageFilter:
    """A filter as the library has it.

    Raises:
        InvalidRequest: a date that is none, or a condition without values.
    """
    return PassageFilter(
        sources=tuple(message.sources),
        date_from=message.date_from or None,
        date_until=message.date_until or None,
        date_field=message.date_field or "date",
        metadata={condition.field: tuple(condition.values) for condition in message.metadata},
        doc_ids=(doc_id,) if doc_id else (),
    )

"""Rankings between the reranker and the answer: batches of candidates, merging what comes back, influences.

Order is everyone's: by exact score from the wanted end, equal scores by smaller id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.vectors import to_array, to_vector
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.ranking import best
from trackstar.v1 import common_pb2, reranker_pb2

# Where the candidates of each end are cut for answers in parts: the likeliest eighth comes first.
_CUTS = (1 / 8, 1 / 2)
# Fewer candidates than this are not worth several calls.
_SMALL = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rankings:
    """One ranking for each end asked for, over what has been scored.

    ids: int64 [<= k] each, best first. scores: float32, likewise. examined: passages scored. matching: passages that
    pass the filter.
    """

    ids: tuple[NDArray[np.int64], ...]
    scores: tuple[NDArray[np.float32], ...]
    background: common_pb2.Background
    examined: int
    matching: int

    @staticmethod
    def empty(ends: int) -> Rankings:
        """Nothing scored yet."""
        return Rankings(
            ids=(np.empty(0, np.int64),) * ends,
            scores=(np.empty(0, np.float32),) * ends,
            background=common_pb2.Background(),
            examined=0,
            matching=0,
        )

    def is_short(self, k: int) -> bool:
        """Whether a ranking has fewer than k passages although more pass the filter."""
        return any(len(ids) < min(k, self.matching) for ids in self.ids)

    def merged(
        self, response: reranker_pb2.RerankResponse, which: Sequence[int], opponents: Sequence[bool], *, k: int
    ) -> Rankings:
        """With an answer of the reranker to the ends `which`, on passages that were not scored before.

        Raises:
            Incompatible: the answer is none to what was asked.
        """
        if len(response.ends) != len(which):
            raise Incompatible(f"the reranker answered {len(response.ends)} ends, {len(which)} were asked for")
        ids, scores = list(self.ids), list(self.scores)
        for end, found in zip(which, response.ends, strict=True):
            new_ids, new_scores = _read(found)
            all_ids, all_scores = np.concatenate([ids[end], new_ids]), np.concatenate([scores[end], new_scores])
            ranking = best(all_ids, all_scores, sign=-1.0 if opponents[end] else 1.0, k=k)
            ids[end], scores[end] = ranking.ids, ranking.scores
        return Rankings(
            ids=tuple(ids),
            scores=tuple(scores),
            background=response.background,
            examined=self.examined + response.examined,
            matching=response.matching,
        )

    def page(self, offset: int, size: int) -> list[Place]:
        """The places of one page, end after end."""
        return [
            Place(end=end, rank=rank, passage_id=int(passage_id), score=float(score))
            for end, (ids, scores) in enumerate(zip(self.ids, self.scores, strict=True))
            for rank, (passage_id, score) in enumerate(
                zip(ids[offset : offset + size], scores[offset : offset + size], strict=True), start=offset + 1
            )
        ]

    def best_z_score(self, end: int) -> float | None:
        """Of the first place of a ranking; None if the ranking is empty."""
        return z_score(float(self.scores[end][0]), self.background) if len(self.scores[end]) else None

    def ends_at(self, offset: int) -> bool:
        """Whether no ranking goes on at `offset`."""
        return all(len(ids) <= offset for ids in self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One place in a ranking; `rank` counts from 1."""

    end: int
    rank: int
    passage_id: int
    score: float

    def influence(
        self,
        passages: Mapping[int, common_pb2.Passage],
        background: common_pb2.Background,
        evidence: Mapping[int, common_pb2.Evidence],
    ) -> common_pb2.Influence:
        """The place with its passage, its distance from the background, and its evidence if there is any."""
        return common_pb2.Influence(
            rank=self.rank,
            score=self.score,
            z_score=z_score(self.score, background),
            passage=passages[self.passage_id],
            evidence=evidence.get(self.passage_id),
        )


def z_score(score: float, background: common_pb2.Background) -> float:
    """How many standard deviations a score lies above the background; 0 without a background."""
    return (score - background.mean) / background.std if background.std > 0 else 0.0


def rerank_end(candidates: NDArray[np.int64], *, opponents: bool) -> reranker_pb2.RerankEnd:
    """Candidates as the reranker takes them."""
    return reranker_pb2.RerankEnd(opponents=opponents, candidates=to_vector(np.sort(candidates)))


def batches(proposed: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
    """Candidates [ends, L], likeliest first, in a few batches of ids per end; no id is in two batches.

    A passage that several ends propose comes as early as the end asks that has it foremost, so that what batches
    examine adds up.
    """
    size = proposed.shape[1]
    if size < _SMALL:
        return [list(proposed)]
    ids = np.unique(proposed)
    foremost = np.full(len(ids), size, dtype=np.int64)
    for end in proposed:
        np.minimum.at(foremost, np.searchsorted(ids, end), np.arange(size))
    batch_of = np.searchsorted([int(size * cut) for cut in _CUTS], foremost, side="right")
    of_ends = [batch_of[np.searchsorted(ids, end)] for end in proposed]
    return [
        [end[of_end == number] for end, of_end in zip(proposed, of_ends, strict=True)]
        for number in range(len(_CUTS) + 1)
    ]


def _read(found: reranker_pb2.RankedEnd) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    try:
        ids: NDArray[np.int64] = to_array(found.ids, common_pb2.DTYPE_INT64, dim=None, name="ids").ravel()
        scores: NDArray[np.float32] = to_array(found.scores, common_pb2.DTYPE_FLOAT32, dim=None, name="scores").ravel()
    except InvalidRequest as error:
        raise Incompatible(f"the reranker's answer cannot be read: {error}") from error
    if len(ids) != len(scores):
        raise Incompatible(f"the reranker answered {len(scores)} scores for {len(ids)} passages")
    return ids, scores

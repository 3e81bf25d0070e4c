"""What a method answers: sentences in order, by their positions in the corpus.

Ties are broken by one rule for all methods: the higher score first, then the smaller position in the corpus. A sentence
occurs once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trackstar.ranking import Ranking, best

TIE_RULE = "higher score first, then the smaller position in the corpus"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retrieval:
    """The sentences found for one query: positions int64 [k] and scores float64 [k], best first."""

    query_id: str
    positions: NDArray[np.int64]
    scores: NDArray[np.float64]

    @staticmethod
    def of(query_id: str, positions: ArrayLike, scores: ArrayLike) -> Retrieval:
        """Sentences that are in order already."""
        return Retrieval(
            query_id=query_id,
            positions=np.asarray(positions, dtype=np.int64),
            scores=np.asarray(scores, dtype=np.float64),
        )

    @staticmethod
    def best_of(query_id: str, scores_N: NDArray[np.floating], k: int) -> Retrieval:
        """The best k of all sentences' scores [N]."""
        ranking = best(np.arange(len(scores_N), dtype=np.int64), scores_N, sign=1.0, k=k)
        return Retrieval.of(query_id, ranking.ids, ranking.scores)

    @staticmethod
    def best_sentences(query_id: str, ranking: Ranking, k: int) -> Retrieval:
        """The best k sentences of a ranking of windows whose ids are positions: each sentence by its best window."""
        _, first = np.unique(ranking.ids, return_index=True)
        kept = np.sort(first)[:k]
        return Retrieval.of(query_id, ranking.ids[kept], ranking.scores[kept])

"""TracIn over several checkpoints (Pruthi et al. 2020, arXiv 2002.08484): gradient dot products, added.

    score(s, q) = sum over checkpoints c of  w_c <g_q(c), g_s(c)>

The g are the projected gradients of an index of each checkpoint; w is what the checkpoint's learning rate was. All
sentences' scores of some queries are held at once, so that checkpoints may be cut into shards in different places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.influence import InfluenceSource
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.retrieval import Retrieval
from trackstar.results import Query

# Scores that are held at once.
_MAX_SCORES = 1 << 27


class TracIn:
    """Adds the scores of checkpoints.

    Args:
        name: of the method.
        checkpoints: an index of each.
        weights: one for each.
        num_sentences: of the corpus.
        on_step: progress.
    """

    def __init__(
        self,
        name: str,
        checkpoints: Sequence[InfluenceSource],
        weights: Sequence[float],
        num_sentences: int,
        *,
        on_step: OnStep = unheard,
    ) -> None:
        self.name = name
        self._checkpoints = checkpoints
        self._weights = weights
        self._num_sentences = num_sentences
        self._on_step = on_step

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`; a sentence of several windows counts by their sum.

        Raises:
            InvalidRequest: a query cannot be tokenised.
            CorruptArtifact: a shard is not what was written.
        """
        found: list[Retrieval] = []
        step = max(1, _MAX_SCORES // self._num_sentences)
        for start in range(0, len(queries), step):
            some = queries[start : start + step]
            found += [
                Retrieval.best_of(query.query_id, scores_N, k)
                for query, scores_N in zip(some, self._scores(some), strict=True)
            ]
        return found

    def _scores(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """Of all sentences, float32 [Q, N]; what is deleted scores 0."""
        scores_NQ = np.zeros((self._num_sentences, len(queries)), dtype=np.float32)
        for source, weight in zip(self._checkpoints, self._weights, strict=True):
            weighted_Qd = weight * source.encode(queries, self._on_step)[0]
            for ids, stored_nd in source.shards(self.name, self._on_step):
                np.add.at(scores_NQ, source.positions_N[ids], (stored_nd.float() @ weighted_Qd.mT).numpy())
        return scores_NQ.T

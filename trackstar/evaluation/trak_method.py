"""TRAK as a method: `trak.Trak` with sentences by their positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.influence import positions_of
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.retrieval import Retrieval
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.trak import Trak
from trackstar.ranking import Ranking, best
from trackstar.results import Query


class TrakMethod:
    """Ranks sentences by TRAK, each by its best window.

    Args:
        trak: what scores windows.
        sentences: the corpus.
        path: the index's, for messages.
        on_step: progress.

    Raises:
        Incompatible: the index holds other sentences.
    """

    def __init__(self, trak: Trak, sentences: Sentences, path: str, *, on_step: OnStep = unheard) -> None:
        self.name = trak.name
        self._trak = trak
        self._positions_N = positions_of(trak.document_ids().tolist(), sentences, path)
        self._on_step = on_step

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`. Raises as `Trak.scores`."""
        rankings = [Ranking.empty() for _ in queries]
        windows = k * int(np.bincount(self._positions_N).max())
        for positions_n, scores_Qn in self._scores(queries):
            rankings = [
                ranking.merge(best(positions_n, scores_n, sign=1.0, k=windows), sign=1.0, k=windows)
                for ranking, scores_n in zip(rankings, scores_Qn, strict=True)
            ]
        return [
            Retrieval.best_sentences(query.query_id, ranking, k)
            for query, ranking in zip(queries, rankings, strict=True)
        ]

    def _scores(self, queries: Sequence[Query]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Positions [n] and scores [Q, n] of windows that are not deleted."""
        shown_N = self._trak.shown_N
        for first, scores_Qn in self._trak.scores(queries):
            some = slice(first, first + scores_Qn.shape[1])
            kept = slice(None) if shown_N is None else shown_N[some]
            yield self._positions_N[some][kept], scores_Qn[:, kept]
            self._on_step(self.name, some.stop, self._trak.num_passages)

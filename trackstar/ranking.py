"""Passages in order of their exact scores: the one order that library and gateway share. It needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """Passages in order: int64 ids [k] and float32 scores [k], best first."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    @staticmethod
    def empty() -> Ranking:
        """No passages."""
        return Ranking(ids=np.empty(0, np.int64), scores=np.empty(0, np.float32))

    def merge(self, other: Ranking, *, sign: float, k: int) -> Ranking:
        """The best k of both."""
        return best(np.concatenate([self.ids, other.ids]), np.concatenate([self.scores, other.scores]), sign=sign, k=k)


def best(ids: NDArray[np.int64], scores: NDArray[np.float32], *, sign: float, k: int) -> Ranking:
    """The k highest (sign > 0) or lowest scores in order; ties go to the smaller id."""
    values = -sign * scores
    if 0 < k < len(values):
        # Sorting a whole shard for the few best of it took most of a scan's time beside its products.
        kept = np.flatnonzero(~(values > np.partition(values, k - 1)[k - 1]))
        ids, scores, values = ids[kept], scores[kept], values[kept]
    order = np.lexsort((ids, values))[:k]
    return Ranking(ids=ids[order], scores=scores[order])

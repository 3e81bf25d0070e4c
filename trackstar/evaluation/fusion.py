"""One ranking from several: lexical and influence evidence find different passages, and a fusion can have both.

    reciprocal rank     score(s) = sum over methods of 1 / (constant + rank of s)
    weights             score(s) = sum over methods of w · (score of s - lowest) / (highest - lowest)

`lowest` and `highest` are of the method's own list for the query, so scores of any scale can be joined; a sentence that
a method did not find adds nothing. Weights are at least 0 and sum to 1. They are chosen from a grid by the mean
reciprocal rank on queries that are not evaluated, and among equals those that give the earlier methods more. As the
grid holds every method alone, the fusion is at least as good as its best part on those queries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest
from trackstar.evaluation.measures import hits_of
from trackstar.evaluation.retrieval import Retrieval
from trackstar.ranking import best
from trackstar.results import Query

# By query id, what one method found.
Found = Mapping[str, Retrieval]


class ReciprocalRank:
    """Fuses by ranks alone; nothing is fitted."""

    def __init__(self, name: str, parts: Sequence[Found], *, constant: float = 60.0) -> None:
        self.name = name
        self._parts = parts
        self._constant = constant

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`; queries are those that the parts have answered."""
        return [self._fuse(query.query_id, k) for query in queries]

    def _fuse(self, query_id: str, k: int) -> Retrieval:
        found = [part[query_id] for part in self._parts]
        shares = [1.0 / (self._constant + np.arange(1, len(item.positions) + 1)) for item in found]
        return joined(query_id, found, shares, k)


class Weighted:
    """Fuses by normalised scores under weights [methods]."""

    def __init__(self, name: str, parts: Sequence[Found], weights: Sequence[float]) -> None:
        self.name = name
        self._parts = parts
        self.weights = tuple(weights)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`; queries are those that the parts have answered."""
        return [self._fuse(query.query_id, k) for query in queries]

    def _fuse(self, query_id: str, k: int) -> Retrieval:
        # A part of no weight adds no sentence either, so that the others' rankings stay as they are.
        weighted = [(weight, part[query_id]) for weight, part in zip(self.weights, self._parts, strict=True) if weight]
        found = [item for _, item in weighted]
        shares = [weight * normalised(item.scores) for weight, item in weighted]
        return joined(query_id, found, shares, k)


def fit_weights(
    parts: Sequence[Found], queries: Sequence[Query], gold: Mapping[str, Collection[int]], *, steps: int = 20, k: int
) -> tuple[float, ...]:
    """The weights of the grid with the highest mean reciprocal rank.

    Args:
        parts: what each method found for these queries.
        queries: held out from the evaluation.
        gold: by query id.
        steps: the grid's weights are multiples of 1 / steps.
        k: depth of the rankings.

    Raises:
        InvalidRequest: there are no such queries.
    """
    if not queries:
        raise InvalidRequest("learnt weights need held-out queries; set held_out above 0, or fuse by reciprocal rank")
    chosen, highest = None, -1.0
    for weights in _grid(len(parts), steps):
        fused = Weighted("", parts, weights).retrieve(queries, k)
        found = [np.flatnonzero(hits_of(item, gold[item.query_id])) for item in fused]
        mean = float(np.mean([1.0 / (1 + places[0]) if len(places) else 0.0 for places in found]))
        if mean > highest + 1e-12:
            chosen, highest = weights, mean
    assert chosen is not None
    return chosen


def normalised(scores_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of one list in 0 … 1; 1 throughout if they are all equal."""
    if not len(scores_K):
        return scores_K
    low, high = scores_K.min(), scores_K.max()
    return (scores_K - low) / (high - low) if high > low else np.ones_like(scores_K)


def by_deviation(scores_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many standard deviations of one list a score lies above the list's lowest; 1 throughout if all are equal."""
    if not len(scores_K) or scores_K.max() == scores_K.min():
        return np.ones_like(scores_K)
    deviations: NDArray[np.float64] = (scores_K - scores_K.min()) / scores_K.std()
    return deviations


def softmax(scores_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of one list that sum to 1, each proportional to the exponential of its score in standard deviations."""
    powers = np.exp(by_deviation(scores_K) - by_deviation(scores_K).max(initial=0.0))
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares


# How scores of two lists are made comparable; a passage that a list lacks has none of its share.
SCALES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "range": normalised,
    "deviation": by_deviation,
    "softmax": softmax,
}


def _grid(num: int, steps: int) -> Iterator[tuple[float, ...]]:
    """All weights that are multiples of 1 / steps and sum to 1, those with more for earlier methods first."""

    def parts(count: int, left: int) -> Iterator[tuple[int, ...]]:
        if count == 1:
            yield (left,)
            return
        for first in range(left, -1, -1):
            for rest in parts(count - 1, left - first):
                yield (first, *rest)

    return (tuple(part / steps for part in whole) for whole in parts(num, steps))


def joined(query_id: str, found: Sequence[Retrieval], shares: Sequence[NDArray[np.floating]], k: int) -> Retrieval:
    """The k passages with the highest sums of their shares in every list."""
    positions, places = np.unique(np.concatenate([item.positions for item in found]), return_inverse=True)
    totals: NDArray[np.floating] = np.zeros(len(positions))
    np.add.at(totals, places, np.concatenate(shares))
    ranking = best(positions, totals, sign=1.0, k=k)
    return Retrieval.of(query_id, ranking.ids, ranking.scores)

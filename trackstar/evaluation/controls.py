"""The two ends between which every method lies: the gold sentences themselves, and sentences drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from trackstar.evaluation.retrieval import Retrieval
from trackstar.results import Query


class Gold:
    """The gold sentences of every query by position, each with score 1, and nothing after them.

    Its precision at k is below 1 where a fact has fewer than k gold sentences: that is as high as precision can be.
    """

    def __init__(self, name: str, gold: Mapping[str, Sequence[int]]) -> None:
        self.name = name
        self._gold = gold

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`."""
        found = [sorted(self._gold[query.query_id])[:k] for query in queries]
        return [
            Retrieval.of(query.query_id, positions, np.ones(len(positions)))
            for query, positions in zip(queries, found, strict=True)
        ]


class Random:
    """Sentences without replacement, every order as likely; drawn from the seed and the query's id alone."""

    def __init__(self, name: str, num_sentences: int, *, seed: int = 0) -> None:
        self.name = name
        self._num_sentences = num_sentences
        self._seed = seed

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`. Scores descend from 1 in equal steps and mean nothing."""
        count = min(k, self._num_sentences)
        scores = 1.0 - np.arange(count) / max(1, count)
        return [Retrieval.of(query.query_id, self._draw(query, count), scores) for query in queries]

    def _draw(self, query: Query, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        digest = hashlib.sha256(f"{self._seed}:{query.query_id}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        return generator.choice(self._num_sentences, count, replace=False)

"""BM25: the words that a sentence shares with prompt and target.

    score(s, q) = sum over words w of q of idf(w) · tf / (tf + k1 · (1 - b + b · |s| / mean |s|))
    idf(w) = ln(1 + (N - df + 1/2) / (df + 1/2))

where tf is how often w occurs in s, |s| the number of its words, and a word of the query counts as often as it occurs.

That is BM25 as Lucene has it; `bm25s` computes it with float32 scores made beforehand. Words are runs of letters and
digits in lower case; nothing is stemmed. Sentences without any word in common score zero and come last, by position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trackstar.evaluation.method import OnStep, text_of, unheard
from trackstar.evaluation.retrieval import Retrieval
from trackstar.results import Query

_WORD = re.compile(r"\w+")
_STEP = 256


def words_in(text: str, stopwords: frozenset[str] = frozenset()) -> list[str]:
    """The words of a text, as often as they occur."""
    return [word for word in _WORD.findall(text.casefold()) if word not in stopwords]


class Lexical:
    """BM25 over a corpus.

    Args:
        name: of the method.
        texts: the sentences, in order.
        k1: how much another occurrence of a word adds.
        b: how much longer sentences are held back, 0 to 1.
        stopwords: words that do not count, on either side.
        on_step: progress.
    """

    def __init__(
        self,
        name: str,
        texts: Sequence[str],
        *,
        k1: float = 1.5,
        b: float = 0.75,
        stopwords: frozenset[str] = frozenset(),
        on_step: OnStep = unheard,
    ) -> None:
        import bm25s

        self.name = name
        self._stopwords = stopwords
        self._on_step = on_step
        # Ids are given here in order of first occurrence: the package's own vocabulary is a set, whose order is not
        # the same in every process.
        self._ids: dict[str, int] = {}
        tokens = [[self._ids.setdefault(word, len(self._ids)) for word in words_in(text, stopwords)] for text in texts]
        self._num_sentences = len(tokens)
        self._scorer: Any = bm25s.BM25(method="lucene", k1=k1, b=b)
        if self._ids:
            self._scorer.index((tokens, self._ids), show_progress=False)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`."""
        import numpy as np

        found = []
        for number, query in enumerate(queries, start=1):
            ids = [self._ids[word] for word in words_in(text_of(query), self._stopwords) if word in self._ids]
            scores_N = self._scorer.get_scores(ids) if ids else np.zeros(self._num_sentences, dtype=np.float32)
            found.append(Retrieval.best_of(query.query_id, scores_N, k))
            if number % _STEP == 0 or number == len(queries):
                self._on_step(self.name, number, len(queries))
        return found

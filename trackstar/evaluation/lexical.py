"""BM25: the words that a sentence shares with prompt and target.

    score(s, q) = sum over words w of q of idf(w) · tf / (tf + k1 · (1 - b + b · |s| / mean |s|))
    idf(w) = ln(1 + (N - df + 1/2) / (df + 1/2))

where tf is how often w occurs in s, |s| the number of its words, and a word of the query counts as often as it occurs.

That is BM25 as Lucene has it, in the arithmetic of the package `bm25s`, whose scores these equal bit for bit. Words are
runs of letters and digits in lower case; nothing is stemmed. Sentences without any word in common score zero and come
last, by position.

No index is made. Only words that are asked for count, so two passes over the corpus suffice: the first finds df and
mean |s|, the second scores part by part and keeps the best k of each query. Memory does not grow with the corpus.

Legend: n sentences of a part, W words that are asked for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.method import OnStep, text_of, unheard
from trackstar.evaluation.retrieval import Retrieval
from trackstar.ranking import Ranking, best
from trackstar.results import Query

_WORD = re.compile(r"\w+")
_PART = 8192


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
        self.name = name
        self._texts = texts
        self._k1 = k1
        self._b = b
        self._stopwords = stopwords
        self._on_step = on_step

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`."""
        asked = [words_in(text_of(query), self._stopwords) for query in queries]
        numbers = {word: number for number, word in enumerate(dict.fromkeys(word for words in asked for word in words))}
        frequency_W = np.zeros(len(numbers), dtype=np.int64)
        num_words = 0
        for _, _, words, _, lengths_n in self._parts(numbers, done=0):
            frequency_W += np.bincount(words, minlength=len(numbers))
            num_words += int(lengths_n.sum())
        count = len(self._texts)
        mean = num_words / max(1, count)
        idf_W = np.array([math.log(1 + (count - df + 0.5) / (df + 0.5)) for df in frequency_W.tolist()])
        idf_W = idf_W.astype(np.float32)
        rankings = [Ranking.empty() for _ in queries]
        for start, rows, words, counts, lengths_n in self._parts(numbers, done=count):
            tf = counts.astype(np.float64)
            held_back = self._k1 * ((1 - self._b) + self._b * lengths_n[rows] / mean) if len(rows) else 0.0
            weights = (idf_W[words] * (tf / (held_back + tf))).astype(np.float32)
            order = np.argsort(words, kind="stable")
            starts = np.searchsorted(words[order], np.arange(len(numbers) + 1))
            rows, weights = rows[order], weights[order]
            ids_n = np.arange(start, start + len(lengths_n), dtype=np.int64)
            for place, wanted in enumerate(asked):
                scores_n = np.zeros(len(lengths_n), dtype=np.float32)
                for word in wanted:
                    held = slice(starts[numbers[word]], starts[numbers[word] + 1])
                    scores_n[rows[held]] += weights[held]
                known = rankings[place]
                # A later sentence loses ties.
                if len(known.ids) < k or scores_n.max() > known.scores[-1]:
                    rankings[place] = known.merge(best(ids_n, scores_n, sign=1.0, k=k), sign=1.0, k=k)
        return [
            Retrieval.of(query.query_id, ranking.ids, ranking.scores)
            for query, ranking in zip(queries, rankings, strict=True)
        ]

    def _parts(
        self, numbers: dict[str, int], *, done: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Part by part: where it starts; row, word and how often, for every word asked for in a sentence; lengths [n].

        `done` of 2 N are the sentences of the pass before.
        """
        for start in range(0, len(self._texts), _PART):
            lengths: list[int] = []
            found: list[tuple[int, int, int]] = []
            for row, text in enumerate(self._texts[start : start + _PART]):
                words = words_in(text, self._stopwords)
                lengths.append(len(words))
                occurring = Counter(numbers[word] for word in words if word in numbers)
                found += [(row, word, times) for word, times in occurring.items()]
            rows, words_, counts = np.array(found, dtype=np.int64).reshape(-1, 3).T
            yield start, rows, words_, counts, np.array(lengths, dtype=np.int64)
            self._on_step(self.name, done + start + len(lengths), 2 * len(self._texts))

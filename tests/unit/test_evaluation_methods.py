"""Lexical and dense retrieval, the controls and the fusions against plain computations, and the rule for ties."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.controls import Gold, Random
from trackstar.evaluation.dense import Dense, model_folder
from trackstar.evaluation.fusion import ReciprocalRank, Weighted, fit_weights, normalised
from trackstar.evaluation.lexical import Lexical, words_in
from trackstar.evaluation.method import Method, text_of
from trackstar.evaluation.predictions import is_right
from trackstar.evaluation.retrieval import Retrieval
from trackstar.ranking import Ranking
from trackstar.results import Query

WORDS = ["cat", "mat", "sat", "one", "two", "three", "red", "green", "blue", "on", "a", "the"]


def ask(prompt: str, target: str, query_id: str = "q") -> Query:
    return Query(query_id=query_id, prompt=prompt, target=target)


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, 9))) for _ in range(count)]


def plain_bm25(texts: Sequence[str], query: str, k1: float = 1.5, b: float = 0.75) -> NDArray[np.float64]:
    """Lucene's BM25 in float64, word by word."""
    counts = [Counter(words_in(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths)
    scores = np.zeros(len(texts))
    for word in words_in(query):
        holding = sum(1 for count in counts if word in count)
        if holding:
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            for number, count in enumerate(counts):
                tf = count[word]
                scores[number] += idf * tf / (tf + k1 * (1 - b + b * lengths[number] / mean))
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (2.0, 1.0)])
def test_bm25_equals_float64_and_the_package(k1: float, b: float) -> None:
    texts = sentences(80)
    queries = [ask("the red cat", "sat", "1"), ask("one two", "three three", "2"), ask("nothing known", "here", "3")]
    found = Lexical("BM25", texts, k1=k1, b=b).retrieve(queries, len(texts))
    package = bm25s.BM25(method="lucene", k1=k1, b=b)
    package.index([words_in(text) for text in texts], show_progress=False)
    for query, item in zip(queries, found, strict=True):
        expected_N = plain_bm25(texts, text_of(query), k1, b)
        scores_N = np.empty(len(texts))
        scores_N[item.positions] = item.scores
        np.testing.assert_allclose(scores_N, expected_N, atol=1e-5)
        theirs_N = package.get_scores([word for word in words_in(text_of(query)) if word in WORDS] or ["?"])
        np.testing.assert_array_equal(scores_N.astype(np.float32), theirs_N)
        assert item.positions.tolist() == sorted(range(len(texts)), key=lambda place: (-scores_N[place], place))


def test_bm25_leaves_stopwords_out_and_answers_an_empty_corpus_of_words() -> None:
    texts = ["the cat", "a mat", "the the the"]
    (found,) = Lexical("x", texts, stopwords=frozenset({"the", "a"})).retrieve([ask("the", "mat")], 3)
    assert found.positions.tolist() == [1, 0, 2]
    assert found.scores.tolist()[1:] == [0.0, 0.0]
    (nothing,) = Lexical("x", ["!", "?"]).retrieve([ask("the", "mat")], 5)
    assert nothing.positions.tolist() == [0, 1]


def test_ties_go_to_the_smaller_position() -> None:
    found = Retrieval.best_of("q", np.array([0.5, 0.9, 0.5, 0.9, 0.1]), 4)
    assert found.positions.tolist() == [1, 3, 0, 2]
    windows = Ranking(ids=np.array([4, 2, 4, 1, 2]), scores=np.array([9, 8, 7, 6, 5], dtype=np.float32))
    assert Retrieval.best_sentences("q", windows, 2).positions.tolist() == [4, 2]
    assert Retrieval.best_sentences("q", windows, 9).scores.tolist() == [9.0, 8.0, 6.0]


def test_company_changes_no_answer() -> None:
    texts = sentences(40)
    queries = [ask("the red", "cat", "1"), ask("one", "two", "2"), ask("blue", "mat", "3")]
    gold = {query.query_id: (1, 5) for query in queries}
    methods: list[Method] = [Lexical("l", texts), Random("r", len(texts), seed=3), Gold("g", gold)]
    for method in methods:
        together = method.retrieve(queries, 6)
        for query, one in zip(queries, together, strict=True):
            (alone,) = method.retrieve([query], 6)
            assert alone.query_id == one.query_id == query.query_id
            assert alone.positions.tolist() == one.positions.tolist()
            assert alone.scores.tolist() == one.scores.tolist()


def test_random_is_uniform_and_follows_its_seed() -> None:
    queries = [ask("p", "t", str(number)) for number in range(600)]
    found = Random("r", 10, seed=1).retrieve(queries, 3)
    assert all(len(set(item.positions.tolist())) == 3 for item in found)
    firsts = np.bincount([item.positions[0] for item in found], minlength=10)
    assert ((firsts - 60) ** 2 / 60).sum() < 27.9  # chi-squared of 9 degrees of freedom, one in a thousand
    other = Random("r", 10, seed=2).retrieve(queries, 3)
    assert [item.positions.tolist() for item in found] != [item.positions.tolist() for item in other]
    assert len(Random("r", 2).retrieve(queries[:1], 5)[0].positions) == 2


def test_gold_gives_its_sentences_and_nothing_more() -> None:
    (found,) = Gold("g", {"q": (8, 2)}).retrieve([ask("p", "t")], 5)
    assert (found.positions.tolist(), found.scores.tolist()) == ([2, 8], [1.0, 1.0])


def test_dense_equals_cosines_of_the_models_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = sentences(30)
    folder = model_folder(None)
    queries = [ask("the red cat", "sat", "1"), ask("one two", "three", "2")]
    found = Dense("d", texts, folder, batch=7).retrieve(queries, 30)
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors = [np.asarray(model.encode([text]), dtype=np.float64)[0] for text in texts]
    for query, item in zip(queries, found, strict=True):
        asked = np.asarray(model.encode([text_of(query)]), dtype=np.float64)[0]
        cosines = [vector @ asked / np.linalg.norm(vector) / np.linalg.norm(asked) for vector in vectors]
        np.testing.assert_allclose(item.scores, np.array(cosines)[item.positions], atol=1e-5)
        assert np.all(np.diff(item.scores) <= 0)
    with pytest.raises(NotFound, match="no folder"):
        model_folder(str(tmp_path / "none"))


def retrieved(query_id: str, positions: Sequence[int], scores: Sequence[float]) -> dict[str, Retrieval]:
    return {query_id: Retrieval.of(query_id, positions, scores)}


def test_reciprocal_rank_worked_out_by_hand() -> None:
    parts = [retrieved("q", [1, 2, 3], [9, 8, 7]), retrieved("q", [3, 4], [0.2, 0.1])]
    (found,) = ReciprocalRank("f", parts, constant=1.0).retrieve([ask("p", "t")], 10)
    assert found.positions.tolist() == [3, 1, 2, 4]
    assert found.scores.tolist() == pytest.approx([1 / 4 + 1 / 2, 1 / 2, 1 / 3, 1 / 3])


def test_weights_worked_out_by_hand() -> None:
    parts = [retrieved("q", [1, 2, 3], [10, 6, 2]), retrieved("q", [3, 4], [0.2, 0.1])]
    (found,) = Weighted("f", parts, (0.75, 0.25)).retrieve([ask("p", "t")], 3)
    assert found.positions.tolist() == [1, 2, 3]
    assert found.scores.tolist() == pytest.approx([0.75, 0.375, 0.25])
    assert normalised(np.array([2.0, 2.0])).tolist() == [1.0, 1.0]
    assert normalised(np.array([])).tolist() == []


lists = st.lists(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=8), min_size=2, max_size=3)


@given(lists)
def test_fusing_a_method_alone_gives_its_ranking(rankings: list[list[int]]) -> None:
    parts = [retrieved("q", item, np.linspace(5, 1, len(item)).tolist()) for item in rankings]
    alone = tuple(1.0 if number == 0 else 0.0 for number in range(len(parts)))
    (found,) = Weighted("f", parts, alone).retrieve([ask("p", "t")], 50)
    assert found.positions.tolist() == rankings[0]


def test_fitted_weights_are_the_best_of_the_grid_and_no_worse_than_any_part() -> None:
    generator = np.random.default_rng(0)
    queries = [ask("p", "t", str(number)) for number in range(30)]
    gold = {query.query_id: (0,) for query in queries}
    parts: list[dict[str, Retrieval]] = [{}, {}]
    for query in queries:
        for number, part in enumerate(parts):
            # The gold sentence stands out in either part by an amount of its own.
            scores = generator.normal(size=12)
            scores[0] += (0.8, 1.2)[number]
            part[query.query_id] = Retrieval.best_of(query.query_id, scores, 12)

    def mrr(weights: Sequence[float]) -> float:
        found = Weighted("f", parts, weights).retrieve(queries, 12)
        return float(np.mean([1.0 / (1 + item.positions.tolist().index(0)) for item in found]))

    chosen = fit_weights(parts, queries, gold, steps=10, k=12)
    grid = [(number / 10, 1 - number / 10) for number in range(11)]
    assert mrr(chosen) == pytest.approx(max(mrr(weights) for weights in grid))
    assert mrr(chosen) >= max(mrr((1.0, 0.0)), mrr((0.0, 1.0)))
    assert sum(chosen) == pytest.approx(1.0)
    with pytest.raises(InvalidRequest, match="held-out"):
        fit_weights(parts, [], gold, k=12)


@pytest.mark.parametrize(
    ("answer", "targets", "right"),
    [
        ("Ottawa, and its", ["Ottawa"], True),
        ("the Ottawa river", ["ottawa"], True),
        ("a mammal", ["mammal"], True),
        ("Ottawan", ["Ottawa"], False),
        ("near Ottawa", ["Ottawa"], False),
        ("New York City", ["NYC", "new york"], True),
        ("", ["Ottawa"], False),
        ("...", ["!"], False),
    ],
)
def test_an_answer_is_right_by_its_first_words(answer: str, targets: list[str], right: bool) -> None:
    assert is_right(answer, targets) is right

"""Measures and intervals against cases worked out by hand, plain loops, and properties that must hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.measures import hits_of, measure, measure_all, measure_names, title_of
from trackstar.evaluation.retrieval import Retrieval


def named(positions: list[int], gold: set[int], depths: tuple[int, ...] = (1, 3, 5, 10)) -> dict[str, float]:
    retrieval = Retrieval.of("q", positions, np.zeros(len(positions)))
    values = measure(hits_of(retrieval, gold), len(gold), depths)
    return dict(zip(measure_names(depths), values.tolist(), strict=True))


def test_a_case_worked_out_by_hand() -> None:
    found = named([7, 2, 9, 4, 1], {2, 4, 8})
    assert found["mrr"] == 1 / 2
    assert found["map"] == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert [found[f"recall_at_{k}"] for k in (1, 3, 5, 10)] == [0, 1, 1, 1]
    assert [found[f"precision_at_{k}"] for k in (1, 3, 5, 10)] == [0, 1 / 3, 2 / 5, 2 / 10]
    assert [found[f"coverage_at_{k}"] for k in (1, 3, 5, 10)] == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])


def test_nothing_found_is_zero_and_everything_first_is_one() -> None:
    assert set(named([5, 6], {1}).values()) == {0.0}
    assert set(named([], {1}).values()) == {0.0}
    best = named([3, 1], {1, 3}, depths=(1, 2))
    assert best["mrr"] == best["map"] == best["precision_at_2"] == best["coverage_at_2"] == 1.0


def slow(positions: list[int], gold: set[int], depth: int) -> tuple[float, float, float, float, float]:
    ranks = [rank for rank, position in enumerate(positions, start=1) if position in gold]
    average = 0.0
    for rank in ranks:
        average += sum(1 for other in positions[:rank] if other in gold) / rank
    hits = sum(1 for position in positions[:depth] if position in gold)
    return (
        1 / min(ranks) if ranks else 0.0,
        average / len(gold),
        1.0 if hits else 0.0,
        hits / depth,
        hits / len(gold),
    )


rankings = st.lists(st.integers(0, 30), unique=True, max_size=20)
golds = st.sets(st.integers(0, 30), min_size=1, max_size=8)


@given(rankings, golds, st.integers(1, 12))
def test_measures_equal_a_plain_loop(positions: list[int], gold: set[int], depth: int) -> None:
    found = named(positions, gold, (depth,))
    assert tuple(found.values()) == pytest.approx(slow(positions, gold, depth))


@given(rankings, golds)
def test_moving_a_gold_sentence_up_never_makes_a_measure_smaller(positions: list[int], gold: set[int]) -> None:
    before = named(positions, gold)
    for place in range(1, len(positions)):
        if positions[place] in gold:
            moved = [*positions]
            moved[place - 1], moved[place] = moved[place], moved[place - 1]
            after = named(moved, gold)
            assert all(after[name] >= before[name] - 1e-12 for name in before)


@given(rankings, golds)
def test_measures_lie_in_order(positions: list[int], gold: set[int]) -> None:
    found = named(positions, gold)
    assert all(0 <= value <= 1 + 1e-12 for value in found.values())
    assert found["recall_at_1"] == found["precision_at_1"]
    assert found["recall_at_10"] >= found["mrr"] or len(positions) > 10
    for kind in ("recall", "coverage"):
        values = [found[f"{kind}_at_{k}"] for k in (1, 3, 5, 10)]
        assert values == sorted(values)


def test_titles_and_order_of_many_queries() -> None:
    retrievals = [Retrieval.of("a", [1], [1.0]), Retrieval.of("b", [2, 1], [1.0, 0.5])]
    values_QM = measure_all(retrievals, [(1,), (1,)], (1,))
    assert values_QM[:, 0].tolist() == [1.0, 0.5]
    assert [title_of(name) for name in measure_names((1,))] == ["MRR", "MAP", "Recall@1", "Precision@1", "Coverage@1"]


def test_intervals_equal_resampling_one_by_one() -> None:
    values_QM = np.random.default_rng(3).random((17, 2))
    bootstrap = Bootstrap(seed=5, resamples=400)
    draws = np.random.default_rng(5).integers(0, 17, (400, 17))
    means = np.array([values_QM[drawn].mean(axis=0) for drawn in draws])
    np.testing.assert_allclose(bootstrap.means(values_QM), means, atol=1e-12)
    np.testing.assert_allclose(bootstrap.interval(values_QM), np.percentile(means, [2.5, 97.5], axis=0), atol=1e-12)


def test_intervals_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values_QM = np.random.default_rng(0).random((9, 3))
    whole = Bootstrap(resamples=100).interval(values_QM)
    monkeypatch.setattr("trackstar.evaluation.intervals._MAX_DRAWN", 9 * 7)
    np.testing.assert_array_equal(Bootstrap(resamples=100).interval(values_QM), whole)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        values = generator.random((60, 1)) ** 2
        low, high = Bootstrap(seed=trial, resamples=300).interval(values)[:, 0]
        held += low <= 1 / 3 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert Bootstrap(resamples=100).interval(np.full((7, 1), 0.1)).tolist() == [[0.1], [0.1]]

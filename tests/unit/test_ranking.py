"""The order of rankings against a plain sort, ties and all."""

from __future__ import annotations

import random as random_numbers

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trackstar.ranking import Ranking, best

_SCORES = st.lists(st.sampled_from([-0.5, -0.0, 0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1, width=32), max_size=40)


@given(_SCORES, st.integers(1, 45), st.sampled_from([1.0, -1.0]), st.randoms())
def test_best_is_a_plain_sort(scores: list[float], k: int, sign: float, random: random_numbers.Random) -> None:
    ids = list(range(100, 100 + len(scores)))
    random.shuffle(ids)
    found = best(np.array(ids, dtype=np.int64), np.array(scores, dtype=np.float32), sign=sign, k=k)
    order = sorted(range(len(ids)), key=lambda place: (-sign * np.float32(scores[place]), ids[place]))[:k]
    assert found.ids.tolist() == [ids[place] for place in order]
    assert found.scores.tolist() == [np.float32(scores[place]) for place in order]


@given(_SCORES, st.integers(1, 10), st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_parts_merge_in_any_order(scores: list[float], k: int, parts: list[int]) -> None:
    ids, values = np.arange(len(scores)), np.array(scores, dtype=np.float32)
    owner = np.array(parts[: len(scores)], dtype=np.int64)
    rankings = [best(ids[owner == part], values[owner == part], sign=1.0, k=k) for part in range(4)]
    whole = best(ids, values, sign=1.0, k=k)
    for order in (rankings, rankings[::-1]):
        merged = Ranking.empty()
        for ranking in order:
            merged = merged.merge(ranking, sign=1.0, k=k)
        assert merged.ids.tolist() == whole.ids.tolist()
        assert merged.scores.tobytes() == whole.scores.tobytes()

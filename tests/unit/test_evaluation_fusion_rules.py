"""Every family of rules on lists whose fusion is worked out by hand, and what `share` promises on any lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.evaluation.fusion import SCALES
from trackstar.evaluation.fusion_rules import FAMILIES, Family, rules
from trackstar.evaluation.fusion_run import in_errors
from trackstar.evaluation.retrieval import Retrieval

# Passages 0 … 4 are in the lexical list, 5 and 6 in influence's alone.
LEXICAL = Retrieval.of("q", [0, 1, 2, 3, 4], [10.0, 9.0, 4.0, 2.0, 0.0])
INFLUENCE = Retrieval.of("q", [5, 3, 0, 6], [0.8, 0.6, 0.4, 0.0])


def order_of(name: str, depth: int = 4) -> list[int]:
    (rule,) = [rule for rule in rules(FAMILIES, depth) if rule.name == name]
    return list(rule.order(LEXICAL, INFLUENCE))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        # Scaled: lexical 1, .9, .4, .2, 0; influence 1 (5), .75 (3), .5 (0), 0 (6). Halves: 0 .75, 1 .45, 3 .475, 5 .5.
        ("weights 0.5, range", [0, 5, 3, 1, 2, 4, 6]),
        # .9 lexical: 0 .95, 1 .81, 2 .36, 3 .255, 5 .1
        ("weights 0.9, range", [0, 1, 2, 3, 5, 4, 6]),
        # 1/rank: 0 1 + 1/3, 1 1/2, 2 1/3, 3 1/4 + 1/2, 4 1/5, 5 1, 6 1/4
        ("ranks 0.5, constant 0", [0, 5, 3, 1, 2, 6, 4]),
        ("lead 1", [0, 5, 3, 6, 1, 2, 4]),
        ("lead 2", [0, 1, 5, 3, 6, 2, 4]),
        # By weights .9 the leader is 0, 1, 2, 3, 5, 4, 6.
        ("lead 3 by weights 0.9", [0, 1, 2, 5, 3, 6, 4]),
        # The first four are 5, 3, 0, 6 whatever leads; the lexical order is 0, 3, then 5 and 6.
        ("share 0 of 4", [0, 3, 5, 6, 1, 2, 4]),
        # 0, 1 lead; 5, 3 come from influence.
        ("share 2 of 4", [0, 1, 3, 5, 2, 4, 6]),
        ("within lexical 2", [0, 1, 2, 3, 4, 5, 6]),
        ("within lexical 5", [3, 0, 1, 2, 4, 5, 6]),
        ("within influence 2", [3, 5, 0, 6, 1, 2, 4]),
        ("within influence 3", [0, 3, 5, 6, 1, 2, 4]),
        ("lead within 5", [0, 3, 1, 2, 4, 5, 6]),
        # 0 and 3 are among the first five of both.
        ("agreed 5", [0, 3, 5, 6, 1, 2, 4]),
    ],
)
def test_rules_by_hand(name: str, order: list[int]) -> None:
    assert order_of(name) == order


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_orders_every_passage_once_and_names_are_unique(family: Family) -> None:
    found = rules([family], 10)
    assert found
    assert {rule.family for rule in found} == {family}
    for rule in found:
        assert sorted(rule.order(LEXICAL, INFLUENCE)) == list(range(7))
        # One of the lists may be empty.
        nothing = Retrieval.of("q", [], [])
        assert sorted(rule.order(LEXICAL, nothing)) == [0, 1, 2, 3, 4]
        assert sorted(rule.order(nothing, INFLUENCE)) == [0, 3, 5, 6]
        assert list(rule.order(nothing, nothing)) == []
    names = [rule.name for rule in rules(FAMILIES, 10)]
    assert len(set(names)) == len(names)


@given(st.permutations(range(12)), st.integers(0, 9), st.integers(3, 12))
def test_share_takes_what_lead_takes_and_keeps_the_lexical_order(influence: list[int], num: int, length: int) -> None:
    lexical = Retrieval.of("q", range(12), -np.arange(12.0))
    other = Retrieval.of("q", influence[:length], -np.arange(float(length)))
    (share,) = [rule for rule in rules(["share"], 10) if rule.name == f"share {num} of 10"]
    order = list(share.order(lexical, other))
    assert order[:10] == sorted(order[:10])
    assert set(range(num)) <= set(order[:10])
    # What the lexical method ranks first stays where it is.
    assert order[:num] == list(range(num))
    own = [number for number in influence[:length] if number >= num][: 10 - num]
    assert set(own) <= set(order[:10])


def test_scales_by_hand() -> None:
    scores = np.array([3.0, 1.0, -1.0])
    spread = np.sqrt(8 / 3)
    assert SCALES["range"](scores).tolist() == [1.0, 0.5, 0.0]
    assert SCALES["deviation"](scores) == pytest.approx([4 / spread, 2 / spread, 0.0])
    powers = np.exp(scores / spread)
    assert SCALES["softmax"](scores) == pytest.approx(powers / powers.sum())
    for scale in SCALES.values():
        assert len(scale(np.zeros(0))) == 0
        assert len(set(scale(np.array([2.0, 2.0])).tolist())) == 1


def test_standing_in_standard_errors() -> None:
    # Mean 1, deviation 2 over four: two standard errors of 1/2 ... here sqrt(4/3) / 2.
    assert in_errors(np.array([0.0, 2.0, 0.0, 2.0])) == pytest.approx(1 / (np.sqrt(4 / 3) / 2))
    assert in_errors(np.zeros(4)) == 0.0
    # What summing in another order leaves is no difference.
    assert in_errors(np.array([1e-17, -3e-17])) == 0.0
    assert in_errors(np.full(3, -0.5)) < -1e8

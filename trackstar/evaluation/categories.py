"""What a proponent has to do with the fact that was asked: the paper's Figure 3.

    entails          it states the fact, as the judge of entailment says
    both entities    it does not, and names subject and object
    one entity       it names one of the two
    neither          it names none

Names are found by the rules of `name_rules`; aliases count. A query's shares are of the passages found for it, ten at
most as a rule; a query for which nothing was found is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.facts import Fact
from trackstar.evaluation.name_rules import Names
from trackstar.evaluation.tables import table, with_interval

CATEGORIES = ("entails", "both entities", "one entity", "neither")
DEPTH = 10


def category_of(entailed: bool, fact: Fact, text: str) -> str:
    """Which of the four a passage is in."""
    if entailed:
        return CATEGORIES[0]
    names = Names(text)
    return CATEGORIES[3 - names.any_of(fact.subjects) - names.any_of(fact.targets)]


def shares_of(facts: Sequence[Fact], lists: Sequence[Sequence[tuple[str, bool]]]) -> NDArray[np.float64]:
    """Shares of the categories, float64 [Q, 4], of the queries for which something was found.

    Args:
        facts: of every query.
        lists: of every query, text and entailment of the passages found.
    """
    rows = []
    for fact, listed in zip(facts, lists, strict=True):
        if listed:
            found = [category_of(entailed, fact, text) for text, entailed in listed]
            rows.append([found.count(name) / len(found) for name in CATEGORIES])
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(CATEGORIES))


def category_table(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: shares with intervals by method."""
    rows = [
        [item["name"], f"{item['categories']['queries']:,}"]
        + [with_interval(item["categories"][name]) for name in CATEGORIES]
        for item in methods
    ]
    return ["## What the first proponents say", "", *table(["method", "queries", *CATEGORIES], rows)]

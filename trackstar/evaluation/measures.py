"""How good a ranking is, for one query at a time.

With gold sentences G of a query, and hit_i = 1 where the i-th sentence found is gold, i = 1 … K:

    mrr              1 / smallest i with hit_i = 1, 0 without one
    recall_at_k      1 if there is a hit among the first k: the paper's Recall@k
    precision_at_k   hits among the first k, divided by k (also where fewer than k were found)
    coverage_at_k    hits among the first k, divided by |G|
    map              average precision: sum over hits of (hits up to i) / i, divided by |G|

Rankings end at depth K, so what a method ranks below K counts as not found: mrr is too low by less than 1/K for such a
query. Only numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.retrieval import Retrieval

DEPTHS = (1, 3, 5, 10)
_TITLES = {"mrr": "MRR", "map": "MAP", "recall": "Recall", "precision": "Precision", "coverage": "Coverage"}


def measure_names(depths: Sequence[int] = DEPTHS) -> list[str]:
    """Names of the measures, in the order of `measure`."""
    by_depth = [f"{kind}_at_{depth}" for kind in ("recall", "precision", "coverage") for depth in depths]
    return ["mrr", "map", *by_depth]


def title_of(measure: str) -> str:
    """How a table calls a measure."""
    kind, _, depth = measure.partition("_at_")
    return _TITLES[kind] + (f"@{depth}" if depth else "")


def hits_of(retrieval: Retrieval, gold: Collection[int]) -> NDArray[np.bool_]:
    """Which of the sentences found are gold, bool [K]."""
    return np.isin(retrieval.positions, np.fromiter(gold, dtype=np.int64, count=len(gold)))


def measure(hits_K: NDArray[np.bool_], num_gold: int, depths: Sequence[int] = DEPTHS) -> NDArray[np.float64]:
    """All measures of one query, float64 [M], in the order of `measure_names`.

    Args:
        hits_K: which of the sentences found are gold.
        num_gold: |G|, at least 1.
        depths: the k of the measures that have one.
    """
    assert num_gold > 0
    found = np.flatnonzero(hits_K) + 1
    reciprocal = 1.0 / found[0] if len(found) else 0.0
    average = float((np.arange(1, len(found) + 1) / found).sum()) / num_gold
    within = np.array([np.count_nonzero(hits_K[:depth]) for depth in depths], dtype=np.float64)
    return np.concatenate(
        [[reciprocal, average], (within > 0).astype(np.float64), within / np.array(depths), within / num_gold]
    )


def measure_all(
    retrievals: Sequence[Retrieval], gold: Sequence[Collection[int]], depths: Sequence[int] = DEPTHS
) -> NDArray[np.float64]:
    """Measures of many queries, float64 [Q, M]."""
    rows = [
        measure(hits_of(retrieval, wanted), len(wanted), depths)
        for retrieval, wanted in zip(retrievals, gold, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(measure_names(depths)))

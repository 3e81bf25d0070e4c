"""Lists of passages under a judge of entailment: every pair of fact and passage is judged once, whoever lists it.

Legend: Q queries, K passages of a list, M measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.categories import shares_of
from trackstar.evaluation.entailment import Judge, Pair, Stated, agreement, make_judge
from trackstar.evaluation.entailment_settings import EntailmentSettings
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.method import OnStep, text_of, unheard
from trackstar.results import Query


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Listed:
    """What one method found for one query: its fact, and ids and texts of the passages, best first."""

    query: Query
    fact: Fact
    ids: Sequence[str]
    texts: Sequence[str]

    def pairs(self) -> Iterator[Pair]:
        """Each passage with the fact."""
        hypothesis = text_of(self.query)
        for passage_id, text in zip(self.ids, self.texts, strict=True):
            yield Pair(fact=self.fact, hypothesis=hypothesis, passage_id=passage_id, text=text)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """Entailment scores of lists: `scores`, by method and query, float64 [K]; `threshold` from which they count.

    judge: its name. agreement: with the annotation, where there is one and the judge is another.
    """

    scores: Mapping[str, Sequence[NDArray[np.float64]]]
    threshold: float
    judge: str
    agreement: Mapping[str, Any] | None

    def hits(self, method: str) -> list[NDArray[np.bool_]]:
        """Which passages of each list are entailing, bool [K]."""
        return [scores_K >= self.threshold for scores_K in self.scores[method]]


class Judging:
    """A judge, made before anything is retrieved so that what is wrong with it shows at once.

    Raises:
        InvalidRequest, NotFound, CorruptArtifact: as `make_judge`.
    """

    def __init__(self, settings: EntailmentSettings, stated: Stated, cache: Path) -> None:
        self._stated = stated
        self._is_annotation = settings.by == "annotation"
        self._judge: Judge = make_judge(settings, stated, cache)

    def judge(self, lists: Mapping[str, Sequence[Listed]], on_step: OnStep = unheard) -> Judged:
        """Judge every pair of the lists."""
        pairs = [pair for listed in lists.values() for one in listed for pair in one.pairs()]
        unique = list({_key(pair): pair for pair in pairs}.values())
        scores = self._judge.scores(unique, lambda done, total: on_step("judging", done, total))
        known = dict(zip(map(_key, unique), scores.tolist(), strict=True))
        entailed = {key[:2]: score >= self._judge.threshold for key, score in known.items()}
        return Judged(
            scores={
                method: [np.array([known[_key(pair)] for pair in one.pairs()], dtype=np.float64) for one in listed]
                for method, listed in lists.items()
            },
            threshold=self._judge.threshold,
            judge=self._judge.name,
            agreement=None if self._is_annotation else agreement(entailed, self._stated),
        )


def category_shares(listed: Sequence[Listed], hits: Sequence[NDArray[np.bool_]], depth: int) -> NDArray[np.float64]:
    """Shares of the categories among the first `depth` of every list, float64 [Q, 4]; see `categories.shares_of`."""
    return shares_of(
        [one.fact for one in listed],
        [
            list(zip(one.texts[:depth], hits_K[:depth].tolist(), strict=True))
            for one, hits_K in zip(listed, hits, strict=True)
        ],
    )


def agreement_sentence(found: Mapping[str, Any] | None) -> str:
    """How far judge and annotation agree, as a report says it; empty where nothing is known."""
    if found is None:
        return ""
    told = [f"{name} {found[name]:.3f}" for name in ("precision", "recall") if found[name] is not None]
    return (
        f"Against the annotation, on {found['pairs']:,} judged pairs ({found['annotated']:,} annotated as stating the "
        f"fact), the judge has {' and '.join(told) or 'nothing to be right about'}."
    )


def _key(pair: Pair) -> tuple[str, str, str, str]:
    # Records of several corpora may give one id to several texts.
    return pair.fact.fact_id, pair.passage_id, pair.hypothesis, pair.text

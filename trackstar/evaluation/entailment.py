"""Whether a passage states a fact: by annotation, by string rules, or by a local model of natural language inference.

    annotation    the corpus says so: its triples, or the fact's own list of sentences
    rules         subject and object occur in the passage (`name_rules`), and a word of the relation if asked for
    nli           probability of entailment, premise the passage, hypothesis prompt and target (`nli`)

Contract: a judge gives every pair a score from 0 to 1, and a pair counts as entailment from `threshold` on. Each judge
errs in its own way: annotation misses what nobody annotated, rules take two names for a statement, a model has its own
errors. So results name the judge, and where a corpus is annotated too, how far the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest
from trackstar.evaluation.entailment_settings import AnnotationSettings, EntailmentSettings, NliSettings, RulesSettings
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.name_rules import Names

# By fact_id, the ids of the passages that are annotated to state the fact.
Stated = Mapping[str, Collection[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A fact, the hypothesis that says it, and a passage."""

    fact: Fact
    hypothesis: str
    passage_id: str
    text: str


class Judge(Protocol):
    """Scores pairs of fact and passage."""

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def threshold(self) -> float:
        """Lowest score that counts as entailment."""

    def scores(self, pairs: Sequence[Pair], on_pairs: Callable[[int, int], None]) -> NDArray[np.float64]:
        """Scores float64 [pairs], 0 to 1; `on_pairs` hears how many of all are done."""


class Annotation:
    """What the corpus or the facts file says of itself.

    Raises:
        InvalidRequest: nothing is annotated.
    """

    name, threshold = "annotation", 0.5

    def __init__(self, stated: Stated) -> None:
        if not any(stated.values()):
            raise InvalidRequest(
                "nothing says which passages state these facts (trex_sentences or fact_triples); judge entailment by "
                "rules or nli"
            )
        self._stated = stated

    def scores(self, pairs: Sequence[Pair], on_pairs: Callable[[int, int], None]) -> NDArray[np.float64]:
        """See `Judge`; 1 or 0."""
        return np.array([pair.passage_id in self._stated[pair.fact.fact_id] for pair in pairs], dtype=np.float64)


class Rules:
    """Subject and object occur, by any alias; with `relation`, a word of the relation too."""

    threshold = 0.5

    def __init__(self, *, relation: bool = False) -> None:
        self.name = "rules (subject, object and a word of the relation)" if relation else "rules (subject and object)"
        self._relation = relation

    def scores(self, pairs: Sequence[Pair], on_pairs: Callable[[int, int], None]) -> NDArray[np.float64]:
        """See `Judge`; 1 or 0."""
        return np.array([self._holds(pair) for pair in pairs], dtype=np.float64)

    def _holds(self, pair: Pair) -> bool:
        names, fact = Names(pair.text), pair.fact
        return (
            names.any_of(fact.subjects)
            and names.any_of(fact.targets)
            and (not self._relation or names.hints_at(fact.relation))
        )


def make_judge(settings: EntailmentSettings, stated: Stated, cache: Path) -> Judge:
    """The judge of these settings.

    Args:
        settings: which.
        stated: the annotations.
        cache: file of scores, for a judge that keeps them.

    Raises:
        InvalidRequest, NotFound: it cannot judge.
    """
    match settings:
        case AnnotationSettings():
            return Annotation(stated)
        case RulesSettings():
            return Rules(relation=settings.relation)
        case NliSettings():
            from trackstar.evaluation.nli import Nli

            return Nli(settings, cache)


def agreement(entailed: Mapping[tuple[str, str], bool], stated: Stated) -> dict[str, Any] | None:
    """How far a judge agrees with the annotation, over pairs (fact_id, passage id) of facts that are annotated.

    Returns None where there is no such pair, else their number, how many each side takes for entailment, and the
    judge's precision and recall (None where nothing can be divided by).
    """
    pairs = [(judged, passage in stated[fact]) for (fact, passage), judged in entailed.items() if stated.get(fact)]
    if not pairs:
        return None
    both = sum(judged and annotated for judged, annotated in pairs)
    judged_count = sum(judged for judged, _ in pairs)
    annotated_count = sum(annotated for _, annotated in pairs)
    return {
        "pairs": len(pairs),
        "judged": judged_count,
        "annotated": annotated_count,
        "precision": both / judged_count if judged_count else None,
        "recall": both / annotated_count if annotated_count else None,
    }

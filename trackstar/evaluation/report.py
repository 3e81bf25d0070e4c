"""What an evaluation found: numbers by method and group, results.json, and a Markdown table.

Contract: results hold no time and no host, so the same command gives the same bytes. Groups are compared on the same
queries for every method. A group's interval is over its own queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.categories import category_table
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.measures import measure_names, title_of
from trackstar.evaluation.tables import mean, table, with_interval

_TABLE_MEASURES = ("mrr", "recall_at_10", "precision_at_1", "precision_at_10", "map")
# Relations of fewer queries are in results.json alone.
TABLE_RELATIONS, TABLE_QUERIES = 12, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Queries parted by a label each, "" for none; `order` is that of the labels."""

    name: str
    labels: tuple[str, ...]
    order: tuple[str, ...]

    def part(self, chosen: Sequence[int]) -> Grouping:
        """Of some of the queries; labels that none of them has are gone."""
        labels = tuple(self.labels[place] for place in chosen)
        return Grouping(name=self.name, labels=labels, order=tuple(label for label in self.order if label in labels))


def groupings(facts: Sequence[Fact], right: Mapping[str, bool]) -> list[Grouping]:
    """By frequency bucket, relation (the most frequent first), and right or wrong prediction where it is known."""
    least: dict[str, int] = {}
    for fact in facts:
        least[fact.bucket] = min(fact.frequency, least.get(fact.bucket, fact.frequency))
    relations = Counter(fact.relation for fact in facts)
    found = [
        Grouping(
            name="bucket",
            labels=tuple(fact.bucket for fact in facts),
            order=tuple(sorted(least, key=lambda bucket: (least[bucket], bucket))),
        ),
        Grouping(
            name="relation",
            labels=tuple(fact.relation for fact in facts),
            order=tuple(sorted(relations, key=lambda relation: (-relations[relation], relation))),
        ),
    ]
    if right:
        names = {True: "right", False: "wrong"}
        labels = tuple(names[right[fact.fact_id]] if fact.fact_id in right else "" for fact in facts)
        order = tuple(name for name in names.values() if name in labels)
        found.append(Grouping(name="prediction", labels=labels, order=order))
    return found


def summarise(
    values_QM: NDArray[np.float64], groups: Sequence[Grouping], bootstrap: Bootstrap, depths: Sequence[int]
) -> dict[str, Any]:
    """Means and intervals of one method's measures [Q, M], overall and by group."""
    return parted(values_QM, groups, bootstrap, measure_names(depths))


def parted(
    values_QM: NDArray[np.float64], groups: Sequence[Grouping], bootstrap: Bootstrap, names: Sequence[str]
) -> dict[str, Any]:
    """Means and intervals of any measures [Q, M] by their names, overall and by group."""
    by_group: dict[str, Any] = {}
    for group in groups:
        labels = np.array(group.labels)
        by_group[group.name] = [
            {"label": label, **numbers(values_QM[labels == label], bootstrap, names)} for label in group.order
        ]
    return {"overall": numbers(values_QM, bootstrap, names), "by": by_group}


def difference(
    values_QM: NDArray[np.float64], others_QM: NDArray[np.float64], bootstrap: Bootstrap, depths: Sequence[int]
) -> dict[str, Any]:
    """Paired differences of two methods on the same queries, with intervals."""
    return numbers(values_QM - others_QM, bootstrap, measure_names(depths))


def numbers(values_QM: NDArray[np.float64], bootstrap: Bootstrap, names: Sequence[str]) -> dict[str, Any]:
    """Means and intervals of measures [Q, M] by their names."""
    means_M, ends = values_QM.mean(axis=0), bootstrap.interval(values_QM)
    found: dict[str, Any] = {"queries": len(values_QM)}
    for number, name in enumerate(names):
        low, high = ends[:, number]
        found[name] = {"mean": float(means_M[number]), "low": float(low), "high": float(high)}
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results.json's content."""
    about, methods = results["about"], results["methods"]
    measures = [name for name in _TABLE_MEASURES if name in methods[0]["overall"]]
    lines = [
        "# Fact tracing",
        "",
        f"{about['queries']:,} queries of {about['facts']:,} facts with gold sentences, {about['sentences']:,} "
        f"sentences; rankings end at {about['k']:,}. Gold by {about['gold_source']}; {_agreement(about)}.",
        f"In brackets: {about['level']:.0%} bootstrap intervals over queries. Ties: {about['ties']}.",
        "",
        *table(["method", *(title_of(name) for name in measures)], overall_rows(methods, measures)),
    ]
    if pairs := results.get("comparisons"):
        head = ["paired difference", *(title_of(name) for name in measures)]
        rows = [[f"{pair['of']} - {pair['from']}", *(with_interval(pair[name]) for name in measures)] for pair in pairs]
        lines += ["", "## Paired differences", "", *table(head, rows)]
    lines += group_tables(methods)
    if "categories" in methods[0]:
        lines += ["", *category_table(methods)]
    if fitted := [(item["name"], item["fitted"]) for item in methods if item["fitted"]]:
        lines += ["", "## Fitted", *(f"- {name}: {_fitted(values)}" for name, values in fitted)]
    return "\n".join(lines) + "\n"


def group_tables(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """MRR by frequency, own answer and relation, of what is known."""
    lines: list[str] = []
    for group, title in (("bucket", "frequency"), ("prediction", "the model's own answer"), ("relation", "relation")):
        found = methods[0]["by"].get(group, [])
        if group == "relation":
            found = [part for part in found if part["queries"] >= TABLE_QUERIES][:TABLE_RELATIONS]
        if not found:
            continue
        head = ["method", *(f"{part['label']} ({part['queries']:,})" for part in found)]
        # Groups stand in the same order for every method.
        rows = [[item["name"], *(mean(part["mrr"]) for part in item["by"][group][: len(found)])] for item in methods]
        lines += ["", f"## MRR by {title}", "Numbers of queries stand in parentheses.", "", *table(head, rows)]
    return lines


def _agreement(about: Mapping[str, Any]) -> str:
    both = about["gold_agreeing"] + about["gold_differing"]
    if not both:
        told = "no fact has both trex_sentences and fact_triples"
    else:
        told = (
            f"trex_sentences and fact_triples name the same sentences for {about['gold_agreeing']:,} of {both:,} facts"
        )
    return told + (f"; {about['without_gold']:,} facts without gold left out" if about["without_gold"] else "")


def overall_rows(methods: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[list[str]]:
    """One row for every method: its name, and the measures with intervals."""
    return [[item["name"], *(with_interval(item["overall"][name]) for name in measures)] for item in methods]


def _fitted(found: Mapping[str, Any]) -> str:
    parts = []
    for name, value in found.items():
        if isinstance(value, dict):
            parts.append(f"{name} " + ", ".join(f"{key} {number:g}" for key, number in value.items()))
        else:
            parts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    return "; ".join(parts)

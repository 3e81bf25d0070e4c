"""An evaluation on an open set: a large corpus in which nobody has marked what states a fact. Proponents are judged.

    facts, corpus ─► queries ─► every method's retrievals ─► entailment of the first `depth` ─► measures, categories

    OUT/results.json, results.md        as of `run`
    OUT/methods.png, .svg, ...          plots; `categories` parts the first proponents
    OUT/retrievals/                     what every method found down to k
    OUT/judged/                         the first `depth` of each list with `proponent_correct`, `proponent_ais_scores`
    OUT/entailment.jsonl                scores of an nli judge, kept batch by batch
    OUT/corpus/, predictions.json       as of `run`

    mrr, recall_at_k, precision_at_k    as of `measures`, down to the judged depth
    map                                 sum over hits of (hits up to i) / i, divided by the judged depth

The divisor of `map` is the depth, since nobody knows how many passages state the fact: it is 1 where all do, and does
not depend on what other methods found. Contract: as `run`; the corpus is never held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.evaluation.categories import CATEGORIES, DEPTH, category_table
from trackstar.evaluation.facts import Fact, FactSet
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.judging import Judged, Judging, Listed, agreement_sentence, category_shares
from trackstar.evaluation.measures import measure, measure_names, title_of
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import folder_name
from trackstar.evaluation.open_config import OpenConfig
from trackstar.evaluation.plots import draw_all
from trackstar.evaluation.predictions import correctness, model_files
from trackstar.evaluation.report import group_tables, groupings, numbers, overall_rows, parted
from trackstar.evaluation.retrieval import TIE_RULE, Retrieval
from trackstar.evaluation.run import run_methods
from trackstar.evaluation.selection import Selection
from trackstar.evaluation.sentence_files import stored_sentences
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Asked, Finished
from trackstar.evaluation.tables import table
from trackstar.records import retrieval_record
from trackstar.results import Query
from trackstar.storage import publish, publish_json


def evaluate_open(config: OpenConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Run every method, judge what it found, and write all files; returns what results.json holds.

    Raises:
        InvalidRequest, NotFound, Incompatible, CorruptArtifact: something that is given cannot be used as it is.
    """
    if config.predictions is not None:
        model_files(config.predictions.model)  # a folder that is not there shows at once
    sentences = stored_sentences(config.corpus, out / "corpus")
    facts = FactSet.read(config.facts, sentences, source=config.gold, bucket_starts=config.bucket_starts, open_set=True)
    drawn = Selection.draw(facts.facts, config, what="facts")
    evaluated = drawn.evaluated.facts
    stated = {fact.fact_id: frozenset(sentences.ids[place] for place in fact.gold) for fact in evaluated}
    judging = Judging(config.entailment, stated, out / "entailment.jsonl")
    queries = drawn.evaluated.queries
    # Methods see no gold, and their records tell none: what counts is what the judge says.
    selection = replace(drawn, evaluated=Asked(queries=queries), held_out=Asked(queries=()))
    finished = run_methods(
        config.methods,
        sentences,
        selection,
        out / "retrievals",
        k=config.k,
        query_set=Path(config.facts).stem,
        on_step=on_step,
    )
    lists = {
        name: _listed(queries, evaluated, known.evaluated, sentences, config.depth) for name, known in finished.items()
    }
    judged = judging.judge(lists, on_step)
    for name, known in finished.items():
        _write_judged(out, name, lists[name], known, judged, Path(config.facts).stem)
    right = correctness(config.predictions, out, evaluated, queries, on_step)
    results = _results(config, sentences, facts, evaluated, finished, lists, judged, right)
    publish_json(out / "results.json", results)
    publish(out / "results.md", markdown(results).encode())
    draw_all(results, out)
    return results


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results.json's content."""
    about, methods = results["about"], results["methods"]
    shown = ("mrr", "recall_at_10", "precision_at_1", "precision_at_10", "map")
    measures = [name for name in shown if name in methods[0]["overall"]]
    lines = [
        "# Open-set tracing",
        "",
        f"{about['queries']:,} queries of {about['facts']:,} facts, {about['sentences']:,} passages. Of every list the "
        f"first {about['depth']} are judged, by {about['judge']}. {agreement_sentence(about['agreement'])}".rstrip(),
        f"In brackets: {about['level']:.0%} bootstrap intervals over queries. Ties: {about['ties']}.",
        "",
        *table(["method", *(title_of(name) for name in measures)], overall_rows(methods, measures)),
        *group_tables(methods),
        "",
        *category_table(methods),
    ]
    return "\n".join(lines) + "\n"


def _listed(
    queries: Sequence[Query], facts: Sequence[Fact], found: Sequence[Retrieval], sentences: Sentences, depth: int
) -> list[Listed]:
    return [
        Listed(
            query=query,
            fact=fact,
            ids=[sentences.ids[place] for place in item.positions[:depth].tolist()],
            texts=[sentences.texts[place] for place in item.positions[:depth].tolist()],
        )
        for query, fact, item in zip(queries, facts, found, strict=True)
    ]


def _write_judged(
    out: Path, name: str, lists: Sequence[Listed], known: Finished, judged: Judged, query_set: str
) -> None:
    lines = []
    for one, item, scores_K, hits_K in zip(lists, known.evaluated, judged.scores[name], judged.hits(name), strict=True):
        record = retrieval_record(
            one.query,
            texts=one.texts,
            ids=one.ids,
            scores=item.scores[: len(one.ids)].tolist(),
            correct=hits_K.tolist(),
            ais_scores=scores_K.tolist(),
            query_set=query_set,
            extras={"method": name, "judge": judged.judge, "c4_frequency_bucket": one.fact.bucket},
        )
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    publish(out / "judged" / f"{folder_name(name)}.jsonl", "".join(lines).encode())


def _results(
    config: OpenConfig,
    sentences: Sentences,
    facts: FactSet,
    evaluated: Sequence[Fact],
    finished: Mapping[str, Finished],
    lists: Mapping[str, Sequence[Listed]],
    judged: Judged,
    right: Mapping[str, bool],
) -> dict[str, Any]:
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    groups = groupings(evaluated, right)
    # Coverage needs the number of all passages that state a fact.
    columns = [place for place, name in enumerate(measure_names(config.depths)) if not name.startswith("coverage")]
    names = [measure_names(config.depths)[place] for place in columns]
    category_depth = min(DEPTH, config.depth)
    methods: list[dict[str, Any]] = []
    first_QM: np.ndarray[Any, np.dtype[np.float64]] | None = None
    for settings in config.methods:
        hits = judged.hits(settings.name)
        values_QM = np.array([measure(hits_K, config.depth, config.depths) for hits_K in hits])[:, columns]
        first_QM = values_QM if first_QM is None else first_QM
        shares = category_shares(lists[settings.name], hits, category_depth)
        methods.append(
            {
                "name": settings.name,
                "kind": settings.kind,
                "settings": settings.model_dump(mode="json"),
                "fitted": dict(finished[settings.name].fitted),
                **parted(values_QM, groups, bootstrap, names),
                "against_first": numbers(values_QM - first_QM, bootstrap, names),
                "categories": numbers(shares, bootstrap, CATEGORIES),
            }
        )
    return {
        "about": {
            "queries": len(evaluated),
            "task_queries": config.task_queries,
            "facts": len(facts.facts),
            "annotated_facts": len(facts.facts) - facts.without_gold,
            "sentences": len(sentences),
            "corpus_digest": sentences.digest,
            "facts_digest": facts.digest,
            "k": config.k,
            "depth": config.depth,
            "category_depth": category_depth,
            "judge": judged.judge,
            "agreement": judged.agreement,
            "level": bootstrap.level,
            "ties": TIE_RULE,
            "predicted_right": sum(right.values()) if right else None,
        },
        "settings": config.model_dump(mode="json"),
        "methods": methods,
    }

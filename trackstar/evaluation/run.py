"""An evaluation of facts from its settings to its files. Read this file last.

    facts, sentences ─► queries ─► every method's retrievals ─► measures ─► results.json, table, plots

    OUT/results.json             settings, numbers with intervals, overall and by group
    OUT/results.md               tables
    OUT/methods.png, .svg, ...   plots
    OUT/retrievals/              what every method found, as records of the release
    OUT/predictions.json         the model's own answers, if asked for
    OUT/corpus/                  the corpus, as `sentence_files` keeps it
    OUT/effects.jsonl            what tail-patch measured, if asked for

Contract: the same settings on the same files give the same numbers, whether they are made at once or not: a method
whose settings, corpus, queries and index are the same as before is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trackstar.evaluation.categories import CATEGORIES, DEPTH, shares_of
from trackstar.evaluation.config import FactsConfig
from trackstar.evaluation.facts import FactSet
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.measures import measure_all
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import FusionSettings, MethodSettings
from trackstar.evaluation.methods import MethodMaker
from trackstar.evaluation.plots import draw_all
from trackstar.evaluation.predictions import correctness, model_files
from trackstar.evaluation.report import difference, groupings, markdown, numbers, summarise
from trackstar.evaluation.retrieval import TIE_RULE
from trackstar.evaluation.selection import Selection, digest_of_asked
from trackstar.evaluation.sentence_files import stored_sentences
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Asked, Finished, RetrievalStore
from trackstar.evaluation.tail_patch_report import draw_patches, patch_tables
from trackstar.evaluation.tail_patch_run import judge_retrievals
from trackstar.storage import digest_of, publish, publish_json

# Changes when a method's answers change under the same settings, so that none is taken from before.
FORMAT = 1


def evaluate_facts(config: FactsConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Run every method, judge it, and write all files; returns what results.json holds.

    Raises:
        InvalidRequest, NotFound, Incompatible, CorruptArtifact: something that is given cannot be used as it is.
    """
    if config.predictions is not None:
        model_files(config.predictions.model)  # a folder that is not there shows at once
    if config.tail_patch is not None:
        model_files(config.tail_patch.model)
    sentences = stored_sentences(config.corpus, out / "corpus")
    facts = FactSet.read(config.facts, sentences, source=config.gold, bucket_starts=config.bucket_starts)
    selection = Selection.draw(facts.facts, config)
    finished = run_methods(
        config.methods,
        sentences,
        selection,
        out / "retrievals",
        k=config.k,
        query_set=Path(config.facts).stem,
        on_step=on_step,
    )
    evaluated = selection.evaluated
    right = correctness(config.predictions, out, evaluated.facts, evaluated.queries, on_step)
    results = _results(config, sentences, facts, evaluated, finished, right)
    text = markdown(results)
    if config.tail_patch is not None:
        results["tail_patch"] = judge_retrievals(
            config.tail_patch,
            out,
            sentences,
            evaluated.queries,
            finished,
            lambda chosen: groupings([evaluated.facts[place] for place in chosen], right),
            Bootstrap(seed=config.seed, resamples=config.resamples),
            compare=config.compare,
            on_step=on_step,
        )
        text += "\n".join(["", "## Tail-patch", *patch_tables(results["tail_patch"]), ""])
        draw_patches(results["tail_patch"], out)
    publish_json(out / "results.json", results)
    publish(out / "results.md", text.encode())
    draw_all(results, out)
    return results


def run_methods(
    methods: Sequence[MethodSettings],
    sentences: Sentences,
    selection: Selection,
    folder: Path,
    *,
    k: int,
    query_set: str,
    on_step: OnStep = unheard,
) -> dict[str, Finished]:
    """What every method found, by name; taken from before where nothing it depends on has changed.

    All that methods depend on is looked at before the first is run, so that a wrong folder shows at once.

    Args:
        methods: in order.
        sentences: the corpus.
        selection: the queries.
        folder: where retrievals are kept.
        k: depth of the rankings.
        query_set: the records' name of the queries.
        on_step: progress.
    """
    asked = selection.asked
    store = RetrievalStore(folder, sentences, query_set=query_set)
    common = {
        "format": FORMAT,
        "corpus": sentences.digest,
        "evaluated": digest_of_asked(selection.evaluated),
        "held_out": digest_of_asked(selection.held_out),
        "k": k,
    }
    finished: dict[str, Finished] = {}
    maker = MethodMaker(sentences, selection, k, on_step)
    try:
        for settings in methods:
            if not isinstance(settings, FusionSettings):
                maker.identity(settings, finished)
        for settings in methods:
            identity = maker.identity(settings, finished)
            digest = digest_of({**common, "settings": settings.model_dump(mode="json"), "identity": identity})
            known = store.read(settings.name, digest)
            if known is None:
                method, fitted = maker.make(settings, finished)
                found = method.retrieve(asked.queries, k)
                known = store.write(settings.name, digest, found, selection.evaluated, selection.held_out, fitted)
            finished[settings.name] = known
    finally:
        maker.close()
    return finished


def _results(
    config: FactsConfig,
    sentences: Sentences,
    facts: FactSet,
    evaluated: Asked,
    finished: dict[str, Finished],
    right: dict[str, bool],
) -> dict[str, Any]:
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    groups = groupings(evaluated.facts, right)
    gold = [fact.gold for fact in evaluated.facts]
    methods: list[dict[str, Any]] = []
    values = {name: measure_all(known.evaluated, gold, config.depths) for name, known in finished.items()}
    for settings in config.methods:
        known, values_QM = finished[settings.name], values[settings.name]
        # By annotation: gold sentences are those that state the fact.
        listed = [
            [(sentences.texts[place], place in fact.gold) for place in item.positions[:DEPTH].tolist()]
            for item, fact in zip(known.evaluated, evaluated.facts, strict=True)
        ]
        methods.append(
            {
                "name": settings.name,
                "kind": settings.kind,
                "settings": settings.model_dump(mode="json"),
                "fitted": dict(known.fitted),
                **summarise(values_QM, groups, bootstrap, config.depths),
                "against_first": difference(values_QM, values[config.methods[0].name], bootstrap, config.depths),
                "categories": numbers(shares_of(evaluated.facts, listed), bootstrap, CATEGORIES),
            }
        )
    return {
        "about": {
            "queries": len(evaluated.queries),
            "held_out": config.held_out,
            "task_queries": config.task_queries,
            "facts": len(facts.facts),
            "without_gold": facts.without_gold,
            "gold_source": facts.source,
            "gold_agreeing": facts.agreeing,
            "gold_differing": facts.differing,
            "sentences": len(sentences),
            "corpus_digest": sentences.digest,
            "facts_digest": facts.digest,
            "k": config.k,
            "category_depth": min(DEPTH, config.k),
            "judge": "annotation",
            "level": bootstrap.level,
            "ties": TIE_RULE,
            "predicted_right": sum(right.values()) if right else None,
        },
        "settings": config.model_dump(mode="json"),
        "methods": methods,
        "comparisons": [
            {"of": one, "from": other, **difference(values[one], values[other], bootstrap, config.depths)}
            for one, other in config.compare
        ],
    }

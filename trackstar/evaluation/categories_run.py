"""Categories of what retrieval files hold, from settings to files: any JSONL in the release's format, and its facts.

    OUT/results.json, results.md        shares with intervals, by method
    OUT/categories.png, .svg            the paper's Figure 3
    OUT/entailment.jsonl                as of `open_set`

A record belongs to the fact of its `fact_id`, or where it has none of its `example_id`. Contract: as `run`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.categories import CATEGORIES, category_table
from trackstar.evaluation.entailment_settings import RecordsSettings
from trackstar.evaluation.facts import Fact, FactSet
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.json_lines import json_lines, texts_field
from trackstar.evaluation.judging import Judging, Listed, agreement_sentence, category_shares
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.open_config import CategoriesConfig
from trackstar.evaluation.plots import draw_categories, drawing, save
from trackstar.evaluation.report import numbers
from trackstar.evaluation.sentence_files import stored_sentences
from trackstar.evaluation.sentences import Sentences
from trackstar.results import Query
from trackstar.storage import file_digest, publish, publish_json

_THRESHOLD = 0.5


def evaluate_categories(config: CategoriesConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Judge the proponents of every file and write the shares of the categories; returns what results.json holds.

    Raises:
        InvalidRequest, NotFound, CorruptArtifact: something that is given cannot be used as it is.
    """
    sentences = Sentences.of([], []) if config.corpus is None else stored_sentences(config.corpus, out / "corpus")
    facts = FactSet.read(config.facts, sentences, open_set=True)
    stated = {
        fact.fact_id: {*fact.fields.get("trex_sentences", ()), *(sentences.ids[place] for place in fact.gold)}
        for fact in facts.facts
    }
    by_id = {fact.fact_id: fact for fact in facts.facts}
    settings = config.entailment
    # What records say themselves needs no judge.
    judging = None if isinstance(settings, RecordsSettings) else Judging(settings, stated, out / "entailment.jsonl")
    lists: dict[str, list[Listed]] = {}
    own_hits: dict[str, list[NDArray[np.bool_]]] = {}
    for name, path in config.retrievals.items():
        records = list(_records(Path(path), by_id, config, need_hits=judging is None))
        lists[name] = [listed for listed, _ in records]
        own_hits[name] = [hits_K for _, hits_K in records]
    judged = None if judging is None else judging.judge(lists, on_step)
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    methods = []
    for name, listed in lists.items():
        hits = own_hits[name] if judged is None else judged.hits(name)
        shares = category_shares(listed, hits, config.depth)
        if not len(shares):
            raise InvalidRequest(f"{config.retrievals[name]!r} holds no record that found anything")
        methods.append(
            {
                "name": name,
                "records": len(listed),
                "file": file_digest(Path(config.retrievals[name])),
                "categories": numbers(shares, bootstrap, CATEGORIES),
            }
        )
    results = {
        "about": {
            "facts": len(facts.facts),
            "facts_digest": facts.digest,
            "category_depth": config.depth,
            "judge": "the records themselves" if judged is None else judged.judge,
            "agreement": None if judged is None else judged.agreement,
            "level": bootstrap.level,
        },
        "settings": config.model_dump(mode="json"),
        "methods": methods,
    }
    publish_json(out / "results.json", results)
    publish(out / "results.md", markdown(results).encode())
    with drawing():
        save(draw_categories(results), out / "categories")
    return results


def markdown(results: Mapping[str, Any]) -> str:
    """The table of results.json's content."""
    about = results["about"]
    lines = [
        "# Categories of proponents",
        "",
        f"Shares of the first {about['category_depth']} proponents of a query, mean over queries for which something "
        f"was found; entailment by {about['judge']}. {agreement_sentence(about['agreement'])}".rstrip(),
        f"In brackets: {about['level']:.0%} bootstrap intervals over queries.",
        "",
        *category_table(results["methods"]),
    ]
    return "\n".join(lines) + "\n"


def _records(
    path: Path, facts: Mapping[str, Fact], config: CategoriesConfig, *, need_hits: bool
) -> Iterator[tuple[Listed, NDArray[np.bool_]]]:
    """Every record of a file, cut at the depth, and what it says of entailment itself (nothing unless needed)."""
    if not path.is_file():
        raise NotFound(f"there is no retrieval file {str(path)!r}")
    for place, record in json_lines(path, "a retrieval record"):
        texts, ids = (texts_field(record, place, name) for name in ("proponents", "proponent_ids"))
        if len(texts) != len(ids):
            raise InvalidRequest(f"{place}: {len(texts)} 'proponents' and {len(ids)} 'proponent_ids'")
        fact_id = record.get("fact_id", record.get("example_id"))
        fact = facts.get(str(fact_id))
        if fact is None:
            raise InvalidRequest(
                f"{place}: the fact {fact_id!r} is not in {config.facts!r}; give the facts of these records"
            )
        query = (
            fact.query(config.prompt)
            if config.entailment.by == "nli"
            else Query(query_id=fact.fact_id, prompt="", target="")
        )
        hits_K = _own_hits(record, place, len(ids)) if need_hits else np.zeros(0, dtype=np.bool_)
        yield (
            Listed(query=query, fact=fact, ids=ids[: config.depth], texts=texts[: config.depth]),
            hits_K[: config.depth],
        )


def _own_hits(record: Mapping[str, Any], place: str, count: int) -> NDArray[np.bool_]:
    for name, kind in (("proponent_correct", bool), ("proponent_ais_scores", (int, float))):
        found = record.get(name)
        if found is None:
            continue
        if not isinstance(found, list) or len(found) != count or not all(isinstance(value, kind) for value in found):
            raise InvalidRequest(f"{place}: the field {name!r} is not one value for each proponent")
        return np.array(found, dtype=np.float64) >= _THRESHOLD
    raise InvalidRequest(
        f"{place}: neither 'proponent_correct' nor 'proponent_ais_scores' is there; judge entailment by annotation, "
        "rules or nli"
    )

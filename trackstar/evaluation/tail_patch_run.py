"""Tail-patch of lists from files, from its settings to its files.

    OUT/results.json                settings, numbers with intervals by method, step, depth and group
    OUT/results.md                  tables, one for each step
    OUT/tail-patch.png, .svg        a panel for each step
    OUT/retrievals/METHOD.jsonl     the judged records as they were given, with the effects of their first proponents
                                    under trackstar.tail_patch
    OUT/effects.jsonl               what was measured, kept so that an interrupted run goes on

Contract: the same settings on the same files give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trackstar.errors import InvalidRequest
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import folder_name
from trackstar.evaluation.patch_settings import TailPatchConfig, TailPatchSettings
from trackstar.evaluation.patching import Measured, Patching, drawn, first_of
from trackstar.evaluation.released import files_of, groups_of, joined
from trackstar.evaluation.report import Grouping
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Finished
from trackstar.evaluation.tail_patch_report import draw_patches, patch_tables, summarise_patches
from trackstar.results import Query
from trackstar.storage import file_digest, publish, publish_json


def judge_retrievals(
    settings: TailPatchSettings,
    out: Path,
    sentences: Sentences,
    queries: Sequence[Query],
    finished: Mapping[str, Finished],
    groups: Callable[[Sequence[int]], Sequence[Grouping]],
    bootstrap: Bootstrap,
    *,
    compare: Sequence[tuple[str, str]] = (),
    on_step: OnStep = unheard,
) -> dict[str, Any]:
    """How much every method's first sentences move the model, on the same queries for all: a part of results.json.

    Args:
        settings: the model and its steps, how deep, and how many of the queries; drawn by the bootstrap's seed.
        out: folder of the evaluation.
        sentences: the corpus.
        queries: those that were evaluated.
        finished: what every method found for them.
        groups: of the queries with these numbers.
        bootstrap: how intervals are made.
        compare: pairs of methods whose difference is measured.
        on_step: progress.

    Raises:
        TrackstarError: as `Patching`.
    """
    chosen = drawn(len(queries), settings.queries, bootstrap.seed)
    depth = settings.depths[-1]
    lists = {
        name: [
            [sentences.texts[position] for position in found.evaluated[place].positions[:depth].tolist()]
            for place in chosen
        ]
        for name, found in finished.items()
    }
    asked = [queries[place] for place in chosen]
    measured = Patching(settings, out).measure(asked, first_of(lists, depth), on_step)
    return summarise_patches(measured, lists, groups(chosen), bootstrap, settings.depths, compare)


def evaluate_tail_patch(config: TailPatchConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Judge every file's lists and write all files; returns what results.json holds.

    Raises:
        NotFound, InvalidRequest: a file, a record or a query cannot be used as it is.
        TrackstarError: as `Patching`.
    """
    files = (
        files_of(config.retrievals)
        if isinstance(config.retrievals, str)
        else {file.name: Path(file.path) for file in config.retrievals}
    )
    records = joined(files)
    given = next(iter(records.values()))
    chosen = drawn(len(given), config.queries, config.seed)
    records = {name: [queries[place] for place in chosen] for name, queries in records.items()}
    queries = next(iter(records.values()))
    lists = {name: [query.fields["proponents"] for query in some] for name, some in records.items()}
    measured = Patching(config, out).measure(queries, first_of(lists, config.depths[-1]), on_step)
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    results = {
        "settings": config.model_dump(mode="json"),
        "files": {name: file_digest(path) for name, path in files.items()},
        "tail_patch": summarise_patches(measured, lists, groups_of(queries), bootstrap, config.depths),
    }
    for name, some in records.items():
        publish(out / "retrievals" / f"{folder_name(name)}.jsonl", _with_effects(some, measured, config.depths[-1]))
    publish_json(out / "results.json", results)
    publish(out / "results.md", "\n".join(["# Tail-patch", "", *patch_tables(results["tail_patch"]), ""]).encode())
    draw_patches(results["tail_patch"], out)
    return results


def _with_effects(records: Sequence[Query], measured: Measured, depth: int) -> bytes:
    lines = []
    for place, query in enumerate(records):
        extras = query.fields.get("trackstar") or {}
        if not isinstance(extras, dict):
            raise InvalidRequest(
                f"the record of the query {query.query_id!r} has a field 'trackstar' that is no object"
            )
        first = query.fields["proponents"][:depth]
        effects = {
            step: {
                "probability_change": [known[place][text].probability_change for text in first],
                "loss_change": [known[place][text].loss_change for text in first],
            }
            for step, known in measured.effects.items()
        }
        record = {**query.fields, "trackstar": {**extras, "tail_patch": effects}}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()

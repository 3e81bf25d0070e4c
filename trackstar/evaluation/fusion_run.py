"""A search for one list with the lexical method's MRR and the influence method's tail-patch, from settings to files.

    OUT/results.json             every rule on held-out and evaluated queries, paired differences from both parents
    OUT/results.md               tables
    OUT/frontier.png, .svg       MRR against tail-patch, a panel for each step
    OUT/retrievals/NAME.jsonl    the chosen rule's list of all evaluated queries, as records of the release
    OUT/effects.jsonl            what tail-patch measured, kept so that an interrupted run goes on

Contract: rules see ids and scores, never gold. The rule is chosen on held-out queries alone, where both measures are
taken: the one whose smallest paired difference, in standard errors, is the largest, of MRR from the lexical method's
and of tail-patch, under every step that decides, from the influence method's. Evaluated queries only report. The same
settings on the same files give the same bytes.

Legend: Q queries, D depths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.fusion_report import draw_frontier, fusion_tables, standing
from trackstar.evaluation.fusion_rules import Rule, rules
from trackstar.evaluation.fusion_settings import FusionConfig
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import folder_name
from trackstar.evaluation.patching import Patching, drawn
from trackstar.evaluation.predictions import model_files
from trackstar.evaluation.released import HELD_OUT, aligned, joined
from trackstar.evaluation.report import numbers
from trackstar.evaluation.retrieval import Retrieval
from trackstar.evaluation.tail_patch_report import measure_names, values_of
from trackstar.records import retrieval_record
from trackstar.results import Query
from trackstar.storage import file_digest, publish, publish_json

# Means over the same passages in another order differ by less; standings are cut off at the second.
_ROUNDING, _LARGEST = 1e-12, 1e9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Two methods' lists for one query; positions number the passages of both, those of the lexical list first."""

    query: Query
    lexical: Retrieval
    influence: Retrieval
    ids: Sequence[str]
    texts: Sequence[str]
    correct: Sequence[bool]

    @property
    def length(self) -> int:
        """How many passages a list keeps."""
        return max(len(self.lexical.positions), len(self.influence.positions))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranked:
    """What one rule makes of some queries: positions best first, and 1 / rank of the first gold passage, [Q]."""

    orders: Sequence[Sequence[int]]
    mrr_Q: NDArray[np.float64]

    def texts(self, pairs: Sequence[Pair]) -> list[list[str]]:
        """The lists' texts."""
        return [[pair.texts[number] for number in order] for pair, order in zip(pairs, self.orders, strict=True)]


def evaluate_fusion(config: FusionConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Try every rule, choose one, and write all files; returns what results.json holds.

    Raises:
        NotFound, InvalidRequest: the evaluation's files or the settings cannot be used as they are.
        TrackstarError: as `Patching`.
    """
    model_files(config.tail_patch.model)  # a folder that is not there shows at once
    evaluated, held_out, files = _read(config)
    patching = Patching(config.tail_patch, out)
    deciding_steps = list(patching.steps) if config.decided_by is None else [config.decided_by]
    if unknown := [name for name in deciding_steps if name not in patching.steps]:
        raise InvalidRequest(f"decided_by: there is no step {unknown[0]!r}, but {', '.join(map(repr, patching.steps))}")
    chosen = drawn(len(evaluated), config.tail_patch.queries, config.seed)
    judged = [evaluated[place] for place in chosen]
    deciding = [held_out[place] for place in drawn(len(held_out), config.held_out, config.seed)]
    depths = config.tail_patch.depths
    tried = [*_parents(config), *rules(config.families, depths[-1])]
    pairs = [*judged, *deciding]
    ranked = [_apply(rule, pairs) for rule in tried]
    wanted = [
        dict.fromkeys(pair.texts[number] for one in ranked for number in one.orders[place][: depths[-1]])
        for place, pair in enumerate(pairs)
    ]
    measured = patching.measure([pair.query for pair in pairs], wanted, on_step)
    values = [{name: values_of(measured, name, one.texts(pairs), depths) for name in measured.steps} for one in ranked]
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    found = [
        {
            "name": rule.name,
            "family": rule.family,
            "curve": rule.curve,
            **{
                part: _numbers(
                    one.mrr_Q[some],
                    ranked[0].mrr_Q[some],
                    {name: values_QM[some] for name, values_QM in own.items()},
                    {name: values_QM[some] for name, values_QM in values[1].items()},
                    depths,
                    bootstrap,
                )
                for part, some in (("held_out", slice(len(judged), None)), ("evaluated", slice(len(judged))))
            },
        }
        for rule, one, own in zip(tried, ranked, values, strict=True)
    ]
    # The first of the best, and not one of the parents.
    best = 2 + int(np.argmax([standing(item, deciding_steps) for item in found[2:]]))
    results: dict[str, Any] = {
        "settings": config.model_dump(mode="json"),
        "files": files,
        "about": {
            "lexical": config.lexical,
            "influence": config.influence,
            "evaluated": len(judged),
            "held_out": len(deciding),
            "depths": list(depths),
            "level": bootstrap.level,
            "decided_by": deciding_steps,
            "model_digest": measured.model,
            "steps": [{"name": name, "settings": one.model_dump(mode="json")} for name, one in measured.steps.items()],
        },
        "chosen": tried[best].name,
        "parents": found[:2],
        "rules": found[2:],
    }
    publish(out / "retrievals" / f"{folder_name(config.name)}.jsonl", _records(config, tried[best], evaluated))
    publish_json(out / "results.json", results)
    publish(out / "results.md", fusion_tables(results).encode())
    draw_frontier(results, out)
    return results


def _read(config: FusionConfig) -> tuple[list[Pair], list[Pair], dict[str, str]]:
    """The evaluated and the held-out pairs of lists, and digests of the files."""
    folder = Path(config.evaluation) / "retrievals"
    found: list[list[Pair]] = []
    digests: dict[str, str] = {}
    for ending in (".jsonl", HELD_OUT):
        files = {name: folder / f"{folder_name(name)}{ending}" for name in (config.lexical, config.influence)}
        for name, path in files.items():
            if not path.is_file() and ending == HELD_OUT and path.with_name(f"{folder_name(name)}.jsonl").is_file():
                raise InvalidRequest(
                    f"the evaluation {config.evaluation!r} has no held-out lists of {name!r} to choose a rule on; set "
                    "held_out above 0 in its settings and run it again"
                )
            if not path.is_file():
                raise NotFound(
                    f"the evaluation {config.evaluation!r} has no lists of a method {name!r}; give the folder that "
                    "eval facts wrote, and a method's name there"
                )
            digests[path.name] = file_digest(path)
        records = joined(files)
        found.append(
            [
                _pair(lexical, influence, files[config.lexical], files[config.influence])
                for lexical, influence in zip(*records.values(), strict=True)
            ]
        )
    return found[0], found[1], digests


def _pair(lexical: Query, influence: Query, lexical_path: Path, influence_path: Path) -> Pair:
    numbers_by_id: dict[str, int] = {}
    texts: list[str] = []
    correct: list[bool] = []
    parts = []
    for record, path in ((lexical, lexical_path), (influence, influence_path)):
        ids = aligned("proponent_ids", record, path, str)
        stated = aligned("proponent_correct", record, path, bool)
        for number, passage_id in enumerate(ids):
            if passage_id not in numbers_by_id:
                numbers_by_id[passage_id] = len(texts)
                texts.append(record.fields["proponents"][number])
                correct.append(stated[number])
        scores = aligned("proponent_scores", record, path, (int, float))
        parts.append(Retrieval.of(record.query_id, [numbers_by_id[one] for one in ids], scores))
    return Pair(
        query=lexical,
        lexical=parts[0],
        influence=parts[1],
        ids=list(numbers_by_id),
        texts=texts,
        correct=correct,
    )


def _parents(config: FusionConfig) -> list[Rule]:
    """Both methods as rules, so that all are measured alike."""
    return [
        Rule(name=config.lexical, family="parent", curve="", order=lambda lexical, _: lexical.positions.tolist()),
        Rule(name=config.influence, family="parent", curve="", order=lambda _, influence: influence.positions.tolist()),
    ]


def _apply(rule: Rule, pairs: Sequence[Pair]) -> Ranked:
    orders = [rule.order(pair.lexical, pair.influence)[: pair.length] for pair in pairs]
    mrr_Q = np.zeros(len(pairs))
    for place, (pair, order) in enumerate(zip(pairs, orders, strict=True)):
        gold = [rank for rank, number in enumerate(order, start=1) if pair.correct[number]]
        mrr_Q[place] = 1.0 / gold[0] if gold else 0.0
    return Ranked(orders=orders, mrr_Q=mrr_Q)


def in_errors(differences_Q: NDArray[np.float64]) -> float:
    """Mean of paired differences in standard errors of the mean; 0 if there is no difference beyond rounding."""
    mean = float(differences_Q.mean())
    if abs(mean) <= _ROUNDING:
        return 0.0
    spread = float(differences_Q.std(ddof=1)) if len(differences_Q) > 1 else 0.0
    return float(np.clip(mean * len(differences_Q) ** 0.5 / max(spread, _ROUNDING), -_LARGEST, _LARGEST))


def _numbers(
    mrr_Q: NDArray[np.float64],
    lexical_Q: NDArray[np.float64],
    patches: Mapping[str, NDArray[np.float64]],
    influence: Mapping[str, NDArray[np.float64]],
    depths: Sequence[int],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """One rule's measures on some queries, and how it stands against the parents under every step.

    Args:
        mrr_Q: the rule's.
        lexical_Q: the lexical method's.
        patches: the rule's tail-patch measures [Q, M] by step.
        influence: the influence method's.
        depths: of tail-patch.
        bootstrap: how intervals are made.
    """
    names = measure_names(depths)
    deepest = names[len(depths) - 1]
    gained_Q = mrr_Q - lexical_Q
    columns, titles = [mrr_Q[:, None], gained_Q[:, None]], ["mrr", "mrr_against_lexical"]
    standings = {}
    for step, values_QM in patches.items():
        differences_QM = values_QM - influence[step]
        columns += [values_QM, differences_QM]
        titles += [f"{step}/{name}" for name in names] + [f"{step}/against/{name}" for name in names]
        standings[step] = min(in_errors(gained_Q), in_errors(differences_QM[:, names.index(deepest)]))
    # Resamples are drawn once for all columns.
    found = numbers(np.concatenate(columns, axis=1), bootstrap, titles)
    return {
        "mrr": found["mrr"],
        "mrr_against_lexical": found["mrr_against_lexical"],
        "steps": {
            step: {
                **{name: found[f"{step}/{name}"] for name in names},
                "against_influence": {name: found[f"{step}/against/{name}"] for name in names},
            }
            for step in patches
        },
        "standing": standings,
        "at_least_both": {step: value >= 0 for step, value in standings.items()},
    }


def _records(config: FusionConfig, rule: Rule, pairs: Sequence[Pair]) -> bytes:
    """The rule's lists as records; scores are 1 / rank, as not every rule has its own."""
    lines = []
    for pair in pairs:
        order = rule.order(pair.lexical, pair.influence)[: pair.length]
        extras = pair.query.fields.get("trackstar")
        record = retrieval_record(
            pair.query,
            texts=[pair.texts[number] for number in order],
            ids=[pair.ids[number] for number in order],
            scores=[1.0 / rank for rank in range(1, len(order) + 1)],
            correct=[pair.correct[number] for number in order],
            query_set=str(pair.query.fields.get("query_set", "queries")),
            extras={**(extras if isinstance(extras, dict) else {}), "method": config.name, "rule": rule.name},
        )
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()

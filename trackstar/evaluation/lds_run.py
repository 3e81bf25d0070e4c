"""An evaluation by retraining from its settings to its files. Read this file last.

    facts, sentences ─► passages ─┬─► model trained on all ─► indexes ─► every method's scores ─┐
                                  └─► retrainings on subsets, and without first passages ───────┴─► LDS, rises

    OUT/results.json             settings, numbers with intervals
    OUT/results.md               tables
    OUT/lds.png, .svg, ...       plots
    OUT/retrievals/              each method's first passages, as records of the release
    OUT/corpus.jsonl             the passages
    OUT/model, OUT/indexes       the model trained on all of them, and indexes by it
    OUT/scores, OUT/runs         every method's scores of all passages; losses after each retraining

Contract: the same settings on the same files give the same numbers, whether they are made at once or not. A folder that
holds the model or an index of other settings is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import safe_open

from trackstar.engine import Engine, LocalEngine
from trackstar.evaluation.config import PredictionSettings
from trackstar.evaluation.facts import FactSet
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.lds import Removal, datamodeling_score, draw_subsets, loss_rises, plan_removals
from trackstar.evaluation.lds_config import LdsConfig
from trackstar.evaluation.lds_corpus import examples_of, passages_of, reduced, write_corpus
from trackstar.evaluation.lds_report import draw, markdown
from trackstar.evaluation.lds_training import checkpoint_folder, train_checkpoints
from trackstar.evaluation.measures import measure_all, measure_names
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import (
    InfluenceSettings,
    MethodSettings,
    TracInSettings,
    TrakSettings,
    folder_name,
)
from trackstar.evaluation.methods import MethodMaker
from trackstar.evaluation.own_indexes import build_own
from trackstar.evaluation.predictions import is_right, model_files, predict_all
from trackstar.evaluation.retraining import Experiment, make_experiment, retrain
from trackstar.evaluation.retrieval import TIE_RULE, Retrieval
from trackstar.evaluation.selection import Selection, digest_of_asked
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Finished, RetrievalStore
from trackstar.storage import digest_of, publish, publish_json

# Changes when scores change under the same settings, so that none is taken from before.
FORMAT = 1


def evaluate_lds(
    config: LdsConfig, out: Path, *, engine: Engine | None = None, on_step: OnStep = unheard
) -> dict[str, Any]:
    """Train, index, score, retrain, judge, and write all files; returns what results.json holds.

    Args:
        config: what to do.
        out: folder of the files; whoever does the retrainings must see it.
        engine: who does them; this process if None.
        on_step: progress.

    Raises:
        InvalidRequest, NotFound, Incompatible, CorruptArtifact: something that is given cannot be used as it is.
    """
    model_files(config.model)  # a folder that is not there shows at once
    whole = Sentences.read(config.corpus)
    facts = FactSet.read(config.facts, whole, source=config.gold, bucket_starts=config.bucket_starts)
    sentences, selection = reduced(whole, Selection.draw(facts.facts, config), config.distractors, config.seed)
    masks_SN = draw_subsets(len(sentences), count=config.subsets, fraction=config.fraction, seed=config.seed)
    corpus = write_corpus(sentences, out / "corpus.jsonl")
    experiment = make_experiment(
        config.model,
        passages_of(corpus, sentences, config.model),
        examples_of(selection.evaluated.queries, config.model),
        config.training,
        device=config.device,
    )
    train_checkpoints(experiment, out, {index.after for index in config.indexes.values()}, on_step)
    for name, index in config.indexes.items():
        checkpoint = str(checkpoint_folder(out, index.after))
        build_own(index, corpus, checkpoint, out / "indexes" / name, on_step)
    finished = _score(config, sentences, selection, out, on_step)
    num_queries = len(selection.evaluated.queries)
    removals = {
        depth: plan_removals(
            {
                name: [[sentences.ids[position] for position in item.positions[:depth]] for item in found.evaluated]
                for name, found in finished.items()
            },
            sentences.ids,
            depth=depth,
            queries_per_run=config.queries_per_run,
        )
        for depth in config.remove
    }
    losses = _retrain(experiment, masks_SN, removals, out / "runs", engine or LocalEngine(), on_step)
    answers = predict_all(
        PredictionSettings(model=str(checkpoint_folder(out, None)), device=config.device),
        selection.evaluated.queries,
        on_step,
    )
    right = sum(is_right(answers[fact.fact_id], fact.targets) for fact in selection.evaluated.facts)
    results = _results(config, sentences, selection, finished, removals, masks_SN, losses)
    results["about"] |= {
        "queries": num_queries,
        "answered_right": right,
        "corpus_digest": sentences.digest,
        "facts_digest": facts.digest,
    }
    publish_json(out / "results.json", results)
    publish(out / "results.md", markdown(results).encode())
    draw(results, out)
    return results


def _score(
    config: LdsConfig, sentences: Sentences, selection: Selection, out: Path, on_step: OnStep
) -> dict[str, Finished]:
    """What every method found, down to the last passage; its first ones are written as records."""
    store = RetrievalStore(out / "retrievals", sentences, query_set=Path(config.facts).stem)
    asked, cut = selection.asked, len(selection.evaluated.queries)
    common = {
        "format": FORMAT,
        "corpus": sentences.digest,
        "evaluated": digest_of_asked(selection.evaluated),
        "held_out": digest_of_asked(selection.held_out),
        "k": config.k,
    }
    finished: dict[str, Finished] = {}
    maker = MethodMaker(sentences, selection, len(sentences), on_step)
    try:
        for given in config.methods:
            settings = _at_home(given, out / "indexes")
            identity = maker.identity(settings, finished)
            digest = digest_of({**common, "settings": given.model_dump(mode="json"), "identity": identity})
            path = out / "scores" / f"{folder_name(given.name)}.safetensors"
            known = _read_scores(path, digest)
            if known is None or store.read(given.name, digest) is None:
                method, fitted = maker.make(settings, finished)
                found = method.retrieve(asked.queries, len(sentences))
                store.write(
                    given.name,
                    digest,
                    [
                        Retrieval.of(item.query_id, item.positions[: config.k], item.scores[: config.k])
                        for item in found
                    ],
                    selection.evaluated,
                    selection.held_out,
                    fitted,
                )
                _write_scores(path, digest, _scores(found, len(sentences)), fitted)
                known = _read_scores(path, digest)
                assert known is not None
            scores_QN, fitted = known
            found = [_retrieval(query.query_id, row) for query, row in zip(asked.queries, scores_QN, strict=True)]
            finished[given.name] = Finished(evaluated=found[:cut], held_out=found[cut:], fitted=fitted, digest=digest)
    finally:
        maker.close()
    return finished


def _at_home(settings: MethodSettings, folder: Path) -> MethodSettings:
    """The same method with the folders of its indexes in place of their names."""
    match settings:
        case InfluenceSettings():
            return settings.model_copy(update={"index": str(folder / settings.index)})
        case TrakSettings() | TracInSettings():
            return settings.model_copy(update={"indexes": tuple(str(folder / name) for name in settings.indexes)})
        case _:
            return settings


def _scores(found: Sequence[Retrieval], num_sentences: int) -> NDArray[np.float64]:
    """Scores [Q, N] of rankings that go to the end; NaN for what a method does not rank."""
    scores_QN = np.full((len(found), num_sentences), np.nan)
    for scores_N, item in zip(scores_QN, found, strict=True):
        scores_N[item.positions] = item.scores
    return scores_QN


def _retrieval(query_id: str, scores_N: NDArray[np.float64]) -> Retrieval:
    ranked = np.flatnonzero(~np.isnan(scores_N))
    order = ranked[np.lexsort((ranked, -scores_N[ranked]))]
    return Retrieval.of(query_id, order, scores_N[order])


def _write_scores(path: Path, digest: str, scores_QN: NDArray[np.float64], fitted: Mapping[str, Any]) -> None:
    # Several entries would be written in any order.
    about = {"about": json.dumps({"digest": digest, "fitted": fitted})}
    publish(path, safetensors.numpy.save({"scores": scores_QN}, metadata=about))


def _read_scores(path: Path, digest: str) -> tuple[NDArray[np.float64], dict[str, Any]] | None:
    if not path.is_file():
        return None
    with safe_open(path, "np") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        if about.get("digest") != digest:
            return None
        return file.get_tensor("scores"), about["fitted"]


def _retrain(
    experiment: Experiment,
    masks_SN: NDArray[np.bool_],
    removals: Mapping[int, Mapping[str, Removal]],
    folder: Path,
    engine: Engine,
    on_step: OnStep,
) -> dict[Any, NDArray[np.float64]]:
    """Losses [R, Q] after training on everything (None), on the subsets ("subsets"), and by depth and method."""
    runs: dict[Any, list[Sequence[int]]] = {
        None: [range(masks_SN.shape[1])],
        "subsets": [np.flatnonzero(mask_N).tolist() for mask_N in masks_SN],
    }
    for depth, by_method in removals.items():
        runs |= {(depth, name): list(removal.kept) for name, removal in by_method.items()}
    losses_RQ = retrain(
        experiment,
        [kept for some in runs.values() for kept in some],
        folder,
        engine,
        on_run=lambda done, total: on_step("retraining", done, total),
    )
    cuts = np.cumsum([len(some) for some in runs.values()])[:-1]
    return dict(zip(runs, np.split(losses_RQ, cuts), strict=True))


def _results(
    config: LdsConfig,
    sentences: Sentences,
    selection: Selection,
    finished: Mapping[str, Finished],
    removals: Mapping[int, Mapping[str, Removal]],
    masks_SN: NDArray[np.bool_],
    losses: Mapping[Any, NDArray[np.float64]],
) -> dict[str, Any]:
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    whole_Q = losses[None][0]
    gold = [fact.gold for fact in selection.evaluated.facts]
    mrr = measure_names(config.depths).index("mrr")
    first_Q: NDArray[np.float64] | None = None
    methods: list[dict[str, Any]] = []
    for settings in config.methods:
        found = finished[settings.name]
        scores_QN = np.nan_to_num(_scores(found.evaluated, len(sentences))).astype(np.float32)
        judged = datamodeling_score(scores_QN, masks_SN, losses["subsets"], bootstrap=bootstrap)
        first_Q = judged.values_Q if first_Q is None else first_Q
        methods.append(
            {
                "name": settings.name,
                "kind": settings.kind,
                "settings": settings.model_dump(mode="json"),
                "fitted": dict(found.fitted),
                "lds": judged.over_queries,
                "lds_over_subsets": judged.over_subsets,
                "lds_against_first": bootstrap.numbers(judged.values_Q - first_Q),
                "mrr": bootstrap.numbers(measure_all(found.evaluated, gold, config.depths)[:, mrr]),
                "removals": [
                    {
                        "depth": depth,
                        "removed": removals[depth][settings.name].num_removed,
                        "rise": bootstrap.numbers(
                            loss_rises(removals[depth][settings.name], losses[depth, settings.name], whole_Q)
                        ),
                    }
                    for depth in config.remove
                ],
            }
        )
    return {
        "about": {
            "sentences": len(sentences),
            "subsets": config.subsets,
            "kept_by_a_subset": int(masks_SN[0].sum()),
            "retrainings": len(
                {tuple(kept) for by in removals.values() for removal in by.values() for kept in removal.kept}
            )
            + config.subsets
            + 1,
            "loss": float(whole_Q.mean()),
            "loss_on_subsets": float(losses["subsets"].mean()),
            "queries_per_run": config.queries_per_run,
            "level": bootstrap.level,
            "ties": TIE_RULE,
        },
        "settings": config.model_dump(mode="json"),
        "methods": methods,
    }

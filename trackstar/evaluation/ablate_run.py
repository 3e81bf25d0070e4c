"""An ablation from its settings to its files: the paper's Figure 2.

    axis d        quality against coordinates of a row, by one checkpoint
    axis steps    against optimizer steps, by the checkpoints of one run
    axis size     against parameters, by checkpoints of several sizes

    OUT/results.json             settings, numbers with intervals at every point
    OUT/results.md               tables
    OUT/ablation.png, .svg       the three panels
    OUT/retrievals/              what was found at every point, as records of the release
    OUT/indexes/                 the index of every point
    OUT/answers/                 every checkpoint's own answers

Contract: all points answer the same queries, so their intervals are of the same resamples. The same settings on the
same files give the same numbers, whether they are made at once or not; a point that several axes share is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest
from trackstar.evaluation.ablate_config import AblateConfig
from trackstar.evaluation.ablate_report import draw, markdown
from trackstar.evaluation.config import PredictionSettings
from trackstar.evaluation.facts import FactSet
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.measures import measure_all, measure_names
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import InfluenceSettings
from trackstar.evaluation.own_indexes import RowsSettings, build_own
from trackstar.evaluation.predictions import is_right, model_files, predict_all
from trackstar.evaluation.report import numbers
from trackstar.evaluation.retrieval import TIE_RULE
from trackstar.evaluation.run import run_methods
from trackstar.evaluation.selection import Selection
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Finished
from trackstar.index_config import ProjectionConfig
from trackstar.model_size import model_size
from trackstar.storage import digest_of, publish, publish_json, read_json

# Of the paper: 8 blocks of neighbouring layers, attention and MLP apart.
_LAYER_BLOCKS = 8
# What says where a checkpoint stands on an axis.
_PLACES = {"steps": "steps", "size": "parameters"}
# Changes when answers change under the same settings, so that none is taken from before.
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One index: of a checkpoint's folder, with rows of `dim` coordinates."""

    model: str
    dim: int

    @property
    def name(self) -> str:
        """Of its folder and its method."""
        return f"{_short_name(self.model)}-d{self.dim}"


def _short_name(folder: str) -> str:
    """Of a checkpoint, for files; folders of the same name elsewhere have another."""
    return f"{Path(folder).resolve().name[:32]}-{digest_of(folder)[:8]}"


def projection_of(dim: int, num_layers: int, layer_blocks: int | None = None, seed: int = 0) -> ProjectionConfig:
    """How d coordinates are spread: over {attention, MLP} of each layer block, in blocks of rows x cols.

    Args:
        dim: d.
        num_layers: of the model.
        layer_blocks: the largest power of two of at most 8 and of the model's layers if None.
        seed: of the projection.

    Raises:
        InvalidRequest: d is not so many blocks of r x r or r x 2r coordinates.
    """
    count = min(layer_blocks or 1 << (min(_LAYER_BLOCKS, num_layers).bit_length() - 1), num_layers)
    each, rest = divmod(dim, 2 * count)
    rows = int(np.sqrt(each))
    while rows and each % rows:
        rows -= 1
    if rest or not rows or each // rows > 2 * rows:
        raise InvalidRequest(
            f"d = {dim:,} is not {2 * count} blocks ({count} layer blocks x attention and MLP) of rows x cols in whole "
            f"numbers, with as many cols as rows or twice as many; {2 * count} times a power of two is"
        )
    return ProjectionConfig(layer_blocks=count, rows=rows, cols=each // rows, seed=seed)


def evaluate_ablation(config: AblateConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Index and evaluate every point, and write all files; returns what results.json holds.

    Raises:
        InvalidRequest, NotFound, Incompatible, CorruptArtifact: something that is given cannot be used as it is.
    """
    axes = {
        "d": [Point(model=config.model, dim=dim) for dim in config.axes.d],
        "steps": [Point(model=folder, dim=config.d) for folder in config.axes.steps],
        "size": [Point(model=folder, dim=config.d) for folder in config.axes.size],
    }
    points = list(dict.fromkeys(point for some in axes.values() for point in some))
    # What cannot be made shows before anything is.
    about = {model: _about(model) for model in dict.fromkeys(point.model for point in points)}
    rows = {point: _rows(config, point, about[point.model]["layers"]) for point in points}
    _check_places("steps", config.axes.steps, [about[folder]["steps"] for folder in config.axes.steps])
    sentences = Sentences.read(config.corpus)
    facts = FactSet.read(config.facts, sentences, source=config.gold, bucket_starts=config.bucket_starts)
    selection = Selection.draw(facts.facts, config)
    found: dict[Point, Finished] = {}
    for point in points:
        index = out / "indexes" / point.name
        build_own(rows[point], config.corpus, point.model, index, on_step)
        method = InfluenceSettings(
            name=point.name,
            kind="influence",
            index=str(index),
            device=config.rows.device,
            trust_remote_code=config.rows.trust_remote_code,
            mix=config.mix,
            unit_norm=config.unit_norm,
        )
        # One at a time: each holds the R of its index.
        retrievals, query_set = out / "retrievals", Path(config.facts).stem
        finished = run_methods(
            [method], sentences, selection, retrievals, k=config.k, query_set=query_set, on_step=on_step
        )
        found[point] = finished[point.name]
    for model in about:
        about[model]["answers"] = _answered(config, model, selection, out / "answers", on_step)
    results = _results(config, selection, axes, found, about, rows)
    results["about"] |= {
        "facts": len(facts.facts),
        "sentences": len(sentences),
        "corpus_digest": sentences.digest,
        "facts_digest": facts.digest,
    }
    publish_json(out / "results.json", results)
    publish(out / "results.md", markdown(results).encode())
    draw(results, out)
    return results


def _about(model: str) -> dict[str, Any]:
    """Layers, parameters, and what training left: steps, tokens and held-out loss, None where it does not say."""
    model_files(model)
    layers, parameters = model_size(model)
    path = Path(model) / "trainer_state.json"
    state = read_json(path) if path.is_file() else {}
    losses = [entry["eval_loss"] for entry in state.get("log_history", []) if "eval_loss" in entry]
    return {
        "layers": layers,
        "parameters": parameters,
        "steps": state.get("global_step"),
        "tokens": state.get("num_input_tokens_seen") or None,
        "held_out_loss": losses[-1] if losses else None,
    }


def _rows(config: AblateConfig, point: Point, num_layers: int) -> RowsSettings:
    given = config.rows.projection
    projection = projection_of(point.dim, num_layers, given.layer_blocks, given.seed)
    return config.rows.model_copy(update={"projection": projection})


def _check_places(axis: str, folders: Sequence[str], places: Sequence[int | None]) -> None:
    """Every checkpoint of an axis has a place of its own on it."""
    for folder, place in zip(folders, places, strict=True):
        if place is None:
            raise InvalidRequest(
                f"the checkpoint {folder!r} has no trainer_state.json that says after how many steps it was saved; "
                f"leave it out of the axis {axis}"
            )
    if len(set(places)) < len(places):
        raise InvalidRequest(f"two checkpoints of the axis {axis} were saved after the same number of steps")


def _answered(
    config: AblateConfig, model: str, selection: Selection, folder: Path, on_step: OnStep
) -> NDArray[np.float64]:
    """Whether the model answers each query rightly, 0 or 1 [Q]; its answers are kept."""
    settings = PredictionSettings(
        model=model,
        device=config.rows.device,
        trust_remote_code=config.rows.trust_remote_code,
        max_new_tokens=config.max_new_tokens,
    )
    queries = selection.evaluated.queries
    asked = [[query.query_id, query.prompt] for query in queries]
    digest = digest_of([_FORMAT, model_files(model), asked, config.max_new_tokens])
    path = folder / f"{_short_name(model)}.json"
    known = read_json(path) if path.is_file() else {}
    if known.get("digest") != digest:
        known = {"digest": digest, "answers": predict_all(settings, queries, on_step)}
        publish_json(path, known)
    right = [is_right(known["answers"][fact.fact_id], fact.targets) for fact in selection.evaluated.facts]
    return np.array(right, dtype=np.float64)


def _results(
    config: AblateConfig,
    selection: Selection,
    axes: Mapping[str, Sequence[Point]],
    found: Mapping[Point, Finished],
    about: Mapping[str, Mapping[str, Any]],
    rows: Mapping[Point, RowsSettings],
) -> dict[str, Any]:
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    gold = [fact.gold for fact in selection.evaluated.facts]
    names = measure_names(config.depths)

    def measured(at: int, point: Point) -> dict[str, Any]:
        model = about[point.model]
        return {
            "at": at,
            "name": point.name,
            "model": point.model,
            "d": point.dim,
            "projection": rows[point].projection.model_dump(mode="json"),
            **{name: model[name] for name in ("parameters", "steps", "tokens", "held_out_loss")},
            "accuracy": bootstrap.numbers(model["answers"]),
            "fitted": dict(found[point].fitted),
            "quality": numbers(measure_all(found[point].evaluated, gold, config.depths), bootstrap, names),
        }

    panels = []
    for axis, some in axes.items():
        at = [point.dim if axis == "d" else about[point.model][_PLACES[axis]] for point in some]
        order = sorted(range(len(some)), key=at.__getitem__)
        if order:
            panels.append({"axis": axis, "points": [measured(at[number], some[number]) for number in order]})
    return {
        "about": {
            "queries": len(selection.evaluated.queries),
            "task_queries": config.task_queries,
            "k": config.k,
            "level": bootstrap.level,
            "ties": TIE_RULE,
        },
        "settings": config.model_dump(mode="json"),
        "axes": panels,
    }

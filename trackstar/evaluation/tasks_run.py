"""An evaluation of tasks from its settings to its files.

    corpus, prompt sets ─► queries ─► every method's retrievals ─► overlap, distinctness, tail-patch

    OUT/results.json, results.md        numbers with intervals by task and method
    OUT/overlap.png, shared.png, ...    plots, as .svg too; tail-patch if asked for
    OUT/retrievals/                     what every method found, as records of the release; `query_set` is the task
    OUT/predictions.json, losses.json   what the model answers, and its losses; OUT/wrong/ what it answers to facts
    OUT/effects.jsonl                   what tail-patch measured
    OUT/corpus/                         as of `run`

Nobody has marked which passages help with these tasks, so what is told of lists is what they are like, and what they
do:

    target_words    share of the target's different words that occur in one of the first `depth` passages
    overlap         share of the query's different words that occur in a passage, mean over the first `depth`
    shared          of two methods: share of the first `depth` passages that both found
    tail-patch      as of `tail_patch_judge`

Contract: as `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.lexical import words_in
from trackstar.evaluation.method import OnStep, text_of, unheard
from trackstar.evaluation.method_settings import folder_name
from trackstar.evaluation.plots import draw_cells, drawing, save
from trackstar.evaluation.predictions import kept_answers, model_files
from trackstar.evaluation.report import Grouping, numbers, parted
from trackstar.evaluation.retrieval import TIE_RULE
from trackstar.evaluation.run import run_methods
from trackstar.evaluation.selection import Selection
from trackstar.evaluation.sentence_files import stored_sentences
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Asked, Finished
from trackstar.evaluation.tables import mean, short, table, with_interval
from trackstar.evaluation.tail_patch_report import draw_patches, patch_tables
from trackstar.evaluation.tail_patch_run import judge_retrievals
from trackstar.evaluation.task_model import measure_model
from trackstar.evaluation.task_settings import TasksConfig
from trackstar.evaluation.tasks import Task, read_task
from trackstar.results import Query
from trackstar.storage import publish, publish_json

_MEASURES = ("target_words", "overlap")


def evaluate_tasks(config: TasksConfig, out: Path, *, on_step: OnStep = unheard) -> dict[str, Any]:
    """Run every method on every task and write all files; returns what results.json holds.

    Raises:
        InvalidRequest, NotFound, Incompatible, CorruptArtifact: something that is given cannot be used as it is.
    """
    for given in (config.predictions, config.tail_patch):
        if given is not None:
            model_files(given.model)  # a folder that is not there shows at once
    tasks = [_read(config, number, out, on_step) for number in range(len(config.tasks))]
    sentences = stored_sentences(config.corpus, out / "corpus")
    queries = [item.query for task in tasks for item in task.items]
    group = Grouping(
        name="task",
        labels=tuple(task.name for task in tasks for _ in task.items),
        order=tuple(task.name for task in tasks),
    )
    nothing = Asked(queries=())
    finished = run_methods(
        config.methods,
        sentences,
        Selection(evaluated=Asked(queries=queries), held_out=nothing, task=nothing),
        out / "retrievals",
        k=config.k,
        query_set="tasks",
        on_step=on_step,
    )
    bootstrap = Bootstrap(seed=config.seed, resamples=config.resamples)
    results: dict[str, Any] = {
        "about": {
            "queries": len(queries),
            "sentences": len(sentences),
            "corpus_digest": sentences.digest,
            "k": config.k,
            "depth": config.depth,
            "level": bootstrap.level,
            "ties": TIE_RULE,
        },
        "settings": config.model_dump(mode="json"),
        "tasks": _tasks(config, out, tasks, bootstrap, on_step),
        "methods": _methods(config, sentences, queries, finished, group, bootstrap),
        "shared": _shared(config, finished, group),
    }
    text = markdown(results)
    if config.tail_patch is not None:
        results["tail_patch"] = judge_retrievals(
            config.tail_patch,
            out,
            sentences,
            queries,
            finished,
            lambda chosen: [group.part(chosen)],
            bootstrap,
            on_step=on_step,
        )
        text += "\n".join(["", "## Tail-patch", *patch_tables(results["tail_patch"]), ""])
        draw_patches(results["tail_patch"], out)
    publish_json(out / "results.json", results)
    publish(out / "results.md", text.encode())
    _draw(results, out)
    return results


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results.json's content, tail-patch aside."""
    about, tasks, methods = results["about"], results["tasks"], results["methods"]
    depth = about["depth"]
    lines = [
        "# Tasks",
        "",
        f"{about['queries']:,} queries of {len(tasks):,} tasks, {about['sentences']:,} passages; of every list the "
        f"first {depth} count.",
        f"In brackets: {about['level']:.0%} bootstrap intervals over queries. Ties: {about['ties']}.",
        "",
    ]
    if "model" in tasks[0]:
        columns = {
            "accuracy": "accuracy",
            "accuracy_per_token": "accuracy, loss per token",
            "loss_per_token": "loss of a target token (nats)",
        }
        rows = [
            [f"{task['name']} ({task['queries']:,})", task["grading"]]
            + [with_interval(task["model"][name]) if name in task["model"] else "" for name in columns]
            for task in tasks
        ]
        lines += ["## The model", "", *table(["task", "graded by", *columns.values()], rows), ""]
    for measure, title in zip(
        _MEASURES,
        (f"Share of the target's words in the first {depth}", "Share of the query's words in a passage"),
        strict=True,
    ):
        head = ["method", *(f"{task['name']} ({task['queries']:,})" for task in tasks)]
        rows = [[item["name"], *(mean(part[measure]) for part in item["by"]["task"])] for item in methods]
        lines += [f"## {title}", "", *table(head, rows), ""]
    names = [item["name"] for item in methods]
    lines += [f"## Share of the first {depth} that two methods have in common", ""]
    rows = [
        [name, *(short(value) for value in row)] for name, row in zip(names, results["shared"]["overall"], strict=True)
    ]
    lines += [*table(["method", *names], rows)]
    return "\n".join(lines) + "\n"


def _read(config: TasksConfig, number: int, out: Path, on_step: OnStep) -> Task:
    settings = config.tasks[number]

    def answers(queries: Sequence[Query]) -> Mapping[str, str]:
        assert config.predictions is not None
        path = out / "wrong" / f"{folder_name(settings.name)}-{number}.json"
        return kept_answers(config.predictions, path, queries, on_step)

    return read_task(settings, answers)


def _tasks(
    config: TasksConfig, out: Path, tasks: Sequence[Task], bootstrap: Bootstrap, on_step: OnStep
) -> list[dict[str, Any]]:
    found = [{"name": task.name, "queries": len(task.items), "grading": task.grading} for task in tasks]
    if config.predictions is None:
        return found
    measured = measure_model(config.predictions, out, tasks, on_step)
    return [
        {**task, "model": numbers(values_QM, bootstrap, names)}
        for task, (names, values_QM) in zip(found, measured, strict=True)
    ]


def _methods(
    config: TasksConfig,
    sentences: Sentences,
    queries: Sequence[Query],
    finished: Mapping[str, Finished],
    group: Grouping,
    bootstrap: Bootstrap,
) -> list[dict[str, Any]]:
    methods = []
    for settings in config.methods:
        known = finished[settings.name]
        values_QM = np.array(
            [
                overlaps(query, [sentences.texts[place] for place in item.positions[: config.depth].tolist()])
                for query, item in zip(queries, known.evaluated, strict=True)
            ]
        )
        methods.append(
            {
                "name": settings.name,
                "kind": settings.kind,
                "settings": settings.model_dump(mode="json"),
                "fitted": dict(known.fitted),
                **parted(values_QM, [group], bootstrap, _MEASURES),
            }
        )
    return methods


def overlaps(query: Query, texts: Sequence[str]) -> tuple[float, float]:
    """`target_words` and `overlap` of one query and the passages found for it; 0 where there is none or no word."""
    target, asked = set(words_in(query.target)), set(words_in(text_of(query)))
    passages = [set(words_in(text)) for text in texts]
    found = set[str]().union(*passages)
    return (
        len(target & found) / len(target) if target else 0.0,
        float(np.mean([len(asked & words) / len(asked) for words in passages])) if passages and asked else 0.0,
    )


def shared_share(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Share of two lists' passages that both hold, by the longer one."""
    return len(np.intersect1d(first, second)) / max(1, len(first), len(second))


def _shared(config: TasksConfig, finished: Mapping[str, Finished], group: Grouping) -> dict[str, Any]:
    """Mean share that two methods have in common, [method][method], overall and by task."""
    lists = [[item.positions[: config.depth] for item in finished[one.name].evaluated] for one in config.methods]
    shares_QMM = np.array(
        [
            [[shared_share(one[place], other[place]) for other in lists] for one in lists]
            for place in range(len(group.labels))
        ]
    )
    labels = np.array(group.labels)
    return {
        "overall": shares_QMM.mean(axis=0).tolist(),
        "by": {name: shares_QMM[labels == name].mean(axis=0).tolist() for name in group.order},
    }


def _draw(results: Mapping[str, Any], folder: Path) -> None:
    methods, tasks, depth = results["methods"], results["tasks"], results["about"]["depth"]
    names = [item["name"] for item in methods]
    words = np.array([[part["target_words"]["mean"] for part in item["by"]["task"]] for item in methods])
    columns = [f"{task['name']}\n({task['queries']:,})" for task in tasks]
    shared = np.array(results["shared"]["overall"])
    title = f"Share of the target's words in the first {depth} passages"
    with drawing():
        save(draw_cells(words, names, columns, title, "queries in parentheses"), folder / "overlap")
        title = f"Share of the first {depth} passages that two methods have in common"
        wrapped = [name.replace(" ", "\n", 1) for name in names]
        caption = f"mean over {results['about']['queries']:,} queries"
        save(draw_cells(shared, names, wrapped, title, caption), folder / "shared")

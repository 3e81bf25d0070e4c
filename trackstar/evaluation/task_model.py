"""What the model itself makes of a task: which choice it prefers, what it answers, how surprised it is by the target.

    accuracy              choices: the right one has the lowest summed loss; else the greedy answer is right
    accuracy_per_token    choices: the right one has the lowest mean loss of a token
    loss, loss_per_token  of the target given the prompt, in nats

Ties go to the earlier choice. Losses and answers are kept by a digest of all they depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trackstar.evaluation.config import PredictionSettings
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.predictions import kept_answers, model_files
from trackstar.evaluation.tasks import Task, is_answered
from trackstar.results import Query
from trackstar.storage import digest_of, publish_json, read_json

# Changes when losses change under the same settings, so that none is taken from before.
_FORMAT = 1


def measure_model(
    settings: PredictionSettings, out: Path, tasks: Sequence[Task], on_step: OnStep = unheard
) -> list[tuple[list[str], NDArray[np.float64]]]:
    """Names and values [Q, M] of what is measured, for every task.

    Args:
        settings: the model.
        out: where losses and answers are kept.
        tasks: what it is asked.
        on_step: progress.

    Raises:
        InvalidRequest: a prompt or a target cannot be tokenised.
    """
    answered = [item.query for task in tasks if task.grading in ("number", "words") for item in task.items]
    answers = kept_answers(settings, out / "predictions.json", answered, on_step) if answered else {}
    losses = _kept_losses(settings, out / "losses.json", tasks, on_step)
    return [_values(task, answers, losses) for task in tasks]


def _values(
    task: Task, answers: Mapping[str, str], losses: Mapping[str, Sequence[Sequence[float]]]
) -> tuple[list[str], NDArray[np.float64]]:
    rows = []
    for item in task.items:
        query = item.query
        # Of every choice or the target alone: summed loss and number of tokens.
        found = np.array(losses[query.query_id], dtype=np.float64)
        right = item.choices.index(query.target) if item.choices else 0
        per_token = found[:, 0] / found[:, 1]
        row = [found[right, 0], per_token[right]]
        if task.grading == "choice":
            row = [float(found[:, 0].argmin() == right), float(per_token.argmin() == right), *row]
        elif task.grading != "none":
            row = [float(is_answered(answers[query.query_id], query.target, task.grading)), *row]
        rows.append(row)
    graded = {"choice": ["accuracy", "accuracy_per_token"], "none": []}.get(task.grading, ["accuracy"])
    return [*graded, "loss", "loss_per_token"], np.array(rows)


def _kept_losses(
    settings: PredictionSettings, path: Path, tasks: Sequence[Task], on_step: OnStep
) -> dict[str, list[list[float]]]:
    asked = [
        Query(query_id=item.query.query_id, prompt=item.query.prompt, target=target)
        for task in tasks
        for item in task.items
        for target in item.choices or (item.query.target,)
    ]
    identity = {
        "format": _FORMAT,
        "model": model_files(settings.model),
        "asked": [[query.query_id, query.prompt, query.target] for query in asked],
    }
    digest = digest_of(identity)
    known = read_json(path) if path.is_file() else {}
    if known.get("digest") != digest:
        losses: dict[str, list[list[float]]] = {}
        for query, loss, count in zip(asked, *_losses(settings, asked, on_step), strict=True):
            losses.setdefault(query.query_id, []).append([loss, count])
        known = {"digest": digest, "losses": losses}
        publish_json(path, known)
    found: dict[str, list[list[float]]] = known["losses"]
    return found


def _losses(settings: PredictionSettings, queries: Sequence[Query], on_step: OnStep) -> tuple[list[float], list[int]]:
    """Summed loss of every target, and its number of tokens."""
    import torch

    from trackstar.evaluation.influence import check_target
    from trackstar.evaluation.passes import summed
    from trackstar.loss import cross_entropy
    from trackstar.model import load_model
    from trackstar.passages import begin_token
    from trackstar.queries import tokenize

    loaded = load_model(
        settings.model,
        dtype=torch.float32,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        exclude=(),
    )
    add_bos = begin_token(loaded.tokenizer) is not None
    examples = []
    for query in queries:
        check_target(query, loaded.tokenizer)
        examples.append(tokenize(query, loaded.tokenizer, add_bos=add_bos, max_tokens=loaded.max_tokens))
    found = summed(loaded.model, examples, cross_entropy).tolist()
    on_step("reading targets", len(queries), len(queries))
    return found, [example.num_targets for example in examples]

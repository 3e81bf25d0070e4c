"""Retraining a small model without some of its passages: the one judge that shares no method's geometry.

    retrain(kept) = losses of all queries under the model trained on the kept passages alone

Every run starts from the same weights and follows the same schedule: which passages make up each step's batch, in which
order, at which learning rate, is drawn once for the whole corpus, and a run differs from another only in the passages
that are missing from its batches. So two runs differ by what was left out and by nothing else. The training is a plain
loop: float32, AdamW, the mean loss over the batch's tokens, warm-up and half a cosine, no dropout.

A run is an item of an `Engine` (stage `retraining`): it publishes its losses as a small file, named after all that
decides them, and is not done again while that is there. Same inputs and thread count give the same bytes on a CPU; on a
GPU, sums of gradients come in any order, so runs agree to rounding that training may amplify.

Legend: N passages, Q queries, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trackstar.blobs import Location
from trackstar.encode import Example
from trackstar.engine import Engine, Report
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.evaluation.passes import predictions, summed
from trackstar.loss import cross_entropy
from trackstar.model import LoadedModel, load_model
from trackstar.storage import digest_of, publish_json, read_json

# Of what is published; another training makes other losses of the same settings.
_VERSION = 1


class Budget(BaseModel):
    """How a run trains. Unknown keys are refused.

    steps: optimizer steps. batch_passages: passages of a step, those left out included. learning_rate: its peak,
    reached after `warmup`, a share of the steps. weight_decay: of matrices. fresh: start from random weights of the
    checkpoint's architecture instead of from its own. seed: of the schedule and of random weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1)
    batch_passages: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, le=10, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    fresh: bool = True
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that the runs share.

    checkpoint: folder of the model; model_digest: its digest. passages, queries: their tokens. device: of torch.
    """

    checkpoint: str
    model_digest: str
    passages: tuple[Example, ...]
    queries: tuple[Example, ...]
    budget: Budget
    device: str = "cpu"

    @cached_property
    def digest(self) -> str:
        """Of everything that decides losses but what a run keeps."""
        tokens = [[[e.tokens.tolist(), e.first_target] for e in examples] for examples in (self.passages, self.queries)]
        return digest_of([_VERSION, self.model_digest, self.budget.model_dump(mode="json"), *tokens])

    def key(self, kept: Sequence[int]) -> str:
        """Of a run."""
        return digest_of([self.digest, list(kept)])[:32]


def make_experiment(
    checkpoint: str,
    passages: Sequence[Example],
    queries: Sequence[Example],
    budget: Budget,
    *,
    device: str = "cpu",
) -> Experiment:
    """Check that the runs can be made.

    Raises:
        InvalidRequest: there are no passages or queries, one of the latter has no target, or one does not fit the
            model's window.
        TrackstarError: as `load_model`.
    """
    loaded = load_model(checkpoint)
    for what, examples in (("passage", passages), ("query", queries)):
        if not examples:
            raise InvalidRequest(f"retraining needs at least one {what}")
        for number, example in enumerate(examples):
            if len(example.tokens) > loaded.max_tokens:
                raise InvalidRequest(
                    f"{what} {number} has {len(example.tokens)} tokens, more than the model's window of "
                    f"{loaded.max_tokens}; shorten it"
                )
            if what == "query" and not example.num_targets:
                raise InvalidRequest(f"query {number} has no target token to watch; give a prompt and a target")
    return Experiment(
        checkpoint=checkpoint,
        model_digest=loaded.digest,
        passages=tuple(passages),
        queries=tuple(queries),
        budget=budget,
        device=device,
    )


def retrain(
    experiment: Experiment,
    runs: Sequence[Sequence[int]],
    folder: Location,
    engine: Engine,
    *,
    on_run: Callable[[int, int], None] = lambda _done, _total: None,
) -> NDArray[np.float64]:
    """Summed losses of the queries after each run, in nats, float64 [R, Q]; what the folder holds is not done again.

    Args:
        experiment: what the runs share.
        runs: numbers of the passages that each keeps.
        folder: where losses are kept; whoever does the work must see it.
        engine: who does the work.
        on_run: hears how many of the runs are done.

    Raises:
        InvalidRequest: a run keeps no passage, or one that there is not, or its training diverged.
        CorruptArtifact: a file of losses is not what was written.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    keys = []
    for run in runs:
        kept = tuple(sorted({int(number) for number in run}))
        if not kept or kept[0] < 0 or kept[-1] >= len(experiment.passages):
            raise InvalidRequest(f"a run keeps some of the passages 0 to {len(experiment.passages) - 1}")
        keys.append(experiment.key(kept))
        wanted[keys[-1]] = kept
    found = {key: losses for key in wanted if (losses := _known(folder, key, experiment)) is not None}
    missing = [(key, kept) for key, kept in wanted.items() if key not in found]
    on_run(len(found), len(wanted))
    make = partial(RetrainWorker, folder=folder, experiment=experiment)
    for key, losses in engine.map("retraining", make, missing):
        found[key] = losses
        on_run(len(found), len(wanted))
    return np.array([found[key] for key in keys], dtype=np.float64).reshape(len(runs), len(experiment.queries))


class RetrainWorker:
    """Does runs; items are (key, numbers of kept passages), answers (key, losses of the queries)."""

    def __init__(self, report: Report, *, folder: Location, experiment: Experiment) -> None:
        self._report, self._folder, self._experiment = report, folder, experiment
        self._model = initial_model(load_model(experiment.checkpoint, device=experiment.device), experiment.budget)
        self._initial = {name: value.clone() for name, value in self._model.state_dict().items()}

    def __call__(self, item: tuple[str, tuple[int, ...]]) -> tuple[str, list[float]]:
        """Trains and publishes, unless it is there.

        Raises:
            InvalidRequest: training diverged.
        """
        key, kept = item
        losses = _known(self._folder, key, self._experiment)
        if losses is None:
            self._model.load_state_dict(self._initial)
            self._report(train(self._model, self._experiment.passages, kept, self._experiment.budget))
            losses = summed(self._model, self._experiment.queries, cross_entropy).tolist()
            if not np.isfinite(losses).all():
                raise InvalidRequest(
                    f"training at learning_rate {self._experiment.budget.learning_rate:g} diverged; give a smaller one"
                )
            publish_json(_path(self._folder, key), {"kept": list(kept), "losses": losses})
        return key, losses


def train(
    model: Any,
    passages: Sequence[Example],
    kept: Sequence[int],
    budget: Budget,
    *,
    on_step: Callable[[int, torch.optim.Optimizer], None] = lambda _steps, _optimizer: None,
) -> int:
    """Train a model, in place, on the kept passages; returns the number of tokens that were processed.

    Args:
        model: a causal language model of transformers.
        passages: of the whole corpus.
        kept: numbers of those that are there.
        budget: how it trains.
        on_step: hears after each step how many there were, and sees the optimizer.
    """
    there = np.zeros(len(passages), dtype=bool)
    there[list(kept)] = True
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": budget.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=budget.learning_rate)
    num_tokens = 0
    for step, planned in enumerate(schedule(len(passages), budget)):
        batch = [passages[number] for number in planned if there[number] and passages[number].num_targets]
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * rate(step, budget)
        if batch:
            optimizer.zero_grad()
            mean_loss(model, batch).backward()
            optimizer.step()
            num_tokens += sum(len(example.tokens) for example in batch)
        on_step(step + 1, optimizer)
    optimizer.zero_grad()
    return num_tokens


def schedule(num_passages: int, budget: Budget) -> Iterator[list[int]]:
    """Numbers of the passages of every step: epoch after epoch in a new order, one running on into the next."""
    waiting: list[int] = []
    epoch = 0
    for _ in range(budget.steps):
        while len(waiting) < budget.batch_passages:
            waiting += np.random.default_rng((budget.seed, epoch)).permutation(num_passages).tolist()
            epoch += 1
        yield waiting[: budget.batch_passages]
        waiting = waiting[budget.batch_passages :]


def rate(step: int, budget: Budget) -> float:
    """Share of the peak learning rate at a step, counted from 0: up in a line, then down in half a cosine."""
    progress = (step + 1) / budget.steps
    if progress < budget.warmup:
        return progress / budget.warmup
    # At the last step's end the rate would be 0 and the step wasted.
    return 0.5 * (1.0 + math.cos(math.pi * (progress - budget.warmup) / (1.0 - budget.warmup + 1.0 / budget.steps)))


def mean_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """Mean loss over all target tokens of a batch."""
    logits_nV, targets_n, _ = predictions(model, batch)
    return nn.functional.cross_entropy(logits_nV, targets_n)


def initial_model(loaded: LoadedModel, budget: Budget) -> Any:
    """The model that every run starts from, every parameter to be trained, without dropout."""
    model: Any = loaded.model
    if budget.fresh:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(budget.seed)
            model = AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.float32)
        model.to(loaded.model.device)
    model.requires_grad_(True)
    model.eval()
    return model


def _path(folder: Location, key: str) -> Location:
    return folder / f"run-{key}.json"


def _known(folder: Location, key: str, experiment: Experiment) -> list[float] | None:
    """Losses of a run that is done."""
    path = _path(folder, key)
    if not path.is_file():
        return None
    content = read_json(path)
    losses = content.get("losses") if isinstance(content, dict) else None
    if (
        not isinstance(losses, list)
        or len(losses) != len(experiment.queries)
        or not all(isinstance(loss, float) for loss in losses)
    ):
        raise CorruptArtifact(f"{str(path)!r} holds no losses of these queries; delete it and the run is done again")
    return losses

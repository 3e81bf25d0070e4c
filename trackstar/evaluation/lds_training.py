"""The model that was trained on everything, kept as checkpoints with their optimizer's state.

    OUT/model/             after the last step: config, weights, tokenizer, optimizer.pt
    OUT/model-after-N/     after N steps, where an index asks for it

Contract: it is the run of `retraining` that keeps all passages; a checkpoint is finished when its training.json is
there. Checkpoints of another experiment are refused.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path

import torch

from trackstar.errors import InvalidRequest
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.retraining import Experiment, initial_model, train
from trackstar.model import load_model
from trackstar.storage import publish, publish_json, read_json

_RECEIPT = "training.json"


def checkpoint_folder(out: Path, after: int | None) -> Path:
    """Where the checkpoint after so many steps lies; after the last if None."""
    return out / ("model" if after is None else f"model-after-{after}")


def train_checkpoints(
    experiment: Experiment, out: Path, afters: Collection[int | None], on_step: OnStep = unheard
) -> None:
    """Train on all passages, once, and save the last and the other checkpoints asked for, unless they are there.

    Raises:
        InvalidRequest: those there are of another experiment.
    """
    wanted = {None, *afters}
    finished = set()
    for after in wanted:
        receipt = checkpoint_folder(out, after) / _RECEIPT
        if receipt.is_file():
            if read_json(receipt).get("digest") != experiment.digest:
                raise InvalidRequest(f"{str(out)!r} holds the model of other settings; give another --out")
            finished.add(after)
    if finished == wanted:
        return
    loaded = load_model(experiment.checkpoint, device=experiment.device)
    model = initial_model(loaded, experiment.budget)
    steps = experiment.budget.steps

    def hear(done: int, optimizer: torch.optim.Optimizer) -> None:
        on_step("training", done, steps)
        for after in wanted - finished:
            if done == (steps if after is None else after):
                folder = checkpoint_folder(out, after)
                model.save_pretrained(folder)
                loaded.tokenizer.save_pretrained(folder)
                state = io.BytesIO()
                torch.save(optimizer.state_dict(), state)
                publish(folder / "optimizer.pt", state.getvalue())
                publish_json(folder / _RECEIPT, {"digest": experiment.digest, "steps": done})

    train(model, experiment.passages, range(len(experiment.passages)), experiment.budget, on_step=hear)

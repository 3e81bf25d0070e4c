"""Tail-patch: what does one training step on one passage do to the target's probability?

    theta' = theta - step(grad Loss(passage, theta))
    effect = p(target | prompt, theta') - p(target | prompt, theta)

The step trains every parameter, on the mean loss of all the passage's tokens. METHOD leaves learning rate and optimizer
open, so both are options, and results name them. The step shares the optimizer's geometry with corrected rows, so it is
no neutral judge between rows with and without a correction.

Contract: the model that serves is never touched. A `TailPatcher` holds a copy, takes the step there, measures, and puts
the copy's parameters back bit for bit, also when something fails in between. Evaluation mode throughout, so effects are
deterministic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trackstar.encode import Example


class PatchStep(BaseModel):
    """The training step: plain gradient descent, or AdamW without any state from before. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=1e-3, gt=0, le=10, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchEffect:
    """Summed loss of the target in nats before and after the step."""

    loss_before: float
    loss_after: float

    @property
    def probability_before(self) -> float:
        """Probability of the whole target before the step."""
        return math.exp(-self.loss_before)

    @property
    def probability_after(self) -> float:
        """Probability of the whole target after the step."""
        return math.exp(-self.loss_after)

    @property
    def probability_change(self) -> float:
        """What tail-patch reports."""
        return self.probability_after - self.probability_before


class TailPatcher:
    """Holds a copy of a model to take steps on.

    Args:
        model: the model that serves; it is copied and not touched. Takes as much memory as it does, and the gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = _copied(model).requires_grad_(True)
        self._originals = dict(model.named_parameters())

    def measure(
        self,
        query: Example,
        passages: Sequence[Example],
        step: PatchStep,
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[PatchEffect]:
        """The effect of a step on each passage, each from the same checkpoint.

        Args:
            query: prompt and target; its loss is watched.
            passages: one step each. One without a token to predict changes nothing.
            step: the optimizer.
            should_stop: asked before each passage but the first; what is left is left out of the answer.
        """
        with torch.no_grad():
            before = float(self._loss(query))
        effects: list[PatchEffect] = []
        for passage in passages:
            if effects and should_stop():
                break
            effects.append(PatchEffect(loss_before=before, loss_after=self._after(query, passage, step, before)))
        return effects

    def _after(self, query: Example, passage: Example, step: PatchStep, before: float) -> float:
        if not passage.num_targets:
            return before
        try:
            (self._loss(passage) / passage.num_targets).backward()
            _optimizer(list(self._model.parameters()), step).step()
            with torch.no_grad():
                return float(self._loss(query))
        finally:
            self._restore()

    def _loss(self, example: Example) -> Tensor:
        """Summed loss of the example's target tokens."""
        tokens_T = torch.from_numpy(example.tokens.astype(np.int64)).to(self._model.device)
        logits_TV = self._model(input_ids=tokens_T[None], use_cache=False).logits[0]
        if logits_TV.dtype != torch.float64:
            logits_TV = logits_TV.float()
        first = max(1, example.first_target)
        return nn.functional.cross_entropy(logits_TV[first - 1 : -1], tokens_T[first:], reduction="sum")

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self._originals[name])
            parameter.grad = None


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """The same model anew. A deep copy would take along the hooks of whoever serves with the original."""
    config = copy.deepcopy(model.config)
    # The serving model's experts may be those that `capture` put in.
    config._experts_implementation = "eager"
    copied: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    copied.load_state_dict(model.state_dict())
    placed: PreTrainedModel = copied.to(model.device).eval()
    return placed


def _optimizer(parameters: list[nn.Parameter], step: PatchStep) -> torch.optim.Optimizer:
    if step.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=step.learning_rate, weight_decay=step.weight_decay)
    return torch.optim.AdamW(parameters, lr=step.learning_rate, weight_decay=step.weight_decay)

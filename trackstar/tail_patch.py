"""Tail-patch: what does one training step on one passage do to the target's probability?

    theta' = theta - step(grad Loss(passage, theta))
    effect = p(target | prompt, theta') - p(target | prompt, theta)

The step trains every parameter, embeddings and norms too, on the mean loss of all the passage's tokens. METHOD leaves
learning rate and optimizer open, so both are options, and results name them. The step shares the optimizer's geometry
with corrected rows, so it is no neutral judge between rows with and without a correction.

Contract: the model that serves is never touched. A `TailPatcher` holds a copy without its hooks, takes the step there,
measures, and puts the copy's parameters back bit for bit, also when something fails in between. The copy is float32 at
least: a weight in bfloat16 swallows every step below 1/256 of it, and effects measured there came out with the wrong
sign. Evaluation mode throughout, so effects are deterministic. A passage costs one forward and backward pass and one
forward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trackstar.encode import Example
from trackstar.errors import InvalidRequest, NotReady, UnsupportedModel
from trackstar.optimizer_state import AdafactorMoments, AdamMoments

Moments = AdamMoments | AdafactorMoments


class PatchStep(BaseModel):
    """The training step. Unknown keys are refused.

    optimizer: plain gradient descent, AdamW, or Adafactor: torch's from a fresh state, and transformers' where its
        moments are carried on.
    weight_decay: decoupled; moves the weights alike whatever the passage.
    betas, eps: of AdamW's step from a fresh state; carried moments bring their own.
    carry: which moments go on from training: none; the second, so that the passage's own gradient is scaled as
        training would (AdamW's first step moves it by 1 - beta1 of the learning rate); or both, the step that training
        itself would take. Adafactor has the second only. The first moment pushes alike whatever the passage, so it
        shifts all effects together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["sgd", "adamw", "adafactor"] = "sgd"
    learning_rate: float = Field(default=1e-3, gt=0, le=10, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, le=1, allow_inf_nan=False)
    carry: Literal["none", "second", "both"] = "none"

    @model_validator(mode="after")
    def _check(self) -> PatchStep:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas must lie between 0 and 1, 1 excluded")
        if self.carry != "none" and self.optimizer == "sgd":
            raise ValueError("carry needs the optimizer adamw or adafactor")
        if self.carry == "both" and self.optimizer == "adafactor":
            raise ValueError("carry of adafactor can be none or second")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchEffect:
    """Summed loss of the target in nats before and after the step."""

    loss_before: float
    loss_after: float

    @property
    def loss_change(self) -> float:
        """Below zero for a passage that supports the target."""
        return self.loss_after - self.loss_before

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
    """Holds a copy of a model to take steps on; threads that share it take turns, passage by passage.

    Args:
        model: the model that serves; it is copied and not touched. No other thread may run it while it is copied. The
            copy takes the memory of its weights in float32, twice that during a step, and carried moments come on top.
        moments: an optimizer's moments by parameter name, for steps of that optimizer that carry them on
            (`optimizer_state.read_adam_moments`, `read_adafactor_moments`).
        device: where the copy is to be; beside the model if None.

    Raises:
        NotReady: another thread ran the model meanwhile, as far as that can be seen.
        UnsupportedModel: the model is cut over several ranks, or its weights are not floating-point numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        moments: Mapping[str, AdamMoments] | Mapping[str, AdafactorMoments] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._device = torch.device(model.device if device is None else device)
        self._originals = dict(model.named_parameters())
        self._model = _copied(model, self._device)
        self._parameters = dict(self._model.named_parameters())
        if self._parameters.keys() != self._originals.keys():
            raise _busy()
        self._moments = moments
        self._lock = Lock()

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

        Raises:
            InvalidRequest: the query has no target, the step needs moments that are not there, or it made the loss
                something that is no number.
        """
        if not query.num_targets:
            raise InvalidRequest("the query has no target token to watch; give a prompt and a target")
        if step.carry != "none" and self._moments is None:
            raise InvalidRequest("carry: there is no optimizer state to carry on from; use none", field="carry")
        kind = AdamMoments if step.optimizer == "adamw" else AdafactorMoments
        if step.carry != "none" and not all(isinstance(one, kind) for one in (self._moments or {}).values()):
            raise InvalidRequest(
                f"carry: the optimizer state is of another optimizer than {step.optimizer}; use none, or the optimizer "
                "that the model was trained with",
                field="carry",
            )
        with self._lock:
            before = self._watch(query)
        effects: list[PatchEffect] = []
        for passage in passages:
            if effects and should_stop():
                break
            with self._lock:
                after = self._after(query, passage, step) if passage.num_targets else before
            if math.isnan(after):
                raise InvalidRequest(
                    f"a step of {step.optimizer} at learning_rate {step.learning_rate:g} made the loss no number; "
                    "give a smaller learning_rate",
                    field="learning_rate",
                )
            effects.append(PatchEffect(loss_before=before, loss_after=after))
        return effects

    def _after(self, query: Example, passage: Example, step: PatchStep) -> float:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                (self._loss(passage) / passage.num_targets).backward()
            self._take(step)
            return self._watch(query)
        finally:
            self._restore()

    @torch.no_grad()
    def _watch(self, query: Example) -> float:
        return float(self._loss(query))

    def _loss(self, example: Example) -> Tensor:
        """Summed loss of the example's target tokens."""
        tokens_T = torch.from_numpy(example.tokens.astype(np.int64)).to(self._device)
        logits_TV = self._model(input_ids=tokens_T[None], use_cache=False).logits[0]
        if logits_TV.dtype != torch.float64:
            logits_TV = logits_TV.float()
        first = max(1, example.first_target)
        return nn.functional.cross_entropy(logits_TV[first - 1 : -1], tokens_T[first:], reduction="sum")

    @torch.no_grad()
    def _take(self, step: PatchStep) -> None:
        """Move every parameter that received a gradient."""
        if step.optimizer == "adafactor" and step.carry == "none":
            torch.optim.Adafactor(
                self._parameters.values(), lr=step.learning_rate, weight_decay=step.weight_decay
            ).step()
            return
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            parameter.mul_(1.0 - step.learning_rate * step.weight_decay)
            if step.optimizer == "sgd":
                parameter.sub_(parameter.grad, alpha=step.learning_rate)
            else:
                carried = self._moments.get(name) if self._moments is not None and step.carry != "none" else None
                parameter.sub_(_direction(parameter.grad, step, carried), alpha=step.learning_rate)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._originals[name])
            parameter.grad = None


def _direction(gradient: Tensor, step: PatchStep, carried: Moments | None) -> Tensor:
    """What an optimizer subtracts, without the learning rate."""
    if step.optimizer == "adafactor":
        # A parameter that training left alone has no moments, and no gradient of a passage either.
        return torch.zeros_like(gradient) if carried is None else _adafactor_direction(gradient, carried)
    return _adam_direction(gradient, step, carried)


def _adafactor_direction(gradient: Tensor, carried: Moments) -> Tensor:
    """What transformers' Adafactor subtracts, without the learning rate."""
    assert isinstance(carried, AdafactorMoments)
    new = (carried.step + 1.0) ** carried.decay
    squared = gradient.square().add_(carried.eps)
    if carried.whole is None:
        assert carried.row is not None
        assert carried.col is not None
        row = torch.lerp(carried.row.to(gradient), squared.mean(-1), new)
        col = torch.lerp(carried.col.to(gradient), squared.mean(-2), new)
        update = (row / row.mean(-1, keepdim=True)).rsqrt_()[..., None] * col.rsqrt_()[..., None, :] * gradient
    else:
        update = torch.lerp(carried.whole.to(gradient), squared, new).rsqrt_().mul_(gradient)
    return update.div_((update.square().mean().sqrt() / carried.clip).clamp_min(1.0))


def _adam_direction(gradient: Tensor, step: PatchStep, carried: Moments | None) -> Tensor:
    """What AdamW subtracts, without the learning rate; a parameter without carried moments starts afresh."""
    assert not isinstance(carried, AdafactorMoments)
    (beta1, beta2), eps, count = step.betas, step.eps, 1.0
    first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
    if carried is not None:
        (beta1, beta2), eps, count = carried.betas, carried.eps, carried.step + 1.0
        second.copy_(carried.second)
        if step.carry == "both":
            first.copy_(carried.first)
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    first.div_(1.0 - beta1**count)
    return first.div_(second.div_(1.0 - beta2**count).sqrt_().add_(eps))


def _copied(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same model anew, float32 at least, every parameter to be trained, without anyone's hooks.

    What `capture` puts into a serving model leads back to it: hooks, forwards of routers, the experts' implementation.
    """
    # `loss.backward` takes the decoder's place for the time of a chunk.
    if not list(model.base_model.parameters()):
        raise _busy()
    known: dict[int, Any] = {}
    with torch.inference_mode(False):
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor) or not parameter.is_floating_point():
                raise UnsupportedModel(
                    f"a training step needs the whole model in floating-point numbers, and {name!r} is "
                    f"{'cut over several ranks' if isinstance(parameter, DTensor) else parameter.dtype}"
                )
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            known[id(parameter)] = nn.Parameter(parameter.detach().to(device, dtype, copy=True))
        for buffer in model.buffers():
            known[id(buffer)] = buffer.detach().to(device, copy=True)
        for module in model.modules():
            for name, value in vars(module).items():
                if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                    known[id(value)] = type(value)()
            if capture := vars(module).get("trackstar_capture"):
                known[id(capture)] = "left out"
        copied: PreTrainedModel = copy.deepcopy(model, known)
    for module in copied.modules():
        vars(module).pop("forward", None)
        vars(module).pop("trackstar_capture", None)
    # The serving model's experts may be those of `capture`; of transformers' own, these alone know float64.
    copied.config._experts_implementation = "eager"
    copied.eval()
    return copied


def _busy() -> NotReady:
    return NotReady("the model was running while it was to be copied for a training step; try again")

"""Tail-patch: what does one training step on one passage do to the target's probability?

    theta' = theta - step(grad Loss(passage, theta))
    effect = p(target | prompt, theta') - p(target | prompt, theta)

The step trains every parameter, embeddings and norms too, on the mean loss of all the passage's tokens. METHOD leaves
learning rate and optimizer open, so both are options, and results name them. The step shares the optimizer's geometry
with corrected rows, so it is no neutral judge between rows with and without a correction.

Contract: the model that serves is never touched. A `TailPatcher` holds a copy without its hooks, takes the step there,
measures, and puts the copy's parameters back bit for bit, also when something fails in between. The copy is float32 at
least: a weight in bfloat16 swallows every step below 1/256 of it, and effects measured there came out with the wrong
sign. Evaluation mode throughout, so effects are deterministic. A passage costs one forward and backward pass, whatever
the number of steps that are tried on it, and each step one forward pass of all queries that are watched.

Queries are watched together, padded on the right, which a causal model does not see. A query's padded length depends
on its own length only, and no pass has fewer tokens than where kernels change their summation order, so on the CPU
kernels of `encode` a loss has the same bits whichever queries are watched beside it.
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

from trackstar.encode import Example, padded_length, plan_batches
from trackstar.errors import InvalidRequest, NotReady, UnsupportedModel
from trackstar.loss import MIN_KERNEL_ROWS
from trackstar.optimizer_state import AdafactorMoments, AdamMoments

Moments = AdamMoments | AdafactorMoments
# Padded lengths of queries are multiples of the first; a pass over them has so many padded tokens at most.
_LENGTH_STEP, _MAX_BATCH_TOKENS = 16, 1024


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
        self._window: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._largest = max((parameter.numel() for parameter in self._parameters.values()), default=0)
        self._spares: dict[tuple[int, torch.dtype], Tensor] = {}
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
        (before,) = self.losses([query])
        self._check(step)
        effects: list[PatchEffect] = []
        for passage in passages:
            if effects and should_stop():
                break
            after = before
            if passage.num_targets:
                ((after,),) = self.losses_after(passage, [(step, [query])])
            effects.append(PatchEffect(loss_before=before, loss_after=after))
        return effects

    def losses(self, queries: Sequence[Example]) -> list[float]:
        """Summed loss of every query's target before any step.

        Raises:
            InvalidRequest: a query has no target.
        """
        if not all(query.num_targets for query in queries):
            raise InvalidRequest("the query has no target token to watch; give a prompt and a target")
        with self._lock:
            return self._watch(queries)

    def losses_after(
        self, passage: Example, watched: Sequence[tuple[PatchStep, Sequence[Example]]]
    ) -> list[list[float]]:
        """Summed losses of queries after each of several steps on one passage, each from the same checkpoint.

        Args:
            passage: it has a token to predict; its gradient is taken once.
            watched: steps, each with the queries whose loss is wanted after it, which have targets.

        Raises:
            InvalidRequest: as `measure`.
        """
        for step, _ in watched:
            self._check(step)
        found: list[list[float]] = []
        with self._lock:
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    (self._loss(passage) / passage.num_targets).backward()
                for number, (step, queries) in enumerate(watched):
                    if number:
                        self._put_back()
                    self._take(step)
                    found.append(self._watch(queries))
            finally:
                self._restore()
        for (step, _), losses in zip(watched, found, strict=True):
            if any(math.isnan(loss) for loss in losses):
                raise InvalidRequest(
                    f"a step of {step.optimizer} at learning_rate {step.learning_rate:g} made the loss no number; "
                    "give a smaller learning_rate",
                    field="learning_rate",
                )
        return found

    def _check(self, step: PatchStep) -> None:
        """Whether the moments that a step carries on are there."""
        if step.carry == "none":
            return
        if self._moments is None:
            raise InvalidRequest("carry: there is no optimizer state to carry on from; use none", field="carry")
        kind = AdamMoments if step.optimizer == "adamw" else AdafactorMoments
        if not all(isinstance(one, kind) for one in self._moments.values()):
            raise InvalidRequest(
                f"carry: the optimizer state is of another optimizer than {step.optimizer}; use none, or the optimizer "
                "that the model was trained with",
                field="carry",
            )

    @torch.no_grad()
    def _watch(self, queries: Sequence[Example]) -> list[float]:
        losses = [0.0] * len(queries)
        lengths = [len(query.tokens) for query in queries]
        for batch in plan_batches(lengths, _MAX_BATCH_TOKENS, step=_LENGTH_STEP, limit=self._window):
            length = padded_length(max(lengths[index] for index in batch), step=_LENGTH_STEP, limit=self._window)
            tokens_BT = np.zeros((max(len(batch), -(-MIN_KERNEL_ROWS // length)), length), dtype=np.int64)
            for row, index in enumerate(batch):
                tokens_BT[row, : lengths[index]] = queries[index].tokens
            tokens = torch.from_numpy(tokens_BT).to(self._device)
            logits_BTV = self._model(input_ids=tokens, use_cache=False).logits
            for row, index in enumerate(batch):
                losses[index] = float(_summed(logits_BTV[row], tokens[row], queries[index]))
        return losses

    def _loss(self, example: Example) -> Tensor:
        """Summed loss of the example's target tokens."""
        tokens_T = torch.from_numpy(example.tokens.astype(np.int64)).to(self._device)
        return _summed(self._model(input_ids=tokens_T[None], use_cache=False).logits[0], tokens_T, example)

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
                continue
            carried = self._moments.get(name) if self._moments is not None and step.carry != "none" else None
            if step.optimizer == "adamw":
                self._take_adam(parameter, parameter.grad, step, carried)
            elif carried is not None:
                # A parameter that training left alone has no moments, and no gradient of a passage either.
                parameter.sub_(_adafactor_direction(parameter.grad, carried), alpha=step.learning_rate)

    def _take_adam(self, parameter: Tensor, gradient: Tensor, step: PatchStep, carried: Moments | None) -> None:
        """AdamW's step; a parameter without carried moments starts afresh."""
        assert not isinstance(carried, AdafactorMoments)
        # Fresh memory for every product takes longer than the products.
        scale = self._spare(0, parameter)
        if carried is None:
            # Corrected for their start, the moments of a first step are the gradient and its square.
            torch.abs(gradient, out=scale).add_(step.eps)
            parameter.addcdiv_(gradient, scale, value=-step.learning_rate)
            return
        beta1, beta2 = carried.betas
        start1, start2 = (1.0 - beta ** (carried.step + 1.0) for beta in carried.betas)
        scale.copy_(carried.second).mul_(beta2 / start2)
        scale.addcmul_(gradient, gradient, value=(1.0 - beta2) / start2).sqrt_().add_(carried.eps)
        if step.carry == "both":
            first = self._spare(1, parameter).copy_(carried.first).lerp_(gradient, 1.0 - beta1)
            parameter.addcdiv_(first, scale, value=-step.learning_rate / start1)
        else:
            parameter.addcdiv_(gradient, scale, value=-step.learning_rate * (1.0 - beta1) / start1)

    def _spare(self, number: int, like: Tensor) -> Tensor:
        """Memory to work in, of a tensor's shape."""
        key = (number, like.dtype)
        if key not in self._spares:
            self._spares[key] = torch.empty(self._largest, dtype=like.dtype, device=like.device)
        return self._spares[key][: like.numel()].view(like.shape)

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._originals[name])

    def _restore(self) -> None:
        self._put_back()
        for parameter in self._parameters.values():
            parameter.grad = None


def _summed(logits_TV: Tensor, tokens_T: Tensor, example: Example) -> Tensor:
    """Summed loss of an example's target tokens; what follows its own tokens is padding."""
    first, last = max(1, example.first_target), len(example.tokens)
    logits_nV = logits_TV[first - 1 : last - 1]
    if logits_nV.dtype != torch.float64:
        logits_nV = logits_nV.float()
    return nn.functional.cross_entropy(logits_nV, tokens_T[first:last], reduction="sum")


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

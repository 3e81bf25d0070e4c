"""The loss whose gradient a row holds, and its backward pass through the language-model head in chunks.

    Loss(z) = - sum over target tokens t of log p(token_t | tokens before t)

The sum (not the mean) is taken; the unit norm makes the final score the same for both. Logits never stand whole: the
head runs on chunks of target positions only, each chunk's gradient goes straight to the hidden states, and prompts and
padding cost no head at all. Whatever an architecture does after its head (soft caps, scales) happens in its own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Maps logits [n, vocabulary] and targets [n] to one value per target token [n]; rows hold the gradient of its sum.
# Logits come as float32, or as float64 from a float64 model.
Objective = Callable[[Tensor, Tensor], Tensor]

# Below this many rows some matrix products switch to kernels with another summation order (measured on x86 with MKL:
# fewer than 6), so smaller chunks are filled up with zero rows to keep a passage's bits independent of its neighbours.
MIN_KERNEL_ROWS = 64


def cross_entropy(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Negative log-likelihood of every target token, [n] in the logits' type."""
    return nn.functional.cross_entropy(logits_nV, targets_n, reduction="none")


def backward(
    model: Any,
    tokens_BT: Tensor,
    is_target_BT: Tensor,
    *,
    objective: Objective = cross_entropy,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Run forward and backward; gradients of the summed objective reach whatever hooks listen.

    Args:
        model: a causal language model of transformers with frozen parameters.
        tokens_BT: int64 [B, T], padded on the right with any valid token.
        is_target_BT: bool [B, T]; True where the token's own prediction counts. Position 0 has no prediction.
        objective: what is summed over target tokens.
        chunk_tokens: target positions per pass through the head.

    Returns:
        float32 [B]: the summed objective of every example.
    """
    prefix = model.base_model_prefix
    outputs = getattr(model, prefix)(input_ids=tokens_BT, use_cache=False)
    hidden_BTH = outputs.last_hidden_state
    # The prediction of token t is made at position t - 1.
    examples, positions = is_target_BT[:, 1:].nonzero(as_tuple=True)
    targets_n = tokens_BT[examples, positions + 1]
    gradient_BTH = torch.zeros_like(hidden_BTH)
    values_B = torch.zeros(tokens_BT.shape[0], dtype=torch.float32, device=tokens_BT.device)
    detached_BTH = hidden_BTH.detach()
    with _precomputed_base(model, prefix, outputs) as head:
        for start in range(0, len(examples), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            where = (examples[chunk], positions[chunk])
            count = len(where[0])
            hidden_nH = detached_BTH[where]
            if count < MIN_KERNEL_ROWS:
                hidden_nH = nn.functional.pad(hidden_nH, (0, 0, 0, MIN_KERNEL_ROWS - count))
            hidden_nH.requires_grad_(True)
            logits_nV = head(hidden_nH)[:count]
            values_n = objective(logits_nV if logits_nV.dtype == torch.float64 else logits_nV.float(), targets_n[chunk])
            (gradient_nH,) = torch.autograd.grad(values_n.sum(), hidden_nH)
            gradient_BTH[where] = gradient_nH[:count]
            values_B.index_add_(0, where[0], values_n.detach().float())
    if hidden_BTH.requires_grad:
        hidden_BTH.backward(gradient_BTH)
    return values_B


class _Precomputed(nn.Module):
    """Stands in for the decoder and returns hidden states that are already known."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
        return self._outputs


@contextmanager
def _precomputed_base(model: Any, prefix: str, outputs: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    base = getattr(model, prefix)
    tokens_1 = torch.zeros(1, 1, dtype=torch.long, device=outputs.last_hidden_state.device)

    def head(hidden_nH: Tensor) -> Tensor:
        known = copy.copy(outputs)
        known.last_hidden_state = hidden_nH.unsqueeze(0)
        setattr(model, prefix, _Precomputed(known))
        logits: Tensor = model(input_ids=tokens_1, use_cache=False).logits
        return logits.squeeze(0)

    try:
        yield head
    finally:
        setattr(model, prefix, base)

"""Greedy completion: what the model itself says after a prompt.

Only plain forward passes without gradients, so hooks of `capture` stay silent and every rank of a sharded model may run
it. Ties in the logits go to the smaller token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trackstar.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """Tokens int32 [T], the stop token not among them, and the summed log-probability of these tokens in nats."""

    tokens: NDArray[np.int32]
    log_probability: float


def complete(
    model: PreTrainedModel, prompt: NDArray[np.int32], *, max_new_tokens: int, stop_tokens: Collection[int] = ()
) -> Completion:
    """The most likely token, again and again, each computed from the keys and values of those before it.

    A model that returns none reads the whole text for every token instead, with the same result.

    Args:
        model: a causal language model.
        prompt: int32 [T], at least one token.
        max_new_tokens: longest completion; the prompt and it must fit the model's window.
        stop_tokens: tokens that end it.

    Raises:
        InvalidRequest: the prompt has no token, or a negative number of tokens is asked for.
    """
    if not len(prompt):
        raise InvalidRequest("the prompt has no token to continue from; give a prompt", field="prompt")
    if max_new_tokens < 0:
        raise InvalidRequest(f"max_new_tokens must be at least 0, not {max_new_tokens}", field="max_new_tokens")
    # Spares the logits of the prompt's other tokens where the model knows how.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    device = model.device
    text_1T = torch.from_numpy(prompt.astype(np.int64)).to(device)[None]
    found: list[int] = []
    log_probability = 0.0
    cache: Any = None
    with torch.no_grad():
        for _ in range(max_new_tokens):
            unread_1T = text_1T if cache is None else text_1T[:, -1:]
            outputs = model(input_ids=unread_1T, past_key_values=cache, use_cache=True, **last_only)
            cache = getattr(outputs, "past_key_values", None)
            log_probabilities_V = outputs.logits[0, -1].double().log_softmax(-1)
            token = int(log_probabilities_V.argmax())
            if token in stop_tokens:
                break
            found.append(token)
            log_probability += float(log_probabilities_V[token])
            text_1T = torch.cat([text_1T, text_1T.new_tensor([[token]])], dim=1)
    return Completion(tokens=np.array(found, dtype=np.int32), log_probability=log_probability)


def stop_tokens_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that ends a text, if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return (end,) if isinstance(end, int) else ()


def line_of(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a completion says, up to the end of the line."""
    return str(tokenizer.decode(completion.tokens.tolist())).split("\n")[0].strip()

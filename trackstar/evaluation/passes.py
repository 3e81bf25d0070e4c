"""Forward passes over padded batches: what a model says of target tokens, with whole logits and no hooks.

For judges, whose models are small or whose corpora are; rows come from `trackstar.encode`, which never holds whole
logits. Passages are padded on the right, which a causal model does not see.

Legend: N examples, B of them in a batch, T tokens, n target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.encode import Example, plan_batches
from trackstar.loss import Objective


def predictions(model: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over a batch.

    Args:
        model: a causal language model of transformers.
        examples: none longer than its window.

    Returns:
        Logits [n, V] of all target tokens, float32 at least, the tokens int64 [n], and each one's example int64 [n].
    """
    length = max(len(example.tokens) for example in examples)
    tokens_BT = np.zeros((len(examples), length), dtype=np.int64)
    is_target_BT = np.zeros((len(examples), length), dtype=bool)
    for row, example in enumerate(examples):
        tokens_BT[row, : len(example.tokens)] = example.tokens
        is_target_BT[row, max(1, example.first_target) : len(example.tokens)] = True
    tokens = torch.from_numpy(tokens_BT).to(model.device)
    # The prediction of token t is made at position t - 1.
    rows_n, positions_n = torch.from_numpy(is_target_BT[:, 1:]).to(model.device).nonzero(as_tuple=True)
    logits_nV = model(input_ids=tokens, use_cache=False).logits[rows_n, positions_n]
    if logits_nV.dtype != torch.float64:
        logits_nV = logits_nV.float()
    return logits_nV, tokens[rows_n, positions_n + 1], rows_n


@torch.no_grad()
def summed(
    model: Any, examples: Sequence[Example], objective: Objective, *, max_batch_tokens: int = 1024
) -> NDArray[np.float64]:
    """An objective summed over each example's target tokens, float64 [N]; zero for one without any.

    Args:
        model: as of `predictions`.
        examples: as of `predictions`.
        objective: of `evaluation.outputs`, or the loss.
        max_batch_tokens: padded tokens of a pass.
    """
    found_N = np.zeros(len(examples))
    for batch in plan_batches([len(example.tokens) for example in examples], max_batch_tokens):
        logits_nV, targets_n, rows_n = predictions(model, [examples[index] for index in batch])
        sums_B = torch.zeros(len(batch), dtype=torch.float64, device=logits_nV.device)
        sums_B.index_add_(0, rows_n, objective(logits_nV, targets_n).double())
        found_N[batch] = sums_B.cpu().numpy()
    return found_N

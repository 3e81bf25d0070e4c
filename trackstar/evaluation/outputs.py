"""Output functions beside the loss: what else of a target token's prediction a row can hold the gradient of.

    loss      - log p_t                    p_t: probability of target token t
    margin    log p_t / (1 - p_t)          TRAK's
    logit     z_t                          the head's own output

Each maps logits to one value per target token, and a row holds the gradient of their sum. Where the model is certain,
the gradients of loss and margin differ most: d loss / d margin = -(1 - p_t), so the loss has next to none left and the
margin does not fade. That is why TRAK takes the margin and weighs with `error` afterwards.

1 - p_t is never formed as a difference: the margin is z_t less the log-sum-exp of all other logits, and the error the
logistic function of minus the margin, both exact to rounding in float32 however certain the model is.

Legend: n target tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trackstar.loss import Objective, cross_entropy

ObjectiveName = Literal["loss", "margin", "logit"]


def margin(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Log-odds of every target token, [n] in the logits' type."""
    others_nV = logits_nV.scatter(1, targets_n[:, None], -torch.inf)
    return logit(logits_nV, targets_n) - others_nV.logsumexp(dim=1)


def logit(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """The logit of every target token, [n] in the logits' type."""
    return logits_nV.gather(1, targets_n[:, None]).squeeze(1)


def error(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """1 - p of every target token, [n] in the logits' type: minus the derivative of its loss by its margin."""
    return torch.sigmoid(-margin(logits_nV, targets_n))


OBJECTIVES: dict[ObjectiveName, Objective] = {"loss": cross_entropy, "margin": margin, "logit": logit}

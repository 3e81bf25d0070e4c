"""Estimating the second moments V from squared per-example gradients of a corpus sample.

For checkpoints that come without an optimizer state. Every example's gradient G = delta^T a is squared and averaged in
the factored form (row and column means), without being formed; see `moments.squared_gradient_sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trackstar.capture import Factors
from trackstar.encode import Encoder, Example
from trackstar.errors import InvalidRequest
from trackstar.model import LoadedModel
from trackstar.moments import MomentEstimator, Moments
from trackstar.ranks import ALONE


class MomentSink:
    """Feeds the unprojected sides of every weight matrix to an estimator."""

    def __init__(self, estimator: MomentEstimator) -> None:
        self._estimator = estimator

    def add(self, block: int, u_BSp: Tensor, v_BSq: Tensor, *, placed: bool = True) -> None:
        """Never called: nothing is projected here."""
        raise AssertionError("moments are estimated from unprojected gradients")

    def add_exact(self, factors: Factors, delta_BSm: Tensor, a_BSn: Tensor, *, placed: bool = True) -> None:
        """Add a batch of examples for one weight."""
        self._estimator.add(factors.name, delta_BSm, a_BSn)


def estimate_moments(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    max_batch_tokens: int = 8192,
    on_batch: Callable[[int], None] | None = None,
) -> Moments:
    """Mean squared gradient over the examples, factored, for every contributing weight.

    Args:
        loaded: the model.
        examples: the sample.
        max_batch_tokens: padded tokens per batch.
        on_batch: called with the number of examples done after each batch.

    Raises:
        InvalidRequest: an empty sample, or a model that is cut over ranks.
    """
    if loaded.ranks is not ALONE:
        raise InvalidRequest("moments are estimated with the whole model in one process; load it without sharding")
    layout = loaded.layout(layer_blocks=1, rows=1, cols=1)
    device, dtype = loaded.model.device, loaded.model.dtype
    nothing = torch.zeros(1, 1, device=device, dtype=dtype)
    factors = {
        member.name: Factors(
            name=member.name,
            block=loaded.block_of(member, layout),
            terms=1,
            out=nothing.expand(member.out_features, 1),
            in_=nothing.expand(member.in_features, 1),
            elementwise=nothing,
        )
        for member in loaded.members
    }
    encoder = Encoder(loaded, layout, factors, max_batch_tokens=max_batch_tokens)
    estimator = MomentEstimator(f"a sample of {len(examples):,} passages")
    done = 0
    for indices, _, _ in encoder.run(examples, lambda _examples, _tokens: MomentSink(estimator)):
        done += len(indices)
        if on_batch is not None:
            on_batch(done)
    encoder.close()
    return estimator.finish(len(examples))

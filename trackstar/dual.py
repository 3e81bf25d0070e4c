"""A query made ready to be compared: whitened once for the coarse code, twice for exact scores.

    unit = W g / |W g|              what codes are made of        W = R^(-1/2), g the query's un-whitened row
    dual = R^-1 g / |W g|           <dual, row> / |W row| is the exact score

An answer must not depend on who else asks at the same moment, so every product is made over at least as many rows as
where kernels change their summation order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trackstar.codes import CodeSpec, Rotation, encode_codes
from trackstar.errors import InvalidRequest
from trackstar.hessian import Whitener

# Measured on x86 with MKL: products of fewer than 6 rows sum in another order.
_MIN_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dual:
    """One query: `unit_d` and `dual_d`, float32 [d], and the summed loss of its target in nats."""

    unit_d: Tensor
    dual_d: Tensor
    loss: float


def make_duals(whitener: Whitener, rows_Qd: Tensor, loss_Q: Tensor) -> list[Dual | InvalidRequest]:
    """Whiten the rows float32 [Q, d] of Q queries.

    Returns:
        One `Dual` for each query, or the `InvalidRequest` to raise for one whose gradient is zero.
    """
    padded_Qd = functional.pad(rows_Qd.cpu(), (0, 0, 0, max(0, _MIN_ROWS - len(rows_Qd))))
    whitened_Qd = whitener.apply(padded_Qd)
    twice_Qd = whitener.apply(whitened_Qd)
    norms_Q = whitened_Qd.norm(dim=1)
    return [
        Dual(unit_d=whitened_Qd[query] / norms_Q[query], dual_d=twice_Qd[query] / norms_Q[query], loss=float(loss))
        if norms_Q[query] > 0
        else InvalidRequest("the query's gradient is zero: the model is already certain of the target")
        for query, loss in enumerate(loss_Q)
    ]


def make_code(spec: CodeSpec, rotation: Rotation, dual: Dual) -> NDArray[Any]:
    """The coarse code of one query: uint8 [1, k/8] for bits, float32 [1, k] for a prefix."""
    code: NDArray[Any] = np.ascontiguousarray(encode_codes(spec, rotation, dual.unit_d[None]))
    return code

"""Inverse square roots of second moments as short sums of outer products, which fold into the projections for free.

The optimizer correction multiplies a weight's gradient G [m, n] elementwise by S = 1 / (sqrt(V) + eps). When
S = sum_k outer(out_k, in_k), then L (S o G) R^T = sum_k (L diag(out_k)) G (R diag(in_k))^T, so no per-example gradient
matrix is ever formed. Adafactor's factored V gives one term exactly; a full V of Adam is fitted with `rank` terms.

The fit minimises the expected relative squared error of the corrected gradient. With E[G_ij^2] = V_ij,

    E|(S_hat - S) o G|^2 / E|S o G|^2 = mean((S_hat / S - 1)^2)          (eps small beside sqrt(V)),

a non-negative factorisation of S with weights 1 / S^2. Each half step of the alternation is an exact quadratic problem
per row or column with a Gram matrix of rank x rank, solved by non-negative coordinate descent: at rank 1 this is the
multiplicative update itself, above it reaches the same optima in several times fewer passes over V. Terms are added
one at a time to a converged fit, so the error cannot grow with the rank.

Silent elements. Where V is at most 1e-12 of its matrix' mean, the weight never received a gradient worth the name (a
dead unit, a token never read), and 1/eps would let such weights drown all others. They are given the factored estimate
row_i col_j / mean instead, in which a silent row or column counts as an average one; live elements stay untouched. A
matrix that is zero throughout has no scale of its own: its scale is zero here, and `Moments` supplies the model's.

This module does not read optimizer states and knows nothing of models (see `moments`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trackstar.errors import InvalidRequest

SILENT_FRACTION = 1e-12  # of the matrix' mean second moment; 1e-6 in units of the gradient
CHUNK_ELEMENTS = 1 << 22  # elements of V held in float64 at once: 32 MiB, a few times over
MAX_ITERATIONS = 100  # per number of terms
TOLERANCE = 3e-4  # stop when an iteration lowers the error by less than this fraction
COORDINATE_SWEEPS = 4  # of non-negative coordinate descent in a half step
SEED = 20241017  # of the directions from which further terms start


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparableScale:
    """S ~ sum_k outer(out[k], in_[k]), every entry non-negative and finite."""

    out: Tensor  # float32 [K, m]
    in_: Tensor  # float32 [K, n]
    error: float  # expected relative squared error of the corrected gradient, mean((S_hat/S - 1)^2); 0.0 where exact

    def dense(self) -> Tensor:
        """The sum written out, float32 [m, n]: for oracles and per-example paths."""
        return self.out.T @ self.in_


def adafactor_scale(row: Tensor, col: Tensor, eps: float) -> SeparableScale:
    """The exact scale of the factored moment V_ij = row_i col_j / mean(row).

    row [m] is the mean of V over columns, col [n] its mean over rows; `eps` is a floor for their square roots, since a
    sum would not be separable. Silent rows and columns count as average ones.
    """
    row, col, mean = _fill_silent(row.double(), col.double())
    if mean == 0.0:
        return uniform_scale(row.numel(), col.numel(), 0.0, row.device)
    if eps > 0.0:
        row, col, mean = row.clamp_min(eps**2), col.clamp_min(eps**2), max(mean, eps**2)
    return SeparableScale(out=(mean / row).sqrt().float()[None], in_=col.rsqrt().float()[None], error=0.0)


def uniform_scale(num_rows: int, num_columns: int, value: float, device: torch.device | None = None) -> SeparableScale:
    """One and the same `value` for every element; value 1 is no correction."""
    out = torch.ones(1, num_rows, dtype=torch.float32, device=device)
    return SeparableScale(out=out, in_=torch.full((1, num_columns), value, device=device), error=0.0)


def exact_scale(v: Tensor, eps: float) -> Tensor:
    """S = 1 / (sqrt(V) + eps) with silent elements filled; v [m, n] -> float32 [m, n] on the same device."""
    target = _Target(v, eps)
    scale = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    if target.mean > 0.0:
        for rows, inverse in target.chunks():
            scale[rows] = (1.0 / (inverse * target.mean**0.5)).float()
    return scale


def relative_error(v: Tensor, eps: float, scale: SeparableScale) -> float:
    """mean((S_hat / S - 1)^2) of `scale` against the full second moment v [m, n]; 0.0 for a matrix of zeros."""
    target = _Target(v, eps)
    if target.mean == 0.0:
        return 0.0
    out, in_ = scale.out.to(v.device).double(), scale.in_.to(v.device).double() * target.mean**0.5
    total = sum(float(((out[:, rows].T @ in_) * inverse - 1.0).square().sum()) for rows, inverse in target.chunks())
    return total / v.numel()


def fit_separable(v: Tensor, eps: float, rank: int) -> SeparableScale:
    """Fit `rank` non-negative terms to S = 1 / (sqrt(V) + eps) in float64; deterministic, and monotone in `rank`.

    v: full second moment [m, n], finite and >= 0, any float dtype, on the device where the work is to be done.
    `error` of the result is measured against V after rounding to float32. Raises InvalidRequest for rank < 1.
    """
    if rank < 1:
        raise InvalidRequest(f"the rank of a separable scale must be at least 1, not {rank}")
    target = _Target(v, eps)
    if target.mean == 0.0:
        return uniform_scale(v.shape[0], v.shape[1], 0.0, v.device)
    # In units of the matrix' root mean square, so that squares and Gram matrices stay near one.
    out, in_ = (1.0 / target.row).sqrt()[None], (1.0 / target.col).sqrt()[None]
    generator = torch.Generator().manual_seed(SEED)
    for num_terms in range(1, rank + 1):
        if num_terms > 1:
            # The new term starts at zero weight, so the first half step can only lower the error.
            direction = torch.rand(in_.shape[1], generator=generator, dtype=torch.float64).to(v.device)
            out = torch.cat([out, torch.zeros_like(out[:1])])
            in_ = torch.cat([in_, 2.0 * direction * in_[:1]])
        out, in_ = _alternate(target, out, in_)
    size = out.square().mean(dim=1, keepdim=True).sqrt()
    size = torch.where(size > 0.0, size, 1.0)
    fitted = SeparableScale(out=(out / size).float(), in_=(in_ * size / target.mean**0.5).float(), error=0.0)
    return SeparableScale(out=fitted.out, in_=fitted.in_, error=relative_error(v, eps, fitted))


class _Target:
    """1/S of one matrix in units of its root mean square, handed out in float64 chunks of rows."""

    def __init__(self, v: Tensor, eps: float) -> None:
        if v.dim() != 2:
            raise InvalidRequest(f"a separable scale is fitted to a matrix, not to shape {tuple(v.shape)}")
        self.v = v
        row = torch.cat([v[rows].double().mean(dim=1) for rows in self.slices()])
        col = torch.stack([v[rows].double().sum(dim=0) for rows in self.slices()]).sum(dim=0) / v.shape[0]
        row, col, self.mean = _fill_silent(row, col)
        self.row, self.col = (row / self.mean, col / self.mean) if self.mean > 0.0 else (row, col)
        self.eps = eps / self.mean**0.5 if self.mean > 0.0 else eps

    def slices(self) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // max(1, self.v.shape[1]))
        return (slice(start, start + step) for start in range(0, self.v.shape[0], step))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.slices():
            v = self.v[rows].double() / self.mean
            v = torch.where(v > SILENT_FRACTION, v, self.row[rows, None] * self.col)
            yield rows, v.sqrt_().add_(self.eps)


def _fill_silent(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor, float]:
    """Silent rows and columns made average ones, and the mean of V over all elements."""
    mean = float(row.mean())
    if mean == 0.0:
        return row, col, 0.0
    floor = SILENT_FRACTION * mean
    row, col = (torch.where(side > floor, side, side[side > floor].mean()) for side in (row, col))
    return row, col, mean


def _alternate(target: _Target, out: Tensor, in_: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted alternating non-negative least squares until the error stands still; one pass over V per iteration."""
    left, right = torch.triu_indices(len(out), len(out), device=out.device)
    previous, out = float("inf"), out.clone()
    for _ in range(MAX_ITERATIONS):
        pairs = in_[left] * in_[right]
        rhs, gram = torch.zeros_like(in_), torch.zeros_like(pairs)
        for rows, inverse in target.chunks():
            squared = inverse.square()
            solved = _solve(out[:, rows], in_ @ inverse.T, pairs @ squared.T, left, right)
            out[:, rows] = solved
            rhs += solved @ inverse
            gram += (solved[left] * solved[right]) @ squared
        in_ = _solve(in_, rhs, gram, left, right)
        twice = torch.where(left == right, 1.0, 2.0)[:, None]
        quadratic = (twice * gram * in_[left] * in_[right]).sum() - 2.0 * (rhs * in_).sum()
        error = 1.0 + float(quadratic) / target.v.numel()
        if previous - error <= TOLERANCE * max(error, SILENT_FRACTION):
            break
        previous = error
    return out, in_


def _solve(start: Tensor, rhs: Tensor, gram: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Non-negative coordinate descent on x^T M x - 2 rhs^T x per column; start, rhs [K, c], gram [K(K+1)/2, c]."""
    num_terms = len(start)
    full = gram.new_empty(num_terms, num_terms, gram.shape[1])
    full[left, right] = gram
    full[right, left] = gram
    x = start.clone()
    for _ in range(COORDINATE_SWEEPS if num_terms > 1 else 1):
        for k in range(num_terms):
            step = rhs[k] - (full[k] * x).sum(dim=0)
            curvature = full[k, k]
            # A term that vanished in a row has no curvature there and stays at zero.
            x[k] = torch.where(curvature > 0.0, x[k] + step / curvature, 0.0).clamp_min(0.0)
    return x

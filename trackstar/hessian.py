"""The Hessian proxy R and whitening by R^(-1/2). Read this file after `encode`.

R is the autocorrelation of un-whitened rows, block by block (a Gauss-Newton proxy):

    R_b = (1/N) Phi_b^T Phi_b            Phi_b [N, D_b]: block b of N rows

R_train comes from passages, R_task from task queries, and a mix joins them:

    R = lambda * R_task + (1 - lambda) * R_train
    lambda = sigma_train[k] / (sigma_task[k] + sigma_train[k])       (crossing rule)

where sigma[k] is the k-th largest eigenvalue over all blocks: under that lambda both terms have the same k-th
eigenvalue, so directions that are common to the task's queries are damped about as much as the strongest directions of
the corpus.
Before the inverse root is taken every eigenvalue is raised by damping * mean eigenvalue of its block.

Everything here is float64 except the whitening matrices that are applied to rows, which are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from trackstar.errors import InvalidRequest
from trackstar.projection import BlockLayout

# The paper reads sigma at about 1,000 of about 65,536.
CROSSING_FRACTION = 1000 / 65536
# Products in float32 leave eigenvalues of up to 1e-7 of the largest where the rows span nothing (measured).
_ROUNDING = 1e-6


class MixConfig(BaseModel):
    """How R is put together. `weight` is lambda, the share of R_task; "crossing" derives it from the two spectra."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["train", "task", "none"] = "train"
    weight: float | Literal["crossing"] = "crossing"
    crossing_fraction: float = Field(default=CROSSING_FRACTION, gt=0, lt=1)
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> MixConfig:
        if isinstance(self.weight, float) and not 0.0 <= self.weight <= 1.0:
            raise ValueError("weight must lie between 0 and 1")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Autocorrelation:
    """R as float64 [D_b, D_b] per block, averaged over `count` rows."""

    blocks: tuple[Tensor, ...]
    count: int

    def eigenvalues(self) -> Tensor:
        """All eigenvalues of all blocks, float64, descending."""
        found = torch.cat([torch.linalg.eigvalsh(block) for block in self.blocks])
        return found.clamp_min(0).sort(descending=True).values


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductSums:
    """Phi_b^T Phi_b of `count` rows as float64 [D_b, D_b] per block: R before it is averaged. Sums of parts add up."""

    blocks: tuple[Tensor, ...]
    count: int

    def __add__(self, other: ProductSums) -> ProductSums:
        blocks = tuple(one + two for one, two in zip(self.blocks, other.blocks, strict=True))
        return ProductSums(blocks=blocks, count=self.count + other.count)

    def average(self) -> Autocorrelation:
        """R.

        Raises:
            InvalidRequest: of no rows.
        """
        if not self.count:
            raise InvalidRequest("the Hessian needs at least one row")
        return Autocorrelation(blocks=tuple(total / self.count for total in self.blocks), count=self.count)


def product_sums(batches: Iterable[Tensor], layout: BlockLayout, *, device: str = "cpu") -> ProductSums:
    """Sums of rows that come in batches [N, d] of any float type, in one streaming pass.

    Products are made in float32 on `device` (float64 of float64 rows), sums over batches in float64 on the CPU.
    """
    sums = [torch.zeros(block.dim, block.dim, dtype=torch.float64) for block in layout.blocks]
    count = 0
    for rows_ND in batches:
        for total, part in zip(sums, layout.split(rows_ND), strict=True):
            part = part.to(device, torch.float32 if part.dtype != torch.float64 else torch.float64)
            total += (part.mT @ part).to(total)
        count += len(rows_ND)
    return ProductSums(blocks=tuple(sums), count=count)


def autocorrelation(batches: Iterable[Tensor], layout: BlockLayout) -> Autocorrelation:
    """R of rows that come in batches [N, d]."""
    return product_sums(batches, layout).average()


def crossing_weight(train: Autocorrelation, task: Autocorrelation, fraction: float = CROSSING_FRACTION) -> float:
    """Lambda by the crossing rule, read at k = fraction * d.

    Raises:
        InvalidRequest: the task's rows span fewer than k directions, so sigma_task[k] is zero.
    """
    sigma_train, sigma_task = train.eigenvalues(), task.eigenvalues()
    k = max(1, round(fraction * len(sigma_train)))
    if float(sigma_task[k - 1]) <= _ROUNDING * float(sigma_task[0]):
        rank = int((sigma_task > _ROUNDING * sigma_task[0]).sum())
        raise InvalidRequest(
            f"the crossing rule reads eigenvalue {k} but the {task.count} task queries span {rank} directions only; "
            "give more task queries, a smaller crossing fraction or a fixed weight"
        )
    return float(sigma_train[k - 1] / (sigma_task[k - 1] + sigma_train[k - 1]))


def mix(train: Autocorrelation, task: Autocorrelation | None, config: MixConfig) -> tuple[Autocorrelation, float]:
    """R under `config`, and the lambda that was used (0.0 without a task).

    Raises:
        InvalidRequest: a task mix without task queries.
    """
    if config.kind != "task":
        return train, 0.0
    if task is None:
        raise InvalidRequest("a task mix needs task queries; give them with --task-queries")
    weight = crossing_weight(train, task, config.crossing_fraction) if config.weight == "crossing" else config.weight
    blocks = tuple(weight * a + (1 - weight) * b for a, b in zip(task.blocks, train.blocks, strict=True))
    return Autocorrelation(blocks=blocks, count=train.count), weight


class Whitener:
    """Applies W = R^(-1/2), symmetric, block by block."""

    def __init__(self, layout: BlockLayout, inverse_roots: Sequence[Tensor]) -> None:
        self.layout = layout
        self.inverse_roots = tuple(inverse_roots)

    @classmethod
    def fit(cls, correlation: Autocorrelation, layout: BlockLayout, *, damping: float) -> Whitener:
        """R^(-1/2) from a float64 eigendecomposition; eigenvalues are raised by damping * mean eigenvalue of the block.

        A block in which no row holds anything (all its weights are left out) gets the pseudo-inverse, which is zero.

        Raises:
            InvalidRequest: R is zero throughout, singular without enough damping, or holds values that are not finite.
        """
        if not any(bool(matrix.any()) for matrix in correlation.blocks):
            raise InvalidRequest("the Hessian is zero: no passage has a gradient, or no weight contributes")
        roots = []
        for block, matrix in zip(layout.blocks, correlation.blocks, strict=True):
            if not bool(torch.isfinite(matrix).all()):
                raise InvalidRequest(f"the Hessian of block {block.name!r} holds values that are not finite")
            if not bool(matrix.any()):
                roots.append(torch.zeros_like(matrix, dtype=torch.float32))
                continue
            values, vectors = torch.linalg.eigh(matrix)
            values = values.clamp_min(0) + damping * float(matrix.diagonal().mean())
            if float(values[0]) <= (1e-14 if damping else _ROUNDING) * float(values[-1]):
                raise InvalidRequest(
                    f"the Hessian of block {block.name!r} has no inverse: {correlation.count} rows, {block.dim} "
                    f"dimensions, damping {damping}; use a larger damping"
                )
            roots.append(((vectors * values.rsqrt()) @ vectors.mT).float())
        return cls(layout, roots)

    @classmethod
    def identity(cls, layout: BlockLayout) -> Whitener:
        """No whitening; kept as matrices of one element per block, broadcast in `apply`."""
        return cls(layout, [torch.ones(1, 1) for _ in layout.blocks])

    def apply(self, rows_ND: Tensor) -> Tensor:
        """R^(-1/2) g for rows [..., d]; float32."""
        return torch.cat(
            [self._apply_block(p, w) for p, w in zip(self._split(rows_ND), self.inverse_roots, strict=True)], -1
        )

    def apply_twice(self, rows_ND: Tensor) -> Tensor:
        """R^(-1) g for rows [..., d]; float32."""
        return self.apply(self.apply(rows_ND))

    def _split(self, rows_ND: Tensor) -> tuple[Tensor, ...]:
        return self.layout.split(rows_ND.float())

    @staticmethod
    def _apply_block(part_ND: Tensor, root_DD: Tensor) -> Tensor:
        return part_ND * root_DD[0, 0] if root_DD.shape[0] == 1 else part_ND @ root_DD

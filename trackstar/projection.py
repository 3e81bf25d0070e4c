"""The projection P_d: two Gaussian factors per weight matrix, grouped into blocks of layers.

    block b of a row = sum over the block's weight matrices i of  L_i (G_i / sqrt(V_i)) R_i^T

with L_i [rows, out_features] and R_i [cols, in_features] of i.i.d. N(0, 1/rows) and N(0, 1/cols) entries, so that inner
products are kept in expectation. By default the layers are cut into 8 contiguous groups, each group gives one block of
attention weights and one of MLP weights, and every block is 64 x 64: d = 65,536, as in the paper.

The factors are a pure function of (seed, weight name, side, feature): a counter-based generator (Philox 4x64) is keyed
by the first three and counted by the fourth, so every rank can draw just its own slice of features and every device
gets the same bits. This module draws and lays out; it knows nothing of models, gradients or moments.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Side = Literal["out", "in"]

# One Philox counter step gives 4 words of 64 bits; one word gives two normals.
_NORMALS_PER_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One square of the projected gradient: the sum over the weight matrices of one kind in one group of layers."""

    name: str
    rows: int
    cols: int

    @property
    def dim(self) -> int:
        """Number of coordinates of the block."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """The order of the blocks within a row; block b occupies `span(b)` in row-major (rows, cols) order."""

    blocks: tuple[Block, ...]

    @property
    def dim(self) -> int:
        """Number of coordinates d of a row."""
        return sum(block.dim for block in self.blocks)

    def span(self, index: int) -> slice:
        """Where block `index` lies within a row."""
        start = sum(block.dim for block in self.blocks[:index])
        return slice(start, start + self.blocks[index].dim)

    def split(self, rows_ND: Tensor) -> tuple[Tensor, ...]:
        """Views of shape [..., block.dim], one per block, of rows of shape [..., d]."""
        return torch.split(rows_ND, [block.dim for block in self.blocks], dim=-1)


def normal_factor(
    *, seed: int, name: str, side: Side, size: int, features: range, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw the factor of one side of one weight matrix, feature-major.

    Args:
        seed: the projection's seed.
        name: name of the weight, as in `named_parameters()`; a fused expert adds its index.
        side: "out" for L (features are output features), "in" for R (features are input features).
        size: `rows` or `cols` of the block; entries have variance 1/size.
        features: contiguous slice of features to draw; any slicing gives the same numbers.

    Returns:
        [len(features), size] tensor, equal on every device and rank: computed in float64, then rounded to `dtype`.
    """
    if features.step != 1:
        raise ValueError("features must be a contiguous range")
    digest = hashlib.blake2b(f"{seed}\0{name}\0{side}".encode(), digest_size=16).digest()
    steps_per_feature = math.ceil(size / _NORMALS_PER_STEP)
    generator = np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))
    generator.advance(features.start * steps_per_feature)
    words = generator.random_raw(len(features) * steps_per_feature * 4)
    normals = _box_muller(words).reshape(len(features), steps_per_feature * _NORMALS_PER_STEP)[:, :size]
    return torch.from_numpy(normals / math.sqrt(size)).to(dtype)


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Two independent N(0, 1) float64 values from the two halves of every 64-bit word."""
    radius_bits = (words >> np.uint64(32)).astype(np.float64)
    angle_bits = (words & np.uint64(0xFFFFFFFF)).astype(np.float64)
    # The half keeps the logarithm finite; 2**32 radii reach 6.7 standard deviations.
    radius = np.sqrt(-2.0 * np.log((radius_bits + 0.5) / 2.0**32))
    angle = (2.0 * np.pi / 2.0**32) * angle_bits
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)

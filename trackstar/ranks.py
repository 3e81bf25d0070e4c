"""Ranks: how the processes that hold one model together make rows together.

A row is linear in both sides of every weight matrix, so the rows of a model that is cut over ranks are sums of parts,
one from each rank. `Encoder` asks for two verbs only: which examples of a batch are mine, and the sum over all ranks.

This module knows no process group; `sharding` brings one. Everyone else is `ALONE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """All ranks call the same verbs in the same order."""

    @property
    def num_dealt(self) -> int:
        """To how many ranks the examples of a batch are dealt; with 1 every rank runs all of them."""

    def mine(self, batch: Sequence[int]) -> list[int]:
        """The part of a batch that this rank runs; may be empty, and still takes a pass."""

    def sum_(self, part: Tensor) -> None:
        """Replace `part`, in place, by the sum of every rank's; the same bits on every rank."""


class Alone:
    """One process with the whole model."""

    num_dealt = 1

    def mine(self, batch: Sequence[int]) -> list[int]:
        """All of it."""
        return list(batch)

    def sum_(self, part: Tensor) -> None:
        """Nothing: the part is the whole."""


ALONE = Alone()

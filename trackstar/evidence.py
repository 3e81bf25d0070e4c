"""Evidence beside a score: the tokens and blocks that carry it, and the words it shares with the query.

Contributions come from one more pass of the model over the passage (see `encode.Encoder.contributions`); divided by the
passage's norm they sum to the score, up to the rounding of the stored row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trackstar.results import Evidence

_WORD = re.compile(r"\w+")
# Name of the share of experts whose tokens are not known.
UNPLACED = "(experts)"


def words_of(text: str) -> frozenset[str]:
    """The distinct words of a text, in lower case."""
    return frozenset(word.lower() for word in _WORD.findall(text))


def overlap(query_words: frozenset[str], text: str) -> float:
    """Share of the query's distinct words that occur in the text, from 0 to 1."""
    return len(query_words & words_of(text)) / len(query_words) if query_words else 0.0


def make_evidence(
    *,
    by_token_Tb: NDArray[np.float32],
    unplaced_b: NDArray[np.float32],
    norm: float,
    token_texts: Sequence[str],
    block_names: Sequence[str],
    overlap: float,
) -> Evidence:
    """Evidence of one passage.

    Args:
        by_token_Tb: float32 [T, b], shares of <row, dual> by token and block.
        unplaced_b: float32 [b], shares of experts whose tokens are not known.
        norm: |W row| of the passage; with 0 every share is 0.
        token_texts: T texts.
        block_names: b names.
        overlap: see `overlap`.
    """
    divisor = norm or float("inf")
    by_token = (by_token_Tb.sum(axis=1, dtype=np.float64) / divisor).tolist()
    by_block = ((by_token_Tb.sum(axis=0, dtype=np.float64) + unplaced_b.astype(np.float64)) / divisor).tolist()
    unplaced = float(unplaced_b.sum(dtype=np.float64)) / divisor
    tokens = list(zip(token_texts, by_token, strict=True)) + ([(UNPLACED, unplaced)] if unplaced else [])
    return Evidence(tokens=tuple(tokens), blocks=tuple(zip(block_names, by_block, strict=True)), overlap=overlap)

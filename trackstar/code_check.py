"""Are stored codes and norms those of the rows? Sampled rows are whitened and coded again.

Kernels of another machine round otherwise, which turns the sign of a coordinate that is almost zero: of normally spread
coordinates with a relative error of 1e-5 about one in 100,000. So with `bit_share` p, a code of k bits differs only if
more than k p + 5 sqrt(k p) of them do, rounded up, which chance exceeds in less than one code in a thousand; p = 0 asks
for equal bits. Another row's code differs in half of its bits.

Legend: N passages, some of them at once, d coordinates of a row, S sampled passages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trackstar.code_store import CodeStore
from trackstar.codes import encode_codes
from trackstar.generation import Generation
from trackstar.rows import RowStore

# Rows read and whitened at once.
ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeCheck:
    """How many passages were compared, how many of their codes and norms differ, and how many single bits."""

    compared: int
    codes_differing: int
    bits_differing: int
    norms_differing: int


def check_codes(
    generation: Generation,
    rows: RowStore,
    store: CodeStore,
    ids_S: NDArray[np.int64],
    *,
    bit_share: float,
    tolerance: float,
    on_rows: Callable[[int, int], None] = lambda _done, _total: None,
) -> CodeCheck:
    """Compare stored codes and norms with those that the rows have.

    Args:
        generation: how rows are whitened and coded, and the norms that scores are divided by.
        rows: the rows.
        store: the codes; every shard that holds one of the passages is read once.
        ids_S: int64 [S], distinct passages.
        bit_share: share of bits that rounding may turn; 0 asks for equal bits.
        tolerance: relative difference that rounding may make to a prefix, as a vector, or to a norm.
        on_rows: called with (passages done, passages in total).

    Raises:
        CorruptArtifact: a row, or a shard of codes, is not what was written.
    """
    ids_S = np.sort(ids_S)
    spec = generation.spec
    expected_bits = spec.size * bit_share
    allowed_bits = math.ceil(expected_bits + 5 * math.sqrt(expected_bits))
    codes_differing = bits_differing = norms_differing = done = 0
    shard_S = np.searchsorted(rows.starts, ids_S, side="right") - 1
    for shard in np.unique(shard_S):
        stored = store.shard(int(shard))
        for ids in runs(ids_S[shard_S == shard]):
            whitened_Nd = generation.whitener.apply(rows.read(ids))
            norms_N = whitened_Nd.norm(dim=1)
            unit_Nd = whitened_Nd / norms_N.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            now = encode_codes(spec, generation.rotation, unit_Nd)
            then = stored.codes[np.searchsorted(stored.passage_ids, ids)]
            if spec.kind == "bits":
                bits_N = np.bitwise_count(now ^ then).sum(axis=1, dtype=np.int64)
                bits_differing += int(bits_N.sum())
                codes_differing += int((bits_N > allowed_bits).sum())
            else:
                distance_N = np.linalg.norm(now.astype(np.float64) - then, axis=1)
                codes_differing += int((~(distance_N <= tolerance * np.linalg.norm(now, axis=1))).sum())
            # Not `>`: what is not a number differs too.
            close_N = np.abs(norms_N.numpy() - generation.norms_N[ids]) <= tolerance * norms_N.numpy()
            norms_differing += int((~close_N).sum())
            done += len(ids)
            on_rows(done, len(ids_S))
    return CodeCheck(
        compared=len(ids_S),
        codes_differing=codes_differing,
        bits_differing=bits_differing,
        norms_differing=norms_differing,
    )


def runs(ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The ids in order, as many at once as rows are read at once."""
    return [ids[start : start + ROWS_AT_ONCE] for start in range(0, len(ids), ROWS_AT_ONCE)]

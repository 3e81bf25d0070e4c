"""Exact scores of rows as they are stored, and the scan of a shard: in any order, in any process, the same answers.

    score(m, q) = <dual_q, g_m> / |W g_m|        dual_q = R^-1 g_q / |W g_q|,  W = R^(-1/2),  g un-whitened rows

A shard's rankings depend on that shard and the queries alone, and `merge` takes them in any order: scores descend, ties
go to the smaller id, and no id lies in two shards. So shards may be scanned wherever they lie, and what comes back is
bitwise the same for every order. It holds one shard as stored, and besides 64 MiB of scores and some float32 rows, few
enough to stay in a processor's cache between conversion and product.

Legend: N passages, n of them at once, Q queries, q of them at once, d coordinates of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.generation import Generation
from trackstar.ranking import Ranking, best
from trackstar.row_shards import Receipt
from trackstar.rows import RowStore

# Float32 rows held at once, but no fewer than so many rows: products with very few sum in another order, and slowly.
_CHUNK_BYTES = 4 << 20
_CHUNK_ROWS = 32
# Scores held at once.
_MAX_SCORES = 1 << 24

# For every query and end, a ranking.
Rankings = list[list[Ranking]]


def exact_scores(dual_Qd: Tensor, rows_Nd: Tensor, norms_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores [Q, N] of duals float32 [Q, d] with rows float32 [N, d]; a norm of zero scores zero."""
    safe_N = np.where(norms_N > 0, norms_N, np.float32(np.inf))
    scores_QN: NDArray[np.float32] = np.divide((dual_Qd @ rows_Nd.mT).numpy(), safe_N, dtype=np.float32)
    return scores_QN


def shard_ids(rows: RowStore, receipt: Receipt) -> NDArray[np.int64]:
    """Passage ids int64 [N] of a shard's rows, in their order."""
    first = rows.first(receipt.shard)
    return np.arange(first, first + receipt.num_passages, dtype=np.int64)


def rank_rows(
    stored_Nd: Tensor,
    ids: NDArray[np.int64],
    norms_N: NDArray[np.float32],
    dual_Qd: Tensor,
    *,
    signs: Sequence[float],
    k: int,
) -> Rankings:
    """The best k of these rows per query and sign.

    Args:
        stored_Nd: rows [N, d] in their stored type.
        ids: their passage ids, int64 [N].
        norms_N: float32 [N], whitened.
        dual_Qd: float32 [Q, d].
        signs: the ends wanted, each 1.0 or -1.0.
        k: passages per ranking.
    """
    found: Rankings = []
    num, dim = stored_Nd.shape
    chunks = list(_parts(num, max(1, _CHUNK_ROWS, _CHUNK_BYTES // (4 * dim))))
    # One buffer for all chunks: memory that is new each time costs more than the products.
    buffer_nd = torch.empty(max(some.stop - some.start for some in chunks), dim)
    for queries in _parts(len(dual_Qd), max(1, _MAX_SCORES // max(1, len(ids)))):
        scores_qN = np.empty((queries.stop - queries.start, len(ids)), dtype=np.float32)
        for some in chunks:
            rows_nd = buffer_nd[: some.stop - some.start].copy_(stored_Nd[some])
            scores_qN[:, some] = exact_scores(dual_Qd[queries], rows_nd, norms_N[some])
        found += [[best(ids, scores_N, sign=sign, k=k) for sign in signs] for scores_N in scores_qN]
    return found


def scan_shard(
    rows: RowStore, generation: Generation, shard: int, dual_Qd: Tensor, signs: Sequence[float], k: int
) -> Rankings:
    """The best k of one shard per query and sign, after its files are compared with their digests; none that is purged.

    Args:
        rows: the store; this shard of it is read once.
        generation: whose norms count.
        shard: number of the shard, of those in `rows.receipts`.
        dual_Qd: float32 [Q, d].
        signs: the ends wanted, each 1.0 or -1.0.
        k: passages per ranking.

    Raises:
        CorruptArtifact: the shard is not what was written.
        NotReady: it cannot be read now.
    """
    receipt = rows.receipts[shard]
    assert receipt.shard == shard
    ids = shard_ids(rows, receipt)
    excluded = generation.excluded
    gone = excluded[slice(*np.searchsorted(excluded, (ids[0], ids[-1] + 1)))] if len(ids) else excluded[:0]
    kept = ~np.isin(ids, gone, assume_unique=True)
    stored_Nd = rows.shard(shard, verify=True)
    if not kept.all():
        ids, stored_Nd = ids[kept], stored_Nd[torch.from_numpy(kept)]
    return rank_rows(stored_Nd, ids, generation.norms_N[ids], dual_Qd, signs=signs, k=k)


def merge(found: Iterable[Rankings], *, num_queries: int, signs: Sequence[float], k: int) -> Rankings:
    """The best k of all shards' rankings, in whatever order these come; empty rankings if none come."""
    merged = [[Ranking.empty() for _ in signs] for _ in range(num_queries)]
    for part in found:
        for old, new in zip(merged, part, strict=True):
            old[:] = [mine.merge(other, sign=sign, k=k) for mine, other, sign in zip(old, new, signs, strict=True)]
    return merged


def _parts(num: int, size: int) -> Iterator[slice]:
    """Runs of `size`, the last one longer by what is left: kernels sum in another order for very few rows."""
    count = max(1, num // size)
    for part in range(count):
        yield slice(part * size, num if part == count - 1 else (part + 1) * size)

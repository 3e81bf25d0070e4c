"""Exact scores: what the coarse search proposes is read from the rows and ranked; or every row is.

The score is that of `trackstar.exact`: one dot product with a row as it is stored, times a norm that was computed with
the generation. A row of norm zero (a passage without any target) scores zero. Ties go to the smaller id. It reads rows
and knows no model.

Legend: N passages, Q queries, d coordinates of a row, b blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.errors import CorruptArtifact
from trackstar.exact import Rankings, exact_scores, merge, rank_rows, shard_ids
from trackstar.generation import Generation
from trackstar.ranking import Ranking, best
from trackstar.row_shards import Receipt
from trackstar.rows import FileState, RowStore

# Below this share of a shard's rows, reading them one by one moves fewer bytes than reading the shard.
_SPARSE = 1 / 8
# Candidates' rows are read and scored so many bytes of float32 at a time: memory that stays in use is warm.
_READ_BYTES = 8 << 20


class Reranker:
    """Scores passages of one generation exactly; safe to use from several threads."""

    def __init__(self, rows: RowStore, generation: Generation) -> None:
        self.rows = rows
        self.generation = generation
        self._background_ND = generation.background_rows_ND.float()
        self._background_norms_N = generation.norms_N[generation.background_ids]
        # Scans check no single rows as reranking does, so the first one compares every shard with its digest, and a
        # later one those whose files are no longer what they were then.
        self._verified: dict[int, FileState | None] = {}

    def rerank(self, dual_d: Tensor, ids: NDArray[np.int64], *, sign: float, k: int) -> Ranking:
        """The best k of the candidates `ids` (by lowest score if `sign` is negative).

        Raises:
            NotFound: an id is out of range.
            CorruptArtifact: a row is not what was written.
        """
        ids = np.sort(ids)
        step = max(1, _READ_BYTES // (4 * self.rows.dim))
        chunks = [ids[start : start + step] for start in range(0, len(ids), step)]
        scores = [
            exact_scores(dual_d[None], self.rows.read(chunk), self.generation.norms_N[chunk])[0] for chunk in chunks
        ]
        return best(ids, np.concatenate(scores) if scores else np.empty(0, np.float32), sign=sign, k=k)

    def scan(
        self,
        dual_Qd: Tensor,
        *,
        signs: Sequence[float],
        k: int,
        mask_N: NDArray[np.bool_] | None = None,
        on_rows: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Rankings:
        """The best k of all passages per query and sign; each shard is read once for all queries.

        Args:
            dual_Qd: float32 [Q, d].
            signs: the ends wanted, each 1.0 or -1.0.
            k: passages per ranking.
            mask_N: which passages count, by id; all if None.
            on_rows: called with (passages done, passages in total).

        Raises:
            CorruptArtifact: a row or shard is not what was written.
        """
        parts = self._scanned(dual_Qd, signs, k, mask_N, on_rows)
        return merge(parts, num_queries=len(dual_Qd), signs=signs, k=k)

    def background(self, dual_d: Tensor) -> tuple[float, float]:
        """Mean and standard deviation of the query's scores on the background sample."""
        scores_N = exact_scores(dual_d[None], self._background_ND, self._background_norms_N)[0]
        std = float(scores_N.std(ddof=1, dtype=np.float64)) if len(scores_N) > 1 else 0.0
        return float(scores_N.mean(dtype=np.float64)), std

    def block_shares(self, dual_d: Tensor, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """How much every block adds to each passage's score, [N, b]; the shares of a passage sum to its score."""
        layout = self.generation.layout
        products_Nd = self.rows.read(ids).double() * dual_d.double()
        shares_Nb = torch.stack([part.sum(1) for part in layout.split(products_Nd)], dim=1).numpy()
        norms_N = self.generation.norms_N[ids].astype(np.float64)
        shares: NDArray[np.float64] = shares_Nb / np.where(norms_N > 0, norms_N, np.inf)[:, None]
        return shares

    def _scanned(
        self,
        dual_Qd: Tensor,
        signs: Sequence[float],
        k: int,
        mask_N: NDArray[np.bool_] | None,
        on_rows: Callable[[int, int], None],
    ) -> Iterator[Rankings]:
        """Every shard's rankings."""
        done = 0
        for receipt in self.rows.receipts:
            ids = shard_ids(self.rows, receipt)
            if mask_N is not None:
                ids = ids[mask_N[ids]]
            if len(ids):
                stored_Nd = self._shard_rows(receipt, ids)
                yield rank_rows(stored_Nd, ids, self.generation.norms_N[ids], dual_Qd, signs=signs, k=k)
            done += receipt.num_passages
            on_rows(done, self.rows.num_passages)

    def _shard_rows(self, receipt: Receipt, ids: NDArray[np.int64]) -> Tensor:
        """Rows [N, d] of a shard, or of the passages `ids` of it."""
        shard, count = receipt.shard, receipt.num_passages
        if len(ids) < _SPARSE * count:
            return self.rows.read(ids)
        state = self.rows.state(shard)
        rows_ND = self.rows.shard(shard, verify=shard not in self._verified or self._verified[shard] != state)
        if self.rows.state(shard) != state:
            raise CorruptArtifact(f"shard {shard} of the rows was written to while it was read")
        self._verified[shard] = state
        return rows_ND if len(ids) == count else rows_ND[torch.from_numpy(ids - self.rows.first(shard))]

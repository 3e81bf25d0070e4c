"""TRAK, the method of Park et al. 2023 (arXiv 2303.14186), on indexes of the margin.

    score(m, q) = mean over checkpoints of  phi_q (Phi^T Phi + damping)^-1 phi_m   x   mean over checkpoints of  Q_m

phi are projected gradients of the margin (an index built with `objective: margin`), Phi all passages' of a checkpoint,
and Q_m = 1 - p_m is how wrong the checkpoint is about passage m: minus the derivative of its loss by its margin. Both
means are taken apart, as in the paper and its package (which besides divides each checkpoint's inverse by its mean
absolute value), and nothing is normalised, so long passages score higher.

What a language model leaves open: a passage has many targets. Its margin is the sum over tokens, so 1 - p_m is the mean
over tokens of 1 - p_t, the one derivative that fits them all. `damping` is in mean eigenvalues of Phi^T Phi; the paper
has none, which needs more passages than coordinates. The paper's soft threshold, fitted to retrained models, is left
out: it changes the order of no two scores that it keeps.

Phi^T Phi takes 8 d^2 bytes; with `blockwise` it is taken for each block of a row apart, which is not TRAK's any more
but stands a d of 65,536. A scan reads one shard of each checkpoint at a time, for all queries at once.

Legend: N passages, n of them at once, Q queries, d coordinates of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.encode import QUERY_LENGTH_STEP, Example
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.evaluation.outputs import error
from trackstar.evaluation.passes import summed
from trackstar.hessian import ProductSums, product_sums
from trackstar.index import Index
from trackstar.model import LoadedModel
from trackstar.projection import Block, BlockLayout
from trackstar.queries import tokenize
from trackstar.ranking import Ranking, best
from trackstar.results import Query
from trackstar.rows import RowStore
from trackstar.tombstones import read_deleted

# Phi^T Phi of so many coordinates takes 2 GiB, and as much again to factor it.
MAX_WHOLE_DIM = 16384
# Of a query, its document ids and scores, best first.
Found = tuple[str, list[str], list[float]]


class Trak:
    """Scores passages by one or several checkpoints. `shown_N`: bool, which passages are not deleted; None if all are.

    Args:
        folders: an index of the margin for each checkpoint, all of the same corpus and windows.
        damping: added to every eigenvalue of Phi^T Phi, in units of their mean.
        blockwise: take Phi^T Phi block by block.
        device: where models run.
        name: of the method in tables.

    Raises:
        InvalidRequest: no folder, an index of another output than the margin, or rows too wide for one kernel.
        Incompatible: the indexes are of different passages.
    """

    def __init__(
        self,
        folders: Sequence[str],
        *,
        damping: float = 0.1,
        blockwise: bool = False,
        device: str = "cpu",
        name: str = "trak",
    ) -> None:
        if not folders:
            raise InvalidRequest("TRAK needs an index of the margin for each checkpoint; give at least one")
        if not 0 <= damping < float("inf"):
            raise InvalidRequest(f"the damping of TRAK is {damping}; give 0 or a number above")
        self.name = name
        self._device = device
        self._checkpoints = [
            _Checkpoint(Index(folder), damping=damping, blockwise=blockwise, device=device) for folder in folders
        ]
        first = self._checkpoints[0]
        for other in self._checkpoints[1:]:
            if other.passages != first.passages:
                raise Incompatible(
                    f"{str(other.index.root)!r} and {str(first.index.root)!r} hold different passages; index the same "
                    "corpus with the same windows for every checkpoint"
                )
        self.num_passages = first.rows.num_passages
        self.shown_N = read_deleted(first.index.root).mask(self.num_passages)

    @cached_property
    def weights_N(self) -> NDArray[np.float32]:
        """Q: 1 - p of every passage, averaged over its tokens and the checkpoints; one forward pass over the corpus."""
        errors_CN = np.stack([checkpoint.errors_N() for checkpoint in self._checkpoints])
        mean_N: NDArray[np.float32] = errors_CN.mean(axis=0, dtype=np.float32)
        return mean_N

    def scores(self, queries: Sequence[Query]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Scores of every passage, in order of their ids: the first id of a run of passages, and float32 [Q, n].

        Raises:
            InvalidRequest: a query cannot be tokenised, or Phi^T Phi has no inverse.
            CorruptArtifact: a shard is not what was written.
        """
        duals = [checkpoint.duals(queries) for checkpoint in self._checkpoints]
        # Checkpoints may be cut into shards in different places.
        cuts = np.unique(np.concatenate([checkpoint.rows.starts for checkpoint in self._checkpoints]))
        for first, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            scores_Qn = np.zeros((len(queries), end - first), dtype=np.float32)
            for checkpoint, dual_Qd in zip(self._checkpoints, duals, strict=True):
                scores_Qn += (dual_Qd @ checkpoint.read(first, end).mT).numpy()
            scores_Qn *= self.weights_N[first:end] / np.float32(len(duals))
            yield first, scores_Qn

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Found]:
        """The best k documents of each query, each by its best passage; ties go to the one that comes first.

        Raises:
            InvalidRequest: k is below 1, or as `scores`.
        """
        if k < 1:
            raise InvalidRequest(f"k must be at least 1; k is {k}")
        rankings = [Ranking.empty() for _ in queries]
        documents = self._documents()
        # Of one document, so many passages may be among the best.
        deep = k * int(np.bincount(documents).max(initial=1))
        for first, scores_Qn in self.scores(queries):
            ids = np.arange(first, first + scores_Qn.shape[1], dtype=np.int64)
            kept = slice(None) if self.shown_N is None else self.shown_N[ids]
            for query, scores_n in enumerate(scores_Qn):
                found = best(ids[kept], scores_n[kept], sign=1.0, k=deep)
                rankings[query] = rankings[query].merge(found, sign=1.0, k=deep)
        return [self._found(query, ranking, documents, k) for query, ranking in zip(queries, rankings, strict=True)]

    def close(self) -> None:
        """Close the rows."""
        for checkpoint in self._checkpoints:
            checkpoint.rows.close()

    def document_ids(self) -> NDArray[np.str_]:
        """Every passage's document, [N]."""
        ids_N: NDArray[np.str_] = self._checkpoints[0].rows.column("doc_id").astype(str)
        return ids_N

    def _documents(self) -> NDArray[np.int64]:
        """Number of every passage's document, int64 [N]."""
        _, numbers = np.unique(self.document_ids(), return_inverse=True)
        return numbers.astype(np.int64)

    def _found(self, query: Query, ranking: Ranking, documents: NDArray[np.int64], k: int) -> Found:
        _, firsts = np.unique(documents[ranking.ids], return_index=True)
        places = np.sort(firsts)[:k]
        passages = self._checkpoints[0].rows.passages(ranking.ids[places])
        return query.query_id, [passage.doc_id for passage in passages], ranking.scores[places].tolist()


class _Checkpoint:
    """One checkpoint's rows, kernel and model; the model is held only while it runs."""

    def __init__(self, index: Index, *, damping: float, blockwise: bool, device: str) -> None:
        objective = index.facts.get("objective", "loss")
        if objective != "margin":
            raise InvalidRequest(
                f"TRAK takes gradients of the margin and {str(index.root)!r} holds those of the {objective}; build an "
                "index with the objective margin"
            )
        layout = index.layout
        if not blockwise:
            if layout.dim > MAX_WHOLE_DIM:
                raise InvalidRequest(
                    f"rows of {layout.dim:,} coordinates are too wide for TRAK's one kernel, which takes up to "
                    f"{MAX_WHOLE_DIM:,}; build a narrower index, or take the kernel block by block"
                )
            layout = BlockLayout(blocks=(Block(name="row", rows=layout.dim, cols=1),))
        self.index, self.rows = index, index.rows()
        self._layout, self._damping, self._device = layout, damping, device
        self._read: tuple[int, Tensor] | None = None

    @property
    def passages(self) -> tuple[object, ...]:
        """What the passages are: the same for every checkpoint that has the same ones."""
        tokens = (self.index.facts["window_tokens"], self.index.facts["add_bos"])
        return (*(part.corpus.get("fingerprint") for part in self.rows.parts), *tokens, self.rows.num_passages)

    def read(self, first: int, end: int) -> Tensor:
        """Rows float32 [n, d] of a run of passages that lies in one shard."""
        shard = int(np.searchsorted(self.rows.starts, first, side="right")) - 1
        if self._read is None or self._read[0] != shard:
            self._read = None
            self._read = (shard, self.rows.shard(shard, verify=True).float())
        offset = self.rows.first(shard)
        return self._read[1][first - offset : end - offset]

    def duals(self, queries: Sequence[Query]) -> Tensor:
        """(Phi^T Phi + damping)^-1 phi of every query, float32 [Q, d]."""
        loaded = self._load()
        add_bos = self.index.facts["add_bos"]
        examples = [tokenize(q, loaded.tokenizer, add_bos=add_bos, max_tokens=loaded.max_tokens) for q in queries]
        encoder = self.index.encoder(loaded, length_step=QUERY_LENGTH_STEP)
        try:
            phi_Qd = encoder.encode(examples).rows_ND.cpu()
        finally:
            encoder.close()
        return solve(self._kernel, self._layout, phi_Qd, damping=self._damping)

    @cached_property
    def _kernel(self) -> ProductSums:
        batches = (self.rows.shard(shard, verify=True) for shard in range(self.rows.num_shards))
        return product_sums(batches, self._layout)

    def errors_N(self) -> NDArray[np.float32]:
        """1 - p of every passage, averaged over its tokens, float32 [N]."""
        loaded = self._load()
        found = [mean_errors(loaded, examples) for examples in _shards_of_examples(self.rows)]
        return np.concatenate(found) if found else np.empty(0, dtype=np.float32)

    def _load(self) -> LoadedModel:
        return self.index.load_model(device=self._device)


def solve(kernel: ProductSums, layout: BlockLayout, phi_Qd: Tensor, *, damping: float) -> Tensor:
    """(Phi^T Phi + damping)^-1 phi, block by block, float32 [Q, d]; solved in float64.

    Args:
        kernel: Phi^T Phi.
        layout: its blocks.
        phi_Qd: rows of queries.
        damping: added to the diagonal, in means of the block's diagonal. A block without any gradient gives zeros.

    Raises:
        InvalidRequest: a block has no inverse.
    """
    solved: list[Tensor] = []
    for block, matrix_DD, part_QD in zip(layout.blocks, kernel.blocks, layout.split(phi_Qd.double()), strict=True):
        if not bool(matrix_DD.any()):
            solved.append(torch.zeros_like(part_QD))
            continue
        damped_DD = matrix_DD + damping * matrix_DD.diagonal().mean() * torch.eye(block.dim, dtype=torch.float64)
        factor_DD, failed = torch.linalg.cholesky_ex(damped_DD)
        # A factor may come out of rounding alone.
        diagonal_D = factor_DD.diagonal()
        if int(failed) or float(diagonal_D.min()) <= 1e-6 * float(diagonal_D.max()):
            raise InvalidRequest(
                f"TRAK's kernel has no inverse: {kernel.count} passages, {block.dim} coordinates, damping {damping:g}; "
                "use a larger damping or a narrower index"
            )
        solved.append(torch.cholesky_solve(part_QD.mT, factor_DD).mT)
    return torch.cat(solved, dim=1).float()


def mean_errors(loaded: LoadedModel, examples: Sequence[Example]) -> NDArray[np.float32]:
    """1 - p averaged over each example's target tokens, float32 [N]; zero for one without any."""
    counts_N = np.array([max(1, example.num_targets) for example in examples])
    found_N: NDArray[np.float32] = (summed(loaded.model, examples, error) / counts_N).astype(np.float32)
    return found_N


def _shards_of_examples(rows: RowStore) -> Iterator[list[Example]]:
    for shard, receipt in enumerate(rows.receipts):
        first = rows.first(shard)
        passages = rows.passages(np.arange(first, first + receipt.num_passages))
        yield [Example(tokens=passage.tokens) for passage in passages]

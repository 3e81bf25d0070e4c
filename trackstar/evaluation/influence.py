"""Influence over an index: TrackStar, its ablations, and the gradient baselines, each by an exact scan of all rows.

    score(s, q) = <R^-1 g_q, g_s> / n(s)        n(s) = |R^(-1/2) g_s| with unit norm, 1 without

                                R                   unit norm    V
    TrackStar                   task mix or train   yes          as the index was built
    without whitening           identity            yes          as built
    without unit norm           any                 no           as built
    gradient cosine             identity            yes          an index built without correction
    gradient dot (TracIn-like)  identity            no           an index built without correction

Dividing by the query's own norm changes no ranking, so unit norm is a choice of the sentences' side alone. R is that of
a generation of the index, whose norms are stored, or is fitted here on the same rows, and the norms with it; a task mix
is then made of held-out queries. The projection and V are the index's: to leave V out, give an index built without.

Each shard of rows is read once for all queries, and is compared with its digest as it is. A sentence that was cut into
several windows counts by its best one. Deleted and purged passages are left out.

Legend: N passages, Q queries, d coordinates of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.dual import Dual, make_duals
from trackstar.encode import QUERY_LENGTH_STEP
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.retrieval import Retrieval
from trackstar.evaluation.sentences import Sentences
from trackstar.exact import rank_rows, shard_ids
from trackstar.hessian import Autocorrelation, MixConfig, Whitener, autocorrelation, mix
from trackstar.index import Index
from trackstar.queries import tokenize
from trackstar.ranking import Ranking
from trackstar.results import Query
from trackstar.tombstones import read_deleted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODED = 64
# Rows whose whitened norms are made at once, in bytes of float32.
_NORM_BYTES = 64 << 20


class InfluenceSource:
    """One index and its checkpoint, shared by the methods that score its rows: queries are encoded once for all.

    Args:
        path: folder of the index.
        sentences: the corpus, which must be what the index was built on.
        model: folder of the checkpoint, if it has moved.
        device: a torch device for the encoding of queries.
        trust_remote_code: run code that the checkpoint brings.

    Raises:
        Incompatible: the index holds other sentences.
    """

    def __init__(
        self,
        path: str,
        sentences: Sentences,
        *,
        model: str | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.index = Index(path)
        # The rows of the generation that answers; before there is one, all that are finished.
        self.rows = self.index.rows(self.index.catalog.pointer())
        doc_ids = (
            doc_id.as_py()
            for receipt in self.rows.receipts
            for doc_id in self.rows.shard_column(receipt.shard, "doc_id")
        )
        self.positions_N = positions_of(doc_ids, sentences, path)
        self.kept_N = self._kept()
        self._model = (model, device, trust_remote_code)
        self._encoded: dict[str, tuple[Tensor, float]] = {}
        self._train: Autocorrelation | None = None

    def encode(self, queries: Sequence[Query], on_step: OnStep = unheard) -> tuple[Tensor, Tensor]:
        """Un-whitened rows float32 [Q, d] and summed losses float32 [Q]; the model is loaded when it is needed first.

        Raises:
            InvalidRequest: a target cannot be tokenised, or as `queries.tokenize`.
        """
        asked = {query.query_id: query for query in queries if query.query_id not in self._encoded}
        if asked:
            model, device, trusted = self._model
            loaded = self.index.load_model(model, device=device, trust_remote_code=trusted)
            for query in asked.values():
                check_target(query, loaded.tokenizer)
            add_bos = self.index.facts["add_bos"]
            examples = [
                tokenize(query, loaded.tokenizer, add_bos=add_bos, max_tokens=loaded.max_tokens)
                for query in asked.values()
            ]
            encoder = self.index.encoder(loaded, length_step=QUERY_LENGTH_STEP)
            try:
                ids = list(asked)
                for start in range(0, len(ids), _ENCODED):
                    encoded = encoder.encode(examples[start : start + _ENCODED])
                    rows, losses = encoded.rows_ND.cpu(), encoded.loss_N.tolist()
                    self._encoded.update(
                        zip(ids[start : start + _ENCODED], zip(rows, losses, strict=True), strict=True)
                    )
                    on_step("encoding", min(start + _ENCODED, len(ids)), len(ids))
            finally:
                encoder.close()
        found = [self._encoded[query.query_id] for query in queries]
        return torch.stack([row for row, _ in found]), torch.tensor([loss for _, loss in found])

    def train(self) -> Autocorrelation:
        """R of all rows, made once."""
        if self._train is None:
            self._train = autocorrelation((batch for _, batch in self.rows.batches()), self.index.layout)
        return self._train

    def shards(self, step: str, on_step: OnStep = unheard) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Passage ids [n] and stored rows [n, d] of every shard, without what is deleted.

        Raises:
            CorruptArtifact: a shard is not what was written.
        """
        done = 0
        for receipt in self.rows.receipts:
            ids = shard_ids(self.rows, receipt)
            stored_Nd = self.rows.shard(receipt.shard, verify=True)
            kept = self.kept_N[ids]
            yield (ids, stored_Nd) if kept.all() else (ids[kept], stored_Nd[torch.from_numpy(kept)])
            done += receipt.num_passages
            on_step(step, done, self.rows.num_passages)

    def close(self) -> None:
        """Close the rows' files."""
        self.rows.close()

    def _kept(self) -> NDArray[np.bool_]:
        mask_N = read_deleted(self.index.root).mask(self.rows.num_passages)
        return np.ones(self.rows.num_passages, dtype=np.bool_) if mask_N is None else mask_N


class Whitening:
    """R^(-1/2), and what a sentence's score is divided by. Without stored norms they are made from the rows."""

    def __init__(self, whitener: Whitener, *, unit_norm: bool, norms_N: NDArray[np.float32] | None = None) -> None:
        self.whitener = whitener
        self._unit_norm = unit_norm
        self._norms_N = norms_N

    def norms(self, ids: NDArray[np.int64], stored_Nd: Tensor) -> NDArray[np.float32]:
        """Divisors float32 [N] of the passages `ids`, whose rows are given."""
        if not self._unit_norm:
            return np.ones(len(ids), dtype=np.float32)
        if self._norms_N is not None:
            return self._norms_N[ids]
        step = max(1, _NORM_BYTES // (4 * stored_Nd.shape[1]))
        parts = [self.whitener.apply(some_Nd).norm(dim=1) for some_Nd in stored_Nd.split(step)]
        norms_N: NDArray[np.float32] = torch.cat(parts).numpy()
        return norms_N


def whitening_of_generation(source: InfluenceSource, name: str | None, *, unit_norm: bool) -> Whitening:
    """That of a finished generation, the active one by default.

    Raises:
        NotFound: no generation of that name.
        Incompatible: it stands on other rows than the active one.
    """
    generation = source.index.generation(name, rows=source.rows, searched=False)
    try:
        return Whitening(generation.whitener, unit_norm=unit_norm, norms_N=generation.norms_N)
    finally:
        generation.close()


def fitted_whitening(
    source: InfluenceSource,
    config: MixConfig,
    task: Sequence[Query],
    *,
    unit_norm: bool,
    on_step: OnStep = unheard,
) -> tuple[Whitening, float]:
    """R made here of the index's rows; with a task mix of `task` too. Returns it and the task's share lambda.

    Raises:
        InvalidRequest: the mix cannot be made as asked.
    """
    layout = source.index.layout
    if config.kind == "none":
        return Whitening(Whitener.identity(layout), unit_norm=unit_norm), 0.0
    if config.kind == "task" and not task:
        raise InvalidRequest("a task mix needs queries that are not evaluated; set task_queries above 0")
    of_task = autocorrelation([source.encode(task, on_step)[0]], layout) if config.kind == "task" else None
    correlation, weight = mix(source.train(), of_task, config)
    return Whitening(Whitener.fit(correlation, layout, damping=config.damping), unit_norm=unit_norm), weight


class Influence:
    """Scores every row of an index under one whitening.

    Args:
        name: of the method.
        source: the index.
        whitening: R and the sentences' norms.
        on_step: progress.
    """

    def __init__(
        self,
        name: str,
        source: InfluenceSource,
        whitening: Whitening,
        *,
        on_step: OnStep = unheard,
    ) -> None:
        self.name = name
        self._source = source
        self._whitening = whitening
        self._on_step = on_step

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`.

        Raises:
            InvalidRequest: a query that cannot be tokenised, or whose gradient is zero.
            CorruptArtifact: a shard is not what was written.
        """
        source, whitening = self._source, self._whitening
        dual_Qd = self._duals(queries)
        # The best k sentences are among the best k·w windows, where no sentence has more than w.
        windows = int(np.bincount(source.positions_N).max())
        rankings = [Ranking.empty() for _ in queries]
        for ids, stored_Nd in source.shards(self.name, self._on_step):
            found = rank_rows(
                stored_Nd,
                source.positions_N[ids],
                whitening.norms(ids, stored_Nd),
                dual_Qd,
                signs=(1.0,),
                k=k * windows,
            )
            rankings = [
                one.merge(other, sign=1.0, k=k * windows) for one, (other,) in zip(rankings, found, strict=True)
            ]
        return [
            Retrieval.best_sentences(query.query_id, ranking, k)
            for query, ranking in zip(queries, rankings, strict=True)
        ]

    def _duals(self, queries: Sequence[Query]) -> Tensor:
        """R^-1 g of every query, float32 [Q, d]."""
        rows_Qd, loss_Q = self._source.encode(queries, self._on_step)
        duals = make_duals(self._whitening.whitener, rows_Qd, loss_Q)
        return torch.stack([_ready(query, dual) for query, dual in zip(queries, duals, strict=True)])


def positions_of(doc_ids: Iterable[str], sentences: Sentences, path: str) -> NDArray[np.int64]:
    """Position of every passage's sentence in the corpus, int64 [N].

    Raises:
        Incompatible: the index holds another sentence, or lacks one.
    """

    def position_of(doc_id: str) -> int:
        position = sentences.positions.get(doc_id)
        if position is None:
            raise Incompatible(
                f"the index {path!r} holds the document {doc_id!r}, which is not in the corpus; evaluate it on the "
                "corpus that it was built from"
            )
        return position

    positions_N = np.fromiter(map(position_of, doc_ids), dtype=np.int64)
    held = np.bincount(positions_N, minlength=len(sentences)) > 0
    if not held.all():
        missing = int(np.flatnonzero(~held)[0])
        raise Incompatible(
            f"the index {path!r} lacks {int((~held).sum()):,} of the corpus's {len(sentences):,} sentences, such as "
            f"{sentences.ids[missing]!r}; evaluate it on the corpus that it was built from"
        )
    return positions_N


def check_target(query: Query, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a target of which the tokenizer keeps nothing: some drop the characters that they do not know."""
    ids = tokenizer(query.target.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    if all(token == tokenizer.unk_token_id for token in ids):
        raise InvalidRequest(
            f"query {query.query_id!r}: the model's tokenizer has no tokens for the target {query.target!r}; leave the "
            "fact out"
        )


def _ready(query: Query, dual: Dual | InvalidRequest) -> Tensor:
    if isinstance(dual, InvalidRequest):
        raise InvalidRequest(f"query {query.query_id!r}: {dual}")
    return dual.dual_d

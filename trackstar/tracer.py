"""The tracer: the whole cascade for a query as one readable function. Read this file last.

    query ─► encode ─► whiten ─► coarse search ─► exact rerank ─► proponents, opponents ─► evidence

    score(m, q) = <R^-1 g_q, g_m> / (|W g_q| |W g_m|)        W = R^(-1/2), g un-whitened rows

The coarse index proposes `candidates` passages for each end of the ranking; their rows are read and scored exactly.
With `exact=True`, or when that costs no more, every row is scored and nothing is left to chance. Scores mean nothing
alone, so each comes with a z-score against the same query's scores on a random sample of passages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trackstar.codes import encode_codes, negate
from trackstar.complete import complete, line_of, stop_tokens_of
from trackstar.dual import Dual, make_duals
from trackstar.encode import QUERY_LENGTH_STEP, Encoder, Example
from trackstar.errors import InvalidRequest
from trackstar.evidence import make_evidence, overlap, words_of
from trackstar.generation import Generation
from trackstar.index import Index
from trackstar.model import LoadedModel
from trackstar.passages import Passage
from trackstar.queries import tokenize, tokenize_prompt
from trackstar.ranking import Ranking
from trackstar.reranker import Reranker
from trackstar.results import Evidence, Influence, Query, Trace
from trackstar.tombstones import read_deleted

# Queries that go through the model and are whitened at once.
_ENCODED = 64
# What queries that are scanned together may hold: of each, its whitened row, its dual, and that once more side by side.
_SCAN_BYTES = 4 << 30


def scan_batch(dim: int) -> int:
    """Queries that `trace_many` can take through one scan within 4 GiB, at least 1."""
    return max(1, _SCAN_BYTES // (3 * 4 * dim))


class Tracer:
    """Answers queries from one generation of an index with the checkpoint it was built with.

    Without `searched` its codes are not opened before a coarse search needs them; an exact scan never does.
    """

    def __init__(
        self, index: Index, loaded: LoadedModel, *, generation: str | None = None, searched: bool = True
    ) -> None:
        self.index = index
        self.loaded = loaded
        name = generation or index.active()
        self.rows = index.rows(name)
        self.generation: Generation = index.generation(name, rows=self.rows, searched=searched)
        self.encoder: Encoder = index.encoder(loaded, length_step=QUERY_LENGTH_STEP)
        self.reranker = Reranker(self.rows, self.generation)

    @classmethod
    def open(cls, path: str, *, model: str | None = None, generation: str | None = None, device: str = "cpu") -> Tracer:
        """Open an index folder and the checkpoint it was built with (`model` if that has moved)."""
        index = Index(path)
        return cls(index, index.load_model(model, device=device), generation=generation)

    def close(self) -> None:
        """Close files and the coarse index, and take the hooks out of the model."""
        self.generation.close()
        self.rows.close()
        self.encoder.close()

    def trace(
        self,
        query: Query,
        *,
        k: int = 10,
        opponents: bool = True,
        candidates: int = 1000,
        exact: bool = False,
        evidence: bool = True,
    ) -> Trace:
        """Find the passages that pushed the model towards the target most, and those that pushed it away.

        Args:
            query: prompt and target.
            k: passages per ranking.
            opponents: also search the other end.
            candidates: passages that the coarse search proposes for each end.
            exact: score every row instead.
            evidence: add contributions of tokens and blocks (one more pass over the passages found).

        Raises:
            InvalidRequest: k or candidates out of range, or a query that cannot be tokenised.
        """
        return next(
            self.trace_many(
                [query], k=k, opponents=opponents, candidates=candidates, exact=exact, evidence=evidence, batch=1
            )
        )

    def trace_many(
        self,
        queries: Sequence[Query],
        *,
        k: int = 10,
        opponents: bool = True,
        candidates: int = 1000,
        exact: bool = False,
        evidence: bool = False,
        batch: int = 64,
        on_step: Callable[[str, int, int], None] = lambda _step, _done, _total: None,
    ) -> Iterator[Trace]:
        """Trace many queries, `batch` at a time through every stage; the same answers as one by one.

        With `exact`, every shard of rows is read once for each `batch`: see `scan_batch`. `on_step` is called with
        (step, units done, units in total) while queries are encoded and rows scanned.
        """
        if k < 1 or candidates < k:
            raise InvalidRequest(f"k must be at least 1 and candidates at least k; k is {k}, candidates {candidates}")
        examples = [self._tokenize(query) for query in queries]
        deleted = read_deleted(self.index.root)
        mask_N = deleted.mask(self.rows.num_passages)
        signs = (1.0, -1.0) if opponents else (1.0,)
        for start in range(0, len(queries), batch):
            part = slice(start, start + batch)
            clock = _Clock()
            encoded: list[Dual] = []
            for first in range(start, min(start + batch, len(queries)), _ENCODED):
                encoded += self._encode(examples[first : min(first + _ENCODED, start + batch)])
                on_step("encoding", start + len(encoded), len(queries))
            clock.lap("encode")
            # A scan reads every row once for all queries; the cascade reads `candidates` rows for every query and end.
            scan = (
                exact or len(encoded) * len(signs) * min(candidates, self.rows.num_passages) >= self.rows.num_passages
            )
            if scan:
                rankings = self.reranker.scan(
                    torch.stack([query.dual_d for query in encoded]),
                    signs=signs,
                    k=k,
                    mask_N=mask_N,
                    on_rows=lambda done, total: on_step("scanning", done, total),
                )
                clock.lap("scan")
                examined = self.rows.num_passages
            else:
                proposed = self._search(encoded, signs, candidates)
                clock.lap("search")
                rankings = [
                    [
                        self.reranker.rerank(query.dual_d, deleted.without(ids), sign=sign, k=k)
                        for ids, sign in zip(ends, signs, strict=True)
                    ]
                    for query, ends in zip(encoded, proposed, strict=True)
                ]
                clock.lap("rerank")
                examined = len(signs) * min(candidates, self.rows.num_passages)
            for query, item, ends in zip(queries[part], encoded, rankings, strict=True):
                mean, std = self.reranker.background(item.dual_d)
                found = [self._influences(query, item, ranking, mean, std, evidence) for ranking in ends]
                clock.lap("evidence")
                yield Trace(
                    query=query,
                    proponents=found[0],
                    opponents=found[1] if opponents else (),
                    loss=item.loss,
                    background_mean=mean,
                    background_std=std,
                    generation=self.generation.name,
                    exact=scan,
                    examined=examined,
                    seconds=clock.take(),
                )

    def predict(self, prompt: str, *, max_new_tokens: int = 8) -> str:
        """What the model itself says after the prompt, greedily, up to the end of the line."""
        tokenizer = self.loaded.tokenizer
        given = tokenize_prompt(
            prompt, tokenizer, add_bos=self.index.facts["add_bos"], max_tokens=self.loaded.max_tokens
        )
        wanted = min(max_new_tokens, self.loaded.max_tokens - len(given))
        found = complete(self.loaded.model, given, max_new_tokens=wanted, stop_tokens=stop_tokens_of(tokenizer))
        return line_of(found, tokenizer)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(tokens))

    def _tokenize(self, query: Query) -> Example:
        facts = self.index.facts
        return tokenize(query, self.loaded.tokenizer, add_bos=facts["add_bos"], max_tokens=self.loaded.max_tokens)

    def _encode(self, examples: Sequence[Example]) -> list[Dual]:
        encoded = self.encoder.encode(examples)
        duals: list[Dual] = []
        for dual in make_duals(self.generation.whitener, encoded.rows_ND, encoded.loss_N):
            if isinstance(dual, InvalidRequest):
                raise dual
            duals.append(dual)
        return duals

    def _search(self, duals: Sequence[Dual], signs: Sequence[float], limit: int) -> list[list[NDArray[np.int64]]]:
        """Candidate ids per query and end."""
        spec = self.generation.spec
        codes = encode_codes(spec, self.generation.rotation, torch.stack([dual.unit_d for dual in duals]))
        ends = [self.generation.coarse.search(codes if sign > 0 else negate(spec, codes), limit)[0] for sign in signs]
        return [[end[query] for end in ends] for query in range(len(duals))]

    def _influences(
        self, query: Query, dual: Dual, ranking: Ranking, mean: float, std: float, evidence: bool
    ) -> tuple[Influence, ...]:
        passages = self.rows.passages(ranking.ids)
        explained: Sequence[Evidence | None] = (
            self._evidence(query, dual, passages) if evidence else [None] * len(passages)
        )
        return tuple(
            Influence(
                rank=rank,
                passage=passage,
                score=float(score),
                z_score=(float(score) - mean) / std if std > 0 else 0.0,
                evidence=item,
            )
            for rank, (passage, score, item) in enumerate(
                zip(passages, ranking.scores, explained, strict=True), start=1
            )
        )

    def _evidence(self, query: Query, dual: Dual, passages: Sequence[Passage]) -> list[Evidence]:
        examples = [Example(tokens=passage.tokens) for passage in passages]
        words = words_of(f"{query.prompt} {query.target}")
        return [
            make_evidence(
                by_token_Tb=shares.by_token_Tb.numpy(),
                unplaced_b=shares.unplaced_b.numpy(),
                norm=float(self.generation.norms_N[passage.passage_id]),
                token_texts=[self._decode([token]) for token in passage.tokens.tolist()],
                block_names=[block.name for block in self.index.layout.blocks],
                overlap=overlap(words, passage.text),
            )
            for passage, shares in zip(passages, self.encoder.contributions(examples, dual.dual_d), strict=True)
        ]


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken

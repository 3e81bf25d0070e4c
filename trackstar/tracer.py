"""The tracer: the whole cascade for a query as one readable function. Read this file last.

    query ─► encode ─► whiten ─► coarse search ─► exact rerank ─► proponents, opponents ─► evidence

    score(m, q) = <R^-1 g_q, g_m> / (|W g_q| |W g_m|)        W = R^(-1/2), g un-whitened rows

The coarse index proposes `candidates` passages for each end of the ranking; their rows are read and scored exactly.
With `exact=True`, or when that costs no more, every row is scored and nothing is left to chance. Scores mean nothing
alone, so each comes with a z-score against the same query's scores on a random sample of passages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.codes import encode_codes, negate
from trackstar.encode import Encoder, Example
from trackstar.errors import InvalidRequest
from trackstar.generation import Generation
from trackstar.index import Index
from trackstar.model import LoadedModel
from trackstar.passages import Passage
from trackstar.queries import Query, tokenize

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Where a score comes from. Both lists sum to the score, up to the rounding of the stored row.

    `tokens`: (text, contribution) of every token, in order; `blocks`: (block name, contribution). `overlap` is the
    share of the query's distinct words that occur in the passage, from 0 to 1.
    """

    tokens: tuple[tuple[str, float], ...]
    blocks: tuple[tuple[str, float], ...]
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """One passage in a ranking; `score` is the cosine of the two whitened rows, `z_score` its place in the
    background."""

    rank: int
    passage: Passage
    score: float
    z_score: float
    evidence: Evidence | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The answer to one query. `loss` is the summed loss of the target in nats, `seconds` the time by stage."""

    query: Query
    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]
    loss: float
    background_mean: float
    background_std: float
    generation: str
    exact: bool
    examined: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """A query ready to be compared: `unit_d` = W g / |W g| for codes, `dual_d` = R^-1 g / |W g| for rows."""

    unit_d: Tensor
    dual_d: Tensor
    loss: float


class Tracer:
    """Answers queries from one generation of an index with the checkpoint it was built with."""

    def __init__(self, index: Index, loaded: LoadedModel, *, generation: str | None = None) -> None:
        self.index = index
        self.loaded = loaded
        self.rows = index.rows()
        self.generation: Generation = index.generation(generation, rows=self.rows)
        self.encoder: Encoder = index.encoder(loaded)
        # Scans check no single rows as reranking does, so the first one compares every shard with its digest.
        self._verified = False
        self._background_ND = self.generation.background_rows_ND.float()
        self._background_norms_N = torch.from_numpy(self.generation.norms_N[self.generation.background_ids])

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
    ) -> Iterator[Trace]:
        """Trace many queries, `batch` at a time through every stage; the same answers as one by one."""
        if k < 1 or candidates < k:
            raise InvalidRequest(f"k must be at least 1 and candidates at least k; k is {k}, candidates {candidates}")
        examples = [self._tokenize(query) for query in queries]
        signs = (1.0, -1.0) if opponents else (1.0,)
        for start in range(0, len(queries), batch):
            part = slice(start, start + batch)
            clock = _Clock()
            encoded = self._encode(examples[part])
            clock.lap("encode")
            # A scan reads every row once for all queries; the cascade reads `candidates` rows for every query and end.
            scan = (
                exact or len(encoded) * len(signs) * min(candidates, self.rows.num_passages) >= self.rows.num_passages
            )
            if scan:
                rankings = self._scan(encoded, signs, k)
                clock.lap("scan")
                examined = self.rows.num_passages
            else:
                proposed = self._search(encoded, signs, candidates)
                clock.lap("search")
                rankings = [
                    [self._rerank(query, ids, sign, k) for ids, sign in zip(ends, signs, strict=True)]
                    for query, ends in zip(encoded, proposed, strict=True)
                ]
                clock.lap("rerank")
                examined = len(signs) * min(candidates, self.rows.num_passages)
            for query, item, ends in zip(queries[part], encoded, rankings, strict=True):
                mean, std = self._background(item)
                found = [self._influences(query, item, ids, scores, mean, std, evidence) for ids, scores in ends]
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
        example = self._tokenize(Query(query_id="prediction", prompt=prompt, target="?"))
        tokens = torch.from_numpy(example.tokens[: example.first_target].astype(np.int64))[None]
        eos = self.loaded.tokenizer.eos_token_id
        with torch.no_grad():
            for _ in range(max_new_tokens):
                logits = self.loaded.model(input_ids=tokens.to(self.loaded.model.device), use_cache=False).logits
                following = int(logits[0, -1].argmax())
                if following == eos:
                    break
                tokens = torch.cat([tokens, torch.tensor([[following]])], dim=1)
        return self._decode(tokens[0, example.first_target :].tolist()).split("\n")[0].strip()

    def _decode(self, tokens: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(tokens))

    def _tokenize(self, query: Query) -> Example:
        facts = self.index.facts
        return tokenize(query, self.loaded.tokenizer, add_bos=facts["add_bos"], max_tokens=self.loaded.max_tokens)

    def _encode(self, examples: Sequence[Example]) -> list[_Encoded]:
        encoded = self.encoder.encode(examples)
        whitened_QD = self.generation.whitener.apply(encoded.rows_ND.cpu())
        dual_QD = self.generation.whitener.apply(whitened_QD)
        norms_Q = whitened_QD.norm(dim=1)
        if not bool((norms_Q > 0).all()):
            raise InvalidRequest("the query's gradient is zero: the model is already certain of the target")
        return [
            _Encoded(unit_d=unit, dual_d=dual, loss=float(loss))
            for unit, dual, loss in zip(
                whitened_QD / norms_Q[:, None], dual_QD / norms_Q[:, None], encoded.loss_N, strict=True
            )
        ]

    def _search(self, encoded: Sequence[_Encoded], signs: Sequence[float], limit: int) -> list[list[NDArray[np.int64]]]:
        """Candidate ids per query and end."""
        spec = self.generation.spec
        codes = encode_codes(spec, self.generation.rotation, torch.stack([query.unit_d for query in encoded]))
        ends = [self.generation.coarse.search(codes if sign > 0 else negate(spec, codes), limit)[0] for sign in signs]
        return [[end[query] for end in ends] for query in range(len(encoded))]

    def _rerank(
        self, query: _Encoded, ids: NDArray[np.int64], sign: float, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best k of the candidates by exact score (by lowest score if `sign` is negative)."""
        ids = np.sort(ids)
        scores = self._scores(self.rows.read(ids), self.generation.norms_N[ids], query.dual_d[None])[0]
        return _best(ids, scores, sign, k)

    def _scan(
        self, encoded: Sequence[_Encoded], signs: Sequence[float], k: int
    ) -> list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]]:
        """The best k of all passages, shard by shard, per query and end."""
        dual_QD = torch.stack([query.dual_d for query in encoded])
        best = [[(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in signs] for _ in encoded]
        for first, rows_ND in self.rows.batches(verify=not self._verified):
            ids = np.arange(first, first + len(rows_ND), dtype=np.int64)
            scores_QN = self._scores(rows_ND.float(), self.generation.norms_N[ids], dual_QD)
            for query, ends in enumerate(best):
                for end, sign in enumerate(signs):
                    new_ids, new_scores = _best(ids, scores_QN[query], sign, k)
                    old_ids, old_scores = ends[end]
                    ends[end] = _best(
                        np.concatenate([old_ids, new_ids]), np.concatenate([old_scores, new_scores]), sign, k
                    )
        self._verified = True
        return best

    @staticmethod
    def _scores(rows_ND: Tensor, norms_N: NDArray[np.float32], dual_QD: Tensor) -> NDArray[np.float32]:
        """Exact scores [Q, N]; a row of norm zero scores zero."""
        norms = np.where(norms_N > 0, norms_N, np.float32(np.inf))
        scores: NDArray[np.float32] = np.divide((dual_QD @ rows_ND.mT).numpy(), norms, dtype=np.float32)
        return scores

    def _background(self, query: _Encoded) -> tuple[float, float]:
        found = self._scores(self._background_ND, self._background_norms_N.numpy(), query.dual_d[None])
        std = float(found[0].std(ddof=1, dtype=np.float64)) if len(found[0]) > 1 else 0.0
        return float(found[0].mean(dtype=np.float64)), std

    def _influences(
        self,
        query: Query,
        encoded: _Encoded,
        ids: NDArray[np.int64],
        scores: NDArray[np.float32],
        mean: float,
        std: float,
        evidence: bool,
    ) -> tuple[Influence, ...]:
        passages = self.rows.passages(ids)
        explained: Sequence[Evidence | None] = (
            self._evidence(query, encoded, passages) if evidence else [None] * len(passages)
        )
        return tuple(
            Influence(
                rank=rank,
                passage=passage,
                score=float(score),
                z_score=(float(score) - mean) / std if std > 0 else 0.0,
                evidence=item,
            )
            for rank, (passage, score, item) in enumerate(zip(passages, scores, explained, strict=True), start=1)
        )

    def _evidence(self, query: Query, encoded: _Encoded, passages: Sequence[Passage]) -> list[Evidence]:
        examples = [Example(tokens=passage.tokens) for passage in passages]
        words = {word.lower() for word in _WORD.findall(f"{query.prompt} {query.target}")}
        found = []
        for passage, shares in zip(passages, self.encoder.contributions(examples, encoded.dual_d), strict=True):
            norm = float(self.generation.norms_N[passage.passage_id]) or float("inf")
            by_token = (shares.by_token_Tb.double().sum(1) / norm).tolist()
            by_block = ((shares.by_token_Tb.double().sum(0) + shares.unplaced_b.double()) / norm).tolist()
            texts = [self._decode([token]) for token in passage.tokens.tolist()]
            unplaced = float(shares.unplaced_b.double().sum()) / norm
            tokens = list(zip(texts, by_token, strict=True)) + ([("(experts)", unplaced)] if unplaced else [])
            here = {word.lower() for word in _WORD.findall(passage.text)}
            found.append(
                Evidence(
                    tokens=tuple(tokens),
                    blocks=tuple(zip((block.name for block in self.index.layout.blocks), by_block, strict=True)),
                    overlap=len(words & here) / len(words) if words else 0.0,
                )
            )
        return found


def _best(
    ids: NDArray[np.int64], scores: NDArray[np.float32], sign: float, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k highest (sign > 0) or lowest scores in order; ties go to the smaller id."""
    order = np.lexsort((ids, -sign * scores))[:k]
    return ids[order], scores[order]


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

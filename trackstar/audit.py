"""Audits a generation before it answers: is the cascade's ranking the exact one, and are its codes those of its rows?

    recall@k = share of the exact best k that coarse search and rerank find, both ends, averaged over queries
    expected = mean of Phi(s / sigma - Phi^-1(1 - L/N)) over the exact scores s of the best k      (`planner.recall`)

The law takes all other passages to score zero, so that it expects somewhat more than is found where they do not.

Queries are given as un-whitened rows, or are the rows of sampled passages, so that no model is needed. A passage that
serves as a query finds itself; it counts neither among the exact best nor among the candidates. A passage tied with
the exact k-th is as good as that one. The scan reads all rows once for all queries, compares their shards with their
digests, and may run elsewhere: see `exact.scan_shard` and `exact.merge`.

Sampled codes are compared by `code_check`.

Legend: Q queries, d coordinates of a row, L candidates, k passages per ranking, N passages, S sampled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from trackstar import planner
from trackstar.audit_record import Audit as Audit
from trackstar.coarse import CoarseIndex
from trackstar.code_check import ROWS_AT_ONCE, check_codes, runs
from trackstar.code_store import CodeStore
from trackstar.codes import encode_codes, negate, sigma
from trackstar.dual import Dual, make_duals
from trackstar.errors import InvalidRequest
from trackstar.exact import Rankings
from trackstar.generation import Generation
from trackstar.generation_files import nth_kept
from trackstar.ranking import Ranking
from trackstar.reranker import Reranker
from trackstar.rows import RowStore

# The best k of every query and end from an exact scan: of (duals float32 [Q, d], signs, k).
Scan = Callable[[Tensor, Sequence[float], int], Rankings]

_SIGNS = (1.0, -1.0)
# Cosines from products of other shapes differ by less.
_TIE = 1e-6
# Second half of the Philox key: the audit's draws are no other draw's, whatever the seed.
_STREAM = int.from_bytes(b"auditing", "big")


class AuditConfig(BaseModel):
    """What is audited and what must be reached.

    queries: sampled passages that serve as queries where none are given. k: passages per ranking. candidates: of each
    coarse search, as many as are served with; no more than the store answers. min_recall: 0 to 1; by default what finds
    half passes, so that a small code may serve where that is wanted. codes: sampled
    passages whose code and norm are computed again. bit_share: share of bits that rounding may turn; tolerance:
    relative, of prefixes and norms. seed: of the samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: int = Field(default=64, ge=1)
    k: int = Field(default=10, ge=1)
    candidates: int = Field(default=1000, ge=1)
    min_recall: float = Field(default=0.5, ge=0.0, le=1.0)
    codes: int = Field(default=256, ge=1)
    bit_share: float = Field(default=1e-4, ge=0.0, lt=0.5)
    tolerance: float = Field(default=1e-4, ge=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0, lt=1 << 64)

    @model_validator(mode="after")
    def _check(self) -> AuditConfig:
        if self.candidates < self.k:
            raise ValueError(f"{self.candidates} candidates cannot hold the best {self.k}; give more candidates")
        return self


def make_audit_config(content: dict[str, Any]) -> AuditConfig:
    """Validate settings.

    Raises:
        InvalidRequest: an unknown key, or a value out of range; the message names it.
    """
    try:
        return AuditConfig(**content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "settings"
        raise InvalidRequest(f"the audit's {place}: {first['msg']}") from error


def audit_generation(
    generation: Generation,
    rows: RowStore,
    coarse: CoarseIndex,
    config: AuditConfig,
    *,
    codes: CodeStore,
    coarse_name: str,
    query_rows: Tensor | None = None,
    exclude_Q: NDArray[np.int64] | None = None,
    scan: Scan | None = None,
    max_candidates: int = planner.MAX_CANDIDATES,
    on_step: Callable[[str, int, int], None] = lambda _step, _done, _total: None,
) -> Audit:
    """Compare a generation's cascade with the exact scan, and its codes with its rows.

    Args:
        generation: finished; it need not have opened a coarse index.
        rows: what it was built on.
        coarse: the index of its codes that is to serve.
        config: how much is sampled, and what must be reached.
        codes: its stored codes.
        coarse_name: what to call the coarse index.
        query_rows: float32 [Q, d], un-whitened, for queries of the caller's; sampled passages if None.
        exclude_Q: int64 [Q], a passage that does not count for each of `query_rows`, -1 for none.
        scan: runs the exact scan; in this process if None.
        max_candidates: the most that `coarse` answers for one query.
        on_step: called with (step, passages done, passages in total).

    Raises:
        InvalidRequest: query rows of another shape, or one whose gradient is zero.
        CorruptArtifact: a shard of rows or codes is not what was written; the sentence names the file.
        NotReady: the coarse index does not answer.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([config.seed, _STREAM], dtype=np.uint64)))
    reranker = Reranker(rows, generation)
    if query_rows is None:
        exclude_Q = _sample_queries(generation, rows, config.queries, generator)
        duals = [dual for ids in runs(exclude_Q) for dual in _duals(generation, rows.read(ids))]
    else:
        if query_rows.ndim != 2 or query_rows.shape[1] != rows.dim or query_rows.dtype != torch.float32:
            raise InvalidRequest(
                f"queries are rows float32 [Q, {rows.dim}], not {query_rows.dtype} {list(query_rows.shape)}"
            )
        exclude_Q = np.full(len(query_rows), -1) if exclude_Q is None else exclude_Q
        duals = [dual for some in query_rows.split(ROWS_AT_ONCE) for dual in _duals(generation, some)]
    excluded = generation.excluded
    num_kept = rows.num_passages - len(excluded)
    sample_S = generator.choice(num_kept, size=min(config.codes, num_kept), replace=False)
    checked = check_codes(
        generation,
        rows,
        codes,
        nth_kept(excluded, sample_S.astype(np.int64)),
        bit_share=config.bit_share,
        tolerance=config.tolerance,
        on_rows=lambda done, total: on_step("coding", done, total),
    )
    dual_Qd = torch.stack([dual.dual_d for dual in duals]) if duals else torch.empty((0, rows.dim))
    mask_N = _mask(excluded, rows.num_passages)
    scan = scan or (
        lambda dual_Qd, signs, k: reranker.scan(
            dual_Qd,
            signs=signs,
            k=k,
            mask_N=mask_N,
            on_rows=lambda done, total: on_step("scanning", done, total),
        )
    )
    exact = scan(dual_Qd, _SIGNS, config.k + 1)
    candidates = min(config.candidates, max_candidates, codes.num_codes)
    proposed = _search(generation, coarse, duals, candidates, max_candidates, exclude_Q)
    found_Qe, expected_Qe = np.ones((len(duals), 2)), np.ones((len(duals), 2))
    noise = sigma(generation.spec.kind, generation.spec.size, generation.layout.dim)
    for query, dual in enumerate(duals):
        for end, sign in enumerate(_SIGNS):
            best = _without(exact[query][end], int(exclude_Q[query]), config.k)
            if len(best.ids):  # else nothing is there to be found
                ranking = reranker.rerank(dual.dual_d, proposed[end][query], sign=sign, k=config.k)
                found_Qe[query, end] = _hits(ranking, best, sign) / len(best.ids)
                law = [planner.recall(sign * float(s), noise, candidates, codes.num_codes) for s in best.scores]
                expected_Qe[query, end] = np.mean(law)
            reranked = len(_SIGNS) * query + end + 1
            on_step("reranking", candidates * reranked, candidates * len(_SIGNS) * len(duals))
    found: dict[str, Any] = {
        "recall": float(found_Qe.mean()) if duals else 0.0,
        "recall_opponents": float(found_Qe[:, 1].mean()) if duals else 0.0,
        "expected_recall": float(expected_Qe.mean()) if duals else 0.0,
        "num_codes": coarse.count(),
        "codes_compared": checked.compared,
        "codes_differing": checked.codes_differing,
        "bits_differing": checked.bits_differing,
        "norms_differing": checked.norms_differing,
    }
    reasons = _reasons(found, config, codes.num_codes, candidates, len(duals))
    return Audit(
        generation=generation.name,
        coarse=coarse_name,
        queries=len(duals),
        k=config.k,
        candidates=candidates,
        min_recall=config.min_recall,
        num_passages=codes.num_codes,
        passed=not reasons,
        reasons=reasons,
        **found,
    )


def _mask(excluded: NDArray[np.int64], num_passages: int) -> NDArray[np.bool_] | None:
    if not len(excluded):
        return None
    mask_N = np.ones(num_passages, dtype=np.bool_)
    mask_N[excluded] = False
    return mask_N


def _sample_queries(
    generation: Generation, rows: RowStore, wanted: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Ids [Q] of passages with a row that is not zero, in random order; fewer if there are fewer."""
    total = rows.num_passages
    # Few rows are zero as a rule; all are looked at only if a sample four times as large has too few others.
    for size in (min(total, 4 * wanted + 64), total):
        ids: NDArray[np.int64] = generator.choice(total, size=size, replace=False)
        found = ids[generation.norms_N[ids] > 0]
        if len(found) >= wanted or size == total:
            return found[:wanted]
    raise AssertionError("unreachable")


def _duals(generation: Generation, rows_Qd: Tensor) -> list[Dual]:
    duals = []
    for dual in make_duals(generation.whitener, rows_Qd, torch.zeros(len(rows_Qd))):
        if isinstance(dual, InvalidRequest):
            raise dual
        duals.append(dual)
    return duals


def _search(
    generation: Generation,
    coarse: CoarseIndex,
    duals: Sequence[Dual],
    candidates: int,
    max_candidates: int,
    exclude_Q: NDArray[np.int64],
) -> list[list[NDArray[np.int64]]]:
    """Candidates of every end and query, without the passage that does not count."""
    if not duals:
        return [[], []]
    spec = generation.spec
    codes_Q = encode_codes(spec, generation.rotation, torch.stack([dual.unit_d for dual in duals]))
    limit = min(candidates + bool((exclude_Q >= 0).any()), max_candidates)
    ends = []
    for sign in _SIGNS:
        asked_Q = codes_Q if sign > 0 else negate(spec, codes_Q)
        # One by one, as they come when it serves: all at once would take a server many times what a call may take.
        found = [coarse.search(asked_Q[query : query + 1], limit)[0][0] for query in range(len(asked_Q))]
        ends.append([ids[ids != own][:candidates] for ids, own in zip(found, exclude_Q, strict=True)])
    return ends


def _without(ranking: Ranking, passage_id: int, k: int) -> Ranking:
    kept = ranking.ids != passage_id
    return Ranking(ids=ranking.ids[kept][:k], scores=ranking.scores[kept][:k])


def _hits(found: Ranking, best: Ranking, sign: float) -> int:
    """How many of what was found are as good as the last of the exact best."""
    last = sign * float(best.scores[-1])
    return min(len(best.ids), int((sign * found.scores.astype(np.float64) >= last - _TIE).sum()))


def _reasons(
    found: dict[str, Any], config: AuditConfig, num_passages: int, candidates: int, num_queries: int
) -> tuple[str, ...]:
    """A sentence for everything that is not as it must be, with what to do about it."""
    reasons = []
    if not num_queries:
        reasons.append("no passage has a row that is not zero, so nothing can be ranked; index other passages")
    elif found["recall"] < config.min_recall:
        reasons.append(
            f"coarse search and rerank find {found['recall']:.3f} of the exact best {config.k}, less than "
            f"{config.min_recall:g} (the noise law expects {found['expected_recall']:.3f}); build a generation with a "
            f"larger --code-size, or serve more than {candidates:,} --candidates"
        )
    if found["num_codes"] != num_passages:
        reasons.append(
            f"the coarse index holds {found['num_codes']:,} codes of {num_passages:,} passages; fill it again"
        )
    for what, count in (("codes", found["codes_differing"]), ("norms", found["norms_differing"])):
        if count:
            reasons.append(
                f"{count:,} of {found['codes_compared']:,} sampled {what} are not those of their rows; delete the "
                "generation and give the index command again"
            )
    return tuple(reasons)

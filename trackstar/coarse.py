"""Coarse search: the best candidates for a query by estimated cosine, from compact codes (see `trackstar.codes`).

`CoarseIndex` is the whole contract; `trackstar.milvus` implements it on Milvus Lite, `trackstar.milvus_server` on a
Milvus server, and `MemoryIndex` here scans codes in memory and is exact, so it also serves as the oracle of the others.
An index maps passage ids to codes; it knows no rows, texts or generations, and its order is final only after the exact
rerank.

Legend: N codes, Q queries, L candidates, k coordinates of a code, w numbers that hold one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trackstar.codes import CodeKind, CodeSpec, check_size, padded_dim
from trackstar.errors import InvalidRequest

# Codes compared at once: a block of them, its XOR and its bit counts stay within a processor's cache.
_BLOCK_BYTES = 1 << 20
# Estimated cosines held at once while searching a batch of queries.
_MAX_SCORES = 1 << 25


class CoarseIndex(Protocol):
    """Codes by passage id, searched by estimated cosine. Every method raises InvalidRequest once closed."""

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        """Store int64 [N] ids with their codes [N, .]; an id that is already there gets the new code.

        So a step that was interrupted may add the same passages again.

        Raises:
            InvalidRequest: shapes, dtypes or values that do not fit, or an id twice in one call.
        """

    def search(
        self, codes: NDArray[Any], limit: int, *, timeout_seconds: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Best candidates of each query: ids [Q, L] and estimated cosines [Q, L], L = min(limit, count()).

        Cosines descend; equal ones are ordered by smaller id.

        Args:
            codes: [Q, .], as `add` takes them.
            limit: candidates wanted of each query.
            timeout_seconds: how long to wait for a server; what is scanned in this process takes the time it takes.

        Raises:
            InvalidRequest: codes of another shape or dtype, or a limit below 1 or above what the index can answer.
            NotReady: the server is down or did not answer in time.
        """

    def count(self) -> int:
        """Number of ids stored."""

    def close(self) -> None:
        """Release everything; closing twice is harmless."""


class MemoryIndex:
    """Exact `CoarseIndex` in memory, for both kinds of code; nothing is kept after `close`.

    Args:
        spec: kind and size of the codes.
        dim: d, dimension of the vectors the codes stand for.

    Raises:
        InvalidRequest: vectors of that dimension have no code of that size.
    """

    def __init__(self, spec: CodeSpec, dim: int) -> None:
        check_size(spec.size, dim)
        self._spec = spec
        self._cosine_per_dot = np.float32(padded_dim(dim) / spec.size)
        # A bits code is kept as whole 64-bit words, zero-padded: equal padding never counts in a Hamming distance.
        width, dtype = (-(-spec.size // 64), np.uint64) if spec.kind == "bits" else (spec.size, np.float32)
        self._ids_N: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._codes_Nw: NDArray[Any] = np.empty((0, width), dtype=dtype)
        self._pending: list[tuple[NDArray[np.int64], NDArray[Any]]] = []
        self._closed = False

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        """See `CoarseIndex.add`."""
        self._check_open()
        check_ids(passage_ids, len(codes))
        check_codes(self._spec.kind, self._spec.size, codes)
        self._pending.append((passage_ids.copy(), self._stored(codes)))

    def search(
        self, codes: NDArray[Any], limit: int, *, timeout_seconds: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `CoarseIndex.search`."""
        self._check_open()
        check_codes(self._spec.kind, self._spec.size, codes)
        check_limit(limit)
        self._merge()
        num_queries, num = len(codes), len(self._ids_N)
        limit = min(limit, num)
        ids_QL = np.empty((num_queries, limit), dtype=np.int64)
        cosines_QL = np.empty((num_queries, limit), dtype=np.float32)
        if limit == 0:
            return ids_QL, cosines_QL
        estimate = self._estimate_bits if self._spec.kind == "bits" else self._estimate_prefix
        queries_Qw = self._stored(codes)
        step = max(1, _MAX_SCORES // num)
        for start in range(0, num_queries, step):
            cosines_qN = estimate(queries_Qw[start : start + step])
            for offset, cosines_N in enumerate(cosines_qN):
                best_L = _best(cosines_N, limit)
                ids_QL[start + offset] = self._ids_N[best_L]
                cosines_QL[start + offset] = cosines_N[best_L]
        return ids_QL, cosines_QL

    def count(self) -> int:
        """See `CoarseIndex.count`."""
        self._check_open()
        self._merge()
        return len(self._ids_N)

    def close(self) -> None:
        """See `CoarseIndex.close`."""
        self._closed = True
        self._pending = []
        self._ids_N, self._codes_Nw = self._ids_N[:0].copy(), self._codes_Nw[:0].copy()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("the coarse index is closed; make a new one")

    def _stored(self, codes: NDArray[Any]) -> NDArray[Any]:
        """An own copy of the codes in the form the scan reads."""
        if self._spec.kind == "prefix":
            return np.array(codes, order="C")
        padded = np.zeros((len(codes), 8 * self._codes_Nw.shape[1]), dtype=np.uint8)
        padded[:, : codes.shape[1]] = codes
        return padded.view(np.uint64)

    def _merge(self) -> None:
        """Take in what was added: ids ascending, of several codes of one id the last."""
        if not self._pending:
            return
        ids = np.concatenate([self._ids_N, *(ids for ids, _ in self._pending)])
        codes = np.concatenate([self._codes_Nw, *(codes for _, codes in self._pending)])
        self._pending = []
        order = np.argsort(ids, kind="stable")
        sorted_ids = ids[order]
        is_last = np.ones(len(ids), dtype=np.bool_)
        is_last[:-1] = sorted_ids[1:] != sorted_ids[:-1]
        kept = order[is_last]
        self._ids_N = ids[kept]
        # Passages come in order as a rule, and then their codes need not be copied once more.
        self._codes_Nw = codes if np.array_equal(kept, np.arange(len(ids))) else codes[kept]

    def _estimate_prefix(self, queries_qk: NDArray[Any]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = queries_qk @ self._codes_Nw.T
        return scores * self._cosine_per_dot

    def _estimate_bits(self, queries_qw: NDArray[Any]) -> NDArray[np.float32]:
        num, words = self._codes_Nw.shape
        cosine_of = np.cos(np.pi * np.arange(self._spec.size + 1) / self._spec.size).astype(np.float32)
        cosines_qN = np.empty((len(queries_qw), num), dtype=np.float32)
        step = max(1, _BLOCK_BYTES // (8 * words))
        differing = np.empty((min(step, num), words), dtype=np.uint64)
        counts = np.empty(differing.shape, dtype=np.uint8)
        for start in range(0, num, step):
            block = self._codes_Nw[start : start + step]
            size = len(block)
            for query, cosines_N in zip(queries_qw, cosines_qN, strict=True):
                np.bitwise_xor(block, query, out=differing[:size])
                np.bitwise_count(differing[:size], out=counts[:size])
                hamming = np.add.reduce(counts[:size], axis=1, dtype=np.uint32)
                cosines_N[start : start + size] = cosine_of[hamming]
        return cosines_qN


def check_ids(passage_ids: NDArray[Any], num_codes: int) -> None:
    """Raise InvalidRequest unless these are `num_codes` distinct int64 ids of passages, none below 0."""
    if passage_ids.dtype != np.int64 or passage_ids.shape != (num_codes,):
        raise InvalidRequest(
            f"{num_codes} codes need int64 [{num_codes}] passage ids, not {passage_ids.dtype} {list(passage_ids.shape)}"
        )
    if num_codes and passage_ids.min() < 0:
        raise InvalidRequest(f"passage id {passage_ids.min()} is below 0; ids are row numbers")
    if len(np.unique(passage_ids)) != num_codes:
        raise InvalidRequest("the same passage id comes twice in one call; give every passage one code")


def check_codes(kind: CodeKind, size: int, codes: NDArray[Any]) -> None:
    """Raise InvalidRequest unless codes are uint8 [N, size/8] (bits) or finite float32 [N, size] (prefix)."""
    width, dtype = (size // 8, np.uint8) if kind == "bits" else (size, np.float32)
    if codes.ndim != 2 or codes.shape[1] != width or codes.dtype != dtype:
        raise InvalidRequest(
            f"this index holds {kind} codes, {np.dtype(dtype)} [N, {width}], not {codes.dtype} {list(codes.shape)}"
        )
    if kind == "prefix" and not np.isfinite(codes).all():
        raise InvalidRequest("a code holds a value that is not finite; its gradient row is broken")


def check_limit(limit: int, maximum: int | None = None) -> None:
    """Raise InvalidRequest unless 1 <= limit <= maximum."""
    if limit < 1:
        raise InvalidRequest(f"a search needs a limit of at least 1, not {limit}")
    if maximum is not None and limit > maximum:
        raise InvalidRequest(f"this index answers at most {maximum:,} candidates per query, not {limit:,}")


def _best(scores_N: NDArray[np.float32], limit: int) -> NDArray[np.int64]:
    """Positions of the `limit` largest scores, descending, ties by smaller position; 1 <= limit <= N."""
    # A partition leaves it open which of several equal scores at the cut it takes; the threshold does not.
    threshold = np.partition(scores_N, len(scores_N) - limit)[len(scores_N) - limit]
    above = np.flatnonzero(scores_N > threshold)
    tied = np.flatnonzero(scores_N == threshold)[: limit - len(above)]
    best = np.concatenate([above, tied])
    return best[np.argsort(-scores_N[best], kind="stable")]

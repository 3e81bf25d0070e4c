"""Coarse search: the best candidates for a query by estimated cosine, from compact codes (see `trackstar.codes`).

`CoarseIndex` is the whole contract; `trackstar.milvus` implements it on Milvus Lite, `trackstar.milvus_server` on a
Milvus server, and `MemoryIndex` here scans codes in memory and is exact, so it also serves as the oracle of the others.
An index maps passage ids to codes; it knows no rows, texts or generations, and its order is final only after the exact
rerank.

Legend: N codes, Q queries, q of them at once, L candidates, k coordinates of a code, w 64-bit words that hold one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trackstar.codes import CodeKind, CodeSpec, check_size, padded_dim
from trackstar.errors import InvalidRequest

# Codes compared at once: the XOR of a word of each, its bit counts and their sums stay within a processor's cache.
_BLOCK_CODES = 1 << 15
# Estimates held at once while searching a batch of queries.
_MAX_SCORES = 1 << 25
# Positions of codes and their estimated cosines, best first.
_Found = tuple[NDArray[np.int64], NDArray[np.float32]]


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
        # A bits code is kept as whole 64-bit words, zero-padded: equal padding never counts in a Hamming distance. They
        # lie word by word, so that sums of bit counts run along codes and not across one, which is slow.
        self._words = -(-spec.size // 64)
        self._ids_N: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._codes: NDArray[Any] = self._empty(0)
        self._pending: list[tuple[NDArray[np.int64], NDArray[Any]]] = []
        self._closed = False

    def add(self, passage_ids: NDArray[np.int64], codes: NDArray[Any]) -> None:
        """See `CoarseIndex.add`."""
        self._check_open()
        check_ids(passage_ids, len(codes))
        check_codes(self._spec.kind, self._spec.size, codes)
        self._pending.append((passage_ids.copy(), np.array(codes, order="C")))

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
        find = self._nearest if self._spec.kind == "bits" else self._largest
        step = max(1, _MAX_SCORES // num)
        for start in range(0, num_queries, step):
            for query, (best_L, cosines_L) in enumerate(find(codes[start : start + step], limit), start):
                ids_QL[query], cosines_QL[query] = self._ids_N[best_L], cosines_L
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
        self._ids_N, self._codes = self._ids_N[:0].copy(), self._empty(0)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("the coarse index is closed; make a new one")

    def _empty(self, num: int) -> NDArray[Any]:
        """Room for codes: uint64 [w, N] of bits, float32 [N, k] of a prefix."""
        if self._spec.kind == "bits":
            return np.empty((self._words, num), dtype=np.uint64)
        return np.empty((num, self._spec.size), dtype=np.float32)

    def _by_code(self, codes: NDArray[Any]) -> NDArray[Any]:
        """The same memory with one code in each row."""
        return codes.T if self._spec.kind == "bits" else codes

    def _words_of(self, codes: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Codes of bits as they are given, as words [., w]."""
        padded = np.zeros((len(codes), 8 * self._words), dtype=np.uint8)
        padded[:, : codes.shape[1]] = codes
        return padded.view(np.uint64)

    def _merge(self) -> None:
        """Take in what was added: ids ascending, of several codes of one id the last.

        What was added is let go piece by piece, so that codes that come in order are held once and a little.
        """
        if not self._pending:
            return
        ids = np.concatenate([self._ids_N, *(ids for ids, _ in self._pending)])
        merged, at = self._empty(len(ids)), len(self._ids_N)
        self._by_code(merged)[:at] = self._by_code(self._codes)
        self._codes = self._empty(0)
        self._pending.reverse()
        while self._pending:
            _, codes = self._pending.pop()
            stored = self._words_of(codes) if self._spec.kind == "bits" else codes
            self._by_code(merged)[at : at + len(codes)] = stored
            at += len(codes)
        order = np.argsort(ids, kind="stable")
        sorted_ids = ids[order]
        is_last = np.ones(len(ids), dtype=np.bool_)
        is_last[:-1] = sorted_ids[1:] != sorted_ids[:-1]
        kept = order[is_last]
        self._ids_N = ids[kept]
        # Passages come in order as a rule, and then their codes need not be copied once more.
        if not np.array_equal(kept, np.arange(len(ids))):
            self._codes = self._empty(len(kept))
            self._by_code(self._codes)[:] = self._by_code(merged)[kept]
        else:
            self._codes = merged

    def _largest(self, queries_qk: NDArray[Any], limit: int) -> Iterator[_Found]:
        """Positions and cosines of the best `limit` prefixes for each query, in the contract's order."""
        cosines_qN = (queries_qk @ self._codes.T) * self._cosine_per_dot
        for cosines_N in cosines_qN:
            best_L = _best(cosines_N, limit)
            yield best_L, cosines_N[best_L]

    def _nearest(self, queries_qb: NDArray[Any], limit: int) -> Iterator[_Found]:
        """The same of bits."""
        cosine_of = np.cos(np.pi * np.arange(self._spec.size + 1) / self._spec.size).astype(np.float32)
        for hamming_N in self._hamming(self._words_of(queries_qb)):
            # Beside 1 and -1, several distances have one cosine in float32: all of the last one's are let in.
            last = cosine_of[np.partition(hamming_N, limit - 1)[limit - 1]]
            furthest = len(cosine_of) - 1 - int(np.searchsorted(cosine_of[::-1], last))
            near = np.flatnonzero(hamming_N <= furthest)
            cosines = cosine_of[hamming_N[near]]
            order = np.argsort(-cosines, kind="stable")[:limit]
            yield near[order], cosines[order]

    def _hamming(self, queries_qw: NDArray[np.uint64]) -> NDArray[Any]:
        """Hamming distances [q, N] of the codes."""
        num = self._codes.shape[1]
        hamming_qN = np.zeros((len(queries_qw), num), dtype=np.uint16 if self._spec.size < 1 << 16 else np.uint32)
        differing = np.empty(min(_BLOCK_CODES, num), dtype=np.uint64)
        counts = np.empty(differing.shape, dtype=np.uint8)
        for start in range(0, num, _BLOCK_CODES):
            block_wn = self._codes[:, start : start + _BLOCK_CODES]
            size = block_wn.shape[1]
            for query_w, hamming_N in zip(queries_qw, hamming_qN, strict=True):
                sums = hamming_N[start : start + size]
                for word, codes_n in zip(query_w, block_wn, strict=True):
                    np.bitwise_xor(codes_n, word, out=differing[:size])
                    np.bitwise_count(differing[:size], out=counts[:size])
                    np.add(sums, counts[:size], out=sums)
        return hamming_qN


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

"""How fast codes and rows are scanned, beside how fast memory is read.

Each contestant takes its turn in every round; a figure is the median over rounds of bytes per CPU second, and its ratio
that of the bytes per second in the same round to those of reading: the sum of a large array.

    read, copy         numpy: sum of 512 MiB of float64; copying them (bytes read and written)
    codes in memory    `MemoryIndex.search`, one query and sixteen; bytes of all codes, for each query
    codes in Milvus    the server's search, its CPU seconds and ours, one query and four; only with a server
    rows               `rank_rows` of rows in memory as they are stored, one query and 64 (bytes of the rows once)
    rows, page cache   `scan_shard`: read, compared with their digests and ranked
    no digests         the same without that, as `Reranker.scan` does it from its second time on

Rows are the first of an index, a few times a processor's cache; codes are all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.resident import cpu_seconds
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.code_store import fill
from trackstar.dual import make_duals
from trackstar.errors import InvalidRequest
from trackstar.exact import rank_rows, scan_shard, shard_ids
from trackstar.generation import Generation
from trackstar.rows import RowStore

_STREAM_BYTES = 512 << 20
_ROW_BYTES = 512 << 20
_LIMIT = 1000
_K = 11
_ENDS = (1.0, -1.0)
_READ = "read"
# CPU seconds of a server are counted in hundredths.
_REPEATED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A contestant: bytes per second, and that over reading in the same round; the range of the latter."""

    name: str
    bytes_per_second: float
    ratio: float
    low: float
    high: float


def measure(
    generation: Generation, rows: RowStore, server: CoarseIndex | None, process_id: int | None, *, rounds: int
) -> list[Scan]:
    """Measure all contestants.

    Args:
        generation: of bits.
        rows: its rows.
        server: the index of its codes on a server, None without.
        process_id: of the server.
        rounds: turns of each.
    """
    memory = MemoryIndex(generation.spec, generation.layout.dim)
    fill(memory, generation.codes)
    drawn = np.sort(np.random.default_rng(0).choice(rows.num_passages, 64, replace=False))
    duals = [
        dual
        for dual in make_duals(generation.whitener, rows.read(drawn), torch.zeros(len(drawn)))
        if not isinstance(dual, InvalidRequest)
    ]
    dual_Qd = torch.stack([dual.dual_d for dual in duals])
    first = generation.codes.shard(0).codes
    codes_Q = np.ascontiguousarray(first[np.arange(16) % len(first)])
    code_bytes = generation.spec.row_bytes * generation.codes.num_codes
    row_bytes = rows.dim * (2 if rows.dtype == "bfloat16" else 4)
    receipts = rows.receipts[: max(1, _ROW_BYTES // (row_bytes * rows.receipts[0].num_passages))]
    shards = [receipt.shard for receipt in receipts]
    scanned = row_bytes * sum(receipt.num_passages for receipt in receipts)
    held = [rows.shard(shard) for shard in shards]
    source = np.ones(_STREAM_BYTES // 8)
    target = np.ones_like(source)

    def rank(count: int) -> None:
        for receipt, stored_Nd in zip(receipts, held, strict=True):
            ids = shard_ids(rows, receipt)
            rank_rows(stored_Nd, ids, generation.norms_N[ids], dual_Qd[:count], signs=_ENDS, k=_K)

    def scan(count: int) -> None:
        for shard in shards:
            scan_shard(rows, generation, shard, dual_Qd[:count], _ENDS, _K)

    def again(count: int) -> None:
        for receipt in receipts:
            ids = shard_ids(rows, receipt)
            rank_rows(rows.shard(receipt.shard), ids, generation.norms_N[ids], dual_Qd[:count], signs=_ENDS, k=_K)

    turns: dict[str, tuple[Callable[[], object], int]] = {
        _READ: (source.sum, _STREAM_BYTES),
        "copy": (lambda: np.copyto(target, source), 2 * _STREAM_BYTES),
        "codes in memory, 1 query": (lambda: memory.search(codes_Q[:1], _LIMIT), code_bytes),
        "codes in memory, 16 queries": (lambda: memory.search(codes_Q, _LIMIT), 16 * code_bytes),
        "rows in memory, 1 query": (lambda: rank(1), scanned),
        "rows in memory, 64 queries": (lambda: rank(64), scanned),
        "rows in page cache, no digests, 1 query": (lambda: again(1), scanned),
        "rows in page cache, 1 query": (lambda: scan(1), scanned),
        "rows in page cache, 64 queries": (lambda: scan(64), scanned),
    }
    if server is not None:

        def ask(count: int) -> None:
            for _ in range(_REPEATED):
                server.search(codes_Q[:count], _LIMIT, timeout_seconds=600)

        turns["codes in Milvus, 1 query"] = lambda: ask(1), _REPEATED * code_bytes
        turns["codes in Milvus, 4 queries"] = lambda: ask(4), 4 * _REPEATED * code_bytes

    def clock() -> float:
        return time.process_time() + (cpu_seconds(process_id) if process_id is not None else 0.0)

    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, (turn, moved) in turns.items():
            timer = clock if "Milvus" in name else time.process_time
            started = timer()
            turn()
            speeds[name].append(moved / (timer() - started))
    memory.close()
    return [_scan(name, found, speeds[_READ]) for name, found in speeds.items()]


def table(scans: Sequence[Scan]) -> str:
    """The scans in Markdown."""
    lines = ["| scan | GB/s | / read | range |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {scan.name} | {scan.bytes_per_second / 1e9:.2f} | {scan.ratio:.3f} | {scan.low:.3f}-{scan.high:.3f} |"
        for scan in scans
    ]
    return "\n".join(lines)


def _scan(name: str, found: Sequence[float], read: Sequence[float]) -> Scan:
    ratios = [one / other for one, other in zip(found, read, strict=True)]
    return Scan(
        name=name,
        bytes_per_second=statistics.median(found),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
    )

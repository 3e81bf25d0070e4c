"""Recall of coarse search + exact rerank against the exact scan, for several codes and candidate counts L.

    python -m benchmarks.coarse_recall INDEX --facts FACTS.jsonl [--queries 200] [--milvus]

The rows of an index are whitened with R_train; the 10 passages with the highest exact score are what the cascade should
return. A passage survives if it is among the L best by code. Beside each measured recall stand two predictions,
averaged over the same (query, passage) pairs with their true scores s:

    law                Phi((s - t) / sigma),  t = sigma Phi^-1(1 - L/N):  every other passage has score zero
    law + background   the same with t from the query's own background: sqrt(sigma^2 + tau^2) Phi^-1(1 - L/N) + mu,
                       where mu and tau are mean and standard deviation of its exact scores

With --near 0.05 the same is measured for all passages whose exact score is within a tenth of that, instead of the first
10: the tops of small models score far higher than those of large corpora.

Codes are searched in memory, exactly; with --milvus also on a real Milvus server (that of the tests, started for the
run) as far as it takes codes of that size, and the ids of both are compared. Rows are whitened and rotated once: a code
of k coordinates is the beginning of a longer one. --whiten-dim cuts the blocks that are whitened into parts, whose
eigenvectors cost less; --keep FILE.npz keeps codes and scores, and a second run goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trackstar.coarse import MemoryIndex
from trackstar.codes import CodeKind, CodeSpec, Rotation, encode_codes, padded_dim, sigma
from trackstar.hessian import Whitener, autocorrelation
from trackstar.index import Index
from trackstar.milvus_collection import drop, largest_code
from trackstar.milvus_link import MilvusLink, RetryPolicy
from trackstar.milvus_server import MAX_CANDIDATES, MilvusServerIndex
from trackstar.projection import Block, BlockLayout
from trackstar.queries import read_queries, tokenize

TOP = 10
NORMAL = NormalDist()
IMPORTED = 4096  # codes handed to the server at once
SEARCHED = 8  # queries asked of the server at once


def main() -> None:
    """Measure every code and L and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("--facts", required=True)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--prefixes", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--bits", type=int, nargs="*", default=[1024, 4096, 16384])
    parser.add_argument("--candidates", type=int, nargs="*", default=[10, 30, 100, 300, 1000, 4096])
    parser.add_argument("--milvus", action="store_true", help="search codes of bits on a Milvus server too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--whiten-dim", type=int, help="whiten parts of blocks, of at most so many dimensions")
    parser.add_argument("--near", type=float, help="what survives of passages about this score, not of the first 10")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()

    index = Index(arguments.index)
    dim = index.layout.dim
    if arguments.keep and arguments.keep.is_file():
        arrays = dict(np.load(arguments.keep))
    else:
        arrays = _coded(index, arguments)
        if arguments.keep:
            np.savez(arguments.keep, allow_pickle=False, **arrays)
    scores_QN: NDArray[np.float32] = arrays["scores"]
    best_QT = np.argsort(-scores_QN, axis=1, kind="stable")[:, :TOP]
    wanted = list(best_QT)
    if (near := arguments.near) is not None:
        wanted = [np.flatnonzero(np.abs(scores_N - near) <= 0.1 * abs(near)) for scores_N in scores_QN]

    results = []
    with _server(arguments.milvus) as link:
        for kind, sizes in _sizes(arguments, dim).items():
            for size in sizes:
                spec = CodeSpec(kind=kind, size=size, seed=0)
                width = size // 8 if kind == "bits" else size
                codes_N, codes_Q = (
                    np.ascontiguousarray(arrays[f"{kind} of {what}"][:, :width]) for what in ("rows", "queries")
                )
                found, cosines = _search_memory(spec, dim, codes_N, codes_Q, max(arguments.candidates))
                noise = sigma(kind, size, dim)
                agreeing: dict[int, int] = {}
                if link is not None and kind == "bits" and size <= largest_code(link, kind):
                    agreeing = _agreeing(link, spec, dim, codes_N, codes_Q, arguments.candidates, found, cosines)
                _tell(f"{size:,} {kind} searched")
                for limit in arguments.candidates:
                    results.append(
                        {
                            "kind": kind,
                            "k": size,
                            "bytes": spec.row_bytes,
                            "candidates": limit,
                            "sigma": noise,
                            "recall": _recall(found[:, :limit], wanted),
                            "law": _law(scores_QN, wanted, noise, limit, background=False),
                            "law_background": _law(scores_QN, wanted, noise, limit, background=True),
                            "milvus_agrees": agreeing.get(limit),
                        }
                    )
    _print(results, scores_QN, best_QT, near, sum(map(len, wanted)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _sizes(arguments: argparse.Namespace, dim: int) -> dict[CodeKind, list[int]]:
    """Sizes of each kind of code that vectors of that dimension have."""
    return {
        "prefix": [k for k in arguments.prefixes if k <= padded_dim(dim)],
        "bits": [k for k in arguments.bits if k <= padded_dim(dim)],
    }


def _coded(index: Index, arguments: argparse.Namespace) -> dict[str, NDArray[Any]]:
    """Exact "scores" [Q, N], and of each kind of code the largest, "KIND of rows" [N, .] and "KIND of queries"."""
    rows, layout = index.rows(), index.layout
    loaded = index.load_model()
    encoder = index.encoder(loaded)
    facts = read_queries(arguments.facts)
    order = np.random.default_rng(0).permutation(len(facts))[: arguments.queries]
    examples = [
        tokenize(facts[i], loaded.tokenizer, add_bos=index.facts["add_bos"], max_tokens=loaded.max_tokens)
        for i in order
    ]
    encoded_QD = encoder.encode(examples).rows_ND
    _tell("queries encoded")
    parts = _parts(layout, arguments.whiten_dim)
    train = autocorrelation((batch for _, batch in rows.batches()), parts)
    _tell("statistics")
    whitener = Whitener.fit(train, parts, damping=arguments.damping)
    del train
    _tell("eigenvectors")
    queries_QD = torch.nn.functional.normalize(whitener.apply(encoded_QD), dim=1)

    rotation = Rotation(layout.dim, 0)
    longest = [
        CodeSpec(kind=kind, size=max(sizes), seed=0) for kind, sizes in _sizes(arguments, layout.dim).items() if sizes
    ]
    exact: list[NDArray[np.float32]] = []
    codes: dict[CodeKind, list[NDArray[Any]]] = {spec.kind: [] for spec in longest}
    for _, batch in rows.batches():
        unit_ND = torch.nn.functional.normalize(whitener.apply(batch), dim=1)
        exact.append((queries_QD @ unit_ND.mT).numpy())
        for spec in longest:
            codes[spec.kind].append(encode_codes(spec, rotation, unit_ND))
    arrays: dict[str, NDArray[Any]] = {"scores": np.concatenate(exact, axis=1)}
    for spec in longest:
        arrays[f"{spec.kind} of rows"] = np.concatenate(codes.pop(spec.kind))
        arrays[f"{spec.kind} of queries"] = encode_codes(spec, rotation, queries_QD)
    _tell("rows whitened, scored and coded")
    return arrays


def _parts(layout: BlockLayout, most: int | None) -> BlockLayout:
    """The same coordinates in blocks of at most `most` dimensions, whole rows of the larger blocks."""
    if most is None:
        return layout
    found = []
    for block in layout.blocks:
        step = max(1, most // block.cols)
        for first in range(0, block.rows, step):
            name = f"{block.name}, rows from {first}"
            found.append(Block(name=name, rows=min(step, block.rows - first), cols=block.cols))
    return BlockLayout(blocks=tuple(found))


def _tell(what: str) -> None:
    print(f"{time.process_time():8.0f} s of CPU: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _server(wanted: bool) -> Iterator[MilvusLink | None]:
    """A link to a Milvus server of our own, gone afterwards; None if it is not wanted."""
    if not wanted:
        yield None
        return
    from tests.milvus_process import milvus_server

    # On a busy machine an answer may take long, and the server gives up when an attempt's time is over.
    policy = RetryPolicy(timeout_seconds=600, attempt_seconds=600)
    with milvus_server() as server, MilvusLink(server.access, policy=policy) as link:
        yield link


def _search_memory(
    spec: CodeSpec, dim: int, codes_N: NDArray[Any], codes_Q: NDArray[Any], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    index = MemoryIndex(spec, dim)
    index.add(np.arange(len(codes_N), dtype=np.int64), codes_N)
    return index.search(codes_Q, limit)


def _agreeing(
    link: MilvusLink,
    spec: CodeSpec,
    dim: int,
    codes_N: NDArray[Any],
    codes_Q: NDArray[Any],
    limits: list[int],
    expected_QL: NDArray[np.int64],
    cosines_QL: NDArray[np.float32],
) -> dict[int, int]:
    """For every limit that the server answers, how many queries get the ids, in the order, that memory gives.

    At the most that a server returns, those tied at the last place are its own choice and left out.
    """
    name = f"recall_{spec.size}"
    index = MilvusServerIndex.create(link, name, spec=spec, dim=dim, timeout_seconds=120)
    for first in range(0, len(codes_N), IMPORTED):
        part = codes_N[first : first + IMPORTED]
        index.add(np.arange(first, first + len(part), dtype=np.int64), part, timeout_seconds=120)
    index.flush(timeout_seconds=300)
    agreeing, starts = {}, range(0, len(codes_Q), SEARCHED)
    for limit in limits:
        if limit > MAX_CANDIDATES:
            continue
        found = [index.search(codes_Q[i : i + SEARCHED], limit, timeout_seconds=600)[0] for i in starts]
        found_QL = np.concatenate(found)
        width = found_QL.shape[1]
        decided_QL = np.ones(found_QL.shape, dtype=np.bool_)
        if limit == MAX_CANDIDATES:
            decided_QL = cosines_QL[:, :width] > cosines_QL[:, width - 1 : width]
        agreeing[limit] = int(((found_QL == expected_QL[:, :width]) | ~decided_QL).all(axis=1).sum())
    drop(link, name, timeout_seconds=60)
    return agreeing


def _recall(found_QL: NDArray[np.int64], wanted: list[NDArray[np.int64]]) -> float:
    hits = [len(np.intersect1d(found, best)) for found, best in zip(found_QL, wanted, strict=True)]
    return sum(hits) / sum(map(len, wanted))


def _law(
    scores_QN: NDArray[np.float32], wanted: list[NDArray[np.int64]], noise: float, limit: int, *, background: bool
) -> float:
    share = 1.0 - limit / scores_QN.shape[1]
    quantile = NORMAL.inv_cdf(share) if 0.0 < share < 1.0 else -np.inf
    values = []
    for scores_N, best in zip(scores_QN.astype(np.float64), wanted, strict=True):
        spread = np.hypot(noise, scores_N.std()) if background else noise
        threshold = spread * quantile + (scores_N.mean() if background else 0.0)
        for score in scores_N[best]:
            values.append(NORMAL.cdf((score - threshold) / noise) if noise > 0 else float(score >= threshold))
    return float(np.mean(values))


def _print(
    results: list[dict[str, Any]],
    scores_QN: NDArray[np.float32],
    best_QT: NDArray[np.int64],
    near: float | None,
    num_wanted: int,
) -> None:
    top = np.take_along_axis(scores_QN, best_QT, axis=1)
    print(
        f"{scores_QN.shape[1]:,} passages, {scores_QN.shape[0]} queries; exact score at rank 1: {top[:, 0].mean():.3f}"
        f", at rank {TOP}: {top[:, -1].mean():.3f}; background standard deviation {scores_QN.std(axis=1).mean():.4f}\n"
    )
    if near is not None:
        print(f"{num_wanted:,} passages score {near:g} up to a tenth\n")
    recall = f"recall@{TOP}" if near is None else f"recall near {near:g}"
    print(f"| code | bytes | sigma | L | {recall} | law | law + background | same in Milvus |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in results:
        unit = "floats" if row["kind"] == "prefix" else "bits"
        agrees = "" if row["milvus_agrees"] is None else f"{row['milvus_agrees']} of {len(scores_QN)}"
        print(
            f"| {row['k']:,} {unit} | {row['bytes']:,} | {row['sigma']:.4f} | "
            f"{row['candidates']:,} | {row['recall']:.3f} | {row['law']:.3f} | {row['law_background']:.3f} | {agrees} |"
        )


if __name__ == "__main__":
    main()

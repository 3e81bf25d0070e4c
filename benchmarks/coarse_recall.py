"""Recall of coarse search + exact rerank against the exact scan, for several codes and candidate counts L.

    python benchmarks/coarse_recall.py INDEX --facts FACTS.jsonl [--queries 200]

The rows of an index are whitened with R_train; the 10 passages with the highest exact score are what the cascade should
return. A passage survives if it is among the L best by code. Beside each measured recall stand two predictions,
averaged over the same (query, passage) pairs with their true scores s:

    law                Phi((s - t) / sigma),  t = sigma Phi^-1(1 - L/N):  every other passage has score zero
    law + background   the same with t from the query's own background: sqrt(sigma^2 + tau^2) Phi^-1(1 - L/N) + mu,
                       where mu and tau are mean and standard deviation of its exact scores
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trackstar.coarse import MemoryIndex
from trackstar.codes import CodeSpec, Rotation, encode_codes, padded_dim, sigma
from trackstar.hessian import Whitener, autocorrelation
from trackstar.index import Index
from trackstar.queries import read_queries, tokenize

TOP = 10
NORMAL = NormalDist()


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
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    index = Index(arguments.index)
    rows, layout = index.rows(), index.layout
    loaded = index.load_model()
    encoder = index.encoder(loaded)
    facts = read_queries(arguments.facts)
    order = np.random.default_rng(0).permutation(len(facts))[: arguments.queries]
    examples = [
        tokenize(facts[i], loaded.tokenizer, add_bos=index.facts["add_bos"], max_tokens=loaded.max_tokens)
        for i in order
    ]
    train = autocorrelation((batch for _, batch in rows.batches()), layout)
    whitener = Whitener.fit(train, layout, damping=arguments.damping)
    queries_QD = torch.nn.functional.normalize(whitener.apply(encoder.encode(examples).rows_ND), dim=1)

    sizes: list[tuple[str, int]] = [("prefix", k) for k in arguments.prefixes] + [("bits", k) for k in arguments.bits]
    specs = [
        CodeSpec(kind="prefix" if kind == "prefix" else "bits", size=k, seed=0)
        for kind, k in sizes
        if k <= padded_dim(layout.dim)
    ]
    rotation = Rotation(layout.dim, 0)
    indexes = [MemoryIndex(spec, layout.dim) for spec in specs]
    exact = []
    for first, batch in rows.batches():
        unit_ND = torch.nn.functional.normalize(whitener.apply(batch), dim=1)
        exact.append((queries_QD @ unit_ND.mT).numpy())
        ids = np.arange(first, first + len(batch), dtype=np.int64)
        for spec, coarse in zip(specs, indexes, strict=True):
            coarse.add(ids, encode_codes(spec, rotation, unit_ND))
    scores_QN: NDArray[np.float32] = np.concatenate(exact, axis=1)
    best_QT = np.argsort(-scores_QN, axis=1, kind="stable")[:, :TOP]

    results = []
    for spec, coarse in zip(specs, indexes, strict=True):
        found, _ = coarse.search(encode_codes(spec, rotation, queries_QD), max(arguments.candidates))
        noise = sigma(spec.kind, spec.size, layout.dim)
        for limit in arguments.candidates:
            results.append(
                {
                    "kind": spec.kind,
                    "k": spec.size,
                    "bytes": spec.row_bytes,
                    "candidates": limit,
                    "sigma": noise,
                    "recall": _recall(found[:, :limit], best_QT),
                    "law": _law(scores_QN, best_QT, noise, limit, background=False),
                    "law_background": _law(scores_QN, best_QT, noise, limit, background=True),
                }
            )
    _print(results, scores_QN, best_QT)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _recall(found_QL: NDArray[np.int64], best_QT: NDArray[np.int64]) -> float:
    hits = [len(set(found) & set(best)) for found, best in zip(found_QL.tolist(), best_QT.tolist(), strict=True)]
    return float(np.mean(hits) / TOP)


def _law(
    scores_QN: NDArray[np.float32], best_QT: NDArray[np.int64], noise: float, limit: int, *, background: bool
) -> float:
    share = 1.0 - limit / scores_QN.shape[1]
    quantile = NORMAL.inv_cdf(share) if 0.0 < share < 1.0 else -np.inf
    values = []
    for scores_N, best in zip(scores_QN.astype(np.float64), best_QT, strict=True):
        spread = np.hypot(noise, scores_N.std()) if background else noise
        threshold = spread * quantile + (scores_N.mean() if background else 0.0)
        for score in scores_N[best]:
            values.append(NORMAL.cdf((score - threshold) / noise) if noise > 0 else float(score >= threshold))
    return float(np.mean(values))


def _print(results: list[dict[str, Any]], scores_QN: NDArray[np.float32], best_QT: NDArray[np.int64]) -> None:
    top = np.take_along_axis(scores_QN, best_QT, axis=1)
    print(
        f"{scores_QN.shape[1]:,} passages, {scores_QN.shape[0]} queries; exact score at rank 1: {top[:, 0].mean():.3f}"
        f", at rank {TOP}: {top[:, -1].mean():.3f}; background standard deviation {scores_QN.std(axis=1).mean():.4f}\n"
    )
    print("| code | bytes | sigma | L | recall@10 | law | law + background |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in results:
        unit = "floats" if row["kind"] == "prefix" else "bits"
        print(
            f"| {row['k']:,} {unit} | {row['bytes']:,} | {row['sigma']:.4f} | "
            f"{row['candidates']:,} | {row['recall']:.3f} | {row['law']:.3f} | {row['law_background']:.3f} |"
        )


if __name__ == "__main__":
    main()

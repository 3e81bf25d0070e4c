"""Closed-set fact tracing: which ablation of the method finds the sentences that state a fact?

    python benchmarks/fact_tracing.py CORPUS... --facts FACTS.jsonl --model DIR --out DIR [--queries 500]

Two indexes are built with the project's own pipeline, one without and one with the optimizer correction V of the
checkpoint. Every method then scores every row exactly (no coarse search), so the table shows the scores alone. The task
mix is made from facts that are not among the queries. A fact counts as found where one of its `trex_sentences` stands.

    MRR          mean over queries of 1 / rank of the first sentence that states the fact
    Recall@10    share of queries with such a sentence among the first 10

Ties go to the smaller passage id. Intervals are 95 % bootstrap intervals over queries.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.build import Silent, build_index, make_config
from trackstar.encode import Encoder
from trackstar.hessian import Autocorrelation, MixConfig, Whitener, autocorrelation, mix
from trackstar.index import Index
from trackstar.queries import read_queries, tokenize
from trackstar.results import Query
from trackstar.rows import RowStore

Scores = NDArray[np.float32]


def main() -> None:
    """Build both indexes, score every method, print the table and write results.json."""
    arguments = _arguments()
    facts = read_queries(arguments.facts)
    order = np.random.default_rng(arguments.seed).permutation(len(facts))
    asked = [facts[index] for index in order[: arguments.queries]]
    others = [facts[index] for index in order[arguments.queries : arguments.queries + arguments.task_queries]]
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    gold: list[set[int]] = []
    for label, moments in (("", "none"), ("+V", str(arguments.moments or arguments.model))):
        index = _index(arguments, out / f"index-{'v' if label else 'plain'}", moments)
        rows, layout = index.rows(), index.layout
        gold = gold or _gold(asked, rows)
        encoder = index.encoder(index.load_model())
        queries_QD, others_QD = _encode(encoder, asked), _encode(encoder, others)
        encoder.close()
        train = autocorrelation((batch for _, batch in rows.batches()), layout)
        mixed, weight = mix(train, autocorrelation([others_QD], layout), MixConfig(kind="task"))
        whiteners = {"": Whitener.identity(layout)}
        for damping in (arguments.damping, *arguments.more_dampings):
            suffix = "" if damping == arguments.damping else f", damping {damping:g}"
            whiteners[f"+R{suffix}"] = Whitener.fit(train, layout, damping=damping)
            whiteners[f"+R+task mix (lambda {weight:.3f}){suffix}"] = Whitener.fit(mixed, layout, damping=damping)
        for name, whitener in whiteners.items():
            dots_QN, norms_N = _scores(rows, whitener, queries_QD)
            for kind, scores_QN in (("gradient dot", dots_QN), ("cosine", dots_QN / norms_N)):
                method = f"{kind}{label}{name}"
                results[method] = found = _measure(scores_QN, gold, arguments.seed)
                print(f"{method:50s} MRR {found['mrr']:.3f}  R@10 {found['recall_at_10']:.3f}", flush=True)
        results[f"spectrum{label}"] = _spectrum(train)
        rows.close()
    (out / "results.json").write_text(json.dumps(results, indent=2))
    print("\n" + _table(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--facts", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--moments", help="optimizer state; the model's folder by default")
    parser.add_argument("--out", required=True)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--task-queries", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cols", type=int, default=64)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--more-dampings", type=float, nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _index(arguments: argparse.Namespace, out: Path, moments: str) -> Index:
    """Build (or continue) the index whose rows are compared; its own generation has no whitening and is not used."""
    config = make_config(
        {
            "corpus": {"paths": arguments.corpus},
            "model": arguments.model,
            "moments": {"source": moments},
            "projection": {"rows": arguments.rows, "cols": arguments.cols, "layer_blocks": 8},
            "mix": {"kind": "none"},
            "code": {"kind": "bits", "store": "memory"},
        }
    )
    build_index(config, out, progress=_Printed()).close()
    return Index(out)


class _Printed(Silent):
    def note(self, text: str) -> None:
        print(f"note: {text}", flush=True)


def _encode(encoder: Encoder, queries: Sequence[Query]) -> Tensor:
    loaded = encoder.loaded
    examples = [tokenize(query, loaded.tokenizer, add_bos=True, max_tokens=loaded.max_tokens) for query in queries]
    return encoder.encode(examples).rows_ND


def _gold(queries: Sequence[Query], rows: RowStore) -> list[set[int]]:
    by_sentence = {doc_id: passage_id for passage_id, doc_id in enumerate(rows.column("doc_id"))}
    return [{by_sentence[name] for name in query.fields["trex_sentences"]} for query in queries]


def _scores(rows: RowStore, whitener: Whitener, queries_QD: Tensor) -> tuple[Scores, Scores]:
    """Whitened inner products [Q, N] with all rows, and the norms [N] of the whitened rows."""
    dual_QD = whitener.apply_twice(queries_QD)
    dots, norms = [], []
    for _, rows_ND in rows.batches():
        dots.append((dual_QD @ rows_ND.float().mT).numpy())
        norms.append(whitener.apply(rows_ND).norm(dim=1).clamp_min(1e-30).numpy())
    return np.concatenate(dots, axis=1), np.concatenate(norms)


def _measure(scores_QN: Scores, gold: Sequence[set[int]], seed: int) -> dict[str, Any]:
    ranks = np.array([_first_rank(scores, found) for scores, found in zip(scores_QN, gold, strict=True)])
    draws = np.random.default_rng(seed).integers(0, len(ranks), (2000, len(ranks)))
    result: dict[str, Any] = {"ranks": ranks.tolist()}
    for name, values in (("mrr", 1.0 / ranks), ("recall_at_10", (ranks <= 10).astype(np.float64))):
        result[name] = float(values.mean())
        result[f"{name}_interval"] = np.percentile(values[draws].mean(axis=1), [2.5, 97.5]).tolist()
    return result


def _first_rank(scores_N: Scores, gold: set[int]) -> int:
    """Rank of the best-scored gold passage, 1-based."""
    ids = np.fromiter(gold, dtype=np.int64)
    best = ids[np.lexsort((ids, -scores_N[ids]))[0]]
    higher = int((scores_N > scores_N[best]).sum())
    return 1 + higher + int((scores_N[:best] == scores_N[best]).sum())


def _spectrum(correlation: Autocorrelation) -> dict[str, Any]:
    """Effective rank and the share of the largest eigenvalue of R, per block."""
    facts = []
    for block in correlation.blocks:
        values = torch.linalg.eigvalsh(block).clamp_min(0)
        share = values / values.sum()
        entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
        facts.append({"effective_rank": float(np.exp(entropy)), "top_eigenvalue_share": float(share[-1])})
    return {"blocks": facts}


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| method | MRR | Recall@10 |", "| --- | --- | --- |"]
    for name, found in results.items():
        if "mrr" in found:
            mrr, recall = (
                "{:.3f} [{:.3f}, {:.3f}]".format(found[key], *found[f"{key}_interval"])
                for key in ("mrr", "recall_at_10")
            )
            lines.append(f"| {name} | {mrr} | {recall} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Final scores against float64 from explicit gradients to cosine; every way to the ranking gives the same one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests import tiny
from tests.unit.test_encode import weight_gradients
from trackstar.build import build_index, make_config
from trackstar.encode import Example
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.index import load_correction
from trackstar.projection import normal_factor
from trackstar.queries import tokenize
from trackstar.ranking import Ranking, best
from trackstar.reranker import Reranker
from trackstar.results import Query, Trace
from trackstar.separable import SeparableScale
from trackstar.tracer import Tracer

DAMPING, LAYER_BLOCKS, SIDE, PASSAGES = 0.1, 2, 4, 60
QUERIES = [
    Query(query_id="1", prompt="the cat sat on", target="a mat"),
    Query(query_id="2", prompt="one two", target="three"),
    Query(query_id="3", prompt="red", target="green blue"),
]


def write_corpus(path: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    words = ["cat", "mat", "sat", "one", "two", "three", "red", "green", "blue", "on", "a", "the"]
    lines = [
        json.dumps({"id": f"d{number}", "text": " ".join(generator.choice(words, generator.integers(2, 9)))})
        for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", params=["none", "estimate", "task mix"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tracer")
    write_corpus(root / "corpus.jsonl", PASSAGES)
    queries = [{"prompt": query.prompt, "target": query.target} for query in QUERIES] * 8
    (root / "task.jsonl").write_text("\n".join(json.dumps(query) for query in queries))
    changes: dict[str, Any] = {"moments": {"source": "estimate" if request.param == "estimate" else "none"}}
    if request.param == "task mix":
        changes = {
            "mix": {"kind": "task", "weight": 0.3, "damping": DAMPING},
            "task_queries": str(root / "task.jsonl"),
        }
    config = make_config(
        {
            "corpus": {"paths": (str(root / "corpus.jsonl"),)},
            "model": str(tiny.save_model(root / "model", "llama", scale=2.0)),
            "projection": {"layer_blocks": LAYER_BLOCKS, "rows": SIDE, "cols": SIDE},
            "mix": {"damping": DAMPING},
            "row_dtype": "float32",
            "shard_passages": 16,
            "code": {"store": "memory", "kind": "prefix", "size": 64},
            "background": 50,
            **changes,
        }
    )
    build_index(config, root / "index").close()
    tracer = Tracer.open(str(root / "index"))
    yield tracer
    tracer.close()


def float64_scores(tracer: Tracer) -> NDArray[np.float64]:
    """Cosines [Q, N] of corrected, projected, whitened gradients, from plain autograd on: nothing of the tracer's."""
    exact = tiny.load(Path(tracer.loaded.path), torch.float64)
    layout = tracer.index.layout
    correction = load_correction(tracer.index.root / "correction.safetensors")
    passages = tracer.rows.passages(range(tracer.rows.num_passages))
    examples = [Example(tokens=passage.tokens) for passage in passages]
    facts = tracer.index.facts
    queries = [
        tokenize(query, exact.tokenizer, add_bos=facts["add_bos"], max_tokens=exact.max_tokens) for query in QUERIES
    ]

    def row(example: Example) -> Tensor:
        gradients = weight_gradients(exact, example)
        found = torch.zeros(layout.dim, dtype=torch.float64)
        for member in exact.members:
            scale = correction[member.name]
            assert isinstance(scale, SeparableScale)
            factor = scale.out.double().mT @ scale.in_.double()
            block = exact.block_of(member, layout)
            left = normal_factor(seed=0, name=member.name, side="out", size=SIDE, features=range(member.out_features))
            right = normal_factor(seed=0, name=member.name, side="in", size=SIDE, features=range(member.in_features))
            gradient = left.double().mT @ (gradients[member.name] * factor) @ right.double()
            found[layout.span(block)] += gradient.reshape(-1)
        return found

    rows_ND, queries_QD = (torch.stack([row(example) for example in some]) for some in (examples, queries))
    mix = tracer.generation.facts["mix"]
    weight = mix["weight"] if mix["kind"] == "task" else 0.0
    whitened_N, whitened_Q = [], []
    for part_N, part_Q in zip(layout.split(rows_ND), layout.split(queries_QD), strict=True):
        correlation = (1 - weight) * part_N.mT @ part_N / len(part_N) + weight * part_Q.mT @ part_Q / len(part_Q)
        values, vectors = torch.linalg.eigh(correlation)
        root = vectors @ torch.diag((values + DAMPING * values.mean()) ** -0.5) @ vectors.mT
        whitened_N.append(part_N @ root)
        whitened_Q.append(part_Q @ root)
    unit_ND, unit_QD = (torch.nn.functional.normalize(torch.cat(parts, 1)) for parts in (whitened_N, whitened_Q))
    scores: NDArray[np.float64] = (unit_QD @ unit_ND.mT).numpy()
    return scores


def scores_of(trace: Trace) -> NDArray[np.float64]:
    """All scores by passage id, from a ranking of all."""
    found = np.empty(len(trace.proponents))
    for item in trace.proponents:
        found[item.passage.passage_id] = item.score
    return found


def test_final_scores_equal_float64(opened: Tracer) -> None:
    expected_QN = float64_scores(opened)
    for query, expected_N in zip(QUERIES, expected_QN, strict=True):
        trace = opened.trace(query, k=PASSAGES, exact=True, evidence=False)
        found_N = scores_of(trace)
        assert np.linalg.norm(found_N - expected_N) / np.linalg.norm(expected_N) < 1e-4
        assert np.abs(found_N - expected_N).max() < 1e-5
        order = [item.passage.passage_id for item in trace.proponents]
        assert order == sorted(range(PASSAGES), key=lambda item: -found_N[item])


def test_every_way_gives_the_same_ranking(opened: Tracer) -> None:
    for query in QUERIES:
        exact = opened.trace(query, k=5, exact=True, evidence=False)
        # 25 candidates for each end are fewer than all passages, so this is the cascade.
        cascade = opened.trace(query, k=5, candidates=25, evidence=False)
        assert exact.exact
        assert not cascade.exact
        assert cascade.examined == 50
        by_id = dict(enumerate(scores_of(opened.trace(query, k=PASSAGES, exact=True, evidence=False))))
        for item in cascade.proponents + cascade.opponents:
            assert item.score == pytest.approx(by_id[item.passage.passage_id], abs=1e-7)
        scores = [item.score for item in exact.opponents]
        assert scores == sorted(scores)


def test_company_changes_nothing(opened: Tracer) -> None:
    alone = [opened.trace(query, k=8, candidates=20, evidence=False) for query in QUERIES]
    together = list(opened.trace_many(QUERIES, k=8, candidates=20, batch=2))
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in zip(one.proponents + one.opponents, other.proponents + other.opponents, strict=True):
            assert mine.passage.passage_id == theirs.passage.passage_id
            assert mine.score == pytest.approx(theirs.score, abs=1e-6)


def test_evidence_sums_to_the_score_and_z_scores_follow_the_background(opened: Tracer) -> None:
    for query in QUERIES:
        trace = opened.trace(query, k=6, exact=True)
        for item in trace.proponents + trace.opponents:
            assert item.evidence is not None
            assert sum(share for _, share in item.evidence.tokens) == pytest.approx(item.score, abs=1e-5)
            assert sum(share for _, share in item.evidence.blocks) == pytest.approx(item.score, abs=1e-5)
            assert item.z_score == pytest.approx((item.score - trace.background_mean) / trace.background_std)
            assert 0 <= item.evidence.overlap <= 1


def test_blocks_from_stored_rows_equal_those_of_the_model(opened: Tracer) -> None:
    trace = opened.trace(QUERIES[0], k=6, exact=True)
    (dual,) = opened._encode([opened._tokenize(QUERIES[0])])
    ids = np.array([item.passage.passage_id for item in trace.proponents])
    shares_Nb = opened.reranker.block_shares(dual.dual_d, ids)
    for item, shares_b in zip(trace.proponents, shares_Nb, strict=True):
        assert item.evidence is not None
        assert shares_b == pytest.approx([share for _, share in item.evidence.blocks], abs=1e-5)


@pytest.mark.parametrize("density", [0.03, 0.6])
def test_a_masked_scan_ranks_what_the_mask_leaves(density: float, opened: Tracer) -> None:
    reranker: Reranker = opened.reranker
    mask_N = np.random.default_rng(1).random(PASSAGES) < density
    duals = torch.stack([dual.dual_d for dual in opened._encode([opened._tokenize(query) for query in QUERIES])])
    whole = reranker.scan(duals, signs=[1.0, -1.0], k=PASSAGES)
    masked = reranker.scan(duals, signs=[1.0, -1.0], k=7, mask_N=mask_N)
    for all_ends, ends in zip(whole, masked, strict=True):
        for ranking, found in zip(all_ends, ends, strict=True):
            kept = mask_N[ranking.ids]
            assert found.ids.tolist() == ranking.ids[kept][:7].tolist()
            np.testing.assert_allclose(found.scores, ranking.scores[kept][:7], atol=1e-7)


def test_a_shard_that_is_written_over_between_two_scans_is_not_ranked(opened: Tracer, tmp_path: Path) -> None:
    copied = Tracer.open(str(shutil.copytree(str(opened.index.root), tmp_path / "copy")))
    expected = copied.trace(QUERIES[0], k=5, exact=True)
    shard = tmp_path / "copy" / "rows" / "000001.safetensors"
    whole = shard.read_bytes()
    with shard.open("r+b") as stream:
        stream.seek(len(whole) // 2)
        stream.write(bytes(64))
    with pytest.raises(CorruptArtifact, match="000001"):
        copied.trace(QUERIES[0], k=5, exact=True)
    with shard.open("r+b") as stream:
        stream.write(whole)
    assert [item.score for item in copied.trace(QUERIES[0], k=5, exact=True).proponents] == [
        item.score for item in expected.proponents
    ]
    copied.close()


def test_ties_go_to_the_smaller_id() -> None:
    ids, scores = np.array([5, 3, 9, 1]), np.array([0.5, 0.5, 0.7, -0.5], dtype=np.float32)
    assert best(ids, scores, sign=1.0, k=3).ids.tolist() == [9, 3, 5]
    assert best(ids, scores, sign=-1.0, k=3).ids.tolist() == [1, 3, 5]
    other = Ranking(ids=np.array([4, 2]), scores=np.array([0.5, 0.1], dtype=np.float32))
    assert best(ids, scores, sign=1.0, k=4).merge(other, sign=1.0, k=4).ids.tolist() == [9, 3, 4, 5]


def test_out_of_range_numbers_are_refused(opened: Tracer) -> None:
    with pytest.raises(InvalidRequest, match="k must be at least 1"):
        opened.trace(QUERIES[0], k=0)
    with pytest.raises(InvalidRequest, match="candidates"):
        opened.trace(QUERIES[0], k=10, candidates=9)

"""Influence over an index against float64 from its rows, for every ablation; shards, windows, deletions, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import tiny
from trackstar.build import build_index, make_config
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest
from trackstar.evaluation.influence import (
    Influence,
    InfluenceSource,
    Whitening,
    fitted_whitening,
    positions_of,
    whitening_of_generation,
)
from trackstar.evaluation.sentences import Sentences
from trackstar.hessian import MixConfig
from trackstar.results import Query
from trackstar.tracer import Tracer

COUNT, DAMPING = 50, 0.1
QUERIES = [
    Query(query_id="1", prompt="the cat sat on", target="a mat"),
    Query(query_id="2", prompt="one two", target="three"),
    Query(query_id="3", prompt="red", target="green blue"),
]
TASK = [Query(query_id=f"t{number}", prompt=f"two {number}", target="cat") for number in range(6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    sentences: Sentences
    root: Path
    index: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("influence")
    generator = np.random.default_rng(0)
    words = ["cat", "mat", "sat", "one", "two", "three", "red", "green", "blue", "on", "a", "the"]
    # Some have more than one window of 24 tokens.
    texts = [" ".join(generator.choice(words, generator.integers(2, 14))) for _ in range(COUNT)]
    ids = [f"d{number}" for number in range(COUNT)]
    lines = [json.dumps({"id": name, "text": text}) for name, text in zip(ids, texts, strict=True)]
    (root / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    config = make_config(
        {
            "corpus": {"paths": (str(root / "corpus.jsonl"),)},
            "model": str(tiny.save_model(root / "model", "llama", scale=2.0)),
            "projection": {"layer_blocks": 2, "rows": 4, "cols": 4},
            "mix": {"damping": DAMPING},
            "moments": {"source": "estimate"},
            "row_dtype": "float32",
            "window_tokens": 24,
            "shard_passages": 7,
            "code": {"store": "memory", "kind": "bits", "size": 64},
            "background": 20,
        }
    )
    build_index(config, root / "index").close()
    return World(sentences=Sentences.of(ids, texts), root=root, index=root / "index")


@pytest.fixture
def source(world: World) -> Iterator[InfluenceSource]:
    opened = InfluenceSource(str(world.index), world.sentences)
    yield opened
    opened.close()


def float64_scores(source: InfluenceSource, mix: MixConfig, *, unit_norm: bool) -> NDArray[np.float64]:
    """Scores [Q, sentences] from the stored rows by dense algebra, each sentence by its best window."""
    layout = source.index.layout
    rows_Nd = torch.cat([batch.double() for _, batch in source.rows.batches()])
    queries_Qd, task_Td = (source.encode(some)[0].double() for some in (QUERIES, TASK))
    dots_QN = torch.zeros(len(QUERIES), len(rows_Nd), dtype=torch.float64)
    squares_N = torch.zeros(len(rows_Nd), dtype=torch.float64)
    for part_N, part_Q, part_T in zip(
        layout.split(rows_Nd), layout.split(queries_Qd), layout.split(task_Td), strict=True
    ):
        correlation = part_N.mT @ part_N / len(part_N)
        if mix.kind == "task":
            assert isinstance(mix.weight, float)
            correlation = mix.weight * part_T.mT @ part_T / len(part_T) + (1 - mix.weight) * correlation
        damped = correlation + DAMPING * correlation.diagonal().mean() * torch.eye(len(correlation))
        inverse = torch.eye(len(correlation), dtype=torch.float64) if mix.kind == "none" else damped.inverse()
        dots_QN += part_Q @ inverse @ part_N.mT
        squares_N += ((part_N @ inverse) * part_N).sum(1)
    scores_QN = (dots_QN / squares_N.sqrt() if unit_norm else dots_QN).numpy()
    found = np.full((len(QUERIES), COUNT), -np.inf)
    for passage, position in enumerate(source.positions_N):
        found[:, position] = np.maximum(found[:, position], scores_QN[:, passage])
    return found


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(
    "mix",
    [
        MixConfig(kind="none"),
        MixConfig(kind="train", damping=DAMPING),
        MixConfig(kind="task", weight=0.7, damping=DAMPING),
    ],
    ids=lambda mix: mix.kind,
)
def test_every_ablation_equals_float64(source: InfluenceSource, mix: MixConfig, unit_norm: bool) -> None:
    expected_QN = float64_scores(source, mix, unit_norm=unit_norm)
    whitening, weight = fitted_whitening(source, mix, TASK, unit_norm=unit_norm)
    assert weight == (0.7 if mix.kind == "task" else 0.0)
    found = Influence("i", source, whitening).retrieve(QUERIES, COUNT)
    for item, expected_N in zip(found, expected_QN, strict=True):
        assert sorted(item.positions.tolist()) == list(range(COUNT))
        # The query's own norm divides all its scores alike.
        scale = item.scores[0] / expected_N[item.positions[0]]
        np.testing.assert_allclose(item.scores, scale * expected_N[item.positions], rtol=2e-3, atol=2e-4 * scale)
        assert np.all(np.diff(item.scores) <= 0)
        short = Influence("i", source, whitening).retrieve(QUERIES, 5)
        assert short[found.index(item)].positions.tolist() == item.positions[:5].tolist()


def test_a_generations_whitening_gives_the_tracers_ranking(source: InfluenceSource, world: World) -> None:
    assert int(np.bincount(source.positions_N).max()) > 1
    found = Influence("i", source, whitening_of_generation(source, None, unit_norm=True)).retrieve(QUERIES, COUNT)
    fitted, _ = fitted_whitening(source, MixConfig(kind="train", damping=DAMPING), [], unit_norm=True)
    again = Influence("i", source, fitted).retrieve(QUERIES, COUNT)
    tracer = Tracer.open(str(world.index))
    for query, item, other in zip(QUERIES, found, again, strict=True):
        trace = tracer.trace(query, k=tracer.rows.num_passages, exact=True, evidence=False, opponents=False)
        docs = list(dict.fromkeys(proponent.passage.doc_id for proponent in trace.proponents))
        assert docs == [world.sentences.ids[position] for position in item.positions]
        np.testing.assert_allclose(other.scores, item.scores, atol=1e-5)
    tracer.close()


def test_company_changes_no_answer(source: InfluenceSource) -> None:
    whitening = whitening_of_generation(source, None, unit_norm=True)
    together = Influence("i", source, whitening).retrieve(QUERIES, 9)
    for query, item in zip(QUERIES, together, strict=True):
        (alone,) = Influence("i", source, whitening).retrieve([query], 9)
        assert alone.positions.tolist() == item.positions.tolist()
        np.testing.assert_allclose(alone.scores, item.scores, atol=1e-6)


def test_deleted_sentences_are_not_ranked(world: World, tmp_path: Path) -> None:
    from trackstar.cli import main

    copy = shutil.copytree(world.index, tmp_path / "index")
    before = InfluenceSource(str(copy), world.sentences)
    (first, *_) = Influence("i", before, whitening_of_generation(before, None, unit_norm=True)).retrieve(QUERIES, 3)
    before.close()
    gone = int(first.positions[0])
    assert main(["delete", str(copy), world.sentences.ids[gone]]) == 0
    after = InfluenceSource(str(copy), world.sentences)
    (item, *_) = Influence("i", after, whitening_of_generation(after, None, unit_norm=True)).retrieve(QUERIES, COUNT)
    assert gone not in item.positions
    assert item.positions[:2].tolist() == first.positions[1:].tolist()
    after.close()


def test_a_damaged_shard_is_not_ranked(world: World, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world.index, tmp_path / "index"))
    source = InfluenceSource(str(copy), world.sentences)
    whitening = whitening_of_generation(source, None, unit_norm=True)
    shard = copy / "rows" / "000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="000001"):
        Influence("i", source, whitening).retrieve(QUERIES, 3)
    source.close()


def test_another_corpus_is_refused() -> None:
    sentences = Sentences.of(["a", "b"], ["x", "y"])
    assert positions_of(["b", "a", "a"], sentences, "i").tolist() == [1, 0, 0]
    with pytest.raises(Incompatible, match="holds the document 'c', which is not in the corpus"):
        positions_of(["a", "c"], sentences, "i")
    with pytest.raises(Incompatible, match="lacks 1 of the corpus's 2 sentences, such as 'b'"):
        positions_of(["a"], sentences, "i")


def test_queries_that_cannot_be_explained_are_named(source: InfluenceSource) -> None:
    long = Query(query_id="long", prompt="one two " * 40, target="three")
    with pytest.raises(InvalidRequest, match="query 'long'"):
        source.encode([long])
    with pytest.raises(InvalidRequest, match="task_queries"):
        fitted_whitening(source, MixConfig(kind="task", weight=0.5), [], unit_norm=True)
    # A tokenizer of ASCII has no token for these.
    with pytest.raises(InvalidRequest, match=r"query 'strange': .* has no tokens for the target '語'"):
        source.encode([Query(query_id="strange", prompt="one", target="語")])


def test_a_query_without_gradient_is_named(source: InfluenceSource) -> None:
    whitening = whitening_of_generation(source, None, unit_norm=True)
    source._encoded["1"] = (torch.zeros(source.index.layout.dim), 0.0)
    with pytest.raises(InvalidRequest, match="query '1': the query's gradient is zero"):
        Influence("i", source, whitening).retrieve(QUERIES, 3)


def test_norms_made_in_parts_are_those_made_at_once(source: InfluenceSource, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_Nd = source.rows.shard(0)
    ids = np.arange(len(rows_Nd))
    stored = whitening_of_generation(source, None, unit_norm=True)
    made = Whitening(stored.whitener, unit_norm=True)
    np.testing.assert_allclose(made.norms(ids, rows_Nd), stored.norms(ids, rows_Nd), rtol=1e-5)
    monkeypatch.setattr("trackstar.evaluation.influence._NORM_BYTES", 4 * rows_Nd.shape[1] * 2)
    np.testing.assert_allclose(made.norms(ids, rows_Nd), stored.norms(ids, rows_Nd), rtol=1e-5)

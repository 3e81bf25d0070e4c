"""TRAK and TracIn as methods: against `trak.Trak`, and against dot products of rows in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from tests import tiny
from trackstar.build import build_index, make_config
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.evaluation.method import Method
from trackstar.evaluation.method_settings import TracInSettings, TrakSettings
from trackstar.evaluation.methods import MethodMaker
from trackstar.evaluation.selection import Selection
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Asked
from trackstar.evaluation.trak import Trak
from trackstar.index import Index
from trackstar.queries import tokenize
from trackstar.results import Query
from trackstar.tombstones import delete_documents

COUNT = 40
QUERIES = [
    Query(query_id="1", prompt="the cat sat on", target="a mat"),
    Query(query_id="2", prompt="red", target="green blue"),
]
NOBODY = Asked(queries=[], facts=[])


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    sentences: Sentences
    root: Path

    def index(self, name: str) -> str:
        return str(self.root / name)

    def maker(self, k: int = 5) -> MethodMaker:
        return MethodMaker(self.sentences, Selection(evaluated=NOBODY, held_out=NOBODY, task=NOBODY), k)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    generator = np.random.default_rng(0)
    words = ["cat", "mat", "sat", "one", "two", "red", "green", "blue", "on", "a", "the"]
    texts = [" ".join(generator.choice(words, generator.integers(2, 12))) for _ in range(COUNT)]
    ids = [f"d{number}" for number in range(COUNT)]
    lines = [json.dumps({"id": name, "text": text}) for name, text in zip(ids, texts, strict=True)]
    (root / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    for seed in (0, 1):
        tiny.save_model(root / f"model-{seed}", "llama", scale=2.0, seed=seed)
        for objective in ("loss", "margin", "logit"):
            # The second checkpoint's shards are cut elsewhere, and some sentences have two windows.
            config = make_config(
                {
                    "corpus": {"paths": (str(root / "corpus.jsonl"),)},
                    "model": str(root / f"model-{seed}"),
                    "objective": objective,
                    "projection": {"layer_blocks": 1, "rows": 3, "cols": 3},
                    "mix": {"kind": "none"},
                    "row_dtype": "float32",
                    "window_tokens": 24,
                    "shard_passages": 7 + 4 * seed,
                    "code": {"store": "memory", "kind": "bits", "size": 16},
                    "background": 4,
                }
            )
            build_index(config, root / f"{objective}-{seed}").close()
    return World(sentences=Sentences.of(ids, texts), root=root)


@pytest.fixture
def maker(world: World) -> Iterator[MethodMaker]:
    made = world.maker()
    yield made
    made.close()


def scores_of(method: Method) -> NDArray[np.float64]:
    """Of all sentences, [Q, N], by a ranking that goes to the end."""
    scores_QN = np.full((len(QUERIES), COUNT), np.nan)
    for scores_N, found in zip(scores_QN, method.retrieve(QUERIES, COUNT), strict=True):
        scores_N[found.positions] = found.scores
    return scores_QN


def positions_in(world: World, name: str) -> NDArray[np.int64]:
    ids = Index(world.index(name)).rows().column("doc_id").tolist()
    return np.array([world.sentences.positions[doc_id] for doc_id in ids])


def added(positions_N: NDArray[np.int64], scores_QN: NDArray[Any]) -> NDArray[np.float64]:
    total = np.zeros((len(QUERIES), COUNT))
    for position, scores_Q in zip(positions_N, scores_QN.T, strict=True):
        total[:, position] += scores_Q
    return total


@pytest.mark.parametrize("names", [["margin-0"], ["margin-0", "margin-1"]])
@pytest.mark.parametrize("blockwise", [False, True])
def test_trak_answers_with_positions(names: list[str], blockwise: bool, world: World, maker: MethodMaker) -> None:
    folders = tuple(world.index(name) for name in names)
    settings = TrakSettings(name="TRAK", kind="trak", indexes=folders, damping=0.2, blockwise=blockwise)
    method, fitted = maker.make(settings, {})
    assert (method.name, fitted) == ("TRAK", {})
    trak = Trak(folders, damping=0.2, blockwise=blockwise)
    scores_QN = np.concatenate([part for _, part in trak.scores(QUERIES)], axis=1)
    trak.close()
    positions_N = positions_in(world, names[0])
    assert len(positions_N) > COUNT
    for found, scores_N in zip(scores_of(method), scores_QN, strict=True):
        # Each sentence by its best window.
        highest = [scores_N[positions_N == position].max() for position in range(COUNT)]
        np.testing.assert_allclose(found, highest, rtol=1e-5, atol=1e-7)


def dots(world: World, name: str) -> NDArray[np.float64]:
    """<g_q, g_s> of every passage in float64, [Q, N]."""
    index = Index(world.index(name))
    loaded = index.load_model()
    encoder = index.encoder(loaded)
    asked = [tokenize(query, loaded.tokenizer, add_bos=True, max_tokens=64) for query in QUERIES]
    queries_Qd = encoder.encode(asked).rows_ND.double()
    encoder.close()
    rows = index.rows()
    found: NDArray[np.float64] = (queries_Qd @ rows.read(np.arange(rows.num_passages)).double().mT).numpy()
    return found


@pytest.mark.parametrize("objective", ["loss", "margin", "logit"])
def test_tracin_adds_weighted_dot_products(objective: str, world: World, maker: MethodMaker) -> None:
    names = [f"{objective}-0", f"{objective}-1"]
    folders = tuple(world.index(name) for name in names)
    settings = TracInSettings(name="TracIn", kind="tracin", indexes=folders, weights=(0.5, 2.0))
    method, _ = maker.make(settings, {})
    first, second = (added(positions_in(world, name), dots(world, name)) for name in names)
    expected = 0.5 * first + 2.0 * second
    np.testing.assert_allclose(scores_of(method), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    for item, scores_N in zip(method.retrieve(QUERIES, 5), scores_of(method), strict=True):
        assert item.positions.tolist() == np.argsort(-scores_N, kind="stable")[:5].tolist()
    alone, _ = maker.make(TracInSettings(name="one", kind="tracin", indexes=folders[:1]), {})
    expected = added(positions_in(world, names[0]), dots(world, names[0]))
    np.testing.assert_allclose(scores_of(alone), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_what_is_deleted_is_not_found(world: World, tmp_path: Path) -> None:
    config = make_config(
        {
            "corpus": {"paths": (str(world.root / "corpus.jsonl"),)},
            "model": str(world.root / "model-0"),
            "objective": "margin",
            "projection": {"layer_blocks": 1, "rows": 2, "cols": 2},
            "mix": {"kind": "none"},
            "code": {"store": "memory", "kind": "bits", "size": 8},
            "background": 4,
        }
    )
    build_index(config, tmp_path / "index").close()
    maker = world.maker()
    settings = TrakSettings(name="TRAK", kind="trak", indexes=(str(tmp_path / "index"),))
    before = maker.identity(settings, {})
    maker.close()
    rows = Index(tmp_path / "index").rows()
    delete_documents(tmp_path / "index", rows, ["d3"])
    rows.close()
    maker = world.maker()
    assert maker.identity(settings, {}) != before
    method, _ = maker.make(settings, {})
    assert all(3 not in item.positions for item in method.retrieve(QUERIES, COUNT))
    maker.close()


def test_what_makes_no_sense_is_refused(world: World, maker: MethodMaker) -> None:
    with pytest.raises(ValidationError, match="give a weight for each of the 1 indexes, not 2"):
        TracInSettings(name="t", kind="tracin", indexes=("a",), weights=(1.0, 2.0))
    with pytest.raises(ValidationError, match="at least 1 item"):
        TrakSettings(name="t", kind="trak", indexes=())
    with pytest.raises(InvalidRequest, match="build an index with the objective margin"):
        maker.make(TrakSettings(name="t", kind="trak", indexes=(world.index("loss-0"),)), {})
    other = MethodMaker(Sentences.of(["x"], ["other"]), Selection(evaluated=NOBODY, held_out=NOBODY, task=NOBODY), 5)
    with pytest.raises(Incompatible, match="evaluate it on the corpus that it was built from"):
        other.identity(TrakSettings(name="t", kind="trak", indexes=(world.index("margin-0"),)), {})

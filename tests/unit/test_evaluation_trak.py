"""TRAK against its formula in dense float64, against its authors' package where that is there, and its rankings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests import tiny
from trackstar.build import build_index, make_config
from trackstar.encode import Example
from trackstar.errors import Incompatible, InvalidRequest
from trackstar.evaluation import trak
from trackstar.evaluation.trak import Trak
from trackstar.index import Index
from trackstar.queries import tokenize
from trackstar.results import Query
from trackstar.tombstones import delete_documents

WORDS = ["river", "bridge", "snow", "hill", "night", "bird", "song", "lamp", "stone", "boat", "rain", "field"]
QUERIES = [
    Query(query_id="q0", prompt="The river", target="bridge"),
    Query(query_id="q1", prompt="Snow fell on", target="the hill"),
    Query(query_id="q2", prompt="A", target="lamp"),
]


def texts() -> list[str]:
    """60 sentences; number 7 is longer than a window and becomes several passages."""
    drawn = np.random.default_rng(3).choice(WORDS, size=(60, 5))
    found = [" ".join(row) for row in drawn.tolist()]
    found[7] = " ".join([*found[7:12]] * 2)
    return found


def build(root: Path, name: str, checkpoint: int, **changes: Any) -> str:
    settings = {
        "corpus": {"paths": [str(root / "corpus.jsonl")], "id_field": "id"},
        "model": str(root / f"model-{checkpoint}"),
        "objective": "margin",
        "projection": {"layer_blocks": 1, "rows": 3, "cols": 3},
        "mix": {"kind": "none"},
        "code": {"kind": "bits", "size": 16, "store": "memory"},
        "background": 4,
        "shard_passages": 16,
        "row_dtype": "float32",
        **changes,
    }
    build_index(make_config(settings), root / name).close()
    return str(root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trak")
    for checkpoint in (0, 1):
        tiny.save_model(root / f"model-{checkpoint}", "gpt2", seed=checkpoint)
    lines = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate(texts())]
    (root / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    build(root, "first", 0)
    build(root, "second", 1, shard_passages=11)
    return root


def phi(folder: Path) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Rows of passages and of queries in float64, and 1 - p of every passage by a loop over its tokens."""
    index = Index(folder)
    rows, loaded = index.rows(), index.load_model()
    everything = range(rows.num_passages)
    wrong = []
    for passage in rows.passages(everything):
        ids = torch.from_numpy(passage.tokens.astype(np.int64))
        p_TV = loaded.model(input_ids=ids[None], use_cache=False).logits[0].double().softmax(-1).detach()
        wrong.append(np.mean([1 - float(p_TV[t - 1, ids[t]]) for t in range(1, len(ids))]))
    encoder = index.encoder(loaded)
    examples = [tokenize(query, loaded.tokenizer, add_bos=True, max_tokens=64) for query in QUERIES]
    queries_Qd = encoder.encode(examples).rows_ND.double()
    encoder.close()
    return rows.read(everything).double(), queries_Qd, np.array(wrong)


def reference(folders: list[Path], damping: float, parts: int = 1) -> NDArray[np.float64]:
    """The formula with an inverse of every part of the kernel, [Q, N]."""
    kernels, weights = [], []
    for folder in folders:
        phi_Nd, queries_Qd, wrong_N = phi(folder)
        total = 0.0
        for mine_Nd, asked_Qd in zip(phi_Nd.chunk(parts, 1), queries_Qd.chunk(parts, 1), strict=True):
            kernel = mine_Nd.mT @ mine_Nd
            kernel += damping * float(kernel.trace()) / len(kernel) * torch.eye(len(kernel), dtype=torch.float64)
            total = total + (asked_Qd @ torch.linalg.inv(kernel) @ mine_Nd.mT).numpy()
        kernels.append(total)
        weights.append(wrong_N)
    found: NDArray[np.float64] = np.mean(kernels, axis=0) * np.mean(weights, axis=0)
    return found


def scores_of(method: Trak) -> NDArray[np.float32]:
    parts = list(method.scores(QUERIES))
    assert [first for first, _ in parts] == np.cumsum([0, *(part.shape[1] for _, part in parts)])[:-1].tolist()
    return np.concatenate([part for _, part in parts], axis=1)


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_scores_are_those_of_the_formula(names: list[str], damping: float, root: Path) -> None:
    """Two checkpoints are cut into shards in different places, and both of their means are taken apart."""
    method = Trak([str(root / name) for name in names], damping=damping)
    found = scores_of(method)
    expected = reference([root / name for name in names], damping)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert found.shape == (3, method.num_passages)
    np.testing.assert_array_equal(scores_of(method), found)
    method.close()


def test_a_kernel_taken_block_by_block_is_that_of_each_block(root: Path) -> None:
    method = Trak([str(root / "first")], damping=0.1, blockwise=True)
    expected = reference([root / "first"], 0.1, parts=2)
    np.testing.assert_allclose(scores_of(method), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    method.close()


def test_scores_are_those_of_the_authors_package(root: Path) -> None:
    package = pytest.importorskip("trak.score_computers", reason="the package traker is not installed")
    phi_Nd, queries_Qd, wrong_N = phi(root / "first")
    phi_Nd, queries_Qd = phi_Nd.float(), queries_Qd.float()
    kernel = phi_Nd.mT @ phi_Nd
    # The package takes damping as it is, and ours is in mean eigenvalues.
    damping = 0.05
    computer = package.BasicScoreComputer(
        dtype=torch.float32, device="cpu", lambda_reg=damping * float(kernel.diagonal().mean())
    )
    features = computer.get_x_xtx_inv(phi_Nd, computer.get_xtx(phi_Nd))
    total = torch.zeros(len(phi_Nd), len(QUERIES))
    computer.get_scores(features, queries_Qd, accumulator=total)
    # As in `TRAKer.finalize_scores`: the mean of the kernels' scores times the mean of `out_to_loss`.
    expected = (total.numpy() * wrong_N[:, None]).T
    method = Trak([str(root / "first")], damping=damping)
    found = scores_of(method)
    # The package divides the inverse by its mean absolute value, which changes no order.
    np.testing.assert_allclose(found / np.abs(found).max(), expected / np.abs(expected).max(), rtol=1e-3, atol=1e-5)
    method.close()


def test_a_list_holds_the_best_documents_once_each(root: Path) -> None:
    method = Trak([str(root / "first"), str(root / "second")], damping=0.1)
    found = scores_of(method)
    ids = [passage.doc_id for passage in Index(root / "first").rows().passages(range(method.num_passages))]
    assert len(ids) > len(set(ids)) == 60
    for k in (1, 5, 100):
        for query, scores_N, (query_id, documents, scores) in zip(
            QUERIES, found, method.retrieve(QUERIES, k), strict=True
        ):
            best = {doc: max(s for d, s in zip(ids, scores_N, strict=True) if d == doc) for doc in ids}
            expected = sorted(best, key=lambda doc: (-best[doc], ids.index(doc)))[:k]
            assert query_id == query.query_id
            assert documents == expected
            assert scores == [best[document] for document in expected]
    with pytest.raises(InvalidRequest, match="k must be at least 1"):
        method.retrieve(QUERIES, 0)
    method.close()


def test_deleted_documents_are_not_retrieved(root: Path, tmp_path: Path) -> None:
    folder = build(root, f"deleted-{tmp_path.name}", 0)
    method = Trak([folder])
    (_, documents, _), *_ = method.retrieve(QUERIES, 3)
    method.close()
    index = Index(folder)
    delete_documents(index.root, index.rows(), [documents[0]])
    method = Trak([folder])
    assert method.retrieve(QUERIES, 2)[0][1] == documents[1:]
    method.close()


def test_the_mean_error_does_not_depend_on_the_batch(root: Path) -> None:
    loaded = tiny.load(root / "model-0", torch.float64)
    passages = Index(root / "first").rows().passages(range(12))
    examples = [Example(tokens=passage.tokens[: 1 + number]) for number, passage in enumerate(passages)]
    together = trak.mean_errors(loaded, examples)
    alone = [trak.mean_errors(loaded, [example])[0] for example in examples]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert together[0] == 0.0
    assert (together[1:] > 0.0).all()


def test_what_does_not_fit_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = str(root / "first")
    with pytest.raises(InvalidRequest, match="give at least one"):
        Trak([])
    with pytest.raises(InvalidRequest, match="the damping of TRAK is -1"):
        Trak([first], damping=-1)
    with pytest.raises(InvalidRequest, match="holds those of the loss; build an index with the objective margin"):
        Trak([build(root, "loss", 0, objective="loss")])
    with pytest.raises(Incompatible, match="hold different passages"):
        Trak([first, build(root, "narrow", 1, window_tokens=8)])
    wide = build(root, "wide", 0, projection={"layer_blocks": 1, "rows": 8, "cols": 8})
    method = Trak([wide], damping=0.0)
    with pytest.raises(InvalidRequest, match=r"no inverse: 6[0-9] passages, 128 coordinates, damping 0; use a larger"):
        next(method.scores(QUERIES))
    method.close()
    monkeypatch.setattr(trak, "MAX_WHOLE_DIM", 17)
    with pytest.raises(InvalidRequest, match="rows of 18 coordinates are too wide for TRAK's one kernel"):
        Trak([first])
    Trak([first], blockwise=True).close()

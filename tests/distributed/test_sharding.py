"""Two ranks give the rows, shares and words of one, whatever the strategy, architecture and correction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.distributed import jobs
from tests.distributed.ranks import WORLD, Ranks
from trackstar.errors import InvalidRequest, UnsupportedModel
from trackstar.sharding import Strategy, shard

# A slice of key-value heads for every rank.
TWO_HEADS = {"num_key_value_heads": 2}
CASES: list[tuple[Strategy, str, dict[str, Any]]] = [
    ("tensor", "llama", TWO_HEADS),
    ("tensor", "gpt_neox", {}),
    ("tensor", "qwen3", TWO_HEADS),
    ("tensor", "gemma2", TWO_HEADS),
    ("tensor", "olmo2", TWO_HEADS),
    ("tensor", "phi3", TWO_HEADS),
    ("fsdp", "llama", {}),
    ("fsdp", "gpt2", {}),
    ("fsdp", "mixtral", {}),
]
SLOW_CASES: list[tuple[Strategy, str, dict[str, Any]]] = [
    ("tensor", "mistral", TWO_HEADS),
    ("tensor", "qwen2", TWO_HEADS),
    ("tensor", "llama_tied", TWO_HEADS),
    ("tensor", "olmo", TWO_HEADS),
    ("tensor", "gemma", TWO_HEADS),
    ("tensor", "gemma3", TWO_HEADS),
    ("fsdp", "gpt_neox", {}),
    ("fsdp", "qwen3_moe", {}),
    ("fsdp", "olmoe", {}),
    ("fsdp", "gpt_oss", {}),
    ("fsdp", "gemma2", {}),
    ("fsdp", "gemma3", {}),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


def error_of(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Largest relative error of a row, in float64; a row of zeros must be one."""
    difference = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    norm = np.linalg.norm(expected.astype(np.float64), axis=-1)
    assert not difference[norm == 0].any()
    return float((difference[norm > 0] / norm[norm > 0]).max())


def check(strategy: Strategy, folder: Path, ranks: Ranks, *, plain_experts: bool = False) -> None:
    whole = jobs.compute(folder, None, plain_experts)
    results = ranks.run(jobs.compute, folder, strategy, plain_experts)
    for found in results:
        if isinstance(found, Exception):
            raise found
        for kind in jobs.CORRECTIONS:
            assert error_of(found.rows[kind], whole.rows[kind]) < 1e-5, kind
            for number, expected in enumerate(whole.by_token[kind]):
                scale = float(np.abs(expected).max()) or 1.0
                np.testing.assert_allclose(found.by_token[kind][number], expected, rtol=0, atol=1e-5 * scale)
                np.testing.assert_allclose(
                    found.unplaced[kind][number], whole.unplaced[kind][number], rtol=0, atol=1e-5 * scale
                )
            np.testing.assert_array_equal(found.rows[kind], results[0].rows[kind])
        np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-5)
        assert found.completion == whole.completion
        assert found.log_probability == pytest.approx(whole.log_probability, rel=1e-5)
        # Norms, and biases behind a sum over ranks, stay whole with "tensor": a few percent of even these tiny layers.
        assert whole.layer_bytes / WORLD <= found.layer_bytes < 1.15 * whole.layer_bytes / WORLD
        assert found.other_bytes == whole.other_bytes


@pytest.mark.parametrize(("strategy", "architecture", "settings"), CASES)
def test_two_ranks_give_what_one_gives(
    strategy: Strategy, architecture: str, settings: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    check(strategy, tiny.save_model(tmp_path / "model", architecture, **settings), ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "architecture", "settings"), SLOW_CASES)
def test_further_architectures(
    strategy: Strategy, architecture: str, settings: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    check(strategy, tiny.save_model(tmp_path / "model", architecture, **settings), ranks)


@pytest.mark.slow
def test_plain_experts_are_encoded_one_by_one_on_every_rank(tmp_path: Path, ranks: Ranks) -> None:
    check("fsdp", tiny.save_model(tmp_path / "model", "mixtral"), ranks, plain_experts=True)


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("gpt2", {}, "brings no tensor-parallel plan"),
        ("mixtral", TWO_HEADS, "as 'packed_colwise'"),
        ("qwen3_moe", TWO_HEADS, "as 'packed_colwise'"),
        ("llama", {}, "num_key_value_heads = 1 does not divide by 2 ranks"),
        ("llama", {**TWO_HEADS, "intermediate_size": 25}, "25 features of 'model.layers.0.mlp.gate_proj'"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    architecture: str, settings: dict[str, Any], reason: str, tmp_path: Path, ranks: Ranks
) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture, **settings)
    for error in ranks.run(jobs.refused, folder, "tensor"):
        assert isinstance(error, UnsupportedModel)
        assert reason in str(error)
        assert "use the strategy 'fsdp'" in str(error)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        # Gate and up lie one behind the other: half of both is not the first half.
        ("phi3", {"gate_up_proj": "colwise", "down_proj": "rowwise"}, "hidden states change when it is cut"),
        # The norm of queries and keys spans all heads.
        ("olmo2", {"q_proj": "colwise"}, "do not run when cut"),
    ],
)
def test_a_plan_that_is_wrong_is_noticed(
    architecture: str, changes: dict[str, str], reason: str, tmp_path: Path, ranks: Ranks
) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture, **TWO_HEADS)
    parts = {"gate_up_proj": "mlp", "down_proj": "mlp", "q_proj": "self_attn"}
    changes = {f"model.layers.*.{parts[name]}.{name}": style for name, style in changes.items()}
    for error in ranks.run(jobs.refused_with, folder, changes):
        assert isinstance(error, UnsupportedModel)
        assert reason in str(error)


def test_without_a_group_nothing_is_cut(tmp_path: Path) -> None:
    loaded = tiny.load(tiny.save_model(tmp_path / "model", "llama"))
    with pytest.raises(InvalidRequest, match="init_process_group"):
        shard(loaded, strategy="tensor")

"""R and its inverse root against dense float64 algebra written another way, and the rules of mixing and damping."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from trackstar.errors import InvalidRequest
from trackstar.hessian import (
    CROSSING_FRACTION,
    Autocorrelation,
    MixConfig,
    Whitener,
    autocorrelation,
    crossing_weight,
    mix,
    product_sums,
)
from trackstar.projection import Block, BlockLayout

LAYOUT = BlockLayout(
    blocks=(Block(name="a", rows=3, cols=4), Block(name="b", rows=5, cols=2), Block(name="c", rows=7, cols=1))
)
ONE = BlockLayout(blocks=(Block(name="only", rows=8, cols=4),))


def rows(count: int, layout: BlockLayout = LAYOUT, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated rows whose coordinates differ in size by a factor of 30 within every block."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for block in layout.blocks:
        white = torch.randn(count, block.dim, dtype=torch.float64, generator=generator)
        turn = torch.linalg.qr(torch.randn(block.dim, block.dim, dtype=torch.float64, generator=generator)).Q
        parts.append(white * torch.logspace(0, -1.5, block.dim, dtype=torch.float64) @ turn)
    return torch.cat(parts, dim=1).to(dtype)


def loop(rows_ND: Tensor, layout: BlockLayout) -> list[Tensor]:
    """Float64 mean of outer products, row by row."""
    found = []
    for index in range(len(layout.blocks)):
        part = rows_ND[:, layout.span(index)].double()
        found.append(sum((torch.outer(row, row) for row in part), torch.zeros(())) / len(part))
    return found


def inverse_root(matrix: Tensor, damping: float) -> Tensor:
    """(M + damping * mean eigenvalue)^(-1/2) by the Denman-Beavers iteration: no eigendecomposition involved."""
    size = len(matrix)
    eye = torch.eye(size, dtype=torch.float64)
    damped = matrix + damping * (matrix.trace() / size) * eye
    scale = damped.trace() / size
    root, inverse = damped / scale, eye.clone()
    for _ in range(60):
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    return inverse / scale.sqrt()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def diagonal(values: Sequence[float], count: int = 1000) -> Autocorrelation:
    return Autocorrelation(blocks=(torch.diag(torch.tensor(values, dtype=torch.float64)),), count=count)


# --- R -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_autocorrelation_equals_the_loop(dtype: torch.dtype, tolerance: float) -> None:
    rows_ND = rows(50, dtype=dtype)
    found = autocorrelation([rows_ND], LAYOUT)
    assert found.count == 50
    for block, expected in zip(found.blocks, loop(rows_ND, LAYOUT), strict=True):
        assert block.dtype == torch.float64
        assert relative(block, expected) < tolerance


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), max_size=6), st.permutations(range(40)))
def test_autocorrelation_does_not_depend_on_batches_or_order(cuts: list[int], order: list[int]) -> None:
    rows_ND = rows(40)
    borders = [0, *sorted(cuts), 40]
    batches = [rows_ND[order][a:b] for a, b in pairwise(borders)]
    found, whole = autocorrelation(batches, LAYOUT), autocorrelation([rows_ND], LAYOUT)
    assert found.count == whole.count
    for one, other in zip(found.blocks, whole.blocks, strict=True):
        assert relative(one, other) < 1e-12


def test_autocorrelation_needs_rows() -> None:
    with pytest.raises(InvalidRequest, match="at least one row"):
        product_sums([], LAYOUT).average()


def test_sums_of_parts_add_up_in_any_grouping() -> None:
    rows_ND = rows(20).double()
    parts = [product_sums([rows_ND[first : first + 5]], LAYOUT) for first in range(0, 20, 5)]
    tree = (parts[0] + parts[1]) + (parts[2] + parts[3])
    chain = parts[0] + parts[1] + parts[2] + parts[3]
    assert tree.count == chain.count == 20
    for one, two, expected in zip(tree.average().blocks, chain.average().blocks, loop(rows_ND, LAYOUT), strict=True):
        assert relative(one, expected) < 1e-14
        assert relative(two, expected) < 1e-14


def test_eigenvalues_are_those_of_all_blocks_descending() -> None:
    correlation = Autocorrelation(
        blocks=tuple(torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([3.0, 1.0], [2.0, 7.0, -1e-17])),
        count=9,
    )
    assert correlation.eigenvalues().tolist() == pytest.approx([7, 3, 2, 1, 0])
    assert float(correlation.eigenvalues().min()) >= 0.0


# --- whitening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 1.0])
def test_whitener_is_the_dense_inverse_root(damping: float) -> None:
    correlation = autocorrelation([rows(400)], LAYOUT)
    whitener = Whitener.fit(correlation, LAYOUT, damping=damping)
    fresh_ND = rows(30, seed=1)
    whitened_ND, twice_ND = whitener.apply(fresh_ND.float()), whitener.apply_twice(fresh_ND.float())
    assert whitened_ND.dtype == torch.float32
    for index, matrix in enumerate(correlation.blocks):
        span, root = LAYOUT.span(index), inverse_root(matrix, damping)
        assert relative(whitener.inverse_roots[index], root) < 1e-6
        assert relative(whitener.inverse_roots[index], whitener.inverse_roots[index].mT.double()) < 1e-6
        assert relative(whitened_ND[:, span], fresh_ND[:, span] @ root) < 1e-4
        assert relative(twice_ND[:, span], fresh_ND[:, span] @ root @ root) < 1e-4


def test_whitened_rows_have_the_identity_as_covariance() -> None:
    rows_ND = rows(400)
    whitener = Whitener.fit(autocorrelation([rows_ND], LAYOUT), LAYOUT, damping=0.0)
    whitened_ND = whitener.apply(rows_ND.float()).double()
    for part in LAYOUT.split(whitened_ND):
        covariance = part.mT @ part / len(part)
        assert float((covariance - torch.eye(part.shape[1], dtype=torch.float64)).abs().max()) < 1e-4


def test_both_ways_of_scoring_agree() -> None:
    """<W q, W m> = <R^-1 q, m>: the identity that lets rows stay un-whitened on disk."""
    whitener = Whitener.fit(autocorrelation([rows(200)], LAYOUT), LAYOUT, damping=0.1)
    query_d, rows_ND = rows(1, seed=2).float()[0], rows(50, seed=3).float()
    direct = whitener.apply(rows_ND).double() @ whitener.apply(query_d).double()
    folded = rows_ND.double() @ whitener.apply_twice(query_d).double()
    torch.testing.assert_close(folded, direct, rtol=1e-4, atol=1e-4 * float(direct.abs().max()))


@settings(max_examples=30)
@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1.0))
def test_damping_is_relative_to_the_mean_eigenvalue(factor: float, damping: float) -> None:
    """Scaling all gradients by c scales W by 1/c: damping follows the size of the spectrum."""
    rows_ND = rows(60)
    plain = Whitener.fit(autocorrelation([rows_ND], LAYOUT), LAYOUT, damping=damping)
    scaled = Whitener.fit(autocorrelation([rows_ND * factor], LAYOUT), LAYOUT, damping=damping)
    for one, other in zip(plain.inverse_roots, scaled.inverse_roots, strict=True):
        assert relative(other * factor, one.double()) < 1e-5


def test_damping_by_hand() -> None:
    layout = BlockLayout(blocks=(Block(name="x", rows=2, cols=1),))
    root = Whitener.fit(diagonal([6.0, 2.0]), layout, damping=0.5).inverse_roots[0]
    torch.testing.assert_close(root, torch.diag(torch.tensor([8.0, 4.0]).rsqrt()))


def test_blocks_are_damped_each_by_its_own_mean() -> None:
    rows_ND = rows(60)
    louder_ND = rows_ND.clone()
    louder_ND[:, LAYOUT.span(0)] *= 1000
    quiet = Whitener.fit(autocorrelation([rows_ND], LAYOUT), LAYOUT, damping=0.1)
    loud = Whitener.fit(autocorrelation([louder_ND], LAYOUT), LAYOUT, damping=0.1)
    assert torch.equal(quiet.inverse_roots[1], loud.inverse_roots[1])
    assert torch.equal(quiet.inverse_roots[2], loud.inverse_roots[2])


def test_identity_leaves_rows_as_they_are() -> None:
    rows_ND = rows(5, dtype=torch.float32)
    whitener = Whitener.identity(LAYOUT)
    assert torch.equal(whitener.apply(rows_ND), rows_ND)
    assert torch.equal(whitener.apply_twice(rows_ND), rows_ND)
    assert torch.equal(whitener.apply(rows_ND.bfloat16()), rows_ND.bfloat16().float())


@pytest.mark.parametrize("shape", [(29,), (2, 3, 29)])
def test_apply_keeps_leading_dimensions(shape: tuple[int, ...]) -> None:
    whitener = Whitener.fit(autocorrelation([rows(60)], LAYOUT), LAYOUT, damping=0.1)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert whitener.apply(batch).shape == shape
    expected = torch.stack([whitener.apply(row) for row in batch.reshape(-1, 29)]).view(shape)
    torch.testing.assert_close(whitener.apply(batch), expected)


def test_blocks_of_one_dimension_are_whitened_too() -> None:
    layout = BlockLayout(blocks=(Block(name="x", rows=1, cols=1), Block(name="y", rows=1, cols=1)))
    rows_ND = torch.tensor([[2.0, 10.0], [-2.0, 10.0]])
    whitener = Whitener.fit(autocorrelation([rows_ND], layout), layout, damping=0.0)
    torch.testing.assert_close(whitener.apply(rows_ND), torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 20, 31])
def test_too_few_rows_without_damping_are_refused(dtype: torch.dtype, count: int) -> None:
    correlation = autocorrelation([rows(count, ONE, dtype=dtype)], ONE)
    with pytest.raises(
        InvalidRequest, match=rf"block 'only' has no inverse: {count} rows, 32 dimensions.*larger damping"
    ):
        Whitener.fit(correlation, ONE, damping=0.0)
    assert bool(torch.isfinite(Whitener.fit(correlation, ONE, damping=1e-3).inverse_roots[0]).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    rows_ND = rows(60)
    rows_ND[3, 14] = value
    with pytest.raises(InvalidRequest, match="block 'b' holds values that are not finite"):
        Whitener.fit(autocorrelation([rows_ND], LAYOUT), LAYOUT, damping=0.1)


def test_a_block_that_no_row_reaches_adds_nothing() -> None:
    """All weights of a block can be left out on purpose; the other blocks are whitened as if it were not there."""
    rows_ND = rows(60)
    rows_ND[:, LAYOUT.span(1)] = 0
    whitener = Whitener.fit(autocorrelation([rows_ND], LAYOUT), LAYOUT, damping=0.1)
    full = Whitener.fit(autocorrelation([rows(60)], LAYOUT), LAYOUT, damping=0.1)
    whitened_ND = whitener.apply(rows(4, seed=9))
    assert not whitened_ND[:, LAYOUT.span(1)].any()
    for index in (0, 2):
        assert torch.equal(whitened_ND[:, LAYOUT.span(index)], full.apply(rows(4, seed=9))[:, LAYOUT.span(index)])


def test_rows_of_zeros_only_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="Hessian is zero"):
        Whitener.fit(autocorrelation([torch.zeros(5, LAYOUT.dim)], LAYOUT), LAYOUT, damping=0.1)


# --- the mix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.03, 0.2, 0.6, 0.99])
def test_at_lambda_both_eigenvalues_agree(fraction: float) -> None:
    train, task = autocorrelation([rows(300)], LAYOUT), autocorrelation([rows(100, seed=1) * 7], LAYOUT)
    weight = crossing_weight(train, task, fraction)
    # The k-th eigenvalue another way: singular values of the blocks.
    k = round(fraction * LAYOUT.dim)
    sigma_train, sigma_task = (
        torch.cat([torch.linalg.svdvals(block) for block in c.blocks]).sort(descending=True).values[k - 1]
        for c in (train, task)
    )
    assert 0.0 < weight < 1.0
    assert float(weight * sigma_task) == pytest.approx(float((1 - weight) * sigma_train), rel=1e-9)


def test_crossing_reads_at_least_the_first_eigenvalue() -> None:
    assert crossing_weight(diagonal([3.0, 1.0]), diagonal([1.0, 1.0]), 0.01) == pytest.approx(0.75)
    assert crossing_weight(diagonal([3.0, 1.0]), diagonal([1.0, 1.0]), 0.9) == pytest.approx(0.5)


def test_crossing_fraction_is_the_papers() -> None:
    """The thousandth eigenvalue of 65,536, so the eighth of 512."""
    values = [2.0 - index / 512 for index in range(512)]
    assert pytest.approx(1000 / 65536) == CROSSING_FRACTION
    assert crossing_weight(diagonal([1.0] * 512), diagonal(values)) == pytest.approx(1 / (1 + values[7]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_of_too_few_directions_is_refused(dtype: torch.dtype) -> None:
    """Also in float32, where rounding leaves small eigenvalues in directions that no query spans."""
    train = autocorrelation([rows(100, ONE, dtype=dtype)], ONE)
    task = autocorrelation([rows(6, ONE, dtype=dtype)], ONE)
    with pytest.raises(InvalidRequest, match="reads eigenvalue 16 but the 6 task queries span 6 directions only"):
        crossing_weight(train, task, 0.5)
    copies = autocorrelation([rows(2, ONE, dtype=dtype).repeat(50, 1)], ONE)
    with pytest.raises(InvalidRequest, match="the 100 task queries span 2 directions only"):
        crossing_weight(train, copies, 0.5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_fixed_weight_joins_the_two(weight: float) -> None:
    train, task = autocorrelation([rows(300)], LAYOUT), autocorrelation([rows(100, seed=1)], LAYOUT)
    mixed, used = mix(train, task, MixConfig(kind="task", weight=weight))
    assert used == weight
    for found, a, b in zip(mixed.blocks, task.blocks, train.blocks, strict=True):
        torch.testing.assert_close(found, weight * a + (1 - weight) * b, rtol=1e-14, atol=0)


def test_the_crossing_weight_is_used_and_told() -> None:
    train, task = autocorrelation([rows(300)], LAYOUT), autocorrelation([rows(100, seed=1)], LAYOUT)
    mixed, used = mix(train, task, MixConfig(kind="task", crossing_fraction=0.3))
    assert used == crossing_weight(train, task, 0.3)
    fixed, _ = mix(train, task, MixConfig(kind="task", weight=used))
    assert all(torch.equal(a, b) for a, b in zip(mixed.blocks, fixed.blocks, strict=True))


@pytest.mark.parametrize("kind", ["train", "none"])
def test_without_a_task_mix_the_task_is_not_looked_at(kind: Any) -> None:
    train, task = autocorrelation([rows(300)], LAYOUT), autocorrelation([rows(100, seed=1)], LAYOUT)
    mixed, used = mix(train, task, MixConfig(kind=kind, weight=0.9))
    assert used == 0.0
    assert mixed is train


def test_a_task_mix_needs_a_task() -> None:
    with pytest.raises(InvalidRequest, match="--task-queries"):
        mix(autocorrelation([rows(10)], LAYOUT), None, MixConfig(kind="task"))


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": -0.1},
        {"weight": 1.1},
        {"weight": float("nan")},
        {"weight": "other"},
        {"damping": -1e-9},
        {"damping": float("nan")},
        {"damping": float("inf")},
        {"crossing_fraction": 0.0},
        {"crossing_fraction": 1.0},
        {"kind": "both"},
        {"lambda": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MixConfig(**settings)

"""The separable fit against the plain definition of its objective, and its behaviour where V is silent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trackstar import separable
from trackstar.errors import InvalidRequest
from trackstar.separable import adafactor_scale, exact_scale, fit_separable, relative_error, uniform_scale


def random_moment(rows: int, columns: int, seed: int, spread: float = 1.0) -> Tensor:
    """Log-normal row and column factors times elementwise noise, at the size that gradients of a real model have."""
    generator = torch.Generator().manual_seed(seed)
    row, column, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, 1), (1, columns), (rows, columns))
    )
    return 1e-9 * torch.exp(2 * spread * (row + column) + spread * noise)


def plain_error(v: Tensor, eps: float, scale: separable.SeparableScale) -> float:
    target = 1.0 / (v.double().sqrt() + eps)
    fitted = torch.einsum("ki,kj->ij", scale.out.double(), scale.in_.double())
    return float(((fitted / target - 1.0) ** 2).mean())


def test_adafactor_scale_is_the_factored_form() -> None:
    row, col = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(7, dtype=torch.float64) + 0.1
    scale = adafactor_scale(row, col, eps=0.0)
    expected = torch.outer(row.mean().sqrt() / row.sqrt(), 1.0 / col.sqrt())
    torch.testing.assert_close(scale.dense().double(), expected, rtol=1e-6, atol=0.0)
    assert scale.out.shape == (1, 5)
    assert scale.in_.shape == (1, 7)
    assert scale.out.dtype == scale.in_.dtype == torch.float32
    assert scale.error == 0.0


def test_adafactor_eps_is_a_floor_of_the_root() -> None:
    scale = adafactor_scale(torch.full((3,), 1e-20), torch.full((4,), 1e-20), eps=1e-3)
    torch.testing.assert_close(scale.dense(), torch.full((3, 4), 1e3))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_rank_one_moment_is_fitted_exactly(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    row, col = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.01 for size in (11, 6))
    scale = fit_separable(1e-12 * torch.outer(row, col), 0.0, rank)
    assert scale.error < 1e-12
    assert scale.out.shape == (rank, 11)


@settings(max_examples=20)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 10_000), st.sampled_from([0.0, 1e-8, 1e-4]))
def test_error_falls_with_rank_and_is_the_one_reported(rows: int, columns: int, seed: int, eps: float) -> None:
    v = random_moment(rows, columns, seed)
    previous = relative_error(v, eps, adafactor_scale(v.mean(1), v.mean(0), 0.0)) if eps == 0.0 else float("inf")
    for rank in (1, 2, 3):
        scale = fit_separable(v, eps, rank)
        assert (scale.out >= 0.0).all()
        assert (scale.in_ >= 0.0).all()
        assert scale.error == pytest.approx(plain_error(v, eps, scale), rel=1e-6, abs=1e-13)
        assert scale.error <= previous + 1e-9
        previous = scale.error


def test_two_terms_are_found_where_two_are_enough() -> None:
    # S is a sum of two separable terms, so V = 1 / S^2 must be recovered by two terms and not by one.
    generator = torch.Generator().manual_seed(5)
    out = torch.rand(2, 30, generator=generator, dtype=torch.float64) ** 4
    in_ = torch.rand(2, 20, generator=generator, dtype=torch.float64) ** 4
    v = (out.T @ in_) ** -2
    assert fit_separable(v, 0.0, 1).error > 0.05
    assert fit_separable(v, 0.0, 2).error < 2e-3


def test_rank_one_is_a_stationary_point_of_the_weighted_objective() -> None:
    v = random_moment(9, 8, seed=1, spread=0.5)
    scale = fit_separable(v, 0.0, 1)
    unit = v.mean().sqrt()
    out, in_ = (side.double().requires_grad_() for side in (scale.out, scale.in_ * unit.float()))
    objective = ((out.T @ in_ * (v.sqrt() / unit) - 1.0) ** 2).mean()
    for gradient, side in zip(torch.autograd.grad(objective, (out, in_)), (out, in_), strict=True):
        assert float((gradient * side).detach().abs().max()) < 1e-2 * scale.error


def test_the_fitted_error_is_that_of_corrected_gradients() -> None:
    # Gradients drawn with E[G^2] = V: the measured relative squared error must match the reported one.
    v = random_moment(12, 10, seed=2, spread=0.5)
    scale = fit_separable(v, 0.0, 1)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4000, 12, 10, generator=generator, dtype=torch.float64) * v.sqrt()
    exact = gradients / v.sqrt()
    measured = (gradients * scale.dense().double() - exact).square().sum() / exact.square().sum()
    assert float(measured) == pytest.approx(scale.error, rel=0.05)


def test_chunks_of_rows_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    v = random_moment(23, 7, seed=8)
    v[3] = 0.0
    whole = fit_separable(v, 1e-8, 2)
    exact = exact_scale(v, 1e-8)
    monkeypatch.setattr(separable, "CHUNK_ELEMENTS", 5 * 7)
    parts = fit_separable(v, 1e-8, 2)
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(exact_scale(v, 1e-8), exact, rtol=1e-6, atol=0.0)


def test_the_same_moment_gives_the_same_bytes() -> None:
    v = random_moment(20, 15, seed=4)
    first, second = fit_separable(v, 1e-8, 3), fit_separable(v.clone(), 1e-8, 3)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.in_, second.in_)


def test_exact_scale_is_adams_where_the_weight_is_live() -> None:
    v = random_moment(6, 5, seed=6).float()
    expected = 1.0 / (v.double().sqrt() + 1e-8)
    torch.testing.assert_close(exact_scale(v, 1e-8).double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("residue", [0.0, 1e-30, 1e-45])
@pytest.mark.parametrize("rank", [1, 3])
def test_silent_rows_columns_and_elements_get_ordinary_scales(residue: float, rank: int) -> None:
    live = random_moment(12, 9, seed=7, spread=0.3).float()
    v = live.clone()
    v[2] = residue
    v[:, 4] = residue
    v[5, 6] = residue
    fitted = fit_separable(v, 1e-8, rank).dense()
    for scale in (fitted, exact_scale(v, 1e-8), adafactor_scale(v.mean(1), v.mean(0), 1e-8).dense()):
        assert torch.isfinite(scale).all()
        assert float(scale.max()) < 10.0 / float(live.sqrt().min())
        assert float(scale[2].min()) > 0.1 / float(live.sqrt().max())
        assert float(scale[:, 4].min()) > 0.1 / float(live.sqrt().max())
    untouched = torch.ones(12, 9, dtype=torch.bool)
    untouched[2], untouched[:, 4], untouched[5, 6] = False, False, False
    expected = (1.0 / (live.double().sqrt() + 1e-8)).float()
    torch.testing.assert_close(exact_scale(v, 1e-8)[untouched], expected[untouched])


def test_a_silent_matrix_has_scale_zero() -> None:
    v = torch.zeros(4, 3)
    assert not fit_separable(v, 1e-8, 2).dense().any()
    assert not exact_scale(v, 1e-8).any()
    assert not adafactor_scale(v.mean(1), v.mean(0), 1e-8).dense().any()
    assert relative_error(v, 1e-8, uniform_scale(4, 3, 0.0)) == 0.0


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least 1, not 0"):
        fit_separable(torch.ones(2, 2), 1e-8, 0)
    with pytest.raises(InvalidRequest, match=r"not to shape \(2, 2, 2\)"):
        fit_separable(torch.ones(2, 2, 2), 1e-8, 1)

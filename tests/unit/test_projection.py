"""The projection's factors against an independent generator in plain integers, their law, and the layout of a row."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trackstar.projection import Block, BlockLayout, normal_factor

WORD = (1 << 64) - 1


def draw(
    *,
    seed: int = 3,
    name: str = "layers.0.mlp.weight",
    side: Literal["out", "in"] = "out",
    size: int = 64,
    features: range = range(100),
) -> Tensor:
    return normal_factor(seed=seed, name=name, side=side, size=size, features=features, dtype=torch.float64)


def philox(counter: int, key: bytes) -> tuple[int, int, int, int]:
    """Philox 4x64-10 (Salmon et al., 2011) in Python integers."""
    c0, c1, c2, c3 = (counter >> shift & WORD for shift in (0, 64, 128, 192))
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = right >> 64 ^ c1 ^ k0, right & WORD, left >> 64 ^ c3 ^ k1, left & WORD
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & WORD, k1 + 0xBB67AE8584CAA73B & WORD
    return c0, c1, c2, c3


def reference(seed: int, name: str, side: str, size: int, feature: int) -> list[float]:
    """One feature's entries with nothing but integers and the math module."""
    key = hashlib.blake2b(f"{seed}\0{name}\0{side}".encode(), digest_size=16).digest()
    steps = -(-size // 8)
    normals: list[float] = []
    for step in range(steps):
        # The generator counts up before it draws.
        for word in philox(feature * steps + step + 1, key):
            radius = math.sqrt(-2.0 * math.log(((word >> 32) + 0.5) / 2**32))
            angle = 2.0 * math.pi * (word & 0xFFFFFFFF) / 2**32
            normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return [value / math.sqrt(size) for value in normals[:size]]


@pytest.mark.parametrize(("size", "feature"), [(64, 0), (64, 17), (5, 3), (9, 100_000), (1, 2)])
def test_entries_are_those_of_an_independent_generator(size: int, feature: int) -> None:
    expected = reference(11, "model.layers.3.mlp.up_proj.weight", "in", size, feature)
    found = draw(
        seed=11, name="model.layers.3.mlp.up_proj.weight", side="in", size=size, features=range(feature, feature + 1)
    )
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


@settings(max_examples=50)
@given(st.integers(1, 40), st.lists(st.integers(0, 60), min_size=2, max_size=5))
def test_any_slicing_gives_the_same_numbers(size: int, cuts: list[int]) -> None:
    whole = draw(size=size, features=range(60))
    borders = sorted(cuts)
    for start, stop in pairwise(borders):
        part = draw(size=size, features=range(start, stop))
        assert part.shape == (stop - start, size)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("change", [{"seed": 4}, {"name": "layers.1.mlp.weight"}, {"side": "in"}])
def test_seed_name_and_side_each_give_other_numbers(change: dict[str, object]) -> None:
    first, second = draw(), draw(**change)  # type: ignore[arg-type]
    assert not torch.isclose(first, second).any()
    # Unrelated, not merely shifted: 6,400 products of variance 1/64^2 have a mean of standard deviation 1/64/80.
    assert abs(float((first * second).mean())) < 5 / 64 / 80


def test_names_that_run_together_do_not_collide() -> None:
    assert not torch.equal(draw(seed=1, name="1x"), draw(seed=11, name="x"))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_entries_are_independent_standard_normals_over_the_root_of_size(size: int) -> None:
    count = 200_000 // size
    values = (draw(size=size, features=range(count)) * math.sqrt(size)).flatten()
    n = len(values)
    # Moments of N(0, 1) with their standard errors; five of those leave a false alarm once in millions.
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float((values**power).mean()) - moment) < 5 * math.sqrt(variance / n)
    # Kolmogorov-Smirnov, by hand: sqrt(n) * distance exceeds 2.2 with probability 2 exp(-2 * 2.2^2) = 1e-4.
    ordered = values.sort().values
    law = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float(torch.maximum((steps - law).abs(), (law - steps + 1 / n).abs()).max())
    assert math.sqrt(n) * distance < 2.2
    # Neighbours (the two outputs of one Box-Muller step, and of successive ones) are uncorrelated, also squared.
    for lag in (1, 2, 8):
        for sample in (values, values.square() - 1):
            correlation = float((sample[:-lag] * sample[lag:]).mean() / sample.square().mean())
            assert abs(correlation) < 5 / math.sqrt(n)


def test_lower_precision_is_the_rounded_float64() -> None:
    exact = draw()
    for dtype in (torch.float32, torch.bfloat16):
        found = normal_factor(seed=3, name="layers.0.mlp.weight", side="out", size=64, features=range(100), dtype=dtype)
        assert found.dtype == dtype
        assert torch.equal(found, exact.to(dtype))
    assert normal_factor(seed=0, name="w", side="in", size=4, features=range(3)).dtype == torch.float32


def test_features_must_be_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        draw(features=range(0, 10, 2))


def test_inner_products_are_kept_in_expectation() -> None:
    """The mean over seeds of <L G R^T, L H R^T> is <G, H>, with the spread that two Gaussian factors imply."""
    generator = torch.Generator().manual_seed(0)
    m, n, rows, cols, num_seeds = 12, 10, 16, 16, 400
    g_mn, h_mn = torch.randn(2, m, n, dtype=torch.float64, generator=generator)
    h_mn = h_mn + g_mn
    products = []
    for seed in range(num_seeds):
        out_mp = draw(seed=seed, side="out", size=rows, features=range(m))
        in_nq = draw(seed=seed, side="in", size=cols, features=range(n))
        products.append(float(((out_mp.mT @ g_mn @ in_nq) * (out_mp.mT @ h_mn @ in_nq)).sum()))
    found = torch.tensor(products)
    expected = float((g_mn * h_mn).sum())
    standard_error = float(found.std()) / math.sqrt(num_seeds)
    assert abs(float(found.mean()) - expected) < 4 * standard_error
    assert standard_error < 0.05 * expected  # or the line above says nothing


LAYOUT = BlockLayout(
    blocks=(
        Block(name="a", rows=2, cols=3),
        Block(name="b", rows=1, cols=1),
        Block(name="c", rows=4, cols=2),
    )
)


def test_layout_spans_cover_a_row_in_order() -> None:
    assert LAYOUT.dim == 15
    assert [LAYOUT.span(index) for index in range(3)] == [slice(0, 6), slice(6, 7), slice(7, 15)]
    assert [block.dim for block in LAYOUT.blocks] == [6, 1, 8]


@pytest.mark.parametrize("shape", [(15,), (4, 15), (2, 3, 15)])
def test_split_gives_views_of_the_spans(shape: tuple[int, ...]) -> None:
    rows = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    parts = LAYOUT.split(rows)
    for index, part in enumerate(parts):
        assert torch.equal(part, rows[..., LAYOUT.span(index)])
        assert part.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    assert torch.equal(torch.cat(parts, dim=-1), rows)


def test_split_refuses_rows_of_another_layout() -> None:
    with pytest.raises(RuntimeError, match="split"):
        LAYOUT.split(torch.zeros(2, 14))

"""The noise law against METHOD's table and a simulation; plans and projections against hand arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.codes import CodeKind, sigma
from trackstar.errors import InvalidRequest
from trackstar.planner import (
    MAX_CANDIDATES,
    options,
    plan,
    propose_projection,
    recall,
    required_candidates,
)

PAPER_PASSAGES, PAPER_DIM, PAPER_SCORE = 365_000_000, 65_536, 0.05


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("prefix", 1_024, 0.01),
        ("prefix", 4_096, 0.27),
        ("bits", 16_384, 0.65),
        ("bits", 32_768, 0.99),
        ("bits", 65_536, 1.0),
    ],
)
def test_the_table_of_the_method_comes_out(kind: CodeKind, size: int, expected: float) -> None:
    found = recall(PAPER_SCORE, sigma(kind, size, PAPER_DIM), MAX_CANDIDATES, PAPER_PASSAGES)
    assert found == pytest.approx(expected, abs=0.005)


def test_recall_is_what_noise_does_to_a_ranking() -> None:
    num, candidates, score, noise = 2_000, 40, 0.05, 0.03
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(2_000):
        cut = np.partition(noise * rng.standard_normal(num - 1), num - 1 - candidates)[num - 1 - candidates]
        found += score + noise * rng.standard_normal() > cut
    assert found / 2_000 == pytest.approx(recall(score, noise, candidates, num), abs=0.03)


scores = st.floats(0.01, 0.5)
noises = st.floats(0.001, 0.1)
counts = st.integers(1_000, 1_000_000_000)


@given(score=scores, noise=noises, target=st.floats(0.05, 0.99), num=counts)
def test_required_candidates_are_the_fewest(score: float, noise: float, target: float, num: int) -> None:
    required = required_candidates(score, noise, target, num)
    assert 1 <= required <= num
    assert recall(score, noise, required, num) >= target - 1e-6
    if required > 2:
        assert recall(score, noise, required - 2, num) < target + 1e-6


@given(score=scores, noise=noises, candidates=st.integers(1, 900), num=counts)
def test_recall_grows_with_score_and_candidates_and_falls_with_noise_and_passages(
    score: float, noise: float, candidates: int, num: int
) -> None:
    base = recall(score, noise, candidates, num)
    assert 0 <= base <= 1
    assert recall(score * 1.1, noise, candidates, num) >= base
    assert recall(score, noise, candidates + 50, num) >= base
    assert recall(score, noise * 1.1, candidates, num) <= base
    assert recall(score, noise, candidates, num * 2) <= base


def test_recall_is_certain_where_everything_is_a_candidate_or_nothing_is_noise() -> None:
    assert recall(-0.5, 0.1, 10, 10) == 1
    assert recall(0.05, 0.0, 1, 10**9) == 1
    assert recall(0.0, 0.0, 25, 100) == 0.25
    assert required_candidates(0.05, 0.0, 0.95, 10**9) == 1
    assert required_candidates(0.0, 0.0, 0.5, 100) == 50


def test_plan_is_the_cheapest_code_that_reaches_the_recall() -> None:
    chosen = plan(PAPER_PASSAGES, PAPER_DIM, PAPER_SCORE)
    assert (chosen.kind, chosen.size, chosen.code_bytes) == ("bits", 32_768, 4_096)
    assert chosen.meets_target
    assert chosen.recall >= 0.95 - 1e-9
    assert chosen.candidates <= MAX_CANDIDATES
    for option in options(PAPER_PASSAGES, PAPER_DIM, PAPER_SCORE):
        assert option.code_bytes >= chosen.code_bytes or not option.meets_target
    assert "32,768 sign bits (4,096 bytes per passage)" in chosen.explanation
    assert "365,000,000" in chosen.explanation


def test_plan_for_milvus_lite_holds_floats_only() -> None:
    chosen = plan(40_754, 32_768, 0.1, kinds=("prefix",))
    assert (chosen.kind, chosen.size) == ("prefix", 1_024)
    assert chosen.meets_target
    assert chosen.code_bytes == 4_096


def test_a_whole_rotated_vector_is_exact() -> None:
    chosen = plan(PAPER_PASSAGES, 4_096, 0.03, kinds=("prefix",))
    assert (chosen.size, chosen.sigma, chosen.recall) == (4_096, 0, 1)


def test_plan_that_cannot_be_met_says_so() -> None:
    chosen = plan(PAPER_PASSAGES, 4_096, 0.03, kinds=("bits",))
    assert not chosen.meets_target
    assert chosen.candidates == MAX_CANDIDATES
    others = options(PAPER_PASSAGES, 4_096, 0.03, kinds=("bits",))
    assert chosen.recall == max(option.recall for option in others)
    assert f"probability {chosen.recall:.2f}" in chosen.explanation


def test_plan_never_asks_for_more_than_there_is() -> None:
    chosen = plan(50, 1_024, 0.05)
    assert chosen.candidates == 50
    assert chosen.recall == 1


def test_sizes_run_from_1024_to_the_padded_dimension_within_what_milvus_stores() -> None:
    found = options(1_000_000, 40_000, 0.05)
    assert sorted(option.size for option in found if option.kind == "bits") == [1024 << i for i in range(7)]
    assert max(option.size for option in found if option.kind == "prefix") == 32_768
    small = options(1_000, 300, 0.05)
    assert sorted((option.kind, option.size) for option in small) == [("bits", 512), ("prefix", 512)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan(0, 1_024, 0.05), "at least one passage"),
        (lambda: plan(10, 1_024, 0.05, recall_target=1.0), "recall"),
        (lambda: plan(10, 1_024, 1.5), "cosine"),
        (lambda: plan(10, 4, 0.05, kinds=("bits",)), "no code of kind bits fits 4"),
        (lambda: plan(10, 1_024, 0.05, max_candidates=16_385), "at most 16,384 candidates per query, not 16,385"),
        (lambda: propose_projection(0, 10, 10), "layers"),
    ],
)
def test_what_cannot_be_planned_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        call()


def test_the_servers_limits_bound_the_plan() -> None:
    chosen = plan(PAPER_PASSAGES, PAPER_DIM, 0.02, kinds=("bits",), max_bits=32_768)
    assert (chosen.size, chosen.candidates, chosen.meets_target) == (32_768, MAX_CANDIDATES, False)
    found = options(PAPER_PASSAGES, 1 << 20, PAPER_SCORE, kinds=("bits",))
    assert max(option.size for option in found) == 262_144
    assert max(option.candidates for option in options(PAPER_PASSAGES, PAPER_DIM, 0.02, max_candidates=500)) == 500


def test_the_papers_projection_where_it_is_affordable() -> None:
    for num_passages in (None, 8_192, 365_000_000):
        blocks, rows, cols, explanation = propose_projection(32, 8 * 10**9, num_passages)
        assert (blocks, rows, cols) == (8, 64, 64)
        assert "65,536 dimensions" in explanation
        assert "as in the paper" in explanation


@pytest.mark.parametrize(
    ("arguments", "expected", "reason"),
    [
        ((4, 5_000_000, 40_754), (4, 64, 64), "only 4 layers"),
        ((12, 124_000_000, 8_191), (8, 32, 32), "8,191 passages cannot settle"),
        ((12, 124_000_000, 10), (8, 8, 8), "10 passages cannot settle"),
        ((12, 12 * 12 * 40**2, 1_000_000), (8, 32, 32), "only some 40 wide"),
    ],
)
def test_smaller_projections_tell_why(
    arguments: tuple[int, int, int], expected: tuple[int, int, int], reason: str
) -> None:
    *found, explanation = propose_projection(*arguments)
    assert tuple(found) == expected
    assert reason in explanation
    dim = 2 * math.prod(expected)
    assert f"{dim:,} dimensions" in explanation
    assert f"±{dim**-0.5:.4f}" in explanation


def test_projection_fits_the_disk() -> None:
    blocks, rows, cols, explanation = propose_projection(12, 124_000_000, 10_000_000, row_bytes_available=1e11)
    assert (blocks, rows, cols) == (8, 16, 16)
    assert 10_000_000 * 2 * 2 * blocks * rows * cols <= 1e11
    assert "must fit 93.1 GiB" in explanation

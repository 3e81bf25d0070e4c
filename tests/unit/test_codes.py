"""Rotation and codes: orthonormality, determinism, and the noise laws on dense, heavy-tailed and spiky vectors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trackstar import codes
from trackstar.codes import CodeKind, CodeSpec, Rotation, encode_codes, negate, padded_dim, sigma
from trackstar.errors import InvalidRequest

DIM = 2048
KINDS: tuple[CodeKind, CodeKind] = ("bits", "prefix")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(vectors: Tensor) -> Tensor:
    scaled: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return scaled


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 100, 128])
def test_rotation_is_orthonormal(dim: int) -> None:
    rotation = Rotation(dim, seed=3)
    matrix = rotation.apply(torch.eye(dim), rotation.padded_dim).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-5, rtol=0)


def test_rotation_is_two_signed_hadamard_rounds_with_a_permutation_between() -> None:
    rotation = Rotation(32, seed=11)
    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]) / math.sqrt(32)
    vector = np.random.default_rng(0).standard_normal(32)
    signs = rotation._signs_2D.astype(np.float64)
    expected = hadamard @ (signs[1] * (hadamard @ (signs[0] * vector))[rotation._permutation_D])
    rotated = rotation.apply(torch.from_numpy(vector).float()[None], 32)[0].double().numpy()
    np.testing.assert_allclose(rotated, expected, atol=1e-6)


@given(dim=st.integers(1, 200), data=st.data())
def test_prefix_is_the_beginning_of_the_whole(dim: int, data: st.DataObject) -> None:
    rotation = Rotation(dim, seed=5)
    k = data.draw(st.integers(1, rotation.padded_dim))
    vectors = torch.randn(3, dim, generator=generator())
    torch.testing.assert_close(
        rotation.apply(vectors, k), rotation.apply(vectors, rotation.padded_dim)[:, :k], atol=1e-6, rtol=1e-5
    )


def test_a_rows_code_does_not_depend_on_its_neighbours() -> None:
    rotation = Rotation(3000, seed=1)
    vectors = unit(torch.randn(33, 3000, generator=generator()))
    together = rotation.apply(vectors, 1024)
    for start, stop in ((0, 1), (5, 8), (7, 24)):
        assert torch.equal(rotation.apply(vectors[start:stop], 1024), together[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_rotated_some_at_a_time_to_the_same_bytes(kind: CodeKind, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, rotation = CodeSpec(kind=kind, size=128, seed=0), Rotation(200, 0)
    vectors = unit(torch.randn(50, 200, generator=generator()))
    whole = encode_codes(spec, rotation, vectors)
    assert len(encode_codes(spec, rotation, vectors[:0])) == 0
    for rows in (1, 7, 49, 50):
        monkeypatch.setattr(codes, "_ROTATED_BYTES", 4 * 256 * rows)
        assert encode_codes(spec, rotation, vectors).tobytes() == whole.tobytes()


def test_rotation_is_the_same_forever() -> None:
    """An index built years ago must still be searchable: the draw is part of the format."""
    rotation = Rotation(1000, seed=42)
    drawn = rotation._signs_2D.astype("<f4").tobytes() + rotation._permutation_D.astype("<i8").tobytes()
    assert hashlib.sha256(drawn).hexdigest()[:16] == "2c21f142c8d7356c"


def test_other_seeds_give_other_rotations() -> None:
    vector = unit(torch.randn(1, 256, generator=generator()))
    first, second = (Rotation(256, seed).apply(vector, 256) for seed in (0, 1))
    assert abs(float((first * second).sum())) < 0.3


def gaussian(num: int, draw: torch.Generator) -> Tensor:
    return torch.randn(num, DIM, generator=draw)


def heavy_tailed(num: int, draw: torch.Generator) -> Tensor:
    return gaussian(num, draw) * torch.exp(1.5 * gaussian(num, draw))


def two_spikes(num: int, draw: torch.Generator) -> Tensor:
    vectors = 0.2 * unit(gaussian(num, draw))
    for row in range(num):
        vectors[row, torch.randperm(DIM, generator=draw)[:2]] += torch.randn(2, generator=draw)
    return vectors


def aligned_spikes(num: int, draw: torch.Generator) -> Tensor:
    """Large coordinates a power of two apart, as equal positions of equal blocks are."""
    vectors = 0.2 * unit(gaussian(num, draw))
    vectors[:, 5 :: DIM // 16] += 0.25 * torch.randn(num, 16, generator=draw)
    return vectors


@pytest.mark.parametrize("vectors", [gaussian, heavy_tailed, two_spikes, aligned_spikes])
@pytest.mark.parametrize("cosine", [0.0, 0.1])
def test_measured_noise_obeys_the_law(vectors: Callable[[int, torch.Generator], Tensor], cosine: float) -> None:
    pairs, rotations, k = 12, 60, 512
    draw = generator(7)
    left = unit(vectors(pairs, draw))
    other = vectors(pairs, draw)
    orthogonal = unit(other - (other * left).sum(1, keepdim=True) * left)
    right = cosine * left + math.sqrt(1 - cosine**2) * orthogonal
    errors: dict[str, list[Tensor]] = {"prefix": [], "asymmetric": [], "bits": []}
    for seed in range(rotations):
        rotated = Rotation(DIM, seed).apply(torch.cat([left, right]), k).double()
        a, b = rotated[:pairs], rotated[pairs:]
        signs = torch.where(b >= 0, 1.0, -1.0).double()
        hamming = ((a >= 0) != (b >= 0)).sum(1)
        errors["prefix"].append(DIM / k * (a * b).sum(1))
        errors["asymmetric"].append(math.sqrt(math.pi / 2 * DIM) / k * (a * signs).sum(1))
        errors["bits"].append(torch.cos(math.pi * hamming / k))
    for law in ("prefix", "asymmetric", "bits"):
        error = torch.stack(errors[law]) - cosine
        expected = sigma(law, k, DIM)
        assert float(error.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)
        # No single pair is served badly by the structure of the transform; chance alone gives up to about 1.35.
        assert float(error.square().mean(0).sqrt().max()) < 1.5 * expected
        assert abs(float(error.mean())) < 0.15 * expected


def test_sigma_is_zero_where_a_prefix_is_whole() -> None:
    assert sigma("prefix", 4096, 4096) == 0
    assert sigma("bits", 4096, 3000) == sigma("bits", 4096, 4096) > 0


def test_codes_hold_what_they_say() -> None:
    vectors = unit(torch.randn(4, 100, generator=generator()))
    rotation = Rotation(100, seed=9)
    rotated = rotation.apply(vectors, 64).numpy()
    bits_spec, prefix_spec = (CodeSpec(kind=kind, size=64, seed=9) for kind in KINDS)
    bits = encode_codes(bits_spec, rotation, vectors)
    prefix = encode_codes(prefix_spec, rotation, vectors)
    assert bits.dtype == np.uint8
    assert bits.shape == (4, 8)
    assert bits_spec.row_bytes == 8
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1), rotated >= 0)
    assert prefix.dtype == np.float32
    assert prefix_spec.row_bytes == prefix[0].nbytes == 256
    np.testing.assert_array_equal(prefix, rotated)


@pytest.mark.parametrize("kind", KINDS)
def test_negated_codes_are_codes_of_negated_vectors(kind: CodeKind) -> None:
    spec = CodeSpec(kind=kind, size=128, seed=0)
    rotation = Rotation(300, seed=0)
    vectors = unit(torch.randn(5, 300, generator=generator()))
    codes = encode_codes(spec, rotation, vectors)
    np.testing.assert_array_equal(negate(spec, codes), encode_codes(spec, rotation, -vectors))
    np.testing.assert_array_equal(negate(spec, negate(spec, codes)), codes)


def test_padded_dim_is_the_next_power_of_two() -> None:
    assert [padded_dim(dim) for dim in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodeSpec(kind="bits", size=12, seed=0), "whole bytes"),
        (lambda: CodeSpec(kind="prefix", size=0, seed=0), "at least one"),
        (lambda: Rotation(0, 0), "dimension"),
        (lambda: Rotation(8, -1), "seed"),
        (lambda: Rotation(8, 0).apply(torch.zeros(2, 9), 4), r"\[2, 9\]"),
        (lambda: Rotation(8, 0).apply(torch.zeros(2, 8, dtype=torch.float64), 4), "float64"),
        (lambda: Rotation(8, 0).apply(torch.zeros(2, 8), 9), "between 1 and 8"),
        (lambda: sigma("bits", 9, 8), "between 1 and 8"),
        (lambda: encode_codes(CodeSpec(kind="bits", size=8, seed=1), Rotation(8, 2), torch.zeros(1, 8)), "seed 1"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()

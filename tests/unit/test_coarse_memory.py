"""Codes in memory: whatever the number of words and blocks, the answers are those of brute force, ties included."""

from __future__ import annotations

import numpy as np
import pytest

from trackstar import coarse
from trackstar.coarse import MemoryIndex
from trackstar.codes import CodeKind, CodeSpec


@pytest.mark.parametrize(("size", "num"), [(8, 90), (72, 90), (1024, 90), (65536, 90)])
@pytest.mark.parametrize("block", [1, 7, 90, 1000])
def test_bits_in_blocks_are_found_as_by_brute_force(
    size: int, num: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coarse, "_BLOCK_CODES", block)
    draw = np.random.default_rng(size)
    codes = draw.integers(0, 256, (num, size // 8), dtype=np.uint8)
    # Some that are so near to the first, or to its opposite, that float32 has one cosine for several distances.
    codes[10:20] = codes[0]
    codes[10:20, 0] ^= draw.integers(0, 256, 10, dtype=np.uint8)
    codes[40:50] = ~codes[10:20]
    ids = draw.permutation(10 * num)[:num].astype(np.int64)
    index = MemoryIndex(CodeSpec(kind="bits", size=size, seed=0), size)
    for part in np.array_split(np.arange(num), 4):
        index.add(ids[part], codes[part])
    bits = np.unpackbits(codes, axis=1).astype(np.int64)
    for query in (0, 5, 45):
        hamming = (bits != bits[query]).sum(axis=1)
        cosines = np.cos(np.pi * np.arange(size + 1) / size).astype(np.float32)[hamming]
        order = np.lexsort((ids, -cosines))
        for limit in (1, 5, 12, num, num + 1):
            found, estimates = index.search(codes[query : query + 1], limit)
            assert found[0].tolist() == ids[order][:limit].tolist()
            assert estimates[0].tobytes() == cosines[order][:limit].tobytes()


@pytest.mark.parametrize("kind", ["bits", "prefix"])
def test_of_an_id_that_comes_again_the_last_code_counts(kind: CodeKind) -> None:
    index = MemoryIndex(CodeSpec(kind=kind, size=64, seed=0), 64)
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 256, (40, 8), dtype=np.uint8)
    given = codes if kind == "bits" else 2 * np.unpackbits(codes, axis=1).astype(np.float32) - 1
    index.add(np.arange(30), given[:30])
    assert index.count() == 30
    index.add(np.arange(29, 19, -1), given[30:])
    assert index.count() == 30
    for place in range(30, 40):
        assert index.search(given[place : place + 1], 1)[0].tolist() == [[59 - place]]

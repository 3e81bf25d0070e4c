"""Codes on disk without torch: what is read, what is refused, and coarse indexes filled from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from trackstar.catalog import FORMAT, Catalog
from trackstar.coarse import MemoryIndex
from trackstar.code_store import CODE_MANIFEST, MANIFEST_SCHEMA, CodeStore, code_path, fill
from trackstar.codes import CodeSpec
from trackstar.errors import CorruptArtifact, NotFound
from trackstar.storage import file_digest, publish_json

SPEC = CodeSpec(kind="bits", size=64, seed=0)
DIM, NUM, IN_SHARD = 100, 25, 10
NAME = "abc"
# Passages that were purged.
GONE = [0, 24]
KEPT = np.setdiff1d(np.arange(NUM), GONE)


def codes_and_norms() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (NUM, 8), dtype=np.uint8), rng.random(NUM, dtype=np.float32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    codes, norms = codes_and_norms()
    home = tmp_path / "generations" / NAME
    (home / "codes").mkdir(parents=True)
    manifest = []
    for shard, first in enumerate(range(0, NUM, IN_SHARD)):
        span = slice(first, first + IN_SHARD)
        ids = np.setdiff1d(np.arange(NUM)[span], GONE)
        arrays = {"ids": ids, "codes": codes[ids], "norms": norms[span]}
        safetensors.numpy.save_file(arrays, home / "codes" / f"{shard:06d}.safetensors")
        manifest.append(
            {
                "shard": shard,
                "passages": len(norms[span]),
                "codes": len(ids),
                "digest": file_digest(code_path(home, shard)),
            }
        )
    pq.write_table(pa.Table.from_pylist(manifest, schema=MANIFEST_SCHEMA), home / CODE_MANIFEST)
    safetensors.numpy.save_file({"norms": norms}, home / "norms.safetensors")
    publish_json(
        home / "generation.json",
        {
            "num_passages": NUM,
            "num_codes": NUM - len(GONE),
            "files": {name: file_digest(home / name) for name in (CODE_MANIFEST, "norms.safetensors")},
        },
    )
    publish_json(tmp_path / "index.json", {"format": FORMAT})
    return tmp_path


def opened(root: Path) -> CodeStore:
    return CodeStore.open(Catalog(root), NAME)


def test_shards_and_norms_are_what_was_written(root: Path) -> None:
    codes, norms = codes_and_norms()
    store = opened(root)
    shards = list(store.shards())
    assert [store.stop(shard) for shard in range(store.num_shards)] == [10, 20, 25]
    np.testing.assert_array_equal(np.concatenate([shard.codes for shard in shards]), codes[KEPT])
    np.testing.assert_array_equal(np.concatenate([shard.norms for shard in shards]), norms)
    np.testing.assert_array_equal(np.concatenate([shard.passage_ids for shard in shards]), KEPT)
    np.testing.assert_array_equal(store.norms(), norms)


def test_an_index_is_filled_and_filling_again_changes_nothing(root: Path) -> None:
    codes, _ = codes_and_norms()
    index, seen = MemoryIndex(SPEC, DIM), []
    for _ in range(2):
        fill(index, opened(root), lambda done, total: seen.append((done, total)))
        assert index.count() == NUM - 2
        assert index.search(codes[[3, 23]], 1)[0].tolist() == [[3], [23]]
    assert seen == [(10, 25), (20, 25), (25, 25)] * 2


def test_an_index_that_held_more_is_told_of(root: Path) -> None:
    index = MemoryIndex(SPEC, DIM)
    index.add(np.array([NUM]), codes_and_norms()[0][:1])
    with pytest.raises(CorruptArtifact, match="holds 24 passages after importing 23"):
        fill(index, opened(root))


def flip_a_code(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-60] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (flip_a_code, "is not what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "is not what was written"),
    ],
)
def test_a_damaged_shard_fills_nothing_more(root: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(root / "generations" / NAME / "codes" / "000001.safetensors")
    index = MemoryIndex(SPEC, DIM)
    with pytest.raises(CorruptArtifact, match=message):
        fill(index, opened(root))
    assert index.count() == IN_SHARD - 1


def test_norms_are_compared_with_their_digest(root: Path) -> None:
    path = root / "generations" / NAME / "norms.safetensors"
    safetensors.numpy.save_file({"norms": codes_and_norms()[1][::-1].copy()}, path)
    with pytest.raises(CorruptArtifact, match="is not what was written"):
        opened(root).norms()
    path.unlink()
    with pytest.raises(CorruptArtifact, match="is not what was written"):
        opened(root).norms()


def test_what_cannot_be_read_is_refused(root: Path) -> None:
    with pytest.raises(NotFound, match="no generation 'other'"):
        CodeStore.open(Catalog(root), "other")
    home = root / "generations" / NAME
    (home / CODE_MANIFEST).write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match=r"codes\.parquet' is not what was written"):
        opened(root)
    publish_json(home / "generation.json", {"num_passages": NUM})
    with pytest.raises(CorruptArtifact, match="not what was written"):
        opened(root)

"""Row shards: what was written comes back bit by bit, in any order, and every kind of damage is one clear error."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady, TrackstarError
from trackstar.passages import Passage
from trackstar.row_shards import (
    ROW_DTYPES,
    Part,
    blank,
    complete_part,
    finished_shards,
    read_receipt,
    write_shard,
)
from trackstar.rows import RowStore
from trackstar.storage import digest_of

DIM = 24
PER_SHARD = 300  # more than one row group of the sidecar
COUNTS = (PER_SHARD, PER_SHARD, 17)
TOTAL = sum(COUNTS)
AGAIN = "give the index command again"
MEND = f"{AGAIN} with --verify, or the job with verify: true,"


def passage(passage_id: int) -> Passage:
    tokens = np.arange(passage_id % 9, dtype=np.int32) + passage_id
    return Passage(
        passage_id=passage_id,
        doc_id=f"doc-{passage_id // 2}",
        text=f"Text of passage {passage_id}: 東京 🌊\n",
        source=f"file-{passage_id % 3}.jsonl",
        metadata={"year": str(1900 + passage_id), "b": "é"} if passage_id % 4 else {},
        token_start=7 * (passage_id % 2),
        token_end=7 * (passage_id % 2) + len(tokens),
        tokens=tokens,
    )


def gradients(seed: int = 0, count: int = TOTAL) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale_N1 = torch.logspace(-15, 15, count)[:, None]
    return torch.randn(count, DIM, generator=generator) * scale_N1


def complete(folder: Path, num_shards: int, dtype: str = "float32", number: int = 0, first_shard: int = 0) -> Part:
    """Make a part of shards that are there."""
    receipts = [read_receipt(folder, first_shard + shard) for shard in range(num_shards)]
    return complete_part(
        folder,
        number,
        [receipt for receipt in receipts if receipt],
        first_shard=first_shard,
        shard_passages=PER_SHARD,
        dim=DIM,
        dtype=dtype,
        corpus={"paths": ["corpus"]},
    )


def write(folder: Path, dtype: str = "float32", counts: tuple[int, ...] = COUNTS) -> Tensor:
    """A finished corpus of rows; returns them as they should come back, float32 [N, d]."""
    rows_ND = gradients(count=sum(counts))
    first = 0
    for shard, count in enumerate(counts):
        write_shard(
            folder,
            shard,
            [passage(first + row) for row in range(count)],
            rows_ND[first : first + count],
            torch.arange(first, first + count, dtype=torch.float32),
            dtype=dtype,
        )
        first += count
    complete(folder, len(counts), dtype)
    return rows_ND.to(ROW_DTYPES[dtype]).float()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "rows"
    write(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "rows"))


def equal(one: Passage, other: Passage) -> bool:
    fields = ("passage_id", "doc_id", "text", "source", "metadata", "token_start", "token_end")
    return (
        all(getattr(one, field) == getattr(other, field) for field in fields)
        and one.tokens.dtype == other.tokens.dtype == np.int32
        and one.tokens.tolist() == other.tokens.tolist()
    )


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


# --- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_back_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    expected_ND = write(tmp_path / "rows", dtype)
    store = RowStore(tmp_path / "rows")
    assert (store.num_passages, store.dim, store.dtype, store.parts[0].shard_passages) == (TOTAL, DIM, dtype, PER_SHARD)
    assert torch.equal(store.read(range(TOTAL)), expected_ND)
    batches = list(store.batches(verify=True))
    assert [first for first, _ in batches] == [0, PER_SHARD, 2 * PER_SHARD]
    assert [batch.dtype for _, batch in batches] == [ROW_DTYPES[dtype]] * 3
    assert torch.equal(torch.cat([batch.float() for _, batch in batches]), expected_ND)
    store.close()


def test_files_are_plain_safetensors(written: Path) -> None:
    """Anyone can read a shard without this project; and offsets agree with the format's own reader."""
    found = safetensors.torch.load_file(written / "000001.safetensors")
    assert list(found) == ["rows"]
    assert torch.equal(found["rows"], gradients()[PER_SHARD : 2 * PER_SHARD])


@settings(max_examples=40)
@given(st.lists(st.integers(0, TOTAL - 1), max_size=40))
def test_reads_across_shards_equal_whole_shards(written: Path, ids: list[int]) -> None:
    store = RowStore(written)
    whole_ND = torch.cat([batch for _, batch in store.batches()])
    assert torch.equal(store.read(ids), whole_ND[torch.tensor(ids, dtype=torch.long)])
    assert torch.equal(store.read(np.array(ids, dtype=np.int64)), store.read(ids))
    store.close()


@settings(max_examples=20)
@given(st.lists(st.integers(0, TOTAL - 1), max_size=12))
def test_passages_come_back_in_the_order_asked_for(written: Path, ids: list[int]) -> None:
    found = RowStore(written).passages(ids)
    assert len(found) == len(ids)
    assert all(equal(one, passage(passage_id)) for one, passage_id in zip(found, ids, strict=True))


def test_reading_nothing_gives_nothing(written: Path) -> None:
    assert RowStore(written).read([]).shape == (0, DIM)
    assert RowStore(written).passages([]) == []


def test_columns_are_in_passage_order(written: Path) -> None:
    store = RowStore(written)
    assert store.column("passage_id").tolist() == list(range(TOTAL))
    assert store.column("loss").tolist() == list(range(TOTAL))
    assert store.column("doc_id").tolist() == [f"doc-{row // 2}" for row in range(TOTAL)]
    norms_N = store.column("norm")
    assert norms_N.dtype == np.float32
    np.testing.assert_allclose(norms_N, gradients().double().norm(dim=1).numpy(), rtol=1e-6)


def test_checksums_are_those_of_the_stored_bytes(tmp_path: Path) -> None:
    expected_ND = write(tmp_path, "bfloat16", counts=(5,)).to(torch.bfloat16)
    checksums = [zlib.crc32(row.view(torch.uint8).numpy().tobytes()) for row in expected_ND]
    assert RowStore(tmp_path).column("crc32").tolist() == checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_twice_the_bytes_are_identical(dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "a", dtype)
    write(tmp_path / "b", dtype)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 3 * len(COUNTS) + 2
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rounding_to_bfloat16_is_to_nearest_even(tmp_path: Path) -> None:
    halfway = struct.unpack("<2f", struct.pack("<2I", 0x3F808000, 0x3F818000))
    write_shard(
        tmp_path,
        0,
        [passage(0)],
        torch.tensor([halfway]),
        torch.zeros(1),
        dtype="bfloat16",
    )
    receipt = read_receipt(tmp_path, 0)
    assert receipt is not None
    complete_part(tmp_path, 0, [receipt], first_shard=0, shard_passages=1, dim=2, dtype="bfloat16", corpus={})
    assert RowStore(tmp_path).read([0]).tolist() == [[1.0, 1.015625]]


# --- receipts ----------------------------------------------------------------------------------------------------


def test_receipts_say_what_the_shards_hold(written: Path) -> None:
    store = RowStore(written)
    assert [receipt.shard for receipt in store.receipts] == finished_shards(written) == [0, 1, 2]
    assert [receipt.num_passages for receipt in store.receipts] == list(COUNTS)
    assert store.starts.tolist() == [0, 300, 600, 617]
    assert store.num_tokens == sum(row % 9 for row in range(TOTAL))
    assert store.digest == digest_of([[receipt.rows_digest, receipt.sidecar_digest] for receipt in store.receipts])


def test_write_returns_the_receipt_it_wrote(tmp_path: Path) -> None:
    written = write_shard(tmp_path, 0, [passage(3)], torch.ones(1, 2), torch.ones(1), dtype="float32")
    assert read_receipt(tmp_path, 0) == written
    assert read_receipt(tmp_path, 1) is None


def test_a_shard_without_a_receipt_does_not_exist(folder: Path) -> None:
    (folder / "000001.json").unlink()
    assert finished_shards(folder) == [0, 2]
    assert finished_shards(folder / "nowhere") == []


def test_rows_that_are_not_complete_are_not_ready(folder: Path) -> None:
    (folder / "part-000.json").unlink()
    with pytest.raises(NotReady, match=rf"not complete; {AGAIN}"):
        RowStore(folder)
    with pytest.raises(NotReady):
        RowStore(folder / "nowhere")


@pytest.mark.parametrize("content", [[], {}, {"shard": 0}, None, "x"])
def test_a_receipt_of_another_form_is_corrupt(content: Any, folder: Path) -> None:
    (folder / "000001.json").write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match=r"000001\.json' is not a shard receipt; delete it"):
        read_receipt(folder, 1)
    with pytest.raises(CorruptArtifact, match="not a shard receipt"):
        RowStore.verify_files(folder / "000001.json", content)


def test_a_truncated_receipt_is_corrupt(folder: Path) -> None:
    (folder / "000001.json").write_bytes((folder / "000001.json").read_bytes()[:-20])
    with pytest.raises(CorruptArtifact, match=r"000001\.json"):
        read_receipt(folder, 1)


@pytest.mark.parametrize("content", [[], {}, {"num_passages": 617}, None])
def test_totals_of_another_form_are_corrupt(content: Any, folder: Path) -> None:
    (folder / "part-000.json").write_text(json.dumps(content))
    with pytest.raises(CorruptArtifact, match=rf"part-000\.json' does not hold the totals.*{AGAIN}"):
        RowStore(folder)


def test_receipts_of_other_rows_are_noticed(folder: Path) -> None:
    store = RowStore(folder)
    complete_part(
        folder.parent / "other",
        0,
        store.receipts[:2],
        first_shard=0,
        shard_passages=PER_SHARD,
        dim=DIM,
        dtype="float32",
        corpus={},
    )
    shutil.copy(folder.parent / "other" / "part-000.parquet", folder)
    with pytest.raises(CorruptArtifact, match=rf"not those of the finished rows.*{AGAIN}"):
        RowStore(folder)
    (folder / "part-000.parquet").unlink()
    with pytest.raises(CorruptArtifact, match=rf"part-000\.parquet' cannot be read; delete part-000\.json.*{AGAIN}"):
        RowStore(folder)


def test_a_whole_shard_exchanged_for_another_is_noticed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    rows_ND = gradients(seed=1, count=17)
    write_shard(other, 2, [passage(600 + row) for row in range(17)], rows_ND, torch.zeros(17), dtype="float32")
    for path in other.iterdir():
        shutil.copy(path, folder)
    store = RowStore(folder)
    with pytest.raises(CorruptArtifact, match=r"000002\.parquet' is not what was written: its digest is"):
        store.read([610])


# --- parts and versions ------------------------------------------------------------------------------------------


def test_a_part_is_added_without_touching_the_one_before(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    more_ND = gradients(seed=2, count=5)
    one = RowStore(folder)
    write_shard(folder, 3, [passage(TOTAL + row) for row in range(5)], more_ND, torch.zeros(5), dtype="float32")
    part = complete(folder, 1, number=1, first_shard=3)
    assert (part.num_passages, part.first_shard) == (5, 3)
    assert {name: (folder / name).read_bytes() for name in before} == before
    both = RowStore(folder)
    assert (both.num_passages, both.num_shards, both.starts.tolist()) == (TOTAL + 5, 4, [0, 300, 600, 617, 622])
    assert torch.equal(
        both.read([0, TOTAL - 1, TOTAL, TOTAL + 4]), torch.cat([one.read([0, TOTAL - 1]), more_ND[[0, 4]]])
    )
    assert [found.passage_id for found in both.passages([TOTAL + 4, 599])] == [TOTAL + 4, 599]
    assert both.column("passage_id").tolist() == list(range(TOTAL + 5))
    first = RowStore(folder, parts=1)
    assert (first.num_passages, first.digest) == (TOTAL, one.digest)
    assert both.digest != one.digest
    with pytest.raises(NotReady, match="not complete"):
        RowStore(folder, parts=3)


def test_a_version_takes_the_place_of_its_shard(folder: Path) -> None:
    plain = RowStore(folder)
    rows_ND = plain.shard(1).clone()
    rows_ND[7] = 0
    passages = plain.passages(list(range(300, 600)))
    passages[7] = blank(passages[7])
    receipt = write_shard(folder, 1, passages, rows_ND, torch.zeros(300), dtype="float32", version="ab12")
    assert finished_shards(folder) == [0, 1, 2]
    store = RowStore(folder, versions={1: "ab12"})
    assert store.receipts[1] == receipt
    assert store.digest != plain.digest
    assert not store.read([307]).any()
    assert torch.equal(store.read([306, 308, 600]), plain.read([306, 308, 600]))
    gone = store.passages([307])[0]
    assert (gone.passage_id, gone.doc_id, gone.text, gone.source, gone.metadata, len(gone.tokens)) == (
        307,
        "",
        "",
        "",
        {},
        0,
    )
    with pytest.raises(CorruptArtifact, match=r"shard 1 of .* is missing in its version cd34; purge again"):
        RowStore(folder, versions={1: "cd34"})


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passage_id", [-1, TOTAL, 10**12])
def test_ids_out_of_range_are_not_found(passage_id: int, written: Path) -> None:
    store = RowStore(written)
    for action in (store.read, store.passages):
        with pytest.raises(NotFound, match=f"no passage {passage_id}; the index holds passages 0 to {TOTAL - 1}"):
            action([0, passage_id])


@pytest.mark.parametrize("row", [0, 150, PER_SHARD - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_found_on_read(row: int, bit: int, folder: Path) -> None:
    path = folder / "000001.safetensors"
    start = path.stat().st_size - PER_SHARD * DIM * 4
    flip(path, start + row * DIM * 4 + 13, bit)
    store = RowStore(folder)
    damaged = PER_SHARD + row
    with pytest.raises(CorruptArtifact, match=rf"000001\.safetensors.*row {row} \(passage {damaged}\).*{MEND}"):
        store.read([3, damaged])
    others = [passage_id for passage_id in range(TOTAL) if passage_id != damaged]
    assert torch.equal(store.read(others), gradients()[others])
    with pytest.raises(CorruptArtifact, match=r"000001\.safetensors.*digest.*receipt"):
        store.verify(1)
    with pytest.raises(CorruptArtifact, match=r"000001\.safetensors"):
        list(store.batches(verify=True))
    store.verify(0)
    store.verify(2)


def test_every_flipped_bit_of_the_sidecar_is_found(folder: Path) -> None:
    """Also where the store was open, and had read the file, before it was altered."""
    path = folder / "000002.parquet"
    whole = path.read_bytes()
    expected = [passage(600 + row) for row in range(17)]
    opened = RowStore(folder)
    for offset in range(0, len(whole), 19):
        flip(path, offset, offset % 8)
        store = RowStore(folder)
        with pytest.raises(CorruptArtifact, match=rf"000002\.parquet.*{MEND}"):
            store.verify(2)
        for reader in (store, opened):
            with pytest.raises(CorruptArtifact, match=rf"000002\.parquet.*{MEND}"):
                reader.passages(range(600, 617))
        path.write_bytes(whole)
        found = opened.passages(range(600, 617))
        assert all(equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_rows_are_found_on_opening(cut: int, folder: Path) -> None:
    path = folder / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorruptArtifact, match=rf"000000\.safetensors.*bytes, .* expected.*{MEND}"):
        RowStore(folder)


def test_rows_truncated_while_open_are_found_on_reading(folder: Path) -> None:
    store = RowStore(folder)
    path = folder / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptArtifact, match="row 299"):
        store.read([299])
    with pytest.raises(CorruptArtifact, match=r"holds 28,795 bytes of rows, 28,800 expected"):
        list(store.batches())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("empty", lambda data: b""),
        ("short", lambda data: data[:5]),
        ("length", lambda data: b"\xff" * 8 + data[8:]),
        ("not json", lambda data: data[:8] + b"x" + data[9:]),
        ("not text", lambda data: data[:8] + b"\xff" + data[9:]),
        ("other tensor", lambda data: data.replace(b'"rows"', b'"rowz"')),
        ("a list", lambda data: struct.pack("<Q", 2) + b"[]"),
    ],
)
def test_unreadable_headers_are_corrupt(name: str, damage: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "000001.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptArtifact, match=rf"000001\.safetensors.*header is unreadable.*{MEND}"):
        RowStore(folder)


def test_missing_rows_are_found_on_opening(folder: Path) -> None:
    (folder / "000001.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match=rf"000001\.safetensors.*missing.*{MEND}"):
        RowStore(folder)


def test_a_missing_sidecar_is_found_on_use(folder: Path) -> None:
    (folder / "000001.parquet").unlink()
    store = RowStore(folder)
    for action in (lambda: store.read([300]), lambda: store.passages([300]), lambda: store.column("loss")):
        with pytest.raises(CorruptArtifact, match=rf"000001\.parquet.*missing.*{MEND}"):
            action()
    assert len(store.passages([0])) == 1


@pytest.mark.parametrize("length", [0, 3, 4000])
def test_a_truncated_sidecar_is_found_on_use(length: int, folder: Path) -> None:
    path = folder / "000001.parquet"
    path.write_bytes(path.read_bytes()[:length])
    store = RowStore(folder)
    for action in (lambda: store.read([300]), lambda: store.passages([300]), lambda: store.column("loss")):
        with pytest.raises(CorruptArtifact, match=rf"000001\.parquet.*its digest is.*{MEND}"):
            action()


def test_a_sidecar_of_other_columns_is_found_on_use(folder: Path) -> None:
    path = folder / "000001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["source"]), path)
    for action in (RowStore(folder).read, RowStore(folder).passages):
        with pytest.raises(CorruptArtifact, match=rf"000001\.parquet.*its digest is.*{MEND}"):
            action([300])


def rewrite(folder: Path, rows_ND: Tensor) -> None:
    safetensors.torch.save_file({"rows": rows_ND}, folder / "000001.safetensors")


@pytest.mark.parametrize(
    ("found", "rows_ND"),
    [
        (r"F32 \[300, 25\]", torch.zeros(PER_SHARD, DIM + 1)),
        (r"F32 \[299, 24\]", torch.zeros(PER_SHARD - 1, DIM)),
        (r"BF16 \[300, 24\]", torch.zeros(PER_SHARD, DIM, dtype=torch.bfloat16)),
        (r"F32 \[7200\]", torch.zeros(PER_SHARD * DIM)),
    ],
)
def test_another_shape_or_type_names_both(found: str, rows_ND: Tensor, folder: Path) -> None:
    rewrite(folder, rows_ND)
    with pytest.raises(Incompatible, match=rf"holds {found}, the index expects F32 \[300, 24\]"):
        RowStore(folder)


# --- verifying without a finished store --------------------------------------------------------------------------


def test_verify_files_needs_no_finished_rows(folder: Path) -> None:
    (folder / "part-000.json").unlink()
    path = folder / "000001.json"
    receipt = json.loads(path.read_text())
    RowStore.verify_files(path, receipt)
    flip(folder / "000001.parquet", 100)
    with pytest.raises(CorruptArtifact, match=r"000001\.parquet.*digest.*its receipt says"):
        RowStore.verify_files(path, receipt)
    (folder / "000001.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match=rf"000001\.safetensors.*missing.*{MEND}"):
        RowStore.verify_files(path, receipt)


def test_no_damage_escapes_as_another_kind_of_error(folder: Path) -> None:
    """Whatever byte of the small files is altered: opening and reading give a TrackstarError or what was written."""
    for name in ("part-000.parquet", "part-000.json", "000002.parquet", "000002.safetensors"):
        path = folder / name
        whole = path.read_bytes()
        for offset in range(min(len(whole), 300)):
            flip(path, offset, (offset * 3) % 8)
            try:
                store = RowStore(folder)
                assert torch.equal(store.read([0, 610]), gradients()[[0, 610]])
                store.close()
            except TrackstarError:
                pass
        path.write_bytes(whole)

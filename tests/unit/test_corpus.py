"""Corpus reading: every format gives the same documents, bad input is named, restart and fingerprint hold."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trackstar.corpus import Corpus, CorpusConfig, Document
from trackstar.corpus_files import find_files, read_records
from trackstar.errors import InvalidRequest, NotFound

TEXTS = ["The Nile is long.", "Ça va, Zoë? 東京 🌊", 'He said "no".\tThen left.', "Line\nbreak inside"]
RECORDS = [
    {"id": f"r{row}", "text": text, "origin": f"s{row % 2}", "year": 1900 + row} for row, text in enumerate(TEXTS)
]


def read(*paths: Path | str, start: int = 0, **config: Any) -> list[Document]:
    return list(Corpus(CorpusConfig(paths=tuple(map(str, paths)), **config)).documents(start))


def json_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_arrow(path: Path, records: list[Any]) -> None:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def parquet_bytes(records: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=2)
    return bytes(sink.getvalue())


def save_to_disk(folder: Path, records: list[Any]) -> None:
    """The layout of `Dataset.save_to_disk` of `datasets`, its second shard listed first to show whose order counts."""
    folder.mkdir(parents=True)
    write_arrow(folder / "data-00001-of-00002.arrow", records[:2])
    write_arrow(folder / "data-00000-of-00002.arrow", records[2:])
    files = [{"filename": f"data-0000{shard}-of-00002.arrow"} for shard in (1, 0)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, kind: str, compress: Callable[[bytes], bytes], request: pytest.FixtureRequest
) -> None:
    suffix = {"gz": ".gz", "zst": ".zst"}.get(request.node.callspec.id.split("-")[-1], "")
    if kind == "arrow":
        write_arrow(tmp_path / "plain", RECORDS)
        content = (tmp_path / "plain").read_bytes()
    else:
        content = parquet_bytes(RECORDS) if kind == "parquet" else json_lines(RECORDS)
    path = tmp_path / f"corpus.{kind}{suffix}"
    path.write_bytes(compress(content))
    documents = read(path, source_field="origin", metadata_fields=("year",))
    assert documents == [
        Document(
            ordinal=row, doc_id=f"r{row}", text=text, source=f"s{row % 2}", metadata={"year": str(RECORDS[row]["year"])}
        )
        for row, text in enumerate(TEXTS)
    ]


def test_saved_dataset_keeps_its_own_order_and_its_splits(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "flat", RECORDS)
    assert [document.text for document in read(tmp_path / "flat")] == TEXTS
    save_to_disk(tmp_path / "dict" / "train", RECORDS)
    save_to_disk(tmp_path / "dict" / "aside", RECORDS[:3])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "aside"]}')
    documents = read(tmp_path / "dict")
    assert [document.text for document in documents] == TEXTS + TEXTS[:3]
    assert [document.source for document in documents][-1] == "aside/data-00000-of-00002.arrow"
    (tmp_path / "dict" / "train" / "state.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r'state\.json holds no "_data_files"'):
        read(tmp_path / "dict")


def test_folder_is_walked_in_sorted_order_and_passes_over_what_is_no_corpus(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a.jsonl", ".hidden.jsonl", "_SUCCESS.txt", "README.md", "model.bin"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = json_lines([{"text": f"in {name}"}])
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "c.parquet").write_bytes(parquet_bytes([{"text": "in c"}]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    documents = read(tmp_path)
    assert [document.doc_id for document in documents] == [
        "a.jsonl:1",
        "b/1.jsonl.gz:1",
        "b/2.jsonl:1",
        "c.parquet:1",
        "link.jsonl:1",
    ]
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    with pytest.raises(InvalidRequest, match="loop is a link to a folder that holds it"):
        read(tmp_path)


def test_paths_keep_their_order_and_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.jsonl").write_bytes(json_lines([{"text": f"in {folder}"}]))
    documents = read(tmp_path / "y", tmp_path / "x" / "s.jsonl")
    assert [(document.doc_id, document.text) for document in documents] == [
        ("y/s.jsonl:1", "in y"),
        ("x/s.jsonl:1", "in x"),
    ]
    with pytest.raises(InvalidRequest, match=r"reach the file .*x/s\.jsonl twice"):
        read(tmp_path, tmp_path / "x")


def test_url_of_another_file_system(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/test-corpus/part.jsonl.gz", gzip.compress(json_lines(RECORDS)))
    (tmp_path / "local.txt").write_text("local")
    try:
        documents = read("memory://test-corpus", tmp_path / "local.txt")
    finally:
        memory.rm("/test-corpus", recursive=True)
    assert [document.text for document in documents] == [*TEXTS, "local"]


def test_parts_of_a_compressed_file_are_all_read_and_a_cut_one_is_an_error(tmp_path: Path) -> None:
    for suffix, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"corpus.jsonl.{suffix}"
        content = compress(json_lines(RECORDS[:2])) + compress(json_lines(RECORDS[2:]))
        path.write_bytes(content)
        assert [document.text for document in read(path)] == TEXTS
        path.write_bytes(content[:-5])
        with pytest.raises(InvalidRequest, match=rf"corpus\.jsonl\.{suffix} cannot be read .*runcated"):
            read(path, skip_bad=True)


def test_a_damaged_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(parquet_bytes(RECORDS)[:-9])
    write_arrow(tmp_path / "cut.arrow", RECORDS)
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "cut.arrow").read_bytes()[:300])
    for name in ("cut.parquet", "cut.arrow"):
        with pytest.raises(InvalidRequest, match=f"{name} cannot be read"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [("a.txt:1", "one"), ("a.txt:2", " two "), ("a.txt:5", "three")]),
        ("paragraph", [("a.txt:1", "one\r\n two "), ("a.txt:5", "three")]),
        ("file", [("a.txt:1", "one\r\n two \n\n \nthree")]),
    ],
)
def test_units_of_plain_text(tmp_path: Path, unit: str, expected: list[tuple[str, str]]) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n two \n\n \nthree\n\n".encode())
    assert [(document.doc_id, document.text) for document in read(tmp_path / "a.txt", text_unit=unit)] == expected


def test_bad_line_of_text_is_named_within_its_unit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\ngood\nb\xffd\n")
    for unit in ("line", "paragraph", "file"):
        with pytest.raises(InvalidRequest, match=r"a\.txt, line 4: the line is not valid UTF-8"):
            read(tmp_path / "a.txt", text_unit=unit)


BAD_LINES = [
    (b'{"text": "cut', "not one JSON object"),
    (b"[" * 100_000, "not one JSON object"),
    (b'["text"]', "not a JSON object but a list"),
    (b'{"id": 3, "body": "x"}', r'the text field "text" is missing \(its fields are id, body\)'),
    (b"{}", "it has no fields"),
    (b'{"text": 5}', "is not a string but a int"),
    (b'{"text": null}', "is not a string"),
    (b'{"text": ""}', 'the text field "text" is empty'),
    (b'{"text": " \\n\\u00a0"}', 'the text field "text" is empty'),
    (b'{"text": "\xff"}', "byte 11 of the line is not valid UTF-8"),
    (b'{"text": "\\ud83c alone"}', "half a surrogate pair"),
    (b'{"text": "x", "id": "\\udc00"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(InvalidRequest, match=rf"corpus\.jsonl, line 3: .*{reason}.*--skip-bad\.$"):
        read(tmp_path / "corpus.jsonl")


def test_bad_records_are_counted_and_good_ones_keep_dense_ordinals(tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_LINES]
    mixed = b"".join(b'{"text": "good %d"}\n%s\n' % (row, line) for row, line in enumerate(lines))
    (tmp_path / "corpus.jsonl").write_bytes(mixed)
    corpus = Corpus(CorpusConfig(paths=(str(tmp_path),), skip_bad=True))
    for start in (0, 5):
        documents = list(corpus.documents(start))
        assert [document.text for document in documents] == [f"good {row}" for row in range(start, len(lines))]
        assert [document.ordinal for document in documents] == list(range(start, len(lines)))
        assert corpus.bad_records == len(lines), "a later run counts anew"
        assert len(corpus.bad_examples) == 5
    assert corpus.bad_examples[2].startswith("corpus.jsonl, line 6: the line is not a JSON object")


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    offsets, data = (
        pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 8, 8))),
        pa.py_buffer(b"good\xff\xfebd"),
    )
    column = pa.StringArray.from_buffers(4, offsets, data)
    table = pa.table({"text": pa.chunked_array([column, pa.array([None, "also good"])])})
    pq.write_table(table, tmp_path / "corpus.parquet")
    corpus = Corpus(CorpusConfig(paths=(str(tmp_path / "corpus.parquet"),), skip_bad=True))
    assert [(d.doc_id, d.text) for d in corpus.documents()] == [
        ("corpus.parquet:1", "good"),
        ("corpus.parquet:6", "also good"),
    ]
    assert "corpus.parquet, row 2: a field of the row is not valid UTF-8." in corpus.bad_examples
    assert corpus.bad_records == 4
    with pytest.raises(InvalidRequest, match=r'corpus\.parquet has no column "body" but text'):
        read(tmp_path / "corpus.parquet", text_field="body", skip_bad=True)


def test_id_fields(tmp_path: Path) -> None:
    records = [
        {"text": "a", "sentence_id": "s", "doc_id": 7},
        {"text": "b", "sentence_id": "s"},
        {"text": "c", "id": None},
        {"text": "d", "id": ""},
        {"text": "e", "uri": "u"},
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(records))
    assert [d.doc_id for d in read(path)] == ["7", "s", "corpus.jsonl:3", "corpus.jsonl:4", "corpus.jsonl:5"]
    with pytest.raises(InvalidRequest, match='line 1: the id field "uri" holds no string'):
        read(path, id_field="uri")
    assert [d.doc_id for d in read(path, id_field="uri", skip_bad=True)] == ["u"]


def test_source_and_metadata_become_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(
        json_lines([{"text": "a", "url": "u", "triples": ["é | b"], "n": 1.5, "none": None}, {"text": "b"}])
    )
    first, second = read(path, source_field="url", metadata_fields=("triples", "n", "none"))
    assert (first.source, first.metadata) == ("u", {"triples": '["é | b"]', "n": "1.5"})
    assert (second.source, second.metadata) == ("corpus.jsonl", {})


def test_missing_empty_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.jsonl does not exist"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(InvalidRequest, match="holds no readable file"):
        read(tmp_path)
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(InvalidRequest, match=r"data\.csv is of an unknown kind"):
        read(tmp_path / "data.csv")
    with pytest.raises(InvalidRequest, match="cannot be opened"):
        read("nosuchprotocol://bucket/x.jsonl")
    with pytest.raises(InvalidRequest, match="No corpus path"):
        read()
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n")
    with pytest.raises(InvalidRequest, match=r"empty\.jsonl holds no documents\.$"):
        read(empty)
    empty.write_bytes(b"{}\n{}\n")
    with pytest.raises(InvalidRequest, match=r"holds no documents: every record is bad, such as empty\.jsonl, line 1"):
        read(empty, skip_bad=True)
    with pytest.raises(ValidationError, match="unknown"):
        CorpusConfig(paths=("x",), unknown=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("start", range(6))
def test_restart_gives_the_same_rest(tmp_path: Path, start: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(RECORDS[:3]))
    (tmp_path / "b.parquet").write_bytes(parquet_bytes(RECORDS[3:]))
    assert read(tmp_path, start=start) == read(tmp_path)[start:]


def test_fingerprint_sees_names_sizes_ends_and_fields_only(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    size = (3 << 20) + 17

    def fingerprint(content: bytes, **config: Any) -> str:
        path.write_bytes(content)
        return Corpus(CorpusConfig(paths=(str(path),), **config)).fingerprint()

    def changed(offset: int) -> bytes:
        content = bytearray(size)
        content[offset] = 1
        return bytes(content)

    base = fingerprint(bytes(size))
    assert fingerprint(bytes(size)) == base
    assert fingerprint(bytes(size), skip_bad=True) == base
    for content in (bytes(size + 1), changed(0), changed((1 << 20) - 1), changed(size - (1 << 20)), changed(size - 1)):
        assert fingerprint(content) != base
    for config in (
        {"text_field": "body"},
        {"id_field": "id"},
        {"source_field": "s"},
        {"metadata_fields": ("m",)},
        {"text_unit": "file"},
    ):
        assert fingerprint(bytes(size), **config) != base
    assert fingerprint(b"ab") != fingerprint(b"ac"), "a file below one MiB is seen whole"
    digests = set()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jsonl").write_bytes(b"x")
        digests.add(Corpus(CorpusConfig(paths=(str(tmp_path / folder),))).fingerprint())
    assert len(digests) == 1, "where the corpus lies does not count"
    path.unlink()
    (tmp_path / "one" / "same.jsonl").rename(tmp_path / "one" / "other.jsonl")
    digests.add(Corpus(CorpusConfig(paths=(str(tmp_path / "one"),))).fingerprint())
    assert len(digests) == 2, "names within the corpus do"


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(RECORDS))
    corpus = Corpus(CorpusConfig(paths=(str(path),)))
    path.unlink()
    with pytest.raises(InvalidRequest, match=r"corpus\.jsonl cannot be read"):
        corpus.fingerprint()
    with pytest.raises(InvalidRequest, match=r"corpus\.jsonl cannot be read at its start"):
        list(corpus.documents())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20))
def test_json_lines_round_trip_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    escape = len(texts) % 2 == 0
    path.write_text(
        "\n".join(json.dumps({"text": t}, ensure_ascii=escape) for t in texts), encoding="utf-8", newline=""
    )
    (file,) = find_files([str(path)])
    records = [record for _, _, record in read_records(file, fields=("text",), text_unit="line")]
    assert records == [{"text": text} for text in texts]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Reading 22 MB, Python's peak and Arrow's memory at every hundredth document stay below 8 MB together."""
    text, batches = "All work and no play. " * 100, 20
    batch = pa.record_batch({"text": [text] * 500})
    with pa.OSFile(str(tmp_path / "1.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        for _ in range(batches):
            stream.write_batch(batch)
    with pq.ParquetWriter(tmp_path / "2.parquet", batch.schema, use_dictionary=False, compression="none") as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    lines = json_lines([{"text": text}]) * (500 * batches)
    (tmp_path / "3.jsonl").write_bytes(lines)
    (tmp_path / "4.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "5.txt").write_bytes(f"{text}\n".encode() * (500 * batches))
    for path in sorted(tmp_path.iterdir()):
        corpus = Corpus(CorpusConfig(paths=(str(path),)))
        arrow_before = arrow_most = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            for document in corpus.documents():
                if document.ordinal % 100 == 0:
                    arrow_most = max(arrow_most, pa.total_allocated_bytes())
            python_most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert document.ordinal == 500 * batches - 1
        assert python_most + arrow_most - arrow_before < 8 << 20, path.name

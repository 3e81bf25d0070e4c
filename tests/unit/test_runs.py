"""Runs: however a corpus is cut and from wherever it is read, the passages are those of one straight reading."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.errors import CorruptArtifact, Incompatible
from trackstar.model import load_tokenizer
from trackstar.passages import Cursor, Passage, read_passages
from trackstar.runs import (
    Outline,
    Plan,
    Run,
    RunReader,
    all_outlines,
    cut_runs,
    load_plan,
    make_outline,
    missing_outlines,
    outline_path,
    save_outline,
    save_plan,
)

WINDOW = 6
DOCUMENTS = [
    {"id": f"d{number}", "text": "\n".join(["The river runs to the sea."] * (number % 4)) or f"x{number}"}
    for number in range(37)
]


def jsonl(documents: Sequence[dict[str, str]]) -> bytes:
    # Blank lines and a record that is no document stand between.
    lines = [json.dumps(document) + "\n" + "\n" * (number % 3 == 0) for number, document in enumerate(documents)]
    return "".join([lines[0], '{"other": 1}\n', *lines[1:]]).encode()


def as_jsonl(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(jsonl(DOCUMENTS[:20]))
    (folder / "b.jsonl").write_bytes(jsonl(DOCUMENTS[20:21]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(DOCUMENTS[21:])))


def as_tables(folder: Path) -> None:
    table = pa.Table.from_pylist(DOCUMENTS[:30])
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    with pa.OSFile(str(folder / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(DOCUMENTS[30:]), max_chunksize=3)


def as_text(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(document["text"] for document in DOCUMENTS[:30]))
    (folder / "b.txt").write_text("\n\n\n" + "\n\n".join(document["text"] for document in DOCUMENTS[30:]) + "\n")


KINDS: list[tuple[Callable[[Path], None], dict[str, Any]]] = [
    (as_jsonl, {"skip_bad": True}),
    (as_tables, {}),
    (as_text, {"text_unit": "line"}),
    (as_text, {"text_unit": "paragraph"}),
    (as_text, {"text_unit": "file"}),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder, "gpt2")
    return load_tokenizer(folder)[0]


def fields(passage: Passage) -> tuple[Any, ...]:
    return (
        passage.passage_id,
        passage.doc_id,
        passage.text,
        passage.source,
        passage.token_start,
        passage.token_end,
        passage.tokens.tolist(),
    )


def planned(corpus: Corpus, tokenizer: Any, shard_passages: int) -> list[Run]:
    outlines = [make_outline(corpus, file, tokenizer) for file in range(corpus.num_files)]
    return list(
        cut_runs(
            outlines,
            window_tokens=WINDOW,
            add_bos=True,
            shard_passages=shard_passages,
            first_shard=3,
            first_passage=100,
        )
    )


@pytest.mark.parametrize(("write", "settings"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("shard_passages", [1, 4, 1000])
def test_runs_read_in_any_order_are_a_straight_reading(
    write: Callable[[Path], None], settings: dict[str, Any], shard_passages: int, tokenizer: Any, tmp_path: Path
) -> None:
    write(tmp_path)
    corpus = Corpus(CorpusConfig(paths=(str(tmp_path),), **settings))
    straight = [
        fields(passage)
        for passage, _ in read_passages(
            corpus, tokenizer, window_tokens=WINDOW, add_bos=True, start=Cursor(0, 0), first_id=100
        )
    ]
    runs = planned(corpus, tokenizer, shard_passages)
    assert [run.shard for run in runs] == list(range(3, 3 + len(runs)))
    assert [run.num_passages for run in runs[:-1]] == [shard_passages] * (len(runs) - 1)
    for order in (runs, runs[::-1], runs[::2] + runs[1::2]):
        reader = RunReader(corpus, tokenizer, window_tokens=WINDOW)
        read = {run.shard: [fields(passage) for passage in reader.read(run)] for run in order}
        assert [item for run in runs for item in read[run.shard]] == straight
        for run in runs:
            assert run.num_tokens == sum(len(item[-1]) for item in read[run.shard])
            assert run.first_passage == read[run.shard][0][0]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(2, 5),
    st.booleans(),
)
def test_runs_cover_every_window_once(
    files: list[list[int]], shard_passages: int, window_tokens: int, add_bos: bool
) -> None:
    """Against a loop over all windows of all documents."""
    outlines = [
        Outline(
            numbers=np.arange(len(tokens), dtype=np.int64),
            offsets=10 * np.arange(len(tokens), dtype=np.int64),
            tokens=np.array(tokens, dtype=np.int64),
        )
        for tokens in files
    ]
    span = window_tokens - add_bos
    windows = []
    document = 0
    for file, tokens in enumerate(files):
        for number, count in enumerate(tokens):
            for window, start in enumerate(range(0, count, span)):
                windows.append((file, number, document, window, min(span, count - start) + add_bos))
            document += 1
    expected: list[Run] = []
    for first in range(0, len(windows), shard_passages):
        part = windows[first : first + shard_passages]
        file, number, ordinal, window, _ = part[0]
        expected.append(
            Run(
                shard=len(expected),
                first_passage=first,
                num_passages=len(part),
                num_tokens=sum(item[-1] for item in part),
                file=file,
                number=number,
                offset=10 * number,
                document=ordinal,
                window=window,
            )
        )
    found = cut_runs(
        outlines,
        window_tokens=window_tokens,
        add_bos=add_bos,
        shard_passages=shard_passages,
        first_shard=0,
        first_passage=0,
    )
    assert list(found) == expected


def test_outlines_and_plans_come_back(tokenizer: Any, tmp_path: Path) -> None:
    as_jsonl(tmp_path)
    corpus = Corpus(CorpusConfig(paths=(str(tmp_path),), skip_bad=True))
    folder = tmp_path / "rows"
    assert missing_outlines(folder, 1, 3) == [0, 1, 2]
    made = [make_outline(corpus, file, tokenizer) for file in range(3)]
    assert [outline.bad_records for outline in made] == [1, 1, 1]
    for file in (2, 0, 1):
        save_outline(outline_path(folder, 1, file), made[file])
    assert missing_outlines(folder, 1, 3) == []
    for one, two in zip(all_outlines(folder, 1, 3), made, strict=True):
        for name in ("numbers", "offsets", "tokens"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert (one.bad_records, one.bad_examples) == (two.bad_records, two.bad_examples)
    plan = Plan(runs=planned(corpus, tokenizer, 5), corpus={"paths": ["x"]}, bad_records=3, bad_examples=("one.",))
    assert load_plan(folder, 1) is None
    save_plan(folder, 1, plan)
    assert load_plan(folder, 1) == plan
    (folder / "plan-001.parquet").write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match=r"plan-001\.json' cannot be read; delete it"):
        load_plan(folder, 1)
    outline_path(folder, 1, 0).write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match=r"000000\.parquet' cannot be read; delete it"):
        list(all_outlines(folder, 1, 3))


def test_a_corpus_that_has_changed_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    as_jsonl(tmp_path)
    config = CorpusConfig(paths=(str(tmp_path),), skip_bad=True)
    runs = planned(Corpus(config), tokenizer, 5)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n')
    reader = RunReader(Corpus(config), tokenizer, window_tokens=WINDOW)
    with pytest.raises(Incompatible, match="the corpus has changed since it was planned: shard"):
        list(map(reader.read, runs))

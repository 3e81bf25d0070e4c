"""A corpus in files: equal to the one in memory, reused while nothing has changed, ids that collide or repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trackstar.corpus import CorpusConfig
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.evaluation import sentence_files
from trackstar.evaluation.sentence_files import Positions, stored_sentences
from trackstar.evaluation.sentences import Sentences


def corpus(path: Path, count: int, **changes: str) -> CorpusConfig:
    records = [
        {"sentence_id": f"s{number}", "text": f"Ünder {number}", "fact_triples": [f"{number} | is | odd"]}
        for number in range(count)
    ]
    records[-1] |= changes
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return CorpusConfig(paths=(str(path),))


def test_files_hold_what_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_files, "_BATCH_SENTENCES", 7)
    config = corpus(tmp_path / "c.jsonl", 100)
    held, stored = Sentences.read(config), stored_sentences(config, tmp_path / "files")
    assert stored.digest == held.digest
    assert list(stored.ids) == held.ids
    assert list(stored.texts) == held.texts
    assert list(stored.triples) == held.triples
    assert stored.texts[5:23] == held.texts[5:23]
    assert stored.texts[90:500] == held.texts[90:]
    assert [stored.texts[0], stored.texts[-1]] == [held.texts[0], held.texts[-1]]
    assert dict(stored.positions) == held.positions
    assert stored.positions.get("s100") is None


def test_files_are_made_again_only_for_another_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    first = stored_sentences(corpus(tmp_path / "c.jsonl", 30), folder)
    time, content = (folder / "sentences.arrow").stat().st_mtime_ns, (folder / "sentences.arrow").read_bytes()
    again = stored_sentences(corpus(tmp_path / "c.jsonl", 30), folder)
    assert (folder / "sentences.arrow").stat().st_mtime_ns == time
    assert again.digest == first.digest
    changed = stored_sentences(corpus(tmp_path / "c.jsonl", 30, text="Another"), folder)
    assert changed.digest != first.digest
    stored_sentences(corpus(tmp_path / "c.jsonl", 30), folder)
    assert (folder / "sentences.arrow").read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == [
        "hashes.bin",
        "positions.bin",
        "receipt.json",
        "sentences.arrow",
    ]
    with (folder / "hashes.bin").open("r+b") as stream:
        stream.truncate(8)
    with pytest.raises(CorruptArtifact, match="is not what was written"):
        stored_sentences(corpus(tmp_path / "c.jsonl", 30), folder)


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"two sentences of the id 's3' \(numbers 4 and 30\)"):
        stored_sentences(corpus(tmp_path / "c.jsonl", 30, sentence_id="s3"), tmp_path / "files")
    assert list((tmp_path / "files").iterdir()) == []


def test_equal_hashes_do_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sentence_files, "_hash", lambda sentence_id: len(sentence_id))
    stored = stored_sentences(corpus(tmp_path / "c.jsonl", 30), tmp_path / "files")
    assert [stored.positions[f"s{number}"] for number in range(30)] == list(range(30))
    assert "s99" not in stored.positions
    with pytest.raises(InvalidRequest, match="'s3'"):
        stored_sentences(corpus(tmp_path / "d.jsonl", 30, sentence_id="s3"), tmp_path / "other")
    nothing = Positions([], np.empty(0, np.uint64), np.empty(0, np.int64))
    assert "s" not in nothing

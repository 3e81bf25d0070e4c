"""The benchmark of growth, at a small size and without a server: what it counts, never how long it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.scale import STAGES, Settings, report, run
from benchmarks.synthetic import LETTERS, TableEncoder, write_corpus
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.encode import Example

SETTINGS = Settings(
    passages=3000, layer_blocks=2, side=4, shard_passages=512, file_documents=1000, queries=16, scan_rounds=1
)


def test_a_run_holds_every_passage_at_every_stage(tmp_path: Path) -> None:
    turn = run(tmp_path, SETTINGS)
    assert turn.passages == turn.codes == turn.searched == 3000
    assert turn.tokens == 3000 * (LETTERS + 1)
    assert turn.shards == 6
    header = 88
    assert abs(turn.row_bytes - 3000 * 64 * 2 - 6 * header) <= 6 * 8
    assert turn.code_bytes == 3000 * 8
    assert set(turn.stages) == set(STAGES) - {"loading"}
    # So few bits say little, but a thousand of three thousand candidates hold more than their share.
    assert turn.recall > 0.5
    assert next(scan.ratio for scan in turn.scans) == 1.0
    assert len(turn.scans) == 9
    lines = report([replace(turn, passages=300), turn]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2 : 2 + len(turn.stages) - 1]] == list(turn.stages)[:-1]
    assert lines[2].endswith("| 1.00 |")


def test_documents_are_numbered_and_near_to_their_family(tmp_path: Path) -> None:
    write_corpus(tmp_path, 2500, family=10, file_documents=1000)
    documents = list(Corpus(CorpusConfig(paths=(str(tmp_path),))).documents())
    assert [int(document.doc_id) for document in documents] == list(range(2500))
    assert {len(document.text) for document in documents} == {LETTERS}
    assert len({document.text for document in documents}) == 2500
    letters = np.array([list(document.text.encode()) for document in documents])
    assert (letters[0] == letters[250]).mean() > 0.3 > (letters[0] == letters[1]).mean()


def test_a_row_depends_on_its_own_tokens_alone() -> None:
    encoder, told = TableEncoder(64), list[int]()
    draw = np.random.default_rng(0)
    examples = [Example(tokens=draw.integers(0, 97, length).astype(np.int32)) for length in (5, 1, 9, 2, 5)]
    encoded = encoder.encode(examples, on_batch=told.append)
    assert told == [22]
    alone = torch.cat([encoder.encode([example]).rows_ND for example in examples])
    assert torch.equal(encoded.rows_ND, alone)
    assert not bool(alone[1].any())
    assert bool(alone[3].any())
    assert encoded.loss_N.shape == (5,)

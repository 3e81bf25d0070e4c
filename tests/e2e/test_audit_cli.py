"""`trackstar audit` and `trackstar scan` on a tiny index, from the command line to the files they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_cli import PLACES, Result, lines, write_corpus
from tests.tiny import save_model
from trackstar.audit_record import read_audit, withdraw_audit
from trackstar.cli import main
from trackstar.index import Index

PASSAGES, SHARD = 96, 16


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Result:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return Result(code=code, out=captured.out, err=captured.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with a generation of prefixes in Milvus Lite, which answers, and one of very few bits."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("audited")
    model = save_model(root / "model", "gpt_neox", num_hidden_layers=2)
    corpus = write_corpus(
        root / "corpus.jsonl", [{"id": f"d{n}", "text": text} for n, text in enumerate(lines(PASSAGES))]
    )
    shape = ["--layer-blocks", "2", "--rows", "8", "--cols", "8", "--shard-passages", str(SHARD)]
    command = ["index", str(corpus), "--model", str(model), "--out", str(root / "index"), *shape]
    assert main([*command, "--code", "bits", "--store", "memory", "--code-size", "8"]) == 0
    assert main([*command, "--code-size", "256"]) == 0
    return root / "index"


@pytest.fixture
def copied(index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(index, tmp_path / "index"))


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    facts = [
        {"fact_id": f"f{number}", "prompt0": f"Line {number}:", "entity1": PLACES[number % 6], "relation": "place"}
        for number in range(9)
    ]
    return write_corpus(tmp_path / "facts.jsonl", facts)


def passive(path: Path) -> str:
    """The generation of few bits."""
    catalog = Index(str(path)).catalog
    return next(name for name in catalog.finished() if catalog.describe(name).store == "memory")


def records(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for record in found:
        record["trackstar"].pop("seconds")
    return found


def test_the_active_generation_passes(copied: Path, run: Callable[..., Result]) -> None:
    home = copied / "generations" / Index(str(copied)).active()
    withdraw_audit(home)
    found = run("audit", copied, "--candidates", 90, "--json")
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert (answer["passed"], answer["coarse"], answer["queries"]) == (True, "milvus-lite", 64)
    assert answer["recall"] > 0.9
    kept = read_audit(home)
    assert kept is not None
    assert kept.to_dict() == answer
    shown = run("audit", copied, "--candidates", 90, "--sample", 5, "--seed", 3)
    assert "recall@10" in shown.out
    assert "passed" in shown.out
    again = read_audit(home)
    assert again is not None
    assert again.queries == 5
    assert run("show", copied, "--verify").code == 0


def test_a_generation_of_few_bits_fails(copied: Path, run: Callable[..., Result]) -> None:
    name = passive(copied)
    found = run("audit", copied, "--generation", name, "--candidates", 12, "--min-recall", 0.9)
    assert found.code == 4
    assert f"generation {name!r} failed its audit" in found.sentence
    assert "--code-size" in found.sentence
    assert "failed" in found.out
    kept = read_audit(copied / "generations" / name)
    assert kept is not None
    assert not kept.passed
    less = run("audit", copied, "--generation", name, "--candidates", 12, "--min-recall", 0.05, "--json")
    assert less.code == 0, less.err
    assert json.loads(less.out)["recall"] < 0.9


def test_queries_are_audited_instead(copied: Path, queries: Path, run: Callable[..., Result]) -> None:
    found = run("audit", copied, "--queries", queries, "--k", 4, "--candidates", 96, "--json")
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert (answer["queries"], answer["k"], answer["recall"]) == (9, 4, 1.0)


def test_an_audit_that_meets_damage_leaves_no_older_one(copied: Path, run: Callable[..., Result]) -> None:
    home = copied / "generations" / Index(str(copied)).active()
    assert run("audit", copied, "--candidates", 96).code == 0
    path = copied / "rows" / "000002.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    found = run("audit", copied, "--sample", 1, "--codes", 1)
    assert found.code == 6
    assert "000002.safetensors" in found.sentence
    assert read_audit(home) is None


def test_without_an_active_generation_one_is_asked_for(copied: Path, run: Callable[..., Result]) -> None:
    (copied / "active.json").unlink()
    found = run("audit", copied)
    assert found.code == 2
    assert "give --generation, one of" in found.sentence
    shutil.rmtree(copied / "generations" / passive(copied))
    assert run("audit", copied, "--candidates", 96).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--candidates", 5], 2, "5 candidates cannot hold the best 10"),
        (["--generation", "none"], 3, "has no generation 'none'"),
        (["--device", "cpu:0"], 2, "belong to --queries"),
        (["--queries", "none.jsonl"], 3, "none.jsonl"),
        (["--queries", "none.jsonl", "--sample", 4], 2, "either --queries"),
    ],
)
def test_audits_that_cannot_be_made(
    index: Path, run: Callable[..., Result], arguments: list[Any], code: int, says: str
) -> None:
    found = run("audit", index, *arguments)
    assert found.code == code
    assert says in found.sentence


@pytest.mark.parametrize("batch", [None, 4])
def test_a_scan_gives_the_records_of_exact_traces(
    index: Path, queries: Path, run: Callable[..., Result], tmp_path: Path, batch: int | None
) -> None:
    out = tmp_path / "scan.jsonl"
    more = [] if batch is None else ["--batch", batch]
    written = run("scan", index, "--queries", queries, "--out", out, "--k", 4, *more)
    assert written.code == 0, written.err
    assert written.out == ""
    assert "9 records in" in written.err
    assert "scanning: 96 of 96 passages" in written.err
    traced = run("trace", "--index", index, "--queries", queries, "--k", 4, "--exact")
    found, expected = records(out.read_text()), records(traced.out)
    assert [record["example_id"] for record in found] == [f"f{number}" for number in range(9)]
    for one, other in zip(found, expected, strict=True):
        for end in ("proponent", "opponent"):
            assert one[f"{end}_ids"] == other[f"{end}_ids"]
            assert one[f"{end}_scores"] == pytest.approx(other[f"{end}_scores"], abs=1e-6)
        assert one.keys() == other.keys()
        assert one["trackstar"].keys() == other["trackstar"].keys()
        assert one["trackstar"]["exact"]


def test_a_scan_prints_one_end_of_one_generation(index: Path, queries: Path, run: Callable[..., Result]) -> None:
    name = passive(index)
    found = run("scan", index, "--queries", queries, "--no-opponents", "--generation", name, "--limit", 2, "--k", 3)
    assert found.code == 0, found.err
    answers = records(found.out)
    assert len(answers) == 2
    assert [len(answer["proponents"]) for answer in answers] == [3, 3]
    assert all(answer["opponents"] == [] and answer["trackstar"]["generation"] == name for answer in answers)


def test_a_scan_that_fails_leaves_the_older_file(
    copied: Path, queries: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("older\n")
    path = copied / "rows" / "000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    found = run("scan", copied, "--queries", queries, "--out", out)
    assert found.code == 6
    assert "000004.safetensors" in found.sentence
    assert out.read_text() == "older\n"
    missing = run("scan", copied, "--queries", queries, "--generation", "none")
    assert missing.code == 3
    assert "no generation 'none'" in missing.sentence

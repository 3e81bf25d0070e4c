"""The real command line on a tiny model: whole runs, every kind of bad input, full disks, interrupts and kills.

Most runs call `main` in this process; what kills or limits a process runs in children forked from a server that has the
imports done, and a few checks start a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import save_model
from trackstar.blobs import local
from trackstar.cli import main
from trackstar.index import Index
from trackstar.milvus import MilvusLiteIndex

PASSAGES, SHARD = 320, 32
PLACES = ("Lima", "Oslo", "Rome", "Cairo", "Quito", "Paris")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence of a failed command, which must be the only one and the last line."""
        lines = self.err.splitlines()
        assert "Traceback" not in self.err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        return lines[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A folder with models, a corpus and a finished index of it, which no test may change."""

    root: Path
    model: Path
    other: Path
    corpus: Path
    index: Path

    def command(self, out: Path, *more: str, corpus: Path | None = None, model: Path | None = None) -> list[str]:
        """An index command with a small projection and many shards."""
        shape = ["--layer-blocks", "2", "--rows", "8", "--cols", "8", "--code-size", "256"]
        return [
            *("index", str(corpus or self.corpus), "--model", str(model or self.model), "--out", str(out)),
            *(*shape, "--shard-passages", str(SHARD), *more),
        ]

    def copy(self, to: Path) -> Path:
        """The finished index, for damage."""
        return Path(shutil.copytree(self.index, to))


def lines(count: int) -> Iterator[str]:
    for number in range(count):
        place = PLACES[number % len(PLACES)]
        yield f"Line {number}: {place} is {'x' * (number % 7)} a city near {PLACES[number * 5 % 6]}."


def write_corpus(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    records = [{"id": f"d{number}", "text": text} for number, text in enumerate(lines(PASSAGES))]
    made = World(
        root=root,
        model=save_model(root / "model", "gpt_neox", num_hidden_layers=2),
        other=save_model(root / "other", "gpt_neox", num_hidden_layers=2, seed=1),
        corpus=write_corpus(root / "corpus.jsonl", records),
        index=root / "index",
    )
    assert main(made.command(made.index)) == 0
    return made


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)

    return call


# --- whole runs


def test_an_index_is_described_and_traced(world: World, run: Callable[..., Result]) -> None:
    shown = run("show", world.index, "--verify", "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["state"] == "complete"
    assert facts["rows"]["passages"] == PASSAGES
    assert facts["dim"] == 2 * 2 * 8 * 8
    assert [item["active"] for item in facts["generations"]] == [True]
    table = run("show", world.index)
    assert f"{PASSAGES} " in table.out.replace(",", " ")
    assert facts["model"]["digest"][:12] in table.out

    answered = run("trace", "--index", world.index, "--prompt", "Line 7:", "--target", "Oslo is", "--k", 3, "--json")
    assert answered.code == 0, answered.err
    answer = json.loads(answered.out)
    assert [item["rank"] for item in answer["proponents"]] == [1, 2, 3]
    assert answer["proponents"][0]["score"] > 0 > answer["opponents"][0]["score"]
    for item in answer["proponents"]:
        shares = sum(token["contribution"] for token in item["evidence"]["tokens"])
        assert shares == pytest.approx(item["score"], abs=0.01)  # rows are stored in bfloat16
        assert item["passage"]["text"] in list(lines(PASSAGES))
    text = run("trace", "--index", world.index, "--prompt", "Line 7:", "--target", "Oslo is", "--k", 3)
    assert f"{answer['proponents'][0]['score']:+.4f}" in text.out
    assert "Opponents" in text.out


def test_without_a_target_the_models_own_words_are_explained(world: World, run: Callable[..., Result]) -> None:
    found = run("trace", "--index", world.index, "--prompt", "Line", "--no-opponents", "--no-evidence", "--json")
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert answer["query"]["target"] == answer["prediction"]
    assert repr(answer["prediction"]) in found.err
    assert answer["opponents"] == []
    assert answer["proponents"][0]["evidence"] is None


def test_queries_are_answered_in_the_releases_format(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    facts = [
        {"fact_id": f"f{number}", "prompt0": f"Line {number}:", "entity1": place, "relation": "place"}
        for number, place in enumerate(PLACES)
    ]
    queries = write_corpus(tmp_path / "facts.jsonl", facts)
    output = tmp_path / "records.jsonl"
    written = run(
        "trace", "--index", world.index, "--queries", queries, "--k", 4, "--candidates", 8, "--output", output
    )
    assert written.code == 0, written.err
    assert written.out == ""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["example_id"] for record in records] == [fact["fact_id"] for fact in facts]
    assert [record["groundtruth"] for record in records] == list(PLACES)
    assert all(len(record[name]) == 4 for record in records for name in ("proponents", "opponent_ids"))
    assert records[0]["query_set"] == "facts"
    assert not records[0]["trackstar"]["exact"]
    printed = run("trace", "--index", world.index, "--queries", queries, "--k", 4, "--limit", 2, "--exact")
    assert [json.loads(line)["fact_id"] for line in printed.out.splitlines()] == ["f0", "f1"]


def test_options_override_the_yaml_file(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "index.yaml"
    config.write_text(
        f"corpus:\n  paths: [{world.corpus}]\nmodel: {world.other}\ncode: {{store: memory, size: 64}}\n"
        "projection: {layer_blocks: 1, rows: 8, cols: 8}\nmix: {damping: 0.5}\n"
    )
    built = run("index", "--config", config, "--model", world.model, "--rows", 4, "--out", tmp_path / "out", "--json")
    assert built.code == 0, built.err
    facts = json.loads(built.out)
    assert facts["model"]["path"] == str(world.model)
    assert facts["dim"] == 2 * 4 * 8
    assert facts["generations"][0]["mix"]["damping"] == 0.5
    assert facts["generations"][0]["code"]["store"] == "memory"


def test_a_task_mix_is_one_option(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    queries = write_corpus(
        tmp_path / "q.jsonl", [{"prompt": f"Line {n}:", "target": place} for n, place in enumerate(PLACES)]
    )
    out = world.copy(tmp_path / "out")
    before = snapshot(out / "rows")
    built = run(*world.command(out, "--task-queries", str(queries), "--mix-weight", "0.25", "--store", "memory"))
    assert built.code == 0, built.err
    generations = json.loads(run("show", out, "--json").out)["generations"]
    assert sorted((item["active"], item["mix"]["kind"], item["weight"]) for item in generations) == [
        (False, "train", 0.0),
        (True, "task", 0.25),
    ]
    assert snapshot(out / "rows") == before
    passive = next(item["name"] for item in generations if not item["active"])
    old = run("trace", "--index", out, "--generation", passive, "--prompt", "Line", "--target", "1", "--json")
    assert json.loads(old.out)["generation"] == passive


def test_sign_bits_are_searched_in_memory(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    out = world.copy(tmp_path / "out")
    assert run(*world.command(out, "--code", "bits")).code == 0
    found = run("trace", "--index", out, "--prompt", "Line", "--target", "1", "--k", 2, "--candidates", 20, "--json")
    assert not json.loads(found.out)["exact"]
    refused = run(*world.command(out, "--code", "bits", "--store", "milvus-lite"))
    assert refused.code == 2
    assert "Milvus Lite holds no bits" in refused.sentence


def test_a_plan_needs_no_index(world: World, run: Callable[..., Result]) -> None:
    planned = run("plan", "--passages", 365_000_000, "--json")
    plan = json.loads(planned.out)
    assert plan["projection"]["dim"] == 65_536
    assert plan["model"]["assumed"]
    assert plan["code"]["meets_target"]
    assert all(cost["formula"] for cost in plan["costs"])
    old_server = json.loads(run("plan", "--passages", 365_000_000, "--score", 0.02, "--max-bits", 32_768, "--json").out)
    assert max(option["size"] for option in old_server["options"] if option["kind"] == "bits") == 32_768
    machines = {cost["name"]: cost["value"] for cost in plan["costs"] if cost["group"] == "machines"}
    assert machines["Milvus query nodes"] > 1
    text = run("plan", "--passages", 1000, "--model", world.model)
    assert "2 layers" in text.out
    assert "In Milvus" in text.out
    for wrong in (
        ["--layers", 4],
        ["--code", "floats"],
        ["--recall", 2],
        ["--model", world.root / "none"],
        ["--days", 0],
        ["--max-candidates", 20_000],
    ):
        refused = run("plan", "--passages", 1000, *wrong)
        assert refused.code in (2, 3)
        assert refused.sentence


# --- bad corpora


def test_a_missing_corpus(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    found = run(*world.command(tmp_path / "out", corpus=tmp_path / "nowhere.jsonl"))
    assert found.code == 3
    assert "nowhere.jsonl" in found.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_corpus(world: World, run: Callable[..., Result], tmp_path: Path, content: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    found = run(*world.command(tmp_path / "out", corpus=empty))
    assert found.code == 2
    assert "empty.jsonl holds no documents" in found.sentence


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"text": "cut sho', "line 301"),
        (
            '{"body": "a record without the text field"}',
            'line 301: the text field "text" is missing (its fields are body)',
        ),
        ('{"text": "  "}', 'line 301: the text field "text" is empty'),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(
    world: World, run: Callable[..., Result], tmp_path: Path, bad: str, says: str
) -> None:
    records: list[Any] = [{"text": text} for text in lines(310)]
    records[300] = bad
    corpus = write_corpus(tmp_path / "bad.jsonl", records)
    out = tmp_path / "out"
    stopped = run(*world.command(out, "--store", "memory", corpus=corpus))
    assert stopped.code == 2
    assert f"bad.jsonl, {says}" in stopped.sentence
    assert not list((out / "rows").glob("[0-9]*"))  # it is said before anything is encoded
    went_on = run(*world.command(out, "--store", "memory", "--skip-bad", corpus=corpus))
    assert went_on.code == 0, went_on.err
    assert "1 bad record" in went_on.err
    assert "line 301" in went_on.err
    after = snapshot(out / "rows")
    assert json.loads(after["part-000.json"])["num_passages"] == 309


def test_a_document_longer_than_the_window_is_cut(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "long.jsonl", [{"id": "long", "text": "Oslo and Rome " * 40}])
    out = tmp_path / "out"
    built = run(*world.command(out, "--store", "memory", "--json", corpus=corpus))
    assert built.code == 0, built.err
    facts = json.loads(built.out)
    assert facts["window_tokens"] == 64
    assert facts["rows"]["passages"] == -(-40 * 14 // 63)  # 63 tokens behind the begin token
    found = json.loads(run("trace", "--index", out, "--prompt", "Oslo and", "--target", "Rome", "--json").out)
    assert {item["passage"]["doc_id"] for item in found["proponents"]} == {"long"}


def test_one_short_document_is_enough(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "one.jsonl", [{"text": "Oslo and Rome"}])
    out = tmp_path / "out"
    built = run(*world.command(out, "--store", "memory", corpus=corpus))
    assert built.code == 0, built.err
    found = run("trace", "--index", out, "--prompt", "Oslo and", "--target", "Rome", "--json")
    assert found.code == 0, found.err
    assert "NaN" not in found.out


# --- bad queries


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "Line", "--target", ""], "the target is empty"),
        (["--prompt", "Line", "--target", "  "], "the target is empty"),
        (["--prompt", "Line ", "--target", "é"], "tokenises to nothing"),
        (["--prompt", "Line " * 30, "--target", "1"], "window of 64"),
        ([], "give either --prompt"),
        (["--prompt", "Line", "--k", "0"], "--k must be at least 1"),
        (["--prompt", "Line", "--output", "x.jsonl"], "--output belongs to --queries"),
        (["--prompt", "Line", "--no-such-option"], "No such option"),
        (["--prompt", "Line", "--k", "many"], "'--k'"),
    ],
)
def test_a_query_that_cannot_be_asked(
    world: World, run: Callable[..., Result], arguments: list[str], says: str
) -> None:
    found = run("trace", "--index", world.index, *arguments)
    assert found.code == 2
    assert says in found.sentence
    assert found.out == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "target": ""}', "queries.jsonl:2"),
        ("{not json", "queries.jsonl:2"),
        ('{"question": "a"}', "queries.jsonl:2"),
        ('{"query_id": "q9", "prompt": "a ", "target": "é"}', "q9"),
    ],
)
def test_a_bad_line_of_a_query_file(
    world: World, run: Callable[..., Result], tmp_path: Path, line: str, says: str
) -> None:
    queries = write_corpus(tmp_path / "queries.jsonl", [{"prompt": "Line", "target": "1"}, line])
    output = tmp_path / "old.jsonl"
    output.write_text("what an earlier run wrote\n")
    found = run("trace", "--index", world.index, "--queries", queries, "--output", output)
    assert found.code == 2
    assert says in found.sentence
    assert output.read_text() == "what an earlier run wrote\n"


def test_a_bad_task_query_shows_before_anything_is_encoded(
    world: World, run: Callable[..., Result], tmp_path: Path
) -> None:
    queries = write_corpus(tmp_path / "task.jsonl", [{"prompt": "Line", "target": ""}])
    found = run(*world.command(tmp_path / "out", "--task-queries", str(queries)))
    assert found.code == 2
    assert "task.jsonl:1" in found.sentence
    assert not (tmp_path / "out").exists()
    missing = run(*world.command(tmp_path / "out", "--mix", "task"))
    assert missing.code == 2
    assert "--task-queries" in missing.sentence


# --- things that do not belong together


def test_an_optimizer_state_of_another_model(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    foreign = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(foreign.parameters())
    foreign(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = run(*world.command(tmp_path / "out", "--moments", str(tmp_path / "optimizer.pt")))
    assert found.code == 7
    assert "optimizer" in found.sentence
    assert not (tmp_path / "out" / "rows").exists()
    missing = run(*world.command(tmp_path / "out", "--moments", str(tmp_path / "nowhere")))
    assert missing.code == 3
    assert "nowhere" in missing.sentence


def test_another_checkpoint_than_the_indexs(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    out = world.copy(tmp_path / "out")
    before = snapshot(out)
    digest = Index(out).facts["model"]["digest"][:12]
    traced = run("trace", "--index", out, "--model", world.other, "--prompt", "Line", "--target", "1")
    assert traced.code == 7
    assert digest in traced.sentence
    rebuilt = run(*world.command(out, model=world.other))
    assert rebuilt.code == 7
    assert digest in rebuilt.sentence
    projected = run(*world.command(out, "--seed", "1"))
    assert projected.code == 7
    assert "projection.seed" in projected.sentence
    assert snapshot(out) == before


def test_a_checkpoint_that_moved(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(world.model, tmp_path / "moved"))
    found = run("trace", "--index", world.index, "--model", moved, "--prompt", "Line", "--target", "1", "--json")
    assert found.code == 0, found.err
    gone = run("trace", "--index", world.index, "--model", tmp_path / "gone", "--prompt", "Line", "--target", "1")
    assert gone.code == 3
    assert "gone" in gone.sentence


@pytest.mark.parametrize(
    ("yaml", "code", "says"),
    [
        ("projektion: {rows: 4}", 2, "unknown key 'projektion'"),
        ("projection: {rowz: 4}", 2, "unknown key 'projection.rowz'"),
        ("corpus: {paths: [a], texfield: t}", 2, "unknown key 'corpus.texfield'"),
        ("projection: {rows: 0}", 2, "projection.rows"),
        ("projection: 3", 2, "projection"),
        ("[1, 2]", 2, "mapping"),
        ("a: [", 2, "not valid YAML"),
    ],
)
def test_a_config_that_is_wrong(
    world: World, run: Callable[..., Result], tmp_path: Path, yaml: str, code: int, says: str
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml)
    found = run("index", world.corpus, "--config", config, "--model", world.model, "--out", tmp_path / "out")
    assert found.code == code
    assert says in found.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--config", "none.yaml", "none.yaml"),
        ("--code-size", "4", "code.size"),
        ("--mix", "tusk", "mix.kind"),
        ("--mix-weight", "much", "mix.weight"),
        ("--text-unit", "word", "corpus.text_unit"),
        ("--window", "1", "window_tokens"),
        ("--rows", "few", "'--rows'"),
        ("--compute-dtype", "int8", "compute_dtype"),
        ("--objective", "entropy", "objective"),
    ],
)
def test_an_option_out_of_range(
    world: World, run: Callable[..., Result], tmp_path: Path, option: str, value: str, says: str
) -> None:
    found = run(*world.command(tmp_path / "out", option, value))
    assert found.code == (3 if option == "--config" else 2)
    assert says in found.sentence
    assert not (tmp_path / "out").exists()


def test_a_code_larger_than_the_rows(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    found = run(*world.command(tmp_path / "out", "--code-size", "4096"))
    assert found.code == 2
    assert "4,096" in found.sentence
    assert not (tmp_path / "out").exists()


def test_an_out_that_holds_something_else(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    assert run(*world.command(tmp_path)).code == 2
    taken = run(*world.command(tmp_path / "thesis.txt"))
    assert taken.code == 2
    assert "thesis.txt" in taken.sentence
    assert snapshot(tmp_path) == before


def test_indexes_and_generations_that_are_not_there(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    for arguments in (["show", tmp_path], ["trace", "--index", tmp_path, "--prompt", "Line", "--target", "1"]):
        found = run(*arguments)
        assert found.code == 3
        assert "holds no index" in found.sentence
    ours = Index(world.index).active()
    unknown = run("trace", "--index", world.index, "--generation", "0badc0ffee", "--prompt", "Line", "--target", "1")
    assert unknown.code == 3
    assert "'0badc0ffee'" in unknown.sentence
    assert ours in unknown.sentence


# --- damage


def alter(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path, _: int) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_truncated_shard_is_named_and_built_anew(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    out = world.copy(tmp_path / "out")
    whole = snapshot(out)
    truncate(out / "rows" / "000003.safetensors", 0)
    found = run("trace", "--index", out, "--prompt", "Line", "--target", "1")
    assert found.code == 6
    assert "000003.safetensors" in found.sentence
    assert "--verify" in found.sentence
    mended = run(*world.command(out, "--verify"))
    assert mended.code == 0, mended.err
    assert "shard 3" in mended.err
    assert snapshot(out) == whole


@pytest.mark.parametrize("exact", [[], ["--exact"]])
@pytest.mark.parametrize("name", ["rows/000003.safetensors", "rows/000003.parquet"])
def test_an_altered_byte_is_found(
    world: World, run: Callable[..., Result], tmp_path: Path, name: str, exact: list[str]
) -> None:
    out = world.copy(tmp_path / "out")
    whole = snapshot(out)
    alter(out / name, len(whole[name]) // 2)
    verified = run("show", out, "--verify")
    assert verified.code == 6
    assert Path(name).name in verified.sentence
    # Every passage is a candidate, so whatever way is taken reads the altered one.
    found = run("trace", "--index", out, "--prompt", "Line", "--target", "1", "--k", PASSAGES, *exact)
    assert found.code == 6
    assert "000003" in found.sentence
    mended = run(*world.command(out, "--verify"))
    assert mended.code == 0, mended.err
    assert snapshot(out) == whole


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("whitener.safetensors", alter),
        ("whitener.safetensors", truncate),
        ("background.safetensors", alter),
        ("background.safetensors", truncate),
        ("norms.safetensors", alter),
        ("codes.parquet", truncate),
    ],
)
def test_a_damaged_generation_is_named(
    world: World, run: Callable[..., Result], tmp_path: Path, name: str, damage: Callable[[Path, int], None]
) -> None:
    out = world.copy(tmp_path / "out")
    rows = snapshot(out / "rows")
    path = out / "generations" / Index(out).active() / name
    damage(path, len(path.read_bytes()) // 2)
    found = run("trace", "--index", out, "--prompt", "Line", "--target", "1")
    assert found.code == 6
    assert Path(name).name in found.sentence
    assert snapshot(out / "rows") == rows


@pytest.mark.parametrize("name", ["index.json", "active.json", "rows/part-000.json"])
def test_a_note_that_is_no_json(world: World, run: Callable[..., Result], tmp_path: Path, name: str) -> None:
    out = world.copy(tmp_path / "out")
    (out / name).write_text('{"cut sh')
    for arguments in (["show", out], ["trace", "--index", out, "--prompt", "Line", "--target", "1"]):
        found = run(*arguments)
        assert found.code == 6
        assert Path(name).name in found.sentence


# --- processes that are limited, interrupted and killed


def child(arguments: list[str], folder: str, file_bytes: int | None) -> None:
    """One command line in a process of its own, its output in files, no file of it longer than `file_bytes`."""
    torch.set_num_threads(1)
    # A shell that starts the tests in the background has interrupts ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        Path(folder, "out").open("w") as out,
        Path(folder, "err").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        code = main(arguments)
    sys.exit(code)


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trackstar.build", "trackstar.describe"])
    return context


class Children:
    """Starts children; those still running at the end are killed."""

    def __init__(self, context: Any, folder: Path) -> None:
        self._context, self._folder, self._started = context, folder, list[Any]()

    def start(self, arguments: Sequence[str], *, file_bytes: int | None = None) -> Any:
        process = self._context.Process(target=child, args=(list(arguments), str(self._folder), file_bytes))
        process.start()
        self._started.append(process)
        return process

    def result(self, process: Any) -> Result:
        process.join(timeout=120)
        assert process.exitcode is not None, "the command hangs"
        out, err = ((self._folder / name).read_text() for name in ("out", "err"))
        return Result(code=process.exitcode, out=out, err=err)

    def run(self, arguments: Sequence[str], *, file_bytes: int | None = None) -> Result:
        return self.result(self.start(arguments, file_bytes=file_bytes))

    def signal_when(self, process: Any, seen: Callable[[], bool], number: int) -> None:
        """Send the signal as soon as `seen`; the process must not have ended before."""
        deadline = time.monotonic() + 120
        while not seen() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, number)

    def end(self) -> None:
        for process in self._started:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()


@pytest.fixture
def children(server: Any, tmp_path: Path) -> Iterator[Children]:
    folder = tmp_path / "streams"
    folder.mkdir()
    started = Children(server, folder)
    yield started
    started.end()


def milvus_content(index: Path) -> list[Any]:
    """Every id and estimated cosine that the database answers a few queries with."""
    opened = Index(index)
    generation = opened.generation()
    size = generation.spec.size
    codes = np.random.Generator(np.random.Philox(key=9)).standard_normal((3, size)).astype(np.float32)
    database = MilvusLiteIndex.open(local(generation.home) / "coarse" / "milvus.db", dim=opened.layout.dim, size=size)
    with contextlib.closing(database):
        return [array.tolist() for array in database.search(codes, PASSAGES)] + [database.count()]


def without_database(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(folder).items() if "/coarse/milvus" not in name}


def test_a_killed_build_continues_to_the_same_bytes(world: World, children: Children, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = world.command(out)
    moments: list[tuple[str, int]] = [
        ("index.json", 0),
        ("rows/*.json", 3),
        ("rows/*.parquet", 7),
        ("statistics/*", 0),
        ("generations/*/codes/*", 2),
        ("generations/*/coarse/*", 0),
    ]
    kills = 0
    for pattern, count in moments:
        process = children.start(command)
        children.signal_when(process, lambda: len(list(out.glob(pattern))) > count, signal.SIGKILL)  # noqa: B023
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    # On a busy machine the last steps may be over before they are seen.
    assert kills >= 4
    finished = children.run(command)
    assert finished.code == 0, finished.err
    assert without_database(out) == without_database(world.index)
    assert milvus_content(out) == milvus_content(world.index)


def test_an_unfinished_index_says_how_far_it_is(world: World, children: Children, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = children.start(world.command(out))
    children.signal_when(process, lambda: (out / "rows" / "000002.json").is_file(), signal.SIGKILL)
    process.join()
    shown = children.run(["show", str(out)])
    assert shown.code == 0, shown.err
    assert "unfinished" in shown.out
    facts = json.loads(children.run(["show", str(out), "--json"]).out)
    assert facts["state"] == "encoding"
    assert 3 <= facts["rows"]["shards"] < PASSAGES // SHARD
    traced = children.run(["trace", "--index", str(out), "--prompt", "Line", "--target", "1"])
    assert traced.code == 4
    assert "give the index command again" in traced.sentence


def test_an_interrupt_says_how_to_go_on(world: World, children: Children, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = children.start(world.command(out))
    children.signal_when(process, lambda: (out / "rows" / "000001.json").is_file(), signal.SIGINT)
    found = children.result(process)
    assert found.code == 130
    assert found.err.splitlines()[-1] == "interrupted; give the same command again to continue"
    assert "Traceback" not in found.err
    assert children.run(world.command(out)).code == 0
    assert without_database(out) == without_database(world.index)


@pytest.mark.parametrize(
    "file_bytes", [4 << 10, 40 << 10, 200 << 10], ids=["at the first shard", "at the statistics", "at the database"]
)
def test_a_full_disk_keeps_what_is_finished(world: World, children: Children, tmp_path: Path, file_bytes: int) -> None:
    # A limit on the size of a file stands for the full disk: the same write fails, for any user.
    out = tmp_path / "out"
    full = children.run(world.command(out), file_bytes=file_bytes)
    assert full.code == 9, full.err
    assert "no space is left" in full.sentence or "disk is full" in full.sentence
    assert not list(out.rglob("*.tmp"))
    kept = without_database(out)
    finished = children.run(world.command(out))
    assert finished.code == 0, finished.err
    after = without_database(out)
    assert {name: after[name] for name in kept} == kept
    assert after == without_database(world.index)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_records(world: World, run: Callable[..., Result], tmp_path: Path) -> None:
    queries = write_corpus(tmp_path / "q.jsonl", [{"prompt": "Line", "target": "1"}])
    found = run("trace", "--index", world.index, "--queries", queries, "--output", "/dev/full")
    assert found.code == 9
    assert "no space is left" in found.sentence


# --- a fresh interpreter


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_help_and_plans_load_nothing_heavy() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['pymilvus'] = None\n"
        "from trackstar.cli import main\n"
        "codes = [main([]), main(['trace', '--help']), main(['plan', '--passages', '1000', '--json'])]\n"
        "print(codes, main(['show', '.']))"
    )
    found = fresh("-c", program)
    assert found.stdout.splitlines()[-1] == "[0, 0, 0] 1"
    assert found.stderr == "error: this command needs more packages: pip install 'trackstar[encoder]'\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_answer() -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "trackstar.cli", "plan", "--passages", "1000"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert (found.returncode, found.stderr.count("\n")) == (9, 1)
    assert "no space is left" in found.stderr


def test_the_program_ends_with_its_exit_code(tmp_path: Path) -> None:
    found = fresh("-m", "trackstar.cli", "plan", "--passages", "10", "--model", str(tmp_path / "none"))
    assert found.returncode == 3
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    shown = fresh("-m", "trackstar.cli", "--version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.count("\n") == 1

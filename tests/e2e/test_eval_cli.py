"""`trackstar eval facts` on a tiny model and corpus: files, records, repetition, resumption, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.folders import files
from tests.tiny import save_model
from trackstar.cli import main

PLACES = ("Lima", "Oslo", "Rome", "Cairo", "Quito", "Paris", "Delhi", "Seoul")
LANDS = ("Peru", "Norway", "Italy", "Egypt", "Ecuador", "France", "India", "Korea")
METHODS: list[dict[str, Any]] = [
    {"name": "gold", "kind": "gold"},
    {"name": "BM25", "kind": "lexical"},
    {"name": "random", "kind": "random"},
    {"name": "gradient dot", "kind": "influence", "mix": {"kind": "none"}, "unit_norm": False},
    {"name": "TrackStar", "kind": "influence"},
    {"name": "task mix", "kind": "influence", "mix": {"kind": "task", "weight": 0.5}},
    {"name": "ranks", "kind": "fusion", "of": ["BM25", "TrackStar"], "rule": "rank"},
    {"name": "weights", "kind": "fusion", "of": ["BM25", "TrackStar"]},
]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def sentences() -> list[dict[str, Any]]:
    found = []
    for number in range(48):
        land, place = LANDS[number % 8], PLACES[number % 8]
        text = (
            f"{place} is the capital of {land}.",
            f"In {land} all roads lead to {place}.",
            f"Rain fell on the hills of {land}.",
        )[number % 3]
        stated = [f"{land} | capital | {place}"] if number % 3 < 2 else []
        found.append({"sentence_id": f"s{number}", "text": text, "fact_triples": stated})
    return found


def facts() -> list[dict[str, Any]]:
    found = []
    for number, (land, place) in enumerate(zip(LANDS, PLACES, strict=True)):
        gold = [item["sentence_id"] for item in sentences() if f"{land} | capital | {place}" in item["fact_triples"]]
        common = {"relation": "capital", "entity0": land, "entity1": place, "entity1_alias": [], "trex_sentences": gold}
        for prompt in range(2):
            text = (f"The capital of {land} is", f"{land} is ruled from")[prompt]
            found.append({"fact_id": f"f{number}-{prompt}", **common, "c4_frequency": len(gold), "prompt0": text})
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    root: Path
    facts: Path
    corpus: Path
    model: Path
    index: Path

    def settings(self, **changes: Any) -> dict[str, Any]:
        methods = [
            {**method, "index": str(self.index)} if method["kind"] == "influence" else method for method in METHODS
        ]
        return {
            "facts": str(self.facts),
            "corpus": {"paths": [str(self.corpus)]},
            "queries": 8,
            "held_out": 4,
            "task_queries": 4,
            "k": 20,
            "resamples": 100,
            "predictions": {"model": str(self.model), "max_new_tokens": 4},
            "methods": methods,
            **changes,
        }

    def config(self, path: Path, **changes: Any) -> str:
        path.write_text(yaml.safe_dump(self.settings(**changes)))
        return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("eval")
    model = save_model(root / "model", "gpt_neox", num_hidden_layers=2)
    corpus = write_lines(root / "sentences.jsonl", sentences())
    shape = ["--layer-blocks", "2", "--rows", "8", "--cols", "8", "--store", "memory", "--code", "bits"]
    command = ["index", str(corpus), "--model", str(model), "--out", str(root / "index"), *shape]
    assert main([*command, "--shard-passages", "10"]) == 0
    return World(
        root=root,
        facts=write_lines(root / "facts.jsonl", facts()),
        corpus=corpus,
        model=model,
        index=root / "index",
    )


def test_an_evaluation_from_end_to_end(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = world.config(tmp_path / "eval.yaml", compare=[["BM25", "gold"]])
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["eval", "facts", config, "--out", str(first), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((first / "results.json").read_text())
    assert printed == results

    about = results["about"]
    assert (about["queries"], about["sentences"], about["facts"]) == (8, 48, 16)
    assert (about["gold_agreeing"], about["gold_differing"]) == (16, 0)
    by_name = {item["name"]: item for item in results["methods"]}
    assert list(by_name) == [method["name"] for method in METHODS]
    assert by_name["gold"]["overall"]["mrr"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert by_name["BM25"]["overall"]["mrr"]["mean"] > by_name["random"]["overall"]["mrr"]["mean"]
    assert by_name["gold"]["against_first"]["mrr"]["mean"] == 0.0
    (pair,) = results["comparisons"]
    assert (pair["of"], pair["from"]) == ("BM25", "gold")
    assert {**pair, "of": 0, "from": 0} == {**by_name["BM25"]["against_first"], "of": 0, "from": 0}
    assert by_name["task mix"]["fitted"] == {"lambda": 0.5}
    assert sum(by_name["weights"]["fitted"]["weights"].values()) == pytest.approx(1.0)
    for item in results["methods"]:
        for groups in item["by"].values():
            assert sum(group["queries"] for group in groups) == 8

    # Measures can be told from the records alone.
    for item in results["methods"]:
        stem = item["name"].lower().replace(" ", "-")
        lines = (first / "retrievals" / f"{stem}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 8
        reciprocal = []
        for record in records:
            assert record["query_set"] == "facts"
            assert record["groundtruth"] == record["targets_plaintext"]
            number = len(record["proponents"])
            assert number == len(record["proponent_ids"]) == len(record["proponent_scores"]) <= 20
            correct = record["proponent_correct"]
            assert correct == [name in record["trex_sentences"] for name in record["proponent_ids"]]
            assert record["trackstar"]["method"] == item["name"]
            reciprocal.append(1 / (1 + correct.index(True)) if True in correct else 0.0)
        assert sum(reciprocal) / 8 == pytest.approx(item["overall"]["mrr"]["mean"])

    table = (first / "results.md").read_text()
    assert "| BM25 | " in table
    assert "## MRR by frequency" in table
    assert "## MRR by the model's own answer" in table
    for name in ("methods", "buckets", "predictions"):
        assert (first / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (first / f"{name}.svg").read_text()

    assert main(["eval", "facts", config, "--out", str(second)]) == 0
    shown = capsys.readouterr()
    assert "TrackStar" in shown.out
    assert "MRR" in shown.out
    assert files(first) == files(second)


def test_what_is_finished_is_not_made_again(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = world.config(tmp_path / "eval.yaml")
    assert main(["eval", "facts", config, "--out", str(out)]) == 0
    before = files(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "retrievals").iterdir()}
    # The run is cut short before its last methods, and one method's settings change.
    (out / "retrievals" / "trackstar.json").unlink()
    methods = world.settings()["methods"]
    methods[1]["k1"] = 0.9
    changed = world.config(tmp_path / "changed.yaml", methods=methods)
    assert main(["eval", "facts", changed, "--out", str(out)]) == 0
    made = {path.name for path, time in times.items() if path.exists() and path.stat().st_mtime_ns != time}
    # The fusions' part has changed, so they are made again too.
    assert {name.partition(".")[0] for name in made} == {"bm25", "trackstar", "ranks", "weights"}
    assert files(out)["retrievals/trackstar.jsonl"] == before["retrievals/trackstar.jsonl"]
    assert main(["eval", "facts", config, "--out", str(out)]) == 0
    assert files(out) == before


def test_a_retrieval_that_was_altered_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = world.config(tmp_path / "eval.yaml", methods=[METHODS[0], METHODS[1]], predictions=None)
    out = tmp_path / "out"
    assert main(["eval", "facts", config, "--out", str(out)]) == 0
    path = out / "retrievals" / "bm25.jsonl"
    path.write_text(path.read_text().replace("capital", "Capital", 1))
    capsys.readouterr()
    assert main(["eval", "facts", config, "--out", str(out)]) == 6
    assert "bm25.jsonl' is not what was written" in capsys.readouterr().err


def test_options_override_the_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = world.config(tmp_path / "eval.yaml", methods=[METHODS[0], METHODS[2]], predictions=None)
    chosen = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        assert main(["eval", "facts", config, "--out", str(out), "--queries", "3", "--seed", seed, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["about"]["queries"] == 3
        lines = (out / "retrievals" / "gold.jsonl").read_text().splitlines()
        chosen.append([json.loads(line)["example_id"] for line in lines])
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"methods": []}, 2, "the list is empty"),
        ({"compare": [["gold", "none"]]}, 2, "compare: there is no method 'none'; there are gold"),
        ({"facts": "none.jsonl"}, 3, "there is no facts file 'none.jsonl'"),
        ({"queries": 13}, 2, "there are 16 facts with gold sentences"),
        ({"held_out": 0}, 2, "learns its weights from held-out queries"),
        ({"task_queries": 0}, 2, "needs queries that are not evaluated; set task_queries above 0"),
        ({"prompt": 2}, 2, "has no prompt2"),
        ({"predictions": {"model": "none"}}, 3, "there is no folder 'none' of a checkpoint"),
        ({"methods": [{"name": "d", "kind": "dense", "model": "none"}]}, 3, "no folder 'none' of an embedding model"),
        ({"methods": [{"name": "i", "kind": "influence", "index": "none"}]}, 3, "'none'"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    code: int,
    sentence: str,
) -> None:
    config = world.config(tmp_path / "eval.yaml", **changes)
    assert main(["eval", "facts", config, "--out", str(tmp_path / "out")]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert sentence in shown.err.splitlines()[-1]
    assert not (tmp_path / "out" / "results.json").exists()


def test_bad_files_end_in_one_sentence(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[str, Any, Any]] = [
        ("is not in the corpus; give", [{**facts()[0], "trex_sentences": ["s0", "gone"]}], None),
        ("stands on line 1 already", [facts()[0], facts()[0]], None),
        ("two sentences of the id 's0'", None, [*sentences(), sentences()[0]]),
        ("none of the 1 facts", [{**facts()[0], "trex_sentences": [], "entity0": "Nowhere"}], None),
        ("has no tokens for the target", [{**item, "entity1": "日本"} for item in facts()], None),
        ("lacks 1 of the corpus's 49 sentences", None, [*sentences(), {"sentence_id": "new", "text": "More."}]),
    ]
    for sentence, given, corpus in cases:
        settings: dict[str, Any] = {"queries": 1, "held_out": 0, "task_queries": 0, "predictions": None}
        settings["methods"] = [{**METHODS[4], "index": str(world.index)}]
        if given is not None:
            settings["facts"] = str(write_lines(tmp_path / "facts.jsonl", given))
        if corpus is not None:
            settings["corpus"] = {"paths": [str(write_lines(tmp_path / "sentences.jsonl", corpus))]}
        config = world.config(tmp_path / "eval.yaml", **settings)
        assert main(["eval", "facts", config, "--out", str(tmp_path / "out")]) != 0
        last = capsys.readouterr().err.splitlines()[-1]
        assert sentence in last, last


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from trackstar.cli import main\n"
        "assert main(['eval', 'facts', '--help']) == 0\n"
        "heavy = {'torch', 'bm25s', 'matplotlib', 'sentence_transformers', 'transformers'} & sys.modules.keys()\n"
        "sys.exit(f'{heavy} imported' if heavy else 0)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--out" in found.stdout

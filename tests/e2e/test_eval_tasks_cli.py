"""`trackstar eval tasks` on the demo's corpus and model: files, records, grading, repetition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.folders import files
from trackstar.cli import main
from trackstar.evaluation.lexical import words_in

DEMO, FILES = Path("examples/demo"), Path("examples/evaluation/tasks")
SETTINGS: dict[str, Any] = {
    "corpus": {"paths": [str(DEMO / "corpus.jsonl.gz")]},
    "predictions": {"model": str(DEMO / "model"), "max_new_tokens": 6},
    "tasks": [
        {"name": "COPA", "format": "copa", "path": str(FILES / "copa.jsonl"), "limit": 4},
        {"name": "sums", "format": "arithmetic", "count": 3},
        {"name": "own", "format": "plain", "path": str(FILES / "plain.jsonl"), "limit": 6},
        {"name": "stories", "format": "stories", "path": str(FILES / "rocstories.csv"), "limit": 2},
    ],
    "methods": [{"name": "BM25", "kind": "lexical"}, {"name": "random", "kind": "random"}],
    "k": 10,
    "depth": 5,
    "resamples": 100,
    "tail_patch": {
        "model": str(DEMO / "model"),
        "depths": [1],
        "queries": 4,
        "steps": [{"name": "SGD", "optimizer": "sgd", "learning_rate": 0.01}],
    },
}


def test_tasks_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    facts = (DEMO / "facts.jsonl").read_text().splitlines()[:40]
    # The model knows none of these objects.
    wrong = [json.dumps(json.loads(line) | {"entity1": "Atlantis"}) for line in facts[:3]]
    (tmp_path / "facts.jsonl").write_text("\n".join(wrong))
    tasks = [
        *SETTINGS["tasks"],
        {"name": "wrong", "format": "wrong_predictions", "path": str(tmp_path / "facts.jsonl")},
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(SETTINGS | {"tasks": tasks}))
    command = ["eval", "tasks", str(tmp_path / "tasks.yaml"), "--out"]
    assert main([*command, str(tmp_path / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(task["name"], task["queries"], task["grading"]) for task in results["tasks"]] == [
        ("COPA", 4, "choice"),
        ("sums", 3, "number"),
        ("own", 6, "words"),
        ("stories", 2, "none"),
        ("wrong", 3, "none"),
    ]
    by_name = {task["name"]: task["model"] for task in results["tasks"]}
    assert by_name["own"]["accuracy"]["mean"] > 0  # the demo's model was trained on such facts
    assert {"accuracy", "accuracy_per_token"} <= by_name["COPA"].keys()
    assert "accuracy" not in by_name["stories"]
    assert all(model["loss"]["mean"] > 0 for model in by_name.values())

    # Measures can be told from the records alone.
    for item in results["methods"]:
        stem = item["name"].lower()
        lines = (tmp_path / "out" / "retrievals" / f"{stem}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["query_set"] for record in records] == [
            name
            for name, count in (("COPA", 4), ("sums", 3), ("own", 6), ("stories", 2), ("wrong", 3))
            for _ in range(count)
        ]
        assert all("proponent_correct" not in record and len(record["proponents"]) == 10 for record in records)
        own = [record for record in records if record["query_set"] == "own"]
        shares = []
        for record in own:
            words = set(words_in(record["targets_plaintext"]))
            shares.append(len(words & set(words_in(" ".join(record["proponents"][:5])))) / len(words))
        (part,) = [part for part in item["by"]["task"] if part["label"] == "own"]
        assert part["target_words"]["mean"] == pytest.approx(sum(shares) / 6)
    (wrong_record, *_) = [record for record in records if record["query_set"] == "wrong"]
    assert wrong_record["groundtruth"] == "Atlantis" != wrong_record["targets_plaintext"]
    shared = results["shared"]["overall"]
    assert shared[0][0] == shared[1][1] == 1.0
    assert shared[0][1] == shared[1][0] < 0.1
    assert results["tail_patch"]["queries"] == 4

    table = (tmp_path / "out" / "results.md").read_text()
    assert "| COPA (4) | choice | " in table
    assert "Tail-patch@1 by task" in table
    for stem in ("overlap", "shared", "tail-patch"):
        assert (tmp_path / "out" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "out" / f"{stem}.svg").read_text()

    before = files(tmp_path / "out")
    assert main([*command, str(tmp_path / "out")]) == 0
    assert main([*command, str(tmp_path / "again")]) == 0
    assert "COPA" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "again") == before


def test_bad_files_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "copa.jsonl").write_text('{"premise": "p"}\n')
    for changes, code, sentence in (
        (
            {"tasks": [{"name": "c", "format": "copa", "path": str(tmp_path / "copa.jsonl")}]},
            2,
            "copa.jsonl:1: the field",
        ),
        ({"predictions": {"model": "none"}}, 3, "there is no folder 'none' of a checkpoint"),
        ({"tail_patch": {"model": "none"}}, 3, "there is no folder 'none' of a checkpoint"),
    ):
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
        assert main(["eval", "tasks", str(tmp_path / "tasks.yaml"), "--out", str(tmp_path / "out")]) == code
        assert sentence in capsys.readouterr().err.splitlines()[-1]

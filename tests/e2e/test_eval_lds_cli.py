"""`trackstar eval lds` on a tiny model and corpus: files, repetition, resumption, and bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.e2e.test_eval_cli import facts, sentences, write_lines
from tests.folders import files
from tests.tiny import save_model
from trackstar.cli import main
from trackstar.engine import LocalEngine

METHODS: list[dict[str, Any]] = [
    {"name": "gold", "kind": "gold"},
    {"name": "BM25", "kind": "lexical"},
    {"name": "random", "kind": "random"},
    {"name": "gradient dot", "kind": "influence", "index": "plain", "mix": {"kind": "none"}, "unit_norm": False},
    {"name": "TrackStar", "kind": "influence", "index": "corrected", "mix": {"kind": "task", "weight": 0.5}},
    {"name": "TRAK", "kind": "trak", "indexes": ["margin"]},
    {"name": "TracIn", "kind": "tracin", "indexes": ["early", "plain"], "weights": [2, 1]},
    {"name": "both", "kind": "fusion", "of": ["BM25", "TrackStar"], "rule": "rank"},
]
MADE_AFRESH = ("indexes/", "scores/", "retrievals/", "model")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("lds")
    save_model(root / "model", "gpt_neox", num_hidden_layers=2)
    write_lines(root / "sentences.jsonl", sentences())
    write_lines(root / "facts.jsonl", facts())
    return root


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    return {
        "facts": str(world / "facts.jsonl"),
        "corpus": {"paths": [str(world / "sentences.jsonl")]},
        "queries": 4,
        "task_queries": 4,
        "distractors": 4,
        "k": 10,
        "depths": [1, 10],
        "resamples": 100,
        "model": str(world / "model"),
        "training": {"steps": 6, "batch_passages": 8, "learning_rate": 0.01},
        "subsets": 4,
        "remove": [1, 3],
        "queries_per_run": 2,
        "rows": {"projection": {"layer_blocks": 1, "rows": 4, "cols": 4}, "shard_passages": 10},
        "indexes": {
            "plain": {},
            "corrected": {"moments": {"source": "checkpoint"}},
            "margin": {"objective": "margin"},
            "early": {"after": 3},
        },
        "methods": METHODS,
        **changes,
    }


def config(path: Path, world: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(settings(world, **changes)))
    return str(path)


def test_an_evaluation_from_end_to_end(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = config(tmp_path / "lds.yaml", world)
    out = tmp_path / "out"
    assert main(["eval", "lds", given, "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    about = results["about"]
    kept = [json.loads(line) for line in (out / "corpus.jsonl").read_text().splitlines()]
    assert (about["queries"], about["sentences"], about["subsets"]) == (4, len(kept), 4)
    assert about["kept_by_a_subset"] == round(len(kept) / 2)
    # Methods may ask for the same run; none is done twice.
    assert len(list((out / "runs").iterdir())) <= about["retrainings"]
    by_name = {item["name"]: item for item in results["methods"]}
    assert list(by_name) == [method["name"] for method in METHODS]
    for item in results["methods"]:
        assert -1 <= item["lds"]["low"] <= item["lds"]["mean"] <= item["lds"]["high"] <= 1
        assert item["lds_over_subsets"]["mean"] == pytest.approx(item["lds"]["mean"])
        assert [removal["depth"] for removal in item["removals"]] == [1, 3]
        assert item["removals"][0]["removed"] <= 2
        stem = item["name"].lower().replace(" ", "-")
        lines = (out / "retrievals" / f"{stem}.jsonl").read_text().splitlines()
        assert len(lines) == 4
        assert all(len(json.loads(line)["proponents"]) <= 10 for line in lines)
    assert by_name["gold"]["mrr"]["mean"] == 1.0
    assert by_name["gold"]["lds_against_first"]["mean"] == 0.0
    assert by_name["TrackStar"]["fitted"] == {"lambda": 0.5}
    assert "| TRAK | " in (out / "results.md").read_text()
    for name in ("lds", "rises"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()

    # The optimizer's state is such that V can be read of it.
    assert (out / "model" / "optimizer.pt").is_file()
    first = files(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert main(["eval", "lds", given, "--out", str(out)]) == 0
    assert "TrackStar" in capsys.readouterr().out
    assert files(out) == first
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == times
    (out / "retrievals" / "bm25.jsonl").unlink()
    assert main(["eval", "lds", given, "--out", str(out)]) == 6
    assert "bm25.jsonl' is not what was written; delete it and its .json" in capsys.readouterr().err
    (out / "retrievals" / "bm25.json").unlink()
    assert main(["eval", "lds", given, "--out", str(out)]) == 0
    assert files(out) == first
    # Elsewhere all is the same but what names folders.
    other = tmp_path / "other"
    assert main(["eval", "lds", given, "--out", str(other)]) == 0
    again = files(other)
    assert again.keys() == first.keys()
    for name in first:
        if not name.startswith(MADE_AFRESH) or name.endswith((".jsonl", "model/model.safetensors")):
            assert again[name] == first[name], name


class Dying(LocalEngine):
    """Is killed after its second run."""

    def map(self, stage: Any, make: Any, items: Sequence[Any], *, report: Any = None) -> Iterator[Any]:
        for number, answer in enumerate(super().map(stage, make, items, report=report)):
            if number == 2:
                raise KeyboardInterrupt
            yield answer


def test_an_interrupted_evaluation_goes_on(world: Path, tmp_path: Path) -> None:
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.lds_config import LdsConfig
    from trackstar.evaluation.lds_run import evaluate_lds

    changes = {"methods": METHODS[1:4], "remove": [2], "indexes": {"plain": {}}, "task_queries": 0, "distractors": None}
    chosen = make_config(LdsConfig, settings(world, **changes))
    with pytest.raises(KeyboardInterrupt):
        evaluate_lds(chosen, tmp_path / "out", engine=Dying())
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 3
    assert not (tmp_path / "out" / "results.json").exists()
    found = evaluate_lds(chosen, tmp_path / "out")
    assert found["about"]["sentences"] == 48
    assert found == evaluate_lds(chosen, tmp_path / "whole")


def test_lds_is_that_of_the_files(world: Path, tmp_path: Path) -> None:
    """From the runs' losses and the scores alone, by scipy."""
    stats = pytest.importorskip("scipy.stats")
    from safetensors.numpy import load_file

    from trackstar.evaluation.lds import draw_subsets

    out = tmp_path / "out"
    given = config(tmp_path / "lds.yaml", world, methods=METHODS[:2], subsets=5, remove=[1], indexes={})
    assert main(["eval", "lds", given, "--out", str(out), "--seed", "3"]) == 0
    results = json.loads((out / "results.json").read_text())
    runs = [json.loads(path.read_text()) for path in (out / "runs").iterdir()]
    losses = {tuple(run["kept"]): run["losses"] for run in runs}
    masks = draw_subsets(results["about"]["sentences"], count=5, seed=3)
    told = np.array([losses[tuple(np.flatnonzero(mask).tolist())] for mask in masks])
    scores = load_file(out / "scores" / "bm25.safetensors")["scores"][:4]
    sums = masks @ scores.T
    expected = np.mean([stats.spearmanr(sums[:, query], -told[:, query]).statistic for query in range(4)])
    assert results["methods"][1]["lds"]["mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"methods": []}, 2, "the list is empty"),
        ({"fraction": 1.0}, 2, "give one that keeps some and not all"),
        ({"subsets": 2}, 2, "2 subsets tell nothing; give at least 3"),
        ({"model": "none"}, 3, "there is no folder 'none' of a checkpoint"),
        ({"remove": [3, 1]}, 2, "remove must ascend, from 1 to k at most, which is 10"),
        ({"remove": [11]}, 2, "remove must ascend"),
        ({"distractors": 1000}, 2, "sentences state nothing that is asked; ask for fewer"),
        ({"indexes": {"plain": {}}}, 2, "needs the index 'corrected'; indexes has plain"),
        ({"indexes": {"a/b": {}}}, 2, "is also a folder's"),
        ({"rows": 3}, 2, "rows and indexes must be mappings"),
        ({"methods": [{"name": "i", "kind": "influence", "index": "plain"}]}, 2, "give the method 'i' a mix"),
        ({"training": {"steps": 2}}, 2, "the index 'early' is after 3 steps, and training has 2"),
        ({"methods": [{"name": "TRAK", "kind": "trak", "indexes": ["plain"]}]}, 2, "with the objective margin"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    code: int,
    sentence: str,
) -> None:
    given = config(tmp_path / "lds.yaml", world, **changes)
    assert main(["eval", "lds", given, "--out", str(tmp_path / "out")]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert sentence in shown.err.splitlines()[-1]
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_folder_of_other_settings_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"methods": METHODS[:1], "indexes": {}, "remove": [1], "subsets": 3}
    given = config(tmp_path / "lds.yaml", world, **changes)
    assert main(["eval", "lds", given, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["eval", "lds", given, "--out", str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "holds the model of other settings; give another --out" in capsys.readouterr().err


def test_a_sentence_longer_than_the_window_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"sentence_id": "long", "text": "many words " * 20, "fact_triples": []}
    path = write_lines(tmp_path / "long.jsonl", [*sentences()[:20], long, *sentences()[20:]])
    given = config(tmp_path / "lds.yaml", world, corpus={"paths": [str(path)]}, distractors=None)
    assert main(["eval", "lds", given, "--out", str(tmp_path / "out")]) == 2
    assert "the sentence 'long' has more tokens than the model's window of 64" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
def test_ray_does_the_retrainings(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    changes = {"methods": METHODS[:2], "indexes": {}, "remove": [1], "workers": 1}
    for engine in ("local", "ray"):
        given = config(tmp_path / "lds.yaml", world, **changes, engine=engine)
        assert main(["eval", "lds", given, "--out", str(tmp_path / engine)]) == 0
    alone, spread = files(tmp_path / "local"), files(tmp_path / "ray")
    runs = [name for name in alone if name.startswith("runs/")]
    assert runs
    assert [name for name in spread if name.startswith("runs/")] == runs
    for name in (*runs, "results.md"):
        assert spread[name] == alone[name]

"""`trackstar eval ablate` on tiny models: every axis, files, repetition, resumption, and bad input."""

from __future__ import annotations

import json
import shutil
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
from trackstar.errors import InvalidRequest
from trackstar.evaluation.ablate_run import projection_of
from trackstar.index import Index


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ablate")
    for number, name in enumerate(("run/checkpoint-5", "run/checkpoint-20", "run")):
        folder = save_model(root / name, "gpt_neox", num_hidden_layers=2, seed=number)
        loss = [{"loss": 3.0}, {"eval_loss": 2.5 - number / 2, "step": 5}]
        state = {"global_step": (5, 20, 30)[number], "num_input_tokens_seen": 0, "log_history": loss}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    save_model(root / "small", "gpt_neox", num_hidden_layers=1)
    write_lines(root / "sentences.jsonl", sentences())
    write_lines(root / "facts.jsonl", facts())
    return root


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    run = str(world / "run")
    return {
        "facts": str(world / "facts.jsonl"),
        "corpus": {"paths": [str(world / "sentences.jsonl")]},
        "queries": 8,
        "task_queries": 4,
        "k": 20,
        "resamples": 100,
        "model": run,
        "d": 64,
        "rows": {"shard_passages": 16, "row_dtype": "float32"},
        "mix": {"kind": "task", "weight": 0.5},
        "max_new_tokens": 3,
        "axes": {
            "d": [64, 16, 32],
            "steps": [run, f"{run}/checkpoint-5", f"{run}/checkpoint-20"],
            "size": [run, str(world / "small")],
        },
        **changes,
    }


def config(path: Path, world: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(settings(world, **changes)))
    return str(path)


def test_an_ablation_from_end_to_end(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = config(tmp_path / "ablate.yaml", world), tmp_path / "out"
    assert main(["eval", "ablate", given, "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    axes = {panel["axis"]: panel["points"] for panel in results["axes"]}
    assert [point["at"] for point in axes["d"]] == [16, 32, 64]
    assert [point["at"] for point in axes["steps"]] == [5, 20, 30]
    assert [point["held_out_loss"] for point in axes["steps"]] == [2.5, 2.0, 1.5]
    assert axes["size"][0]["at"] == axes["size"][0]["parameters"] < axes["size"][1]["parameters"]
    assert axes["size"][0]["held_out_loss"] is None
    # The whole run's checkpoint at d = 64 stands on every axis, and is made once.
    assert len({point["name"] for points in axes.values() for point in points}) == 6
    assert len(list((out / "indexes").iterdir())) == 6
    for point in (point for points in axes.values() for point in points):
        index = Index(out / "indexes" / point["name"])
        assert index.layout.dim == point["d"]
        assert 0 <= point["accuracy"]["mean"] <= 1
        assert point["fitted"] == {"lambda": 0.5}
        # Measures can be told from the records alone.
        lines = (out / "retrievals" / f"{point['name']}.jsonl").read_text().splitlines()
        correct = [json.loads(line)["proponent_correct"] for line in lines]
        expected = np.mean([1 / (1 + found.index(True)) if True in found else 0.0 for found in correct])
        assert point["quality"]["mrr"]["mean"] == pytest.approx(expected)
    table = (out / "results.md").read_text()
    assert "## By coordinates of a row, d" in table
    assert "64 = 4 blocks of 4 x 4" in table
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "ablation.svg").read_text()

    # Again: nothing is made anew. After a part is lost: only that.
    before = files(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "indexes").rglob("*.safetensors")}
    lost = axes["d"][0]["name"]
    shutil.rmtree(out / "indexes" / lost)
    (out / "retrievals" / f"{lost}.json").unlink()
    assert main(["eval", "ablate", given, "--out", str(out)]) == 0
    assert "answered rightly" in capsys.readouterr().out
    assert files(out) == before
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed
    assert all(lost in str(path) for path in changed)


def test_d_is_spread_over_powers_of_two_of_layer_blocks() -> None:
    for dim, num_layers, expected in [
        (65536, 24, (8, 64, 64)),
        (256, 8, (8, 4, 4)),
        (512, 12, (8, 4, 8)),
        (8192, 4, (4, 32, 32)),
        (8192, 6, (4, 32, 32)),
        (24, 3, (2, 2, 3)),
        (2, 1, (1, 1, 1)),
    ]:
        made = projection_of(dim, num_layers)
        assert (made.layer_blocks, made.rows, made.cols) == expected
    assert (projection_of(36, 3, 3).layer_blocks, projection_of(36, 3, 3).rows) == (3, 2)
    for dim in (1, 100, 16 * 17, 16 * 6 + 1):
        with pytest.raises(InvalidRequest, match=r"is not 16 blocks \(8 layer blocks x attention and MLP\)"):
            projection_of(dim, 8)


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"axes": {}}, 2, "there is nothing to vary; give d, steps or size"),
        ({"axes": {"d": [64, 64]}}, 2, "the axis d has a value twice"),
        ({"axes": {"d": [0]}}, 2, "the axis d must hold numbers from 1"),
        ({"axes": {"d": [64, 104]}}, 2, "d = 104 is not 4 blocks (2 layer blocks x attention and MLP)"),
        ({"axes": {"steps": ["none"]}}, 3, "there is no folder 'none' of a checkpoint"),
        ({"axes": {"size": ["none"]}}, 3, "there is no folder 'none' of a checkpoint"),
        ({"axes": {"depth": [1]}}, 2, "unknown key 'axes.depth'"),
        ({"rows": {"projection": {"rows": 4}}}, 2, "rows and cols of the projection follow from d"),
        ({"task_queries": 0}, 2, "set task_queries above 0"),
        ({"rows": {"moments": {"source": "checkpoint"}}}, 3, "holds no optimizer.pt"),
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
    given = config(tmp_path / "ablate.yaml", world, **changes)
    assert main(["eval", "ablate", given, "--out", str(tmp_path / "out")]) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert sentence in shown.err.splitlines()[-1]
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_checkpoint_without_a_place_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(tmp_path / "ablate.yaml", world, axes={"steps": [str(world / "small")]})
    assert main(["eval", "ablate", given, "--out", str(tmp_path / "out")]) == 2
    assert "has no trainer_state.json that says after how many steps it was saved" in capsys.readouterr().err
    shutil.copytree(world / "run" / "checkpoint-5", tmp_path / "again")
    axes = {"steps": [str(world / "run" / "checkpoint-5"), str(tmp_path / "again")]}
    given = config(tmp_path / "ablate.yaml", world, axes=axes)
    assert main(["eval", "ablate", given, "--out", str(tmp_path / "out")]) == 2
    assert "two checkpoints of the axis steps were saved after the same number of steps" in capsys.readouterr().err

"""`trackstar eval tail-patch` and `fusion`, and the tail-patch of `eval facts`, on the demo: files, repetition, and bad
input."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.folders import files
from trackstar.cli import main

DEMO = Path(__file__).parents[2] / "examples" / "demo"
MODEL = str(DEMO / "model")
STEPS = [
    {"name": "SGD", "optimizer": "sgd", "learning_rate": 0.01},
    {"name": "Adafactor", "optimizer": "adafactor", "learning_rate": 1e-4, "carry": "second"},
]
FACTS: dict[str, Any] = {
    "facts": str(DEMO / "facts.jsonl"),
    "corpus": {"paths": [str(DEMO / "corpus.jsonl.gz")]},
    "queries": 5,
    "held_out": 4,
    "k": 12,
    "resamples": 100,
    "methods": [
        {"name": "BM25", "kind": "lexical"},
        {"name": "gold", "kind": "gold"},
        {"name": "by chance", "kind": "random"},
    ],
    "tail_patch": {"model": MODEL, "queries": 4, "depths": [1, 3], "steps": STEPS},
    "compare": [["gold", "BM25"], ["by chance", "gold"]],
}


def run(command: str, settings: dict[str, Any], out: Path) -> int:
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    return main(["eval", command, str(config), "--out", str(out)])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("facts") / "out"
    assert run("facts", FACTS, out) == 0
    return out


def patched(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "depths": [1, 3], "steps": STEPS, "resamples": 100, **changes}


def test_facts_are_judged_by_tail_patch_too(evaluation: Path, tmp_path: Path) -> None:
    found = json.loads((evaluation / "results.json").read_text())["tail_patch"]
    assert found["queries"] == 4
    assert [step["name"] for step in found["steps"]] == ["SGD", "Adafactor"]
    assert [item["name"] for item in found["methods"]] == ["BM25", "gold", "by chance"]
    for item in found["methods"]:
        for step in item["steps"]:
            assert {"probability_at_1", "probability_at_3", "loss_at_1", "loss_at_3"} < step["overall"].keys()
            assert [sum(group["queries"] for group in groups) for groups in step["by"].values()] == [4, 4]
    assert found["methods"][0]["steps"][0]["against_first"]["probability_at_3"]["mean"] == 0.0
    for pair, number in zip(found["comparisons"], (1, 2), strict=True):
        of, less = found["methods"][number], found["methods"][number - 1]
        assert (pair["of"], pair["from"]) == (of["name"], less["name"])
        for step, one, other in zip(pair["steps"], of["steps"], less["steps"], strict=True):
            for name in ("probability_at_3", "loss_at_1"):
                expected = one["overall"][name]["mean"] - other["overall"][name]["mean"]
                assert step[name]["mean"] == pytest.approx(expected)
                assert step[name]["low"] <= step[name]["mean"] <= step[name]["high"]
    assert found["comparisons"][0]["steps"] == [step["against_first"] for step in found["methods"][1]["steps"]]
    means = {item["name"]: item["steps"][1]["overall"]["probability_at_3"]["mean"] for item in found["methods"]}
    assert means["gold"] > means["by chance"]
    text = (evaluation / "results.md").read_text()
    assert "## Tail-patch" in text
    assert text.count("| gold - BM25 |") == 2
    for name in ("### SGD", "### Adafactor", "| method | tail-patch@1 | tail-patch@3 | loss@3 (nats) |"):
        assert name in text
    assert (evaluation / "tail-patch.png").read_bytes().startswith(b"\x89PNG")
    # What was measured is taken from the file, and gives the same bytes.
    before = files(evaluation)
    assert run("facts", FACTS, evaluation) == 0
    assert files(evaluation) == before


def test_lists_from_files_end_in_the_numbers_of_the_evaluation(evaluation: Path, tmp_path: Path) -> None:
    """The folder of an evaluation, whose methods are named by their files; the same pairs need no measuring."""
    out, effects = tmp_path / "out", str(evaluation / "effects.jsonl")
    size = Path(effects).stat().st_size
    ids = [line["example_id"] for line in lines_of(evaluation / "retrievals" / "gold.jsonl")]
    retrievals = str(evaluation / "retrievals")
    assert run("tail-patch", patched(retrievals=retrievals, queries=4, effects=effects), out) == 0
    assert Path(effects).stat().st_size == size
    found = json.loads((out / "results.json").read_text())["tail_patch"]
    expected = json.loads((evaluation / "results.json").read_text())["tail_patch"]
    assert [item["name"] for item in found["methods"]] == ["bm25", "by-chance", "gold"]
    by_name = {item["name"]: item["steps"] for item in expected["methods"]}
    for item, name in zip(found["methods"], ("BM25", "by chance", "gold"), strict=True):
        for step, other in zip(item["steps"], by_name[name], strict=True):
            assert step["overall"] == other["overall"]
            # Records tell bucket and relation; the release's model answered none of these.
            assert {group: step["by"][group] for group in ("bucket", "relation")} == other["by"]
    # Every record comes back with the effects that the means are of.
    values = []
    for line in lines_of(out / "retrievals" / "bm25.jsonl"):
        assert line["example_id"] in ids
        assert len(line["proponents"]) == 12
        effects_of = line["trackstar"]["tail_patch"]
        assert list(effects_of) == ["SGD", "Adafactor"]
        values.append(effects_of["SGD"]["probability_change"])
        assert line["trackstar"]["method"] == "BM25"
    mean = found["methods"][0]["steps"][0]["overall"]["probability_at_3"]["mean"]
    assert np.mean([np.mean(row) for row in values]) == pytest.approx(mean)
    assert np.mean([row[0] for row in values]) == pytest.approx(
        found["methods"][0]["steps"][0]["overall"]["probability_at_1"]["mean"]
    )


def record(number: int, proponents: Sequence[str], **fields: Any) -> dict[str, Any]:
    return {
        "example_id": f"q{number}",
        "inputs_plaintext": ["The capital of Canada is", "The capital of Peru is", "A dolphin is a kind of"][number],
        "targets_plaintext": ["Ottawa", "Lima", "mammal"][number],
        "proponents": list(proponents),
        **fields,
    }


def write(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


STATING = [record(0, ["Ottawa is the capital of Canada."]), record(1, ["Lima is the capital of Peru."])]


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Lists as anyone may write them: of any length, with groups, without a field of ours."""
    other = [
        {**STATING[1], "proponents": [], "is_8b_correct": True},
        record(0, ["Rain fell."] * 2 + [""], is_8b_correct=False),
    ]
    given = [
        {"name": "stating", "path": write(tmp_path / "a.jsonl", STATING)},
        {"name": "others", "path": write(tmp_path / "b.jsonl", other)},
    ]
    settings = patched(retrievals=given)
    assert run("tail-patch", settings, tmp_path / "whole") == 0
    whole = files(tmp_path / "whole")
    results = json.loads(whole["results.json"])["tail_patch"]
    stating, others = (item["steps"][0] for item in results["methods"])
    assert stating["by"] == {}
    # Nothing is listed for one query; of the other's three passages two are the same, and the last holds no word.
    first = json.loads(whole["retrievals/others.jsonl"].splitlines()[0])["trackstar"]["tail_patch"]["SGD"]
    assert first["probability_change"][0] == first["probability_change"][1] != 0.0
    assert first["probability_change"][2] == first["loss_change"][2] == 0.0
    mean = others["overall"]["probability_at_3"]["mean"]
    assert mean == pytest.approx(2 * first["probability_change"][0] / 3 / 2)
    assert others["overall"]["queries"] == 2
    # The same lists the other way round: what the first file's records tell makes the groups.
    assert run("tail-patch", patched(retrievals=given[::-1]), tmp_path / "turned") == 0
    turned = json.loads((tmp_path / "turned" / "results.json").read_text())["tail_patch"]["methods"][1]["steps"][0]
    assert [part["label"] for part in turned["by"]["prediction"]] == ["right", "wrong"]
    for name in ("probability_at_1", "loss_at_3"):
        assert turned["overall"][name] == pytest.approx(stating["overall"][name])

    # Killed while the second line was written.
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "effects.jsonl").write_bytes(whole["effects.jsonl"][: whole["effects.jsonl"].index(b"\n") + 20])
    assert run("tail-patch", settings, cut) == 0
    assert files(cut) == whole


def test_default_steps_carry_on_what_the_checkpoint_has(tmp_path: Path) -> None:
    settings = {"model": MODEL, "resamples": 100, "depths": [1]}
    settings["retrievals"] = [{"name": "a", "path": write(tmp_path / "a.jsonl", STATING)}]
    names = {}
    for optimizer in (None, "none"):
        out = tmp_path / str(optimizer)
        assert run("tail-patch", {**settings, "optimizer": optimizer}, out) == 0
        names[optimizer] = [
            step["name"] for step in json.loads((out / "results.json").read_text())["tail_patch"]["steps"]
        ]
    assert names["none"] == ["SGD 0.01", "AdamW 0.0001, fresh"]
    assert names[None] == [*names["none"], "Adafactor 0.0001, second moment carried"]


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"retrievals": []}, 2, "the list is empty; name at least one file"),
        ({"retrievals": "none"}, 3, "there is no folder 'none' of retrievals"),
        ({"retrievals": [{"name": "a", "path": "none.jsonl"}]}, 3, "there is no file 'none.jsonl' of retrievals"),
        ({"model": "none"}, 3, "'none'"),
        ({"optimizer": "nowhere"}, 3, "nowhere"),
        ({"optimizer": "none"}, 2, "carry: there is no optimizer state to carry on from; use none"),
        ({"steps": [{"name": "s", "optimizer": "lion"}]}, 2, "steps.0.optimizer: Input should be 'sgd', 'adamw' or"),
        ({"steps": [{"optimizer": "sgd"}]}, 2, "the config's steps.0.name"),
        ({"steps": [STEPS[0], STEPS[0]]}, 2, "two steps have the same name"),
        ({"steps": []}, 2, "the config's steps"),
        ({"steps": [{**STEPS[1], "optimizer": "adamw"}]}, 2, "the optimizer state is of another optimizer than adamw"),
        ({"depths": [3, 1]}, 2, "depths must ascend from 1 or more"),
        ({"depth": 3}, 2, "unknown key 'depth'"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, sentence: str
) -> None:
    given = [{"name": "a", "path": write(tmp_path / "a.jsonl", STATING)}]
    assert run("tail-patch", patched(**{"retrievals": given, **changes}), tmp_path / "out") == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert sentence in " ".join(shown.splitlines()[-1:]), shown
    assert not (tmp_path / "out" / "results.json").exists()


def _without(name: str) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{key: value for key, value in one.items() if key != name} for one in STATING]


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (lambda: [], "holds no queries"),
        (_without("proponents"), "the record of the query 'q0' has no list 'proponents' of texts"),
        (lambda: [{**one, "proponents": []} for one in STATING], "has a proponent; there is nothing to judge"),
        (lambda: [{**STATING[0], "proponents": [1]}], "has no list 'proponents' of texts"),
        (lambda: [STATING[0], STATING[0]], "holds two records of the query 'q0'; ids must be unique"),
        (lambda: STATING[:1], "lack the query 'q1', which 'first' answers; give files of the same queries"),
        (lambda: [STATING[0], {**STATING[1], "inputs_plaintext": "Peru:"}], "ask the query 'q1' with another prompt"),
        (_without("targets_plaintext"), "no prompt and target"),
        (lambda: [{**one, "trackstar": 3} for one in STATING], "has a field 'trackstar' that is no object"),
    ],
)
def test_bad_files_end_in_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: Callable[[], list[dict[str, Any]]],
    sentence: str,
) -> None:
    given = [
        {"name": "first", "path": write(tmp_path / "a.jsonl", STATING)},
        {"name": "second", "path": write(tmp_path / "b.jsonl", records())},
    ]
    assert run("tail-patch", patched(retrievals=given), tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert sentence in shown.splitlines()[-1], shown


def test_a_target_without_tokens_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import save_model

    model = str(save_model(tmp_path / "model", "gpt_neox"))
    path = write(tmp_path / "a.jsonl", [{**STATING[0], "targets_plaintext": "日本"}])
    settings = patched(model=model, retrievals=[{"name": "a", "path": path}], steps=STEPS[:1])
    assert run("tail-patch", settings, tmp_path / "out") == 2
    assert "the model's tokenizer has no tokens for the target '日本'" in capsys.readouterr().err.splitlines()[-1]


def fused(folder: Path, **changes: Any) -> dict[str, Any]:
    tail_patch = {
        "model": MODEL,
        "depths": [1, 3],
        "steps": STEPS,
        "queries": 4,
        "effects": str(folder / "effects.jsonl"),
    }
    return {
        "evaluation": str(folder),
        "lexical": "BM25",
        "influence": "gold",
        "tail_patch": tail_patch,
        "resamples": 100,
        "families": ["lead", "share"],
        **changes,
    }


def test_a_fusion_from_end_to_end(evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The gold method stands for influence, so that much of both lists is alike."""
    out = tmp_path / "out"
    assert run("fusion", fused(evaluation), out) == 0
    assert "On the evaluated queries it " in " ".join(capsys.readouterr().out.split())
    results = json.loads((out / "results.json").read_text())
    assert (results["about"]["evaluated"], results["about"]["held_out"]) == (4, 4)
    assert results["about"]["decided_by"] == ["SGD", "Adafactor"]
    lexical, influence = results["parents"]
    assert (lexical["name"], influence["name"]) == ("BM25", "gold")
    assert influence["evaluated"]["mrr"]["mean"] == 1.0
    assert {rule["family"] for rule in results["rules"]} == {"lead", "share"}
    # The parents' numbers are those of the evaluation on the same queries.
    expected = {
        item["name"]: item["steps"]
        for item in json.loads((evaluation / "results.json").read_text())["tail_patch"]["methods"]
    }
    for item in (lexical, influence):
        for step in expected[item["name"]]:
            for name in ("probability_at_1", "probability_at_3", "loss_at_3"):
                assert item["evaluated"]["steps"][step["step"]][name] == pytest.approx(step["overall"][name])
    # What counts against the parents is counted by query: both differences in their own mean.
    for rule in results["rules"]:
        found = rule["evaluated"]
        less = found["mrr"]["mean"] - lexical["evaluated"]["mrr"]["mean"]
        assert found["mrr_against_lexical"]["mean"] == pytest.approx(less)
        for step, values in found["steps"].items():
            other = influence["evaluated"]["steps"][step]["probability_at_3"]["mean"]
            difference = values["against_influence"]["probability_at_3"]["mean"]
            assert difference == pytest.approx(values["probability_at_3"]["mean"] - other)
            assert found["at_least_both"][step] == (less >= -1e-12 and difference >= -1e-12)
    # The rule was chosen by the held-out queries.
    standings = {rule["name"]: min(rule["held_out"]["standing"].values()) for rule in results["rules"]}
    assert standings[results["chosen"]] == max(standings.values())
    # Its list holds every evaluated query, in the release's format, and gives its MRR.
    lines = lines_of(out / "retrievals" / "fusion.jsonl")
    assert len(lines) == 5
    for line in lines:
        assert line["trackstar"]["rule"] == results["chosen"]
        assert len(line["proponents"]) == len(line["proponent_ids"]) == len(line["proponent_correct"]) == 12
        assert line["proponent_scores"] == sorted(line["proponent_scores"], reverse=True)
    assert "# Fusion" in (out / "results.md").read_text()
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    before = files(out)
    assert run("fusion", fused(evaluation), out) == 0
    assert files(out) == before
    # The list can be judged like any other.
    judged = [{"name": "fusion", "path": str(out / "retrievals" / "fusion.jsonl")}]
    effects = fused(evaluation)["tail_patch"]["effects"]
    assert run("tail-patch", patched(retrievals=judged, queries=4, effects=effects), tmp_path / "judged") == 0
    again = json.loads((tmp_path / "judged" / "results.json").read_text())["tail_patch"]["methods"][0]["steps"]
    (chosen,) = [rule for rule in results["rules"] if rule["name"] == results["chosen"]]
    for step in again:
        own = chosen["evaluated"]["steps"][step["step"]]["probability_at_3"]
        assert step["overall"]["probability_at_3"] == pytest.approx(own)


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"evaluation": "none"}, 3, "the evaluation 'none' has no lists of a method 'BM25'"),
        ({"influence": "TrackStar"}, 3, "has no lists of a method 'TrackStar'"),
        ({"influence": "BM25"}, 2, "name the same method; a fusion needs two"),
        ({"families": ["magic"]}, 2, "the config's families.0"),
        ({"decided_by": "AdamW"}, 2, "decided_by: there is no step 'AdamW', but 'SGD', 'Adafactor'"),
        ({"tail_patch": {"model": "none"}}, 3, "there is no folder 'none' of a checkpoint"),
        ({"tail_patch": {"model": MODEL, "depths": [1]}}, 2, "its greatest depth must be 2 at least"),
    ],
)
def test_a_fusion_that_cannot_be_made_ends_in_one_sentence(
    evaluation: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    code: int,
    sentence: str,
) -> None:
    assert run("fusion", fused(evaluation, **changes), tmp_path / "out") == code
    shown = capsys.readouterr().err
    assert sentence in shown.splitlines()[-1], shown


def test_a_fusion_needs_held_out_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "facts"
    assert run("facts", {**FACTS, "queries": 2, "held_out": 0, "tail_patch": None}, out) == 0
    assert run("fusion", fused(out), tmp_path / "out") == 2
    assert "has no held-out lists of 'BM25' to choose a rule on; set held_out above 0" in capsys.readouterr().err

"""`trackstar eval open` and `eval categories` on the demo's corpus: files, records, repetition, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.folders import files
from tests.unit.test_evaluation_entailment import save_nli
from trackstar.cli import main

DEMO = Path("examples/demo")
METHODS: list[dict[str, Any]] = [
    {"name": "BM25", "kind": "lexical"},
    {"name": "random", "kind": "random"},
    {"name": "both", "kind": "fusion", "of": ["BM25", "random"], "rule": "rank"},
]


def config(path: Path, **changes: Any) -> str:
    settings = {
        "facts": str(DEMO / "facts.jsonl"),
        "corpus": {"paths": [str(DEMO / "corpus.jsonl.gz")]},
        "entailment": {"by": "rules"},
        "queries": 30,
        "k": 20,
        "resamples": 100,
        "methods": METHODS,
        **changes,
    }
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return str(path)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_open_set_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    # What the facts file says of sentences is of another corpus: nobody knows where these facts are stated.
    facts = [record | {"trex_sentences": ["elsewhere"]} for record in records(DEMO / "facts.jsonl")]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in facts))
    settings = config(tmp_path / "open.yaml", facts=str(path))
    assert main(["eval", "open", settings, "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((out / "results.json").read_text())
    about = results["about"]
    assert (about["queries"], about["sentences"], about["judge"]) == (30, 6041, "rules (subject and object)")
    # The corpus is annotated beside, and written from templates that the rules see through.
    assert about["agreement"]["precision"] > 0.95
    assert about["agreement"]["recall"] > 0.95
    by_name = {item["name"]: item for item in results["methods"]}
    assert by_name["BM25"]["overall"]["mrr"]["mean"] > 0.8 > by_name["random"]["overall"]["mrr"]["mean"]
    assert not [name for name in by_name["BM25"]["overall"] if name.startswith("coverage")]

    for name, item in by_name.items():
        judged = records(out / "judged" / f"{name.lower()}.jsonl")
        found = records(out / "retrievals" / f"{name.lower()}.jsonl")
        assert len(judged) == len(found) == 30
        reciprocal, precision = [], []
        for one, whole in zip(judged, found, strict=True):
            assert one["proponents"] == whole["proponents"][:10]
            assert one["proponent_scores"] == whole["proponent_scores"][:10]
            assert "proponent_correct" not in whole
            assert one["proponent_correct"] == [score >= 0.5 for score in one["proponent_ais_scores"]]
            correct = one["proponent_correct"]
            reciprocal.append(1 / (1 + correct.index(True)) if True in correct else 0.0)
            precision.append(sum(correct) / 10)
        assert sum(reciprocal) / 30 == pytest.approx(item["overall"]["mrr"]["mean"])
        assert sum(precision) / 30 == pytest.approx(item["overall"]["precision_at_10"]["mean"])
        # By these rules a passage that names both states the fact.
        assert item["categories"]["entails"]["mean"] == pytest.approx(sum(precision) / 30)
        assert item["categories"]["both entities"]["mean"] == 0.0
    for stem in ("methods", "buckets", "categories"):
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{stem}.svg").read_text()

    before = files(out)
    assert main(["eval", "open", settings, "--out", str(out)]) == 0
    assert main(["eval", "open", settings, "--out", str(tmp_path / "again")]) == 0
    assert "MRR" in capsys.readouterr().out
    assert files(out) == files(tmp_path / "again") == before

    # The same split from the files alone, by what they say themselves and by the rules.
    for by in ("records", "rules"):
        content = {
            "facts": str(path),
            "entailment": {"by": by},
            "retrievals": {name: str(out / "judged" / f"{name.lower()}.jsonl") for name in by_name},
            "resamples": 100,
        }
        (tmp_path / "categories.yaml").write_text(yaml.safe_dump(content))
        given = str(tmp_path / "categories.yaml")
        assert main(["eval", "categories", given, "--out", str(tmp_path / by), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert {item["name"]: item["categories"] for item in again["methods"]} == {
            name: item["categories"] for name, item in by_name.items()
        }
        assert main(["eval", "categories", given, "--out", str(tmp_path / f"{by}-again")]) == 0
        assert "both entities" in capsys.readouterr().out
        assert files(tmp_path / by) == files(tmp_path / f"{by}-again")
        assert (tmp_path / by / "categories.png").is_file()
    # By annotation: the facts' own lists, or the corpus's triples.
    content |= {"entailment": {"by": "annotation"}, "corpus": {"paths": [str(DEMO / "corpus.jsonl.gz")]}}
    (tmp_path / "categories.yaml").write_text(yaml.safe_dump(content))
    assert main(["eval", "categories", str(tmp_path / "categories.yaml"), "--out", str(tmp_path / "a")]) == 0
    table = (tmp_path / "a" / "results.md").read_text()
    assert "entailment by annotation" in table


def test_an_nli_judge_keeps_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_nli(tmp_path / "nli", ["entailment", "not_entailment"])
    nli = {"by": "nli", "model": str(model), "batch": 16}
    settings = config(tmp_path / "open.yaml", entailment=nli, queries=5, depth=4, depths=[1, 4], methods=METHODS[:1])
    assert main(["eval", "open", settings, "--out", str(tmp_path / "out"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["about"]["judge"] == "nli (nli, 0.5 or more)"
    assert results["about"]["agreement"]["pairs"] == 20
    kept = (tmp_path / "out" / "entailment.jsonl").read_bytes()
    assert kept.count(b"\n") == 2
    assert main(["eval", "open", settings, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "entailment.jsonl").read_bytes() == kept
    assert "judging" not in capsys.readouterr().err
    for one in records(tmp_path / "out" / "judged" / "bm25.jsonl"):
        assert all(0 < score < 1 for score in one["proponent_ais_scores"])


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"methods": []}, 2, "the list is empty"),
        ({"methods": [{"name": "g", "kind": "gold"}]}, 2, "'g' is the gold sentences, and none are known here"),
        ({"methods": [*METHODS[:2], {**METHODS[2], "rule": "weights"}]}, 2, "set its rule to rank"),
        ({"k": 5}, 2, "depth, which is 10, must not be above k, which is 5"),
        ({"depth": 5}, 2, "depths must lie between 1 and depth, which is 5"),
        ({"entailment": None}, 2, "the config's entailment: Field required"),
        ({"entailment": {"by": "hope"}}, 2, "'annotation', 'rules', 'nli'"),
        ({"entailment": {"by": "nli", "model": "none"}}, 3, "no model of natural language inference in 'none'"),
        ({"entailment": {"by": "nli", "model": str(DEMO / "model")}}, 2, "has no label of its own for entailment"),
        ({"facts": "none.jsonl"}, 3, "there is no facts file 'none.jsonl'"),
        ({"facts": "/dev/null"}, 3, "there is no facts file"),
        ({"prompt": 2, "facts": "short"}, 2, "has no prompt2"),
        ({"facts": "empty"}, 2, "holds no facts"),
        ({"facts": "short", "entailment": {"by": "annotation"}}, 2, "judge entailment by rules or nli"),
        ({"queries": 2000}, 2, "there are 1,172 facts; 2,000 queries"),
    ],
)
def test_bad_settings_end_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, sentence: str
) -> None:
    fact = {"fact_id": "f", "relation": "r", "entity0": "No", "entity1": "Where", "prompt0": "No is"}
    (tmp_path / "short").write_text(json.dumps(fact) + "\n")
    (tmp_path / "empty").write_text("\n")
    if changes.get("facts") in ("short", "empty"):
        changes = {"queries": None} | changes | {"facts": str(tmp_path / changes["facts"])}
    settings = config(tmp_path / "open.yaml", **changes)
    assert main(["eval", "open", settings, "--out", str(tmp_path / "out")]) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert sentence in shown.splitlines()[-1]
    assert not (tmp_path / "out" / "results.json").exists()


def test_bad_retrieval_files_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fact, *_) = records(DEMO / "facts.jsonl")
    good = {"fact_id": fact["fact_id"], "proponents": ["a"], "proponent_ids": ["1"]}
    cases: list[tuple[str, str, Any]] = [
        ("retrievals.jsonl:2: the field 'proponents' is missing", "rules", [good, {"fact_id": fact["fact_id"]}]),
        ("1 'proponents' and 2 'proponent_ids'", "rules", [good | {"proponent_ids": ["1", "2"]}]),
        ("the fact 'other' is not in", "rules", [good | {"fact_id": "other"}]),
        ("neither 'proponent_correct' nor 'proponent_ais_scores'", "records", [good]),
        ("'proponent_ais_scores' is not one value for each", "records", [good | {"proponent_ais_scores": [0.1, 0.2]}]),
        ("holds no record that found anything", "rules", [good | {"proponents": [], "proponent_ids": []}]),
        ("not valid JSON", "rules", None),
    ]
    for sentence, by, lines in cases:
        path = tmp_path / "retrievals.jsonl"
        path.write_text("{" if lines is None else "".join(json.dumps(line) + "\n" for line in lines))
        content = {"facts": str(DEMO / "facts.jsonl"), "retrievals": {"m": str(path)}, "entailment": {"by": by}}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
        assert main(["eval", "categories", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]

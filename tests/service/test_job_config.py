"""What a job's configuration takes from the operator, from the request and from the index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.gateway.job_config import JobConfiguration
from trackstar.errors import InvalidRequest, NotFound, TrackstarError
from trackstar.index_config import IndexConfig
from trackstar.runs import Plan, save_plan

_CORPUS = {"paths": ["/data/first.jsonl"], "text_field": "words"}


def _derive(root: Path, base: Any, spec: dict[str, Any]) -> dict[str, Any]:
    (root / "base.yaml").write_text(json.dumps(base))
    configuration = JobConfiguration(root / "base.yaml", ["/data/new/", "s3://bucket/new"], root)
    found: dict[str, Any] = yaml.safe_load(configuration.derive(spec))
    return found


def _planned(root: Path, number: int, *paths: str) -> None:
    corpus = {**_CORPUS, "paths": list(paths), "fingerprint": "f"}
    save_plan(root / "rows", number, Plan(runs=[], corpus=corpus, bad_records=0, bad_examples=()))


def test_nothing_asked_changes_only_what_a_request_decides(tmp_path: Path) -> None:
    base = {"index": "s3://i", "workers": {"x": 1}, "build": {"corpus": _CORPUS, "model": "m", "activate": True}}
    found = _derive(tmp_path, base, {})
    build = {**base["build"], "activate": False, "refit": False, "purge": False}  # type: ignore[dict-item]
    assert found == {**base, "build": build}
    assert not IndexConfig(**found["build"]).activate


def test_what_is_asked_is_the_build_s(tmp_path: Path) -> None:
    base = {
        "build": {
            "corpus": _CORPUS,
            "model": "m",
            "mix": {"kind": "train", "damping": 0.2},
            "code": {"kind": "prefix", "size": 64, "store": "memory"},
        }
    }
    spec = {
        "mix": {"kind": "task", "weight": "crossing"},
        "code": {"kind": "bits"},
        "task_queries": "s3://bucket/new/queries.jsonl",
        "append_paths": ["/data/new/a", "/data/new/b"],
        "refit": True,
    }
    found = _derive(tmp_path, base, spec)
    assert found["index"] == str(tmp_path)
    build = IndexConfig(**found["build"])
    assert (build.mix.kind, build.mix.weight, build.mix.damping) == ("task", "crossing", 0.2)
    assert (build.code.kind, build.code.size, build.code.store) == ("bits", None, "memory")
    assert build.append[0].paths == ("/data/new/a", "/data/new/b")
    assert (build.append[0].text_field, build.refit, build.purge) == ("words", True, False)
    assert build.task_queries == "s3://bucket/new/queries.jsonl"


def test_what_was_appended_before_stays_where_it_is(tmp_path: Path) -> None:
    _planned(tmp_path, 0, "/data/first.jsonl")
    _planned(tmp_path, 1, "/data/operators.jsonl")
    _planned(tmp_path, 2, "/data/new/a", "/data/new/b")
    operators = {**_CORPUS, "paths": ["/data/operators.jsonl"]}
    base = {"build": {"corpus": _CORPUS, "append": [operators], "model": "m"}}
    found = _derive(tmp_path, base, {"append_paths": ["/data/new/b", "/data/new/c"]})
    parts = [part["paths"] for part in found["build"]["append"]]
    assert parts == [["/data/operators.jsonl"], ["/data/new/a", "/data/new/b"], ["/data/new/c"]]
    assert all("fingerprint" not in part for part in found["build"]["append"])
    again = _derive(tmp_path, base, {"append_paths": ["/data/new/a"]})
    assert [part["paths"] for part in again["build"]["append"]] == parts[:2]


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}", "build: 1", "build: {corpus: x}", "build: {corpus: {paths: [a]}, append: [1]}"]
)
def test_what_the_operator_cannot_mean_is_said(tmp_path: Path, content: str) -> None:
    base = tmp_path / "base.yaml"
    configuration = JobConfiguration(base, [], tmp_path)
    with pytest.raises(NotFound, match="no reindex configuration"):
        configuration.check()
    base.write_text(content)
    with pytest.raises(InvalidRequest):
        configuration.check()
    with pytest.raises(TrackstarError, match="no job can be made now") as failed:
        configuration.derive({})
    assert not isinstance(failed.value, InvalidRequest)

"""Groups, tables and plots of results that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trackstar.evaluation.facts import Fact
from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.measures import measure_names
from trackstar.evaluation.plots import draw_all
from trackstar.evaluation.report import difference, groupings, markdown, summarise

DEPTHS = (1, 10)


def fact(number: int, relation: str, frequency: int, bucket: str) -> Fact:
    return Fact(
        fact_id=f"f{number}",
        relation=relation,
        target="t",
        aliases=(),
        frequency=frequency,
        bucket=bucket,
        gold=(0,),
        fields={},
    )


FACTS = [fact(number, "big" if number < 12 else "small", 9 - number % 3, f"b{number % 3}") for number in range(15)]
RIGHT = {f"f{number}": number % 2 == 0 for number in range(10)}


def results() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    groups = groupings(FACTS, RIGHT)
    bootstrap = Bootstrap(resamples=100)
    methods = [
        {
            "name": name,
            "fitted": fitted,
            **summarise(generator.random((15, len(measure_names(DEPTHS)))), groups, bootstrap, DEPTHS),
        }
        for name, fitted in (("one | two", {}), ("three", {"lambda": 0.25, "weights": {"a": 0.5}}))
    ]
    about = {
        "queries": 15,
        "facts": 20,
        "sentences": 1000,
        "k": 100,
        "gold_source": "auto",
        "gold_agreeing": 0,
        "gold_differing": 0,
        "without_gold": 2,
        "level": 0.95,
        "ties": "smaller first",
    }
    return {"about": about, "methods": methods}


def test_groups_are_in_order_and_leave_out_what_is_not_known() -> None:
    bucket, relation, prediction = groupings(FACTS, RIGHT)
    assert bucket.order == ("b2", "b1", "b0")
    assert relation.order == ("big", "small")
    assert prediction.order == ("right", "wrong")
    assert prediction.labels.count("") == 5
    assert [group.name for group in groupings(FACTS, {})] == ["bucket", "relation"]


def test_groups_hold_the_means_of_their_own_queries() -> None:
    values_QM = np.random.default_rng(1).random((15, len(measure_names(DEPTHS))))
    found = summarise(values_QM, groupings(FACTS, RIGHT), Bootstrap(resamples=100), DEPTHS)
    small = found["by"]["relation"][1]
    assert (small["label"], small["queries"]) == ("small", 3)
    assert small["map"]["mean"] == pytest.approx(values_QM[12:, 1].mean())
    assert small["map"]["low"] <= small["map"]["mean"] <= small["map"]["high"]
    same = difference(values_QM, values_QM, Bootstrap(resamples=100), DEPTHS)
    assert same["mrr"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_the_table_names_every_method_group_and_fit() -> None:
    text = markdown(results())
    assert "| one \\| two | ." in text
    assert "2 facts without gold left out" in text
    assert "| method | b2 (5) | b1 (5) | b0 (5) |" in text
    # Relations of few queries are left to results.json.
    assert "| method | big (12) |" in text
    assert "| method | right (5) | wrong (5) |" in text
    assert "- three: lambda 0.250; weights a 0.5" in text


def test_plots_are_the_same_bytes_twice(tmp_path: Path) -> None:
    names = draw_all(results(), tmp_path / "a")
    assert names == draw_all(results(), tmp_path / "b")
    assert sorted(names) == sorted(
        f"{name}{suffix}" for name in ("methods", "buckets", "predictions") for suffix in (".png", ".svg")
    )
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

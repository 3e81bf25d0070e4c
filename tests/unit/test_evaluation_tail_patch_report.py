"""Numbers, groups, tables and plot of effects that are known by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from trackstar.evaluation.intervals import Bootstrap
from trackstar.evaluation.patching import Measured, drawn, first_of
from trackstar.evaluation.released import groups_of
from trackstar.evaluation.tail_patch_report import draw_patches, patch_tables, summarise_patches
from trackstar.results import Query
from trackstar.tail_patch import PatchEffect, PatchStep

LISTS = {"one": [["a", "b"], ["c"], []], "two | three": [["b", "a"], ["d", "c"], ["a"]]}
# The target's probability goes from a half to these.
AFTER = [{"a": 0.75, "b": 0.25}, {"c": 0.5, "d": 1.0}, {"a": 0.5}]


def query(number: int, **fields: Any) -> Query:
    return Query(query_id=f"q{number}", prompt="p", target="t", fields=fields)


QUERIES = [
    query(0, relation="capital", is_8b_correct=True, c4_frequency=9, c4_frequency_bucket="8-15"),
    query(1, relation="capital", is_8b_correct=False, trackstar={"c4_frequency_bucket": "2-3"}, c4_frequency=2),
    query(2),
]


def results() -> dict[str, Any]:
    effects = [
        {text: PatchEffect(loss_before=math.log(2), loss_after=-math.log(after)) for text, after in known.items()}
        for known in AFTER
    ]
    measured = Measured(queries=QUERIES, effects={"SGD": effects}, steps={"SGD": PatchStep()}, model="digest")
    return summarise_patches(measured, LISTS, groups_of(QUERIES), Bootstrap(resamples=100), [1, 2])


def test_means_differences_and_groups_are_those_by_hand() -> None:
    one, two = ({**item, **item["steps"][0]} for item in results()["methods"])
    # First passages: one +1/4, 0 and nothing; two -1/4, +1/2, 0.
    assert one["overall"]["probability_at_1"]["mean"] == pytest.approx(0.25 / 3)
    assert two["overall"]["probability_at_1"]["mean"] == pytest.approx(0.25 / 3)
    # Of two: one (1/4 - 1/4) / 2, 0, 0; two 0, (1/2 + 0) / 2, 0.
    assert one["overall"]["probability_at_2"]["mean"] == pytest.approx(0.0)
    assert two["overall"]["probability_at_2"]["mean"] == pytest.approx(0.25 / 3)
    assert two["overall"]["loss_at_1"]["mean"] == pytest.approx((math.log(2) - math.log(2)) / 3)
    assert one["overall"]["loss_at_1"]["mean"] == pytest.approx(-math.log(1.5) / 3)
    assert two["against_first"]["probability_at_2"]["mean"] == pytest.approx(0.25 / 3)
    assert one["against_first"]["probability_at_1"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    by = {
        group: [(part["label"], part["queries"], part["probability_at_1"]["mean"]) for part in parts]
        for group, parts in two["by"].items()
    }
    # A query that tells nothing of itself is in no group.
    assert by == {
        "bucket": [("2-3", 1, pytest.approx(0.5)), ("8-15", 1, pytest.approx(-0.25))],
        "relation": [("capital", 2, pytest.approx(0.125))],
        "prediction": [("right", 1, pytest.approx(-0.25)), ("wrong", 1, pytest.approx(0.5))],
    }
    assert results()["pairs"] == 5


def test_tables_show_percentage_points() -> None:
    text = "\n".join(patch_tables(results()))
    assert "### SGD" in text
    assert "| method | tail-patch@1 | tail-patch@2 | loss@2 (nats) |" in text
    assert "| two \\| three | +8.333 [" in text
    assert "| method | 2-3 (1) | 8-15 (1) |\n| --- | --- | --- |\n| one | +0.000 | +0.000 |" in text
    assert "| two \\| three | +0.000 | +25.000 |" in text


def test_the_plot_has_the_same_bytes_twice(tmp_path: Path) -> None:
    assert draw_patches(results(), tmp_path / "a") == draw_patches(results(), tmp_path / "b")
    for name in ("tail-patch.png", "tail-patch.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_judged() -> None:
    assert [list(texts) for texts in first_of(LISTS, 1)] == [["a", "b"], ["c", "d"], ["a"]]
    assert drawn(3, None, 0) == drawn(3, 5, 0) == [0, 1, 2]
    assert drawn(100, 10, 1) == sorted(set(drawn(100, 10, 1)))
    assert len(drawn(100, 10, 1)) == 10
    assert drawn(100, 10, 1) != drawn(100, 10, 2)

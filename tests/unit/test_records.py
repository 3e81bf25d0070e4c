"""Records against the release's field list, and against the trace they are made of."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from trackstar.passages import Passage
from trackstar.records import release_record, to_dict
from trackstar.results import Evidence, Influence, Query, Trace


def influence(rank: int, score: float, *, evidence: Evidence | None = None) -> Influence:
    return Influence(
        rank=rank,
        passage=Passage(
            passage_id=100 + rank,
            doc_id=f"doc-{rank}",
            text=f"Text {rank}: “ü”.",
            source="wiki",
            metadata={"year": "1998"},
            token_start=0,
            token_end=3,
            tokens=np.array([0, 5, 6, 7], dtype=np.int32),
        ),
        score=score,
        z_score=10 * score,
        evidence=evidence,
    )


def trace(**fields: Any) -> Trace:
    evidence = Evidence(tokens=(("Text", 0.125), (" 1", 0.375)), blocks=(("layers 0-1 attention", 0.5),), overlap=0.25)
    return Trace(
        query=Query(query_id="q7", prompt="The capital of Peru is", target="Lima", fields=fields),
        proponents=(influence(1, 0.5, evidence=evidence), influence(2, 0.25)),
        opponents=(influence(3, -0.125),),
        loss=1.5,
        background_mean=0.01,
        background_std=0.05,
        generation="abc",
        exact=False,
        examined=2000,
        seconds={"encode": 0.1},
    )


def test_a_plain_query_has_the_releases_keys_and_nothing_else() -> None:
    record = release_record(trace(), query_set="mine")
    extras = record.pop("trackstar")
    assert record == {
        "example_id": "q7",
        "query_set": "mine",
        "inputs_plaintext": "The capital of Peru is",
        "targets_plaintext": "Lima",
        "proponents": ["Text 1: “ü”.", "Text 2: “ü”."],
        "proponent_ids": ["doc-1", "doc-2"],
        "proponent_scores": [0.5, 0.25],
        "opponents": ["Text 3: “ü”."],
        "opponent_ids": ["doc-3"],
        "opponent_scores": [-0.125],
    }
    assert extras == {
        "proponent_passage_ids": [101, 102],
        "proponent_z_scores": [5.0, 2.5],
        "opponent_passage_ids": [103],
        "opponent_z_scores": [-1.25],
        "background_mean": 0.01,
        "background_std": 0.05,
        "loss": 1.5,
        "generation": "abc",
        "exact": False,
        "examined": 2000,
        "seconds": {"encode": 0.1},
    }


def test_a_querys_own_release_fields_are_carried_over() -> None:
    own = {
        "query_set": "trex",
        "fact_id": "f1",
        "relation": "capital",
        "entity0": "Peru",
        "groundtruth": "Lima",
        "c4_frequency": 12,
        "8b_generations": ["Lima", "Cusco"],
        "8b_confidence": 0.75,
        "is_8b_correct": True,
    }
    record = release_record(trace(**own))
    assert {name: record[name] for name in own} == own


def test_a_fact_without_ground_truth_is_its_second_entity() -> None:
    assert release_record(trace(fact_id="f1", entity1="Lima"))["groundtruth"] == "Lima"
    assert release_record(trace(entity1="Lima", groundtruth="City of Lima"))["groundtruth"] == "City of Lima"
    assert "groundtruth" not in release_record(trace(fact_id="f1"))


def test_another_rankings_verdicts_and_unknown_fields_are_left_out() -> None:
    foreign = {
        "proponents": ["theirs"],
        "proponent_correct": [True],
        "proponent_ais_scores": [0.9],
        "note": "private",
        "trackstar": {"loss": 0.0},
    }
    record = release_record(trace(**foreign))
    assert record["proponents"][0].startswith("Text 1")
    assert record["trackstar"]["loss"] == 1.5
    assert not {"proponent_correct", "proponent_ais_scores", "note"} & record.keys()


def test_absent_8b_fields_stay_absent() -> None:
    assert not [name for name in release_record(trace(fact_id="f1")) if name.startswith("8b_")]


def test_a_dictionary_holds_everything() -> None:
    found = to_dict(trace())
    assert found["probability"] == pytest.approx(math.exp(-1.5))
    assert found["background"] == {"mean": 0.01, "std": 0.05}
    first, second = found["proponents"]
    assert first["passage"] == {
        "passage_id": 101,
        "doc_id": "doc-1",
        "source": "wiki",
        "metadata": {"year": "1998"},
        "token_start": 0,
        "token_end": 3,
        "text": "Text 1: “ü”.",
    }
    assert first["evidence"] == {
        "overlap": 0.25,
        "tokens": [{"text": "Text", "contribution": 0.125}, {"text": " 1", "contribution": 0.375}],
        "blocks": [{"block": "layers 0-1 attention", "contribution": 0.5}],
    }
    assert second["evidence"] is None
    assert [item["rank"] for item in found["opponents"]] == [3]


@pytest.mark.parametrize("make", [release_record, to_dict])
def test_both_are_plain_json(make: Any) -> None:
    found = make(trace(fact_id="f1", entity0_alias=["Peru", "República"]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found

"""Facts and their gold sentences: both annotations, aliases, URIs, buckets, and every kind of bad input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trackstar.corpus import CorpusConfig
from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.config import FactsConfig, make_config
from trackstar.evaluation.facts import FactSet, GoldSource, bucket_of
from trackstar.evaluation.selection import Selection
from trackstar.evaluation.sentences import Sentences


def fact(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "fact_id": f"f{number}",
        "relation": "capital",
        "entity0": f"Land {number}",
        "entity1": f"City {number}",
        "entity1_alias": [],
        "trex_sentences": [f"s{number}"],
        "prompt0": f"The capital of Land {number} is",
        **changes,
    }


def written(path: Path, facts: Sequence[Any]) -> Path:
    path.write_text("".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in facts))
    return path


def corpus(*triples: list[Any]) -> Sentences:
    ids = [f"s{number}" for number in range(len(triples))]
    return Sentences.of(ids, [f"text {name}" for name in ids], [json.dumps(stated) for stated in triples])


FIVE = corpus([], [], [], [], [])


def read(path: Path, facts: Sequence[Any], sentences: Sentences = FIVE, source: GoldSource = "auto") -> FactSet:
    return FactSet.read(written(path / "facts.jsonl", facts), sentences, source=source)


def test_gold_comes_from_the_facts_own_list(tmp_path: Path) -> None:
    found = read(tmp_path, [fact(1, trex_sentences=["s3", "s1"], entity1_alias=["Ville"], c4_frequency=9)])
    (only,) = found.facts
    assert only.gold == (1, 3)
    assert only.targets == ("City 1", "Ville")
    assert (only.frequency, only.bucket, only.relation) == (9, "8-15", "capital")
    query = only.query(0)
    assert (query.query_id, query.prompt, query.target) == ("f1", "The capital of Land 1 is", "City 1")
    assert (found.without_gold, found.agreeing, found.differing) == (0, 0, 0)


@pytest.mark.parametrize(
    "triple",
    [
        "Land_1 | capital | City_1",
        'land 1 | Capital | "City 1"',
        "The Land | capital | Ville",
        ["Land 1", "capital", "City 1"],
        "Q1 | P36 | Q2",
    ],
)
def test_triples_state_a_fact_by_names_aliases_or_uris(tmp_path: Path, triple: Any) -> None:
    uris = {"entity0_uri": "Q1", "relation_uri": "P36", "entity1_uri": "Q2"}
    record = fact(1, trex_sentences=[], entity0_alias=["The Land"], entity1_alias=["Ville"], **uris)
    others = ["Land 1 | capital | City 2", "Land 2 | capital | City 1", "Land 1 | largestCity | City 1"]
    found = read(tmp_path, [record], corpus(others, [triple]))
    assert found.facts[0].gold == (1,)
    assert found.facts[0].frequency == 1


def test_agreement_of_both_annotations_is_counted(tmp_path: Path) -> None:
    sentences = corpus([], ["Land 1 | capital | City 1"], ["Land 1 | capital | City 1", "Land 2 | capital | City 2"])
    facts = [fact(1), fact(2)]
    found = read(tmp_path, facts, sentences)
    assert (found.agreeing, found.differing) == (1, 1)
    assert [item.gold for item in found.facts] == [(1,), (2,)]
    by_triple = read(tmp_path, facts, sentences, "fact_triples")
    assert [item.gold for item in by_triple.facts] == [(1, 2), (2,)]


def test_facts_without_gold_are_left_out_and_counted(tmp_path: Path) -> None:
    found = read(tmp_path, [fact(1), fact(2, trex_sentences=[])])
    assert [item.fact_id for item in found.facts] == ["f1"]
    assert found.without_gold == 1
    with pytest.raises(InvalidRequest, match=r"none of the 1 facts .* has a gold sentence"):
        read(tmp_path, [fact(2, trex_sentences=[])])
    with pytest.raises(InvalidRequest, match="by fact_triples"):
        read(tmp_path, [fact(1)], FIVE, "fact_triples")


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ([fact(1), fact(1)], "facts.jsonl:2: the fact_id 'f1' stands on line 1 already"),
        ([fact(1, trex_sentences=["s1", "else"])], "names the sentence 'else', which is not in the corpus"),
        ([fact(1, entity1="  ")], "the target (field 'entity1') is empty"),
        ([fact(1, relation=3)], "the field 'relation' is missing or not a text"),
        ([fact(1, trex_sentences="s1")], "the field 'trex_sentences' is not a list of texts"),
        ([fact(1, c4_frequency="many")], "the field 'c4_frequency' is not a whole number"),
        (["{"], "facts.jsonl:1: not valid JSON"),
        (["[]"], "a fact must be a JSON object, not list"),
        ([], "holds no facts"),
    ],
)
def test_bad_facts_are_refused_in_one_sentence(tmp_path: Path, facts: Sequence[Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(tmp_path, facts)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_bad_annotations(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no facts file"):
        FactSet.read(tmp_path / "none.jsonl", FIVE)
    for annotation in ("Land 1 capital City 1", {"subject": "Land 1"}, ["a", "b"], ["a", "b", 3]):
        with pytest.raises(InvalidRequest, match="the sentence 's0' has fact_triples"):
            read(tmp_path, [fact(1)], corpus([annotation], []))
    with pytest.raises(InvalidRequest, match="has no prompt1"):
        read(tmp_path, [fact(1)]).facts[0].query(1)


def test_sentences_keep_the_corpus_order_and_refuse_an_id_twice(tmp_path: Path) -> None:
    lines = [{"sentence_id": "b", "text": "One.", "fact_triples": ["x | y | z"]}, {"sentence_id": "a", "text": "Two."}]
    written(tmp_path / "one.jsonl", lines)
    found = Sentences.read(CorpusConfig(paths=(str(tmp_path / "one.jsonl"),)))
    assert (list(found.ids), list(found.texts), list(found.triples)) == (
        ["b", "a"],
        ["One.", "Two."],
        ['["x | y | z"]', ""],
    )
    written(tmp_path / "two.jsonl", [*lines, lines[0]])
    with pytest.raises(InvalidRequest, match=r"two sentences of the id 'b' \(numbers 1 and 3\)"):
        Sentences.read(CorpusConfig(paths=(str(tmp_path / "two.jsonl"),)))


def test_the_digest_is_of_the_content() -> None:
    first = Sentences.of(["a", "b"], ["x", "y"])
    assert first.digest == Sentences.of(["a", "b"], ["x", "y"]).digest
    assert first.digest != Sentences.of(["a", "b"], ["xy", ""]).digest
    assert first.digest != Sentences.of(["b", "a"], ["x", "y"]).digest


def test_buckets_are_six_and_leave_no_gap() -> None:
    labels = [bucket_of(frequency) for frequency in range(70)]
    assert list(dict.fromkeys(labels)) == ["below 2", "2-3", "4-7", "8-15", "16-31", "32 or more"]
    assert bucket_of(1, (1, 2)) == "1"


def config(**changes: Any) -> dict[str, Any]:
    methods = [{"name": "BM25", "kind": "lexical"}]
    return {"facts": "f", "corpus": {"paths": ["c"]}, "methods": methods, **changes}


def test_selections_share_no_fact_and_follow_the_seed(tmp_path: Path) -> None:
    sentences = corpus(*[[] for _ in range(21)])
    facts = read(tmp_path, [fact(number) for number in range(1, 21)], sentences).facts
    settings = make_config(FactsConfig, config(queries=8, held_out=5, task_queries=6))
    drawn = Selection.draw(facts, settings)
    parts = [[item.fact_id for item in part.facts] for part in (drawn.evaluated, drawn.held_out, drawn.task)]
    assert [len(part) for part in parts] == [8, 5, 6]
    assert len(set().union(*parts)) == 19
    again = Selection.draw(facts, settings)
    assert [item.fact_id for item in again.evaluated.facts] == parts[0]
    other = Selection.draw(facts, settings.model_copy(update={"seed": 1}))
    assert [item.fact_id for item in other.evaluated.facts] != parts[0]
    whole = Selection.draw(facts, make_config(FactsConfig, config(held_out=5)))
    assert len(whole.evaluated.facts) == 15
    with pytest.raises(InvalidRequest, match="there are 20 facts with gold sentences; 16 queries"):
        Selection.draw(facts, make_config(FactsConfig, config(queries=16, held_out=5)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": []}, "methods: the list is empty"),
        ({"methods": [{"name": "x", "kind": "magic"}]}, "methods.0"),
        ({"methods": [{"name": "A b", "kind": "gold"}, {"name": "a-b", "kind": "gold"}]}, "share the files 'a-b'"),
        ({"methods": [{"name": "x", "kind": "fusion", "of": ["y", "z"]}]}, "needs the method 'y' listed before it"),
        ({"methods": [{"name": "x", "kind": "gold", "size": 3}]}, "unknown key 'methods.0.gold.size'"),
        ({"depths": [5, 1]}, "depths must ascend"),
        ({"depths": [200]}, "depths must lie between 1 and k, which is 100"),
        ({"bucket_starts": [4, 2]}, "bucket_starts must ascend"),
        ({"k": 0}, "the config's k"),
        ({"more": 1}, "unknown key 'more'"),
        ({"prompt": 3}, "the config's prompt"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_config(FactsConfig, config(**changes))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_generation_and_a_mix_exclude_each_other() -> None:
    method = {"name": "x", "kind": "influence", "index": "i", "generation": "g", "mix": {"kind": "none"}}
    with pytest.raises(InvalidRequest, match="either a generation, or a mix"):
        make_config(FactsConfig, config(methods=[method]))

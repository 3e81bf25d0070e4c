"""Rules on names, judges of entailment, and categories, worked out by hand; NLI with tiny models of two and three
labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from tests.tiny import save_tokenizer
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.evaluation.categories import CATEGORIES, category_of, shares_of
from trackstar.evaluation.entailment import Annotation, Judge, Pair, Rules, agreement
from trackstar.evaluation.entailment_settings import NliSettings, RulesSettings
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.judging import Judging, Listed, category_shares
from trackstar.evaluation.measures import measure, measure_names
from trackstar.evaluation.name_rules import Names, words_of
from trackstar.evaluation.nli import Nli
from trackstar.results import Query


def fact(subject: str = "Peru", target: str = "Lima", fact_id: str = "f", **fields: Any) -> Fact:
    aliases = tuple(fields.get("entity1_alias", ()))
    given = {"entity0": subject, **fields}
    return Fact(
        fact_id=fact_id,
        relation=fields.get("relation", "capital"),
        target=target,
        aliases=aliases,
        frequency=1,
        bucket="b",
        gold=(),
        fields=given,
    )


def pair(text: str, passage_id: str = "p", of: Fact | None = None) -> Pair:
    return Pair(fact=of or fact(), hypothesis="The capital of Peru is Lima", passage_id=passage_id, text=text)


def scores(judge: Judge, *pairs: Pair) -> list[float]:
    found: list[float] = judge.scores(pairs, lambda _done, _total: None).tolist()
    return found


@pytest.mark.parametrize(
    ("text", "name", "occurs"),
    [
        ("Oman lies east of it.", "Oman", True),
        ("A Roman road", "Oman", False),
        ("Canada's capital", "CANADA", True),
        ("Besançon and Zürich", "zurich", True),
        ("Die große Straße", "GROSSE STRASSE", True),
        ("Alan_Bean was born", "Alan Bean", True),
        ("songs by Beatles fans", "The Beatles", True),
        ("Jean-Paul Sartre", "jean paul sartre", True),
        ("Paul Jean", "Jean Paul", False),
        ("It has 1,234,567 people.", "1234567", True),
        ("It has 1234567 people.", "1,234,567", True),
        ("scores 1,23,4", "1234", False),
        ("3.50 metres", "3.5", True),
        ("in 1990.", "1990", True),
        ("100 people", "10", False),
        ("born on March 12th, 1999 there", "12 March 1999", True),
        ("born on 12 Mar. 1999 there", "1999-03-12", True),
        ("born on the 3rd of May 1808", "May 3, 1808", True),
        ("born on 1999-03-12", "March 1999", True),
        ("born on 1999-03-12", "1999", True),
        ("born on March 13, 1999", "12 March 1999", False),
        ("anything", "?!", False),
        ("", "x", False),
    ],
)
def test_names_occur_word_by_word_in_one_form(text: str, name: str, occurs: bool) -> None:
    assert Names(text).holds(name) is occurs


def test_words_in_the_form_that_is_compared() -> None:
    assert words_of("On 05 June 2001, É-Mail 1,000.50!") == ["on", "5", "june", "2001", "e", "mail", "1000.5"]
    assert words_of("2001-13-01") == ["1", "13", "2001"]


def test_a_relation_is_hinted_at_by_one_of_its_longer_words() -> None:
    assert Names("He was born in Rome").hints_at("bornIn")
    assert Names("the capitals of").hints_at("capital of")
    assert not Names("Rome is in Italy").hints_at("birthPlace")
    assert Names("Rome is in Italy").hints_at("is in")


def test_rules_want_subject_and_object_by_any_alias() -> None:
    known = fact(entity0_alias=["Republic of Peru"], entity1_alias=["City of Kings"], relation="capital")
    texts = ["Lima is in Peru.", "Lima is old.", "The City of Kings rules the Republic of Peru.", "Peru."]
    assert scores(Rules(), *(pair(text, of=known) for text in texts)) == [1.0, 0.0, 1.0, 0.0]
    texts = ["Lima is in Peru.", "Lima, the capital of Peru."]
    assert scores(Rules(relation=True), *(pair(text, of=known) for text in texts)) == [0.0, 1.0]


def test_annotation_knows_passages_by_their_ids() -> None:
    judge = Annotation({"f": {"p1"}, "g": set()})
    assert scores(judge, pair("x", "p1"), pair("x", "p2"), pair("x", "p1", fact(fact_id="g"))) == [1.0, 0.0, 0.0]
    with pytest.raises(InvalidRequest, match="judge entailment by rules or nli"):
        Annotation({"f": set()})


def test_agreement_worked_out_by_hand() -> None:
    entailed = {("f", "1"): True, ("f", "2"): True, ("f", "3"): False, ("f", "4"): True, ("g", "1"): True}
    found = agreement(entailed, {"f": {"1", "3", "4", "9"}, "g": set()})
    assert found == {"pairs": 4, "judged": 3, "annotated": 3, "precision": 2 / 3, "recall": 2 / 3}
    assert agreement({("f", "1"): False}, {"f": {"2"}}) == {
        "pairs": 1,
        "judged": 0,
        "annotated": 0,
        "precision": None,
        "recall": None,
    }
    assert agreement(entailed, {"g": set()}) is None


def test_categories_worked_out_by_hand() -> None:
    known = fact(entity1_alias=["City of Kings"])
    texts = ["Lima, Peru", "Peru and the city of kings", "Lima", "Peru", "Oslo"]
    assert category_of(True, known, "Oslo") == "entails"
    assert [category_of(False, known, text) for text in texts] == [
        "both entities",
        "both entities",
        "one entity",
        "one entity",
        "neither",
    ]
    lists = [[(text, place == 1) for place, text in enumerate(texts)], [], [("Oslo", False)]]
    assert shares_of([known, known, known], lists).tolist() == [[0.2, 0.2, 0.4, 0.2], [0, 0, 0, 1]]
    assert shares_of([known], [[]]).shape == (0, len(CATEGORIES))


def test_judged_lists_give_the_measures_worked_out_by_hand(tmp_path: Path) -> None:
    query = Query(query_id="f", prompt="The capital of Peru is", target="Lima")
    texts = ["Oslo", "Lima in Peru", "Lima", "Peru has Lima"]
    listed = [Listed(query=query, fact=fact(), ids=list("abcd"), texts=texts)]
    lists = {"one": listed, "two": [Listed(query=query, fact=fact(), ids=["b"], texts=[texts[1]])]}
    judged = Judging(RulesSettings(by="rules"), {"f": {"b", "c"}}, tmp_path / "cache").judge(lists)
    (hits_K,) = judged.hits("one")
    assert hits_K.tolist() == [False, True, False, True]
    found = dict(zip(measure_names((1, 4)), measure(hits_K, 4, (1, 4)).tolist(), strict=True))
    assert (found["mrr"], found["map"]) == (0.5, (1 / 2 + 2 / 4) / 4)
    assert (found["recall_at_1"], found["recall_at_4"], found["precision_at_4"]) == (0.0, 1.0, 0.5)
    assert judged.agreement == {"pairs": 4, "judged": 2, "annotated": 2, "precision": 0.5, "recall": 0.5}
    assert category_shares(listed, judged.hits("one"), 4).tolist() == [[0.5, 0.0, 0.25, 0.25]]
    assert category_shares(listed, judged.hits("one"), 1).tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert not (tmp_path / "cache").exists()


def save_nli(folder: Path, labels: list[str]) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        pad_token_id=0,
        initializer_range=1.0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    # Pads as such models' tokenizers do.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    return folder


TEXTS = ["Lima is the capital of Peru.", "Rain fell.", "Peru is ruled from Lima", "x", "Lima " * 40]


@pytest.mark.parametrize(
    "labels", [["contradiction", "ENTAILMENT", "neutral"], ["entailment", "not_entailment"], ["no", "entails"]]
)
def test_nli_is_the_probability_of_entailment(tmp_path: Path, labels: list[str]) -> None:
    folder = save_nli(tmp_path / "nli", labels)
    pairs = [pair(text) for text in TEXTS]
    judge = Nli(NliSettings(by="nli", model=str(folder), batch=2, max_tokens=64), tmp_path / "cache.jsonl")
    found = scores(judge, *pairs)
    assert judge.name == "nli (nli, 0.5 or more)"
    # One by one, without padding.
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    place = [label.lower()[:6] for label in labels].index("entail")
    for one, score in zip(pairs, found, strict=True):
        inputs = tokenizer(one.text, one.hypothesis, truncation="longest_first", max_length=64, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(1)[0, place].item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in found}) > 1


def test_nli_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    folder = save_nli(tmp_path / "nli", ["entailment", "not_entailment"])
    settings = NliSettings(by="nli", model=str(folder), batch=2)
    cache = tmp_path / "cache.jsonl"
    pairs = [pair(text) for text in TEXTS]
    whole = scores(Nli(settings, cache), *pairs, pairs[0])
    content = cache.read_bytes()
    assert content.count(b"\n") == 3
    first_line = content.index(b"\n") + 1
    cache.write_bytes(content[: first_line + 20])  # killed while it wrote the second batch
    assert scores(Nli(settings, cache), *pairs, pairs[0]) == whole
    assert cache.read_bytes() == content
    heard: list[tuple[int, int]] = []
    again = Nli(settings, cache).scores(pairs, lambda done, total: heard.append((done, total)))
    assert (again.tolist(), heard) == (whole[:-1], [])
    cache.write_bytes(b"[1]\n" + content)
    with pytest.raises(CorruptArtifact, match=r"cache.jsonl:1 holds no scores"):
        Nli(settings, cache)


def test_an_nli_folder_without_an_entailment_label_is_refused(tmp_path: Path) -> None:
    for labels, told in (
        (["LABEL_0", "LABEL_1"], "no names"),
        (["not_entailment", "neutral"], "not_entailment, neutral"),
        (["entailment", "entails"], "entailment, entails"),
    ):
        folder = save_nli(tmp_path / labels[0], labels)
        with pytest.raises(InvalidRequest, match=rf"no label of its own for entailment \(its labels: {told}\)"):
            Nli(NliSettings(by="nli", model=str(folder)), tmp_path / "cache")
    with pytest.raises(NotFound, match="no model of natural language inference in"):
        Nli(NliSettings(by="nli", model=str(tmp_path / "none")), tmp_path / "cache")


def test_scores_stay_between_0_and_1_whatever_the_threshold(tmp_path: Path) -> None:
    folder = save_nli(tmp_path / "nli", ["entailment", "neutral", "contradiction"])
    query = Query(query_id="f", prompt="p", target="t")
    listed = [Listed(query=query, fact=fact(), ids=["a", "b"], texts=TEXTS[:2])]
    for threshold in (0.001, 1.0):
        settings = NliSettings(by="nli", model=str(folder), threshold=threshold)
        judged = Judging(settings, {}, tmp_path / "cache").judge({"m": listed})
        assert judged.agreement is None
        assert all(np.all((found >= 0) & (found <= 1)) for found in judged.scores["m"])
        assert judged.hits("m")[0].all() == (threshold < 0.5)

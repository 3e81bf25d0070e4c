"""Loaders of prompt sets on files of our own writing and on bad ones; overlap and distinctness worked out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.config import make_config
from trackstar.evaluation.task_settings import TasksConfig, TaskSettings
from trackstar.evaluation.tasks import Task, is_answered, read_task
from trackstar.evaluation.tasks_run import overlaps, shared_share
from trackstar.results import Query

FILES = Path("examples/evaluation/tasks")


def unasked(queries: Sequence[Query]) -> Mapping[str, str]:
    raise AssertionError(f"the model was asked {len(queries)} queries")


def read(format: str, path: Path | str | None = None, answers: Any = unasked, **settings: Any) -> Task:
    given = {"name": "my task", "format": format, **settings, **({} if path is None else {"path": str(path)})}
    return read_task(TypeAdapter[Any](TaskSettings).validate_python(given), answers)


def first(task: Task) -> tuple[str, str, tuple[str, ...]]:
    item = task.items[0]
    return item.query.prompt, item.query.target, item.choices


def test_copa() -> None:
    task = read("copa", FILES / "copa.jsonl")
    assert (len(task.items), task.grading) == (12, "choice")
    wanted = "the water in it had boiled."
    assert first(task) == ("The kettle began to whistle because", wanted, (wanted, "the kitchen window was open."))
    effect = task.items[1].query
    assert effect.prompt == "The boy left his scarf on the bus so"
    assert effect.target == "his neck was cold on the way home."
    assert (effect.query_id, effect.fields["query_set"]) == ("my task-2", "my task")


def test_copa_keeps_the_word_i(tmp_path: Path) -> None:
    record = {
        "premise": "It rained.",
        "question": "effect",
        "label": 0,
        "choice1": "I stayed in.",
        "choice2": "It did.",
    }
    (tmp_path / "f").write_text(json.dumps(record))
    assert first(read("copa", tmp_path / "f")) == ("It rained so", "I stayed in.", ("I stayed in.", "it did."))


def test_piqa() -> None:
    task = read("piqa", FILES / "piqa.jsonl", labels=str(FILES / "piqa-labels.lst"), limit=2)
    assert (len(task.items), task.grading) == (2, "choice")
    choices = ("rub it with oil now and then.", "leave it in boiling water overnight.")
    assert first(task) == (
        "Question: To keep a wooden spoon from splitting,\nAnswer:",
        choices[0],
        choices,
    )
    assert task.items[1].query.target == task.items[1].choices[1]


def test_word_problems() -> None:
    task = read("gsm8k", FILES / "gsm8k.jsonl")
    assert task.grading == "number"
    prompt, target, choices = first(task)
    assert prompt.startswith("Question: Nora has 3 boxes")
    assert prompt.endswith("?\nAnswer:")
    assert (target, choices) == ("37", ())
    targets = [item.query.target for item in task.items]
    assert targets == ["37", "180", "900", "168", "1000", "8", "7", "-3", "48", "15", "37", "380"]
    task = read("multiarith", FILES / "multiarith.json")
    assert [item.query.target for item in task.items][:4] == ["35", "17", "7", "7.5"]


def test_sums_are_right_and_follow_their_seed() -> None:
    operators = ["plus", "minus", "times"]
    seen = set()
    for wording, pattern in (("words", r"Q: What is (\d+) (\w+) (\d+)\? A:"), ("symbols", r"(\d+) ([-+*]) (\d+) =")):
        task = read("arithmetic", count=300, largest=10, operators=operators, wording=wording)
        assert len({item.query.prompt for item in task.items}) == 300  # all there are
        for item in task.items:
            found = re.fullmatch(pattern, item.query.prompt)
            assert found is not None
            left, operator, right = int(found[1]), found[2], int(found[3])
            results = {"plus": left + right, "minus": left - right, "times": left * right}
            results |= {"+": left + right, "-": left - right, "*": left * right}
            assert results[operator] == int(item.query.target) >= 0
            seen.add(operator)
    assert seen == {"plus", "minus", "times", "+", "-", "*"}
    prompts = [[item.query.prompt for item in read("arithmetic", count=9, seed=seed).items] for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_stories() -> None:
    task = read("stories", FILES / "rocstories.csv")
    assert (len(task.items), task.grading) == (6, "none")
    assert first(task) == (
        "Mara came home late. Her key was not in her bag. She sat down on the stairs. Then her neighbour came up with "
        "a lamp.",
        "Together they found the key under the mat.",
        (),
    )
    cloze = read("stories", FILES / "story-cloze.csv")
    assert cloze.grading == "choice"
    assert [item.query.target for item in cloze.items] == [item.query.target for item in task.items]
    assert [item.choices.index(item.query.target) for item in cloze.items] == [0, 1, 0, 1, 0, 1]


def test_wrong_predictions_ask_for_what_the_model_said(tmp_path: Path) -> None:
    common = {"relation": "capital", "prompt0": "It is", "entity0": "Peru"}
    facts = [
        {"fact_id": "right", "entity1": "Lima", **common},
        {"fact_id": "alias", "entity1": "Oslo", "entity1_alias": ["Christiania"], **common},
        {"fact_id": "wrong", "entity1": "Rome", "c4_frequency": 3, **common},
        {"fact_id": "mute", "entity1": "Cairo", **common},
    ]
    (tmp_path / "f").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    said = {"right": "Lima, a city", "alias": "Christiania.", "wrong": "St. Paul in summer, and more.", "mute": "."}
    task = read("wrong_predictions", tmp_path / "f", lambda queries: said)
    (item,) = task.items
    assert (item.query.query_id, item.query.target) == ("my task-wrong", "St")
    assert item.query.fields["entity1"] == "Rome"
    with pytest.raises(InvalidRequest, match=r"answers none of the 4 facts .* wrongly"):
        read("wrong_predictions", tmp_path / "f", lambda queries: said | {"wrong": "Rome"})


def test_plain() -> None:
    task = read("plain", FILES / "plain.jsonl")
    assert (first(task), task.grading) == (("The capital of Canada is", "Ottawa", ()), "words")
    assert task.items[0].query.query_id == "my task-own-0"


def test_answers_are_graded_by_number_or_words() -> None:
    assert is_answered("It is 1,000 miles.", "1000", "number")
    assert is_answered("-3 inches", "-3", "number")
    assert not is_answered("3 inches", "-3", "number")
    assert not is_answered("100", "10", "number")
    assert not is_answered("many", "10", "number")
    assert is_answered("Ottawa, and its", "Ottawa", "words")
    assert not is_answered("In Ottawa", "Ottawa", "words")


COPA = {"premise": "p.", "choice1": "a", "choice2": "b", "question": "cause", "label": 1}
ROC = "storyid,storytitle,sentence1,sentence2,sentence3,sentence4,sentence5\n"


@pytest.mark.parametrize(
    ("format", "content", "sentence"),
    [
        (
            "copa",
            json.dumps(COPA) + "\n" + json.dumps({**COPA, "choice2": None}),
            "f:2: the field 'choice2' is missing",
        ),
        ("copa", json.dumps({**COPA, "label": -1}), "f:1: the field 'label' is missing or none of 0, 1"),
        (
            "copa",
            json.dumps({**COPA, "question": "why"}),
            "f:1: the field 'question' is 'why', neither cause nor effect",
        ),
        ("copa", "[1]", "f:1: a COPA problem must be a JSON object, not list"),
        ("copa", "{", "f:1: not valid JSON"),
        ("copa", "\n", "the task 'my task' holds nothing to ask"),
        (
            "gsm8k",
            json.dumps({"question": "q", "answer": "it is 3"}),
            "f:1: the field 'answer' does not end with '####'",
        ),
        ("gsm8k", json.dumps({"question": "q"}), "f:1: the field 'answer' is missing"),
        ("multiarith", "{}", "must hold a list of word problems"),
        ("multiarith", '[{"sQuestion": "q"}]', "f, problem 1: the field 'lSolutions' is missing or not one number"),
        ("multiarith", "nothing", "is not valid JSON"),
        ("stories", "a,b\n1,2\n", "f:1: the column 'sentence1' is missing"),
        ("stories", ROC + "1,t,a,b,c,d,e\n2,t,a,b,c\n", "f:3: the field 'sentence4' is missing, empty or not a text"),
        ("stories", ROC, "holds nothing to ask"),
        ("plain", '{"prompt": "p"}', "f:1: no prompt and target"),
        ("plain", '{"query_id": "1", "prompt": "p", "target": "t"}\n' * 2, "two queries of the id '1'"),
        ("wrong_predictions", "", "holds no facts"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, format: str, content: str, sentence: str) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(InvalidRequest) as found:
        read(format, tmp_path / "f")
    assert sentence in str(found.value)


def test_labels_must_fit_their_problems(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.write_text("0\n" * 11)
    with pytest.raises(InvalidRequest, match=r"holds 11 labels and .* 12 problems"):
        read("piqa", FILES / "piqa.jsonl", labels=str(labels))
    labels.write_text("0\n" * 11 + "2\n")
    with pytest.raises(InvalidRequest, match=r"labels:12: the field 'label' is missing or none of 0, 1"):
        read("piqa", FILES / "piqa.jsonl", labels=str(labels))
    for format in ("copa", "gsm8k", "multiarith", "stories", "plain"):
        with pytest.raises(NotFound, match=r"there is no (query )?file"):
            read(format, tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": [{"name": "a", "format": "riddles"}]}, "tasks.0: Input tag 'riddles'"),
        ({"tasks": []}, "name at least one task"),
        ({"tasks": [{"name": "a", "format": "arithmetic"}] * 2}, "two tasks have the name 'a'"),
        ({"tasks": [{"name": "a", "format": "copa"}]}, "the config's tasks.0.copa.path: Field required"),
        ({"tasks": [{"name": "a", "format": "arithmetic", "largest": 3}]}, "there are 18 problems"),
        ({"tasks": [{"name": "a", "format": "wrong_predictions", "path": "f"}]}, "name the model in predictions"),
        ({"methods": []}, "name at least one method"),
        ({"methods": [{"name": "g", "kind": "gold"}]}, "'g' is the gold sentences, and none are known here"),
        (
            {"methods": [{"name": "t", "kind": "influence", "index": "i", "mix": {"kind": "task"}}]},
            "the task mix of 't' needs queries that are not evaluated, and there are none here",
        ),
        ({"depth": 20, "k": 10}, "depth, which is 20, must not be above k, which is 10"),
        ({"k": 10, "tail_patch": {"model": "m", "depths": [20]}}, "tail_patch.depths must not go beyond k"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    good = {
        "corpus": {"paths": ["c"]},
        "tasks": [{"name": "a", "format": "arithmetic"}],
        "methods": [{"name": "BM25", "kind": "lexical"}],
    }
    with pytest.raises(InvalidRequest) as found:
        make_config(TasksConfig, good | changes)
    assert sentence in str(found.value)


def test_overlap_and_distinctness_worked_out_by_hand() -> None:
    query = Query(query_id="q", prompt="The kettle whistles because", target="the water boils.")
    # Of the, kettle, whistles, because, water, boils the first passage has three and the second one.
    texts = ["Water in the kettle", "It boils"]
    assert overlaps(query, texts) == pytest.approx((1.0, (3 / 6 + 1 / 6) / 2))
    assert overlaps(query, texts[1:]) == pytest.approx((1 / 3, 1 / 6))
    assert overlaps(query, []) == (0.0, 0.0)
    assert overlaps(Query(query_id="q", prompt="?", target="!"), texts) == (0.0, 0.0)
    assert shared_share(np.array([1, 2, 3, 4]), np.array([4, 9, 2])) == 0.5
    assert shared_share(np.array([], dtype=np.int64), np.array([], dtype=np.int64)) == 0.0

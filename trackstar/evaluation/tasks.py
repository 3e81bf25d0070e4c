"""Prompt sets beyond facts: loaders of the public files as they are distributed, and a generator of sums.

    format              prompt                                              target
    copa                premise without its full stop, because or so        the right choice
    piqa                Question: goal, Answer:                             the right solution
    gsm8k, multiarith   Question: question, Answer:                         the number
    arithmetic          Q: What is 12 plus 7? A:    or    12 + 7 =          the number
    stories             four sentences                                      the fifth; the right ending
    wrong_predictions   the fact's prompt                                   what the model says instead of the object
    plain               as it is                                            as it is

Contract: the same file gives the same items in its order; ids are the task's name and the item's number or own id. A
line that lacks something is refused with its file, line and field; nothing is left out in silence.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.facts import FactSet
from trackstar.evaluation.json_lines import choice_field, json_lines, text_field
from trackstar.evaluation.predictions import is_right
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.task_settings import (
    ArithmeticSettings,
    CopaSettings,
    Gsm8kSettings,
    MultiArithSettings,
    PiqaSettings,
    PlainSettings,
    StoriesSettings,
    TaskSettings,
    WrongPredictionsSettings,
)
from trackstar.queries import read_queries
from trackstar.results import Query

# How the model's answer is graded: by which choice it prefers, the number it says, the words it says, or not at all.
Grading = Literal["choice", "number", "words", "none"]
# Gives a model's own answers by query id.
Answers = Callable[[Sequence[Query]], Mapping[str, str]]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
# Ends what counts as the model's answer; a full stop does so before white space or at the end.
_ANSWER_END = re.compile(r"[,;:!?]|\.(?=\s|$)")
_SYMBOLS = {"plus": "+", "minus": "-", "times": "*"}
_ROC = tuple(f"sentence{number}" for number in range(1, 6))
_CLOZE = tuple(f"InputSentence{number}" for number in range(1, 5))
_ENDINGS = ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One query; `choices` holds all answers to choose from, the target among them, or nothing."""

    query: Query
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Items in order, and how the model's answers to them are graded."""

    name: str
    items: tuple[Item, ...]
    grading: Grading


def read_task(settings: TaskSettings, answers: Answers) -> Task:
    """The items of a task.

    Args:
        settings: of the task.
        answers: what the model says; only wrong predictions ask it.

    Raises:
        NotFound: there is no such file.
        InvalidRequest: a line lacks something, or there is nothing to ask.
    """
    grading: Grading
    match settings:
        case CopaSettings():
            found, grading = _copa(Path(settings.path)), "choice"
        case PiqaSettings():
            found, grading = _piqa(Path(settings.path), Path(settings.labels)), "choice"
        case Gsm8kSettings():
            found, grading = _gsm8k(Path(settings.path)), "number"
        case MultiArithSettings():
            found, grading = _multiarith(Path(settings.path)), "number"
        case ArithmeticSettings():
            found, grading = _arithmetic(settings), "number"
        case StoriesSettings():
            rows, grading = _stories(Path(settings.path))
            found = iter(rows)
        case WrongPredictionsSettings():
            found, grading = _wrong_predictions(settings, answers), "none"
        case PlainSettings():
            found, grading = (Item(query=query) for query in _plain(settings.path)), "words"
    items = tuple(_named(item, settings.name) for item in islice(found, settings.limit))
    if not items:
        raise InvalidRequest(f"the task {settings.name!r} holds nothing to ask")
    return Task(name=settings.name, items=items, grading=grading)


def is_answered(answer: str, target: str, grading: Grading) -> bool:
    """Whether what the model said is right: the first number in it, or its first words."""
    if grading == "number":
        found, wanted = _first_number(answer), _first_number(target)
        return found is not None and found == wanted
    return is_right(answer, [target])


def _named(item: Item, task: str) -> Item:
    query = item.query
    fields = {**query.fields, "query_set": task}
    return replace(item, query=replace(query, query_id=f"{task}-{query.query_id}", fields=fields))


def _item(number: int, prompt: str, target: str, choices: tuple[str, ...] = ()) -> Item:
    return Item(query=Query(query_id=str(number), prompt=prompt, target=target), choices=choices)


def _copa(path: Path) -> Iterator[Item]:
    for number, (place, record) in enumerate(json_lines(path, "a COPA problem"), start=1):
        premise = text_field(record, place, "premise").strip().rstrip(".")
        asked = text_field(record, place, "question")
        if asked not in ("cause", "effect"):
            raise InvalidRequest(f"{place}: the field 'question' is {asked!r}, neither cause nor effect")
        first, second = (_continued(text_field(record, place, name)) for name in ("choice1", "choice2"))
        right = choice_field(record, place, "label", range(2))
        link = "because" if asked == "cause" else "so"
        yield _item(number, f"{premise} {link}", (first, second)[right], (first, second))


def _continued(sentence: str) -> str:
    """A sentence as it stands behind because or so: its first letter is small, unless the first word is I."""
    sentence = sentence.strip()
    return sentence if re.match(r"I\b", sentence) else sentence[:1].lower() + sentence[1:]


def _piqa(path: Path, labels_path: Path) -> Iterator[Item]:
    records = list(json_lines(path, "a PIQA problem"))
    if not labels_path.is_file():
        raise NotFound(f"there is no file {str(labels_path)!r}")
    labels = labels_path.read_text(encoding="utf-8").split()
    if len(labels) != len(records):
        raise InvalidRequest(
            f"{str(labels_path)!r} holds {len(labels):,} labels and {str(path)!r} {len(records):,} problems; give the "
            "labels of these problems"
        )
    for number, ((place, record), label) in enumerate(zip(records, labels, strict=True), start=1):
        goal, *choices = (text_field(record, place, name).strip() for name in ("goal", "sol1", "sol2"))
        right = choice_field({"label": label}, f"{labels_path}:{number}", "label", range(2))
        yield _item(number, f"Question: {goal}\nAnswer:", choices[right], tuple(choices))


def _gsm8k(path: Path) -> Iterator[Item]:
    for number, (place, record) in enumerate(json_lines(path, "a word problem"), start=1):
        question, answer = (text_field(record, place, name).strip() for name in ("question", "answer"))
        _, mark, last = answer.rpartition("####")
        found = _first_number(last) if mark else None
        if found is None:
            raise InvalidRequest(f"{place}: the field 'answer' does not end with '####' and a number")
        yield _item(number, f"Question: {question}\nAnswer:", _plain_number(found))


def _multiarith(path: Path) -> Iterator[Item]:
    if not path.is_file():
        raise NotFound(f"there is no file {str(path)!r}")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{str(path)!r} is not valid JSON") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InvalidRequest(f"{str(path)!r} must hold a list of word problems")
    for number, record in enumerate(records, start=1):
        place = f"{path}, problem {number}"
        question, solutions = text_field(record, place, "sQuestion").strip(), record.get("lSolutions")
        if not isinstance(solutions, list) or len(solutions) != 1 or not isinstance(solutions[0], int | float):
            raise InvalidRequest(f"{place}: the field 'lSolutions' is missing or not one number")
        yield _item(number, f"Question: {question}\nAnswer:", _plain_number(float(solutions[0])))


def _arithmetic(settings: ArithmeticSettings) -> Iterator[Item]:
    size, generator = settings.largest, np.random.default_rng(settings.seed)
    drawn = generator.choice(len(settings.operators) * size**2, settings.count, replace=False)
    for number, code in enumerate(drawn.tolist(), start=1):
        which, pair = divmod(code, size**2)
        first, second = (part + 1 for part in divmod(pair, size))
        operator = settings.operators[which]
        if operator == "minus":
            # A sum less one of its parts, so that no answer is negative.
            first, second, result = first + second, first, second
        else:
            result = first + second if operator == "plus" else first * second
        if settings.wording == "words":
            prompt = f"Q: What is {first} {operator} {second}? A:"
        else:
            prompt = f"{first} {_SYMBOLS[operator]} {second} ="
        yield _item(number, prompt, str(result))


def _stories(path: Path) -> tuple[list[Item], Grading]:
    if not path.is_file():
        raise NotFound(f"there is no file {str(path)!r}")
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or ()
        cloze = any(name in columns for name in (*_CLOZE, *_ENDINGS))
        needed = (*_CLOZE, *_ENDINGS, "AnswerRightEnding") if cloze else _ROC
        if missing := [name for name in needed if name not in columns]:
            raise InvalidRequest(
                f"{path}:1: the column {missing[0]!r} is missing; a file of ROCStories or Story Cloze is needed"
            )
        items = []
        for number, record in enumerate(reader, start=1):
            place = f"{path}:{reader.line_num}"
            *before, last = (
                text_field(record, place, name).strip() for name in (_ROC if not cloze else (*_CLOZE, *_ENDINGS))
            )
            if cloze:
                choices = (before.pop(), last)
                right = choice_field(record, place, "AnswerRightEnding", range(1, 3)) - 1
                items.append(_item(number, " ".join(before), choices[right], choices))
            else:
                items.append(_item(number, " ".join(before), last))
    return items, "choice" if cloze else "none"


def _wrong_predictions(settings: WrongPredictionsSettings, answers: Answers) -> Iterator[Item]:
    facts = FactSet.read(settings.path, Sentences.of([], []), open_set=True).facts
    queries = [fact.query(settings.prompt) for fact in facts]
    said = answers(queries)
    wrong = [
        (query, target)
        for fact, query in zip(facts, queries, strict=True)
        if not is_right(said[query.query_id], fact.targets)
        and (target := _ANSWER_END.split(said[query.query_id])[0].strip())
    ]
    if not wrong:
        raise InvalidRequest(
            f"the model answers none of the {len(facts):,} facts of {settings.path!r} wrongly, so the task "
            f"{settings.name!r} holds nothing to ask"
        )
    for query, target in wrong:
        yield Item(query=replace(query, target=target))


def _plain(path: str) -> list[Query]:
    queries = read_queries(path)
    seen: set[str] = set()
    for query in queries:
        if query.query_id in seen:
            raise InvalidRequest(f"{path!r} holds two queries of the id {query.query_id!r}; ids must be unique")
        seen.add(query.query_id)
    return queries


def _first_number(text: str) -> float | None:
    found = _NUMBER.search(_THOUSANDS.sub("", text))
    return None if found is None else float(found[0])


def _plain_number(value: float) -> str:
    return str(int(value)) if value.is_integer() else f"{value:g}"

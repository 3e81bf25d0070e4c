"""The settings of an evaluation of tasks, from a YAML file.

Contract: as `config`.

    corpus: {paths: [corpus.jsonl]}
    predictions: {model: my-checkpoint}
    tasks:
      - {name: COPA, format: copa, path: val.jsonl}
      - {name: sums, format: arithmetic, count: 100}
    methods:
      - {name: BM25, kind: lexical}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trackstar.corpus import CorpusConfig
from trackstar.evaluation.categories import DEPTH
from trackstar.evaluation.config import PredictionSettings
from trackstar.evaluation.method_settings import (
    InfluenceSettings,
    MethodSettings,
    Settings,
    check_methods,
    some_methods,
)
from trackstar.evaluation.open_config import refuse_gold
from trackstar.evaluation.patch_settings import TailPatchSettings

Operator = Literal["plus", "minus", "times"]


class _Task(Settings):
    """`name`: how tables call the task, and the records' `query_set`. `limit`: ask so many at most, the first ones."""

    name: str = Field(min_length=1, max_length=60)
    limit: int | None = Field(default=None, ge=1)


class CopaSettings(_Task):
    """COPA as SuperGLUE has it: JSONL with premise, choice1, choice2, question (cause or effect), label."""

    format: Literal["copa"]
    path: str


class PiqaSettings(_Task):
    """PIQA: JSONL with goal, sol1, sol2, and a file with a label on each line."""

    format: Literal["piqa"]
    path: str
    labels: str


class Gsm8kSettings(_Task):
    """Word problems as GSM8K has them: JSONL with question, and an answer that ends with "#### number"."""

    format: Literal["gsm8k"]
    path: str


class MultiArithSettings(_Task):
    """Word problems as MultiArith and its kin have them: a JSON list with sQuestion and lSolutions."""

    format: Literal["multiarith"]
    path: str


class ArithmeticSettings(_Task):
    """Problems that are made here, each once: numbers from 1 to `largest`, in words ("Q: What is 12 plus 7? A:") or
    symbols ("12 + 7 =")."""

    format: Literal["arithmetic"]
    count: int = Field(default=100, ge=1, le=100_000)
    largest: int = Field(default=99, ge=1, le=1_000_000)
    operators: tuple[Operator, ...] = Field(default=("plus", "minus"), min_length=1)
    wording: Literal["words", "symbols"] = "words"
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> ArithmeticSettings:
        if len(set(self.operators)) < len(self.operators):
            raise ValueError("operators must differ")
        if self.count > (there := len(self.operators) * self.largest**2):
            raise ValueError(
                f"count is {self.count:,}, but there are {there:,} problems with numbers up to {self.largest}"
            )
        return self


class StoriesSettings(_Task):
    """The last of five sentences, as a CSV file of ROCStories (no choice) or of the Story Cloze test (two endings)."""

    format: Literal["stories"]
    path: str


class WrongPredictionsSettings(_Task):
    """Facts that the model answers wrongly; the target is its own answer. `prompt`: the template."""

    format: Literal["wrong_predictions"]
    path: str
    prompt: int = Field(default=0, ge=0, le=2)


class PlainSettings(_Task):
    """JSONL with prompt and target, or any other names that `queries` knows."""

    format: Literal["plain"]
    path: str


TaskSettings = Annotated[
    CopaSettings
    | PiqaSettings
    | Gsm8kSettings
    | MultiArithSettings
    | ArithmeticSettings
    | StoriesSettings
    | WrongPredictionsSettings
    | PlainSettings,
    Field(discriminator="format"),
]


class TasksConfig(Settings):
    """Everything that determines an evaluation of tasks. Unknown keys are refused.

    corpus: the passages, as of `index`. tasks: what is asked. depth: how many passages of each list count; k: depth of
    the rankings. predictions: the model whose answers and choices are looked at; none are if None.
    tail_patch: how much the lists move a model; not measured if None. methods, seed, resamples: as of
    `config.FactsConfig`.
    """

    corpus: CorpusConfig
    tasks: tuple[TaskSettings, ...]
    k: int = Field(default=100, ge=1, le=10_000)
    depth: int = Field(default=DEPTH, ge=1, le=1000)
    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=2000, ge=100, le=100_000)
    predictions: PredictionSettings | None = None
    tail_patch: TailPatchSettings | None = None
    methods: tuple[MethodSettings, ...]

    _some = field_validator("methods", mode="before")(some_methods)

    @field_validator("tasks", mode="before")
    @classmethod
    def _some_tasks(cls, tasks: Any) -> Any:
        if isinstance(tasks, list | tuple) and not tasks:
            raise ValueError("the list is empty; name at least one task, such as {name: sums, format: arithmetic}")
        return tasks

    @model_validator(mode="after")
    def _check(self) -> TasksConfig:
        names = [task.name for task in self.tasks]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two tasks have the name {repeated[0]!r}; give each its own")
        if self.depth > self.k:
            raise ValueError(f"depth, which is {self.depth}, must not be above k, which is {self.k}")
        if self.tail_patch is not None and self.tail_patch.depths[-1] > self.k:
            raise ValueError(f"tail_patch.depths must not go beyond k, which is {self.k}")
        for task in self.tasks:
            if isinstance(task, WrongPredictionsSettings) and self.predictions is None:
                raise ValueError(
                    f"the task {task.name!r} asks for a model's wrong answers; name the model in predictions"
                )
        refuse_gold(self.methods)
        for method in self.methods:
            if isinstance(method, InfluenceSettings) and method.needs_task:
                raise ValueError(
                    f"the task mix of {method.name!r} needs queries that are not evaluated, and there are none here; "
                    "mix in another way, or name a generation of the index"
                )
        check_methods(self.methods, held_out=0, task_queries=0)
        return self

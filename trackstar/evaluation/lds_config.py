"""The settings of an evaluation by retraining, from a YAML file.

Contract: unknown keys and values out of range are refused in one sentence that names the key. It reads no other files.

    facts: facts.jsonl
    corpus: {paths: [sentences.jsonl]}
    distractors: 400
    model: my-model
    training: {steps: 400}
    indexes:
      plain: {}
      corrected: {moments: {source: checkpoint}}
      margin: {objective: margin}
    methods:
      - {name: BM25, kind: lexical}
      - {name: TrackStar, kind: influence, index: corrected, mix: {kind: task}}
      - {name: TRAK, kind: trak, indexes: [margin]}
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trackstar.evaluation.config import QueriesConfig
from trackstar.evaluation.method_settings import (
    InfluenceSettings,
    MethodSettings,
    TracInSettings,
    TrakSettings,
    check_methods,
    some_methods,
)
from trackstar.evaluation.own_indexes import RowsSettings
from trackstar.evaluation.retraining import Budget

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class OwnIndex(RowsSettings):
    """An index by the model that was trained on all passages; `after`: by that of so many of its steps, the last if
    None."""

    after: int | None = Field(default=None, ge=1)


class LdsConfig(QueriesConfig):
    """Everything that determines an evaluation by retraining. Unknown keys are refused.

    distractors: keep the sentences that state what is asked and so many others, drawn by `seed`; all if None.
    model: folder of a checkpoint: its architecture and tokenizer count, and its weights unless training is `fresh`.
    subsets: retrainings on random subsets, each of a `fraction` of the passages.
    remove: depths at which a method's first passages are left out. queries_per_run: so many queries share such a run.
    rows: what all `indexes` have in common. Methods name indexes by their keys here.
    engine: who does the retrainings: this process, or Ray with `workers` actors. device: of training.
    """

    distractors: int | None = Field(default=None, ge=0)
    model: str
    training: Budget
    subsets: int = Field(default=40, ge=1)
    fraction: float = Field(default=0.5, gt=0, le=1)
    remove: tuple[int, ...] = (10,)
    queries_per_run: int = Field(default=1, ge=1)
    indexes: dict[str, OwnIndex] = Field(default_factory=dict)
    engine: Literal["local", "ray"] = "local"
    workers: int = Field(default=2, ge=1, le=1024)
    device: str = "cpu"
    methods: tuple[MethodSettings, ...]

    _some = field_validator("methods", mode="before")(some_methods)

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, content: Any) -> Any:
        """Put what `rows` says into every index that does not say otherwise."""
        if not isinstance(content, dict) or "rows" not in content:
            return content
        rest = {name: value for name, value in content.items() if name != "rows"}
        rows, indexes = content["rows"], content.get("indexes") or {}
        if not isinstance(rows, dict) or not isinstance(indexes, dict):
            raise ValueError("rows and indexes must be mappings")
        return {**rest, "indexes": {name: {**rows, **(given or {})} for name, given in indexes.items()}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(depth < 1 or depth > self.k for depth in self.remove) or list(self.remove) != sorted(set(self.remove)):
            raise ValueError(f"remove must ascend, from 1 to k at most, which is {self.k}")
        check_methods(self.methods, held_out=self.held_out, task_queries=self.task_queries)
        for name, index in self.indexes.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} of an index is also a folder's; use a to z, digits, _ and -")
            if index.after is not None and index.after > self.training.steps:
                raise ValueError(
                    f"the index {name!r} is after {index.after} steps, and training has {self.training.steps}"
                )
        for method in self.methods:
            for name in indexes_of(method):
                if name not in self.indexes:
                    raise ValueError(
                        f"the method {method.name!r} needs the index {name!r}; indexes has "
                        f"{', '.join(self.indexes) or 'none'}"
                    )
            if isinstance(method, InfluenceSettings) and method.mix is None:
                raise ValueError(f"the indexes built here have no generation; give the method {method.name!r} a mix")
        return self


def indexes_of(method: MethodSettings) -> tuple[str, ...]:
    """The indexes that a method names."""
    match method:
        case InfluenceSettings():
            return (method.index,)
        case TrakSettings() | TracInSettings():
            return method.indexes
        case _:
            return ()

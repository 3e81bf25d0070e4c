"""The settings of an ablation over d, training steps and model size, from a YAML file.

Contract: unknown keys and values out of range are refused in one sentence that names the key. It reads no other files.

    facts: facts.jsonl
    corpus: {paths: [sentences.jsonl]}
    queries: 500
    task_queries: 400
    model: my-model
    d: 4096
    axes:
      d: [256, 1024, 4096, 16384]
      steps: [my-model/checkpoint-500, my-model/checkpoint-1000, my-model]
      size: [small-model, my-model]
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from trackstar.evaluation.config import QueriesConfig
from trackstar.evaluation.method_settings import Settings
from trackstar.evaluation.own_indexes import RowsSettings
from trackstar.hessian import MixConfig


class Axes(Settings):
    """What is varied, one axis at a time: d of `model`, and the checkpoints of `steps` and `size` at the same d."""

    d: tuple[int, ...] = ()
    steps: tuple[str, ...] = ()
    size: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.d or self.steps or self.size):
            raise ValueError("there is nothing to vary; give d, steps or size")
        for axis in ("d", "steps", "size"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"the axis {axis} has a value twice")
        if any(dim < 1 for dim in self.d):
            raise ValueError("the axis d must hold numbers from 1")
        return self


class AblateConfig(QueriesConfig):
    """Everything that determines an ablation. Unknown keys are refused.

    model: folder of the checkpoint of the axis d. d: coordinates of a row on the other axes. rows: what rows are like;
    `layer_blocks` are 8 at most if left out, and rows and cols follow from d. mix, unit_norm: as of the method
    influence. axes: what is varied. max_new_tokens: of the models' own answers.
    """

    model: str
    d: int = Field(default=4096, ge=1)
    rows: RowsSettings = RowsSettings()
    mix: MixConfig = MixConfig(kind="task")
    unit_norm: bool = True
    axes: Axes
    max_new_tokens: int = Field(default=16, ge=1, le=256)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mix.kind == "task" and not self.task_queries:
            raise ValueError("the task mix needs queries that are not evaluated; set task_queries above 0")
        if self.rows.projection.rows is not None or self.rows.projection.cols is not None:
            raise ValueError("rows and cols of the projection follow from d; leave them out")
        return self

"""The settings of tail-patch: which steps are taken from which checkpoint, and how much of the lists is judged.

Contract: as `config`. Alone (`trackstar eval tail-patch`), or as the block `tail_patch` of another evaluation:

    model: my-checkpoint
    depths: [1, 3, 5, 10]
    queries: 200
    steps:
      - {name: SGD, optimizer: sgd, learning_rate: 0.01}
      - {name: as training, optimizer: adamw, learning_rate: 1e-4, carry: both}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trackstar.evaluation.method_settings import Settings, folder_name
from trackstar.evaluation.tail_patch_judge import DEPTHS, steps_side_by_side
from trackstar.tail_patch import PatchStep


class NamedStep(PatchStep):
    """A step and how tables call it."""

    name: str = Field(min_length=1, max_length=60)

    @property
    def step(self) -> PatchStep:
        """The step itself."""
        return PatchStep(**self.model_dump(exclude={"name"}))


class LearningRates(Settings):
    """Of the steps that are taken if none is named: `sgd` of plain descent, `adamw` of AdamW and Adafactor."""

    sgd: float = Field(default=0.01, gt=0, le=10, allow_inf_nan=False)
    adamw: float = Field(default=1e-4, gt=0, le=10, allow_inf_nan=False)


class TailPatchSettings(Settings):
    """How lists are judged.

    model: the final checkpoint's folder. optimizer: folder or optimizer.pt of the state that steps carry on, "none" for
    none; the checkpoint's own, where it has one, if left out.
    steps: what is tried, each with a name; if left out, plain descent, AdamW from a fresh state, and the steps that
    carry on the moments that there are, at `learning_rates`.
    depths: how many of a list's first passages count. queries: so many are judged, drawn by the seed; all if None.
    effects: the file that keeps what was measured, which any number of evaluations may share; in the evaluation's own
    folder if None.
    """

    model: str
    optimizer: str | None = None
    steps: tuple[NamedStep, ...] | None = Field(default=None, min_length=1)
    learning_rates: LearningRates = LearningRates()
    depths: tuple[int, ...] = Field(default=DEPTHS, min_length=1)
    queries: int | None = Field(default=None, ge=1)
    effects: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_steps(self) -> TailPatchSettings:
        if self.depths[0] < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ValueError("depths must ascend from 1 or more")
        names = [step.name for step in self.steps or ()]
        if len(set(names)) < len(names):
            raise ValueError("two steps have the same name; give each its own")
        return self

    @property
    def optimizer_path(self) -> Path | None:
        """Where the state to carry on lies."""
        if self.optimizer is None:
            own = Path(self.model) / "optimizer.pt"
            return own if own.is_file() else None
        return None if self.optimizer == "none" else Path(self.optimizer)

    def named_steps(self, carried: Literal["none", "adamw", "adafactor"]) -> dict[str, PatchStep]:
        """The steps by name, given whose state there is to carry on."""
        if self.steps is None:
            return steps_side_by_side(sgd=self.learning_rates.sgd, adamw=self.learning_rates.adamw, carried=carried)
        return {step.name: step.step for step in self.steps}


class RetrievalFile(Settings):
    """One method's lists: how tables call the method, and a JSONL file of the release's records."""

    name: str = Field(min_length=1, max_length=60)
    path: str


class TailPatchConfig(TailPatchSettings):
    """Everything that determines an evaluation by tail-patch. Unknown keys are refused.

    retrievals: the methods' files, or a folder: all of its `*.jsonl` but those of held-out queries, by name. The first
    method is the one that others are compared with. seed: of queries and resamples. resamples: of the bootstrap.
    """

    retrievals: tuple[RetrievalFile, ...] | str
    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=2000, ge=100, le=100_000)

    @field_validator("retrievals", mode="before")
    @classmethod
    def _some_retrievals(cls, given: Any) -> Any:
        if isinstance(given, list | tuple) and not given:
            raise ValueError("the list is empty; name at least one file, such as {name: BM25, path: bm25.jsonl}")
        return given

    @model_validator(mode="after")
    def _check_names(self) -> TailPatchConfig:
        seen: dict[str, str] = {}
        for file in () if isinstance(self.retrievals, str) else self.retrievals:
            stem = folder_name(file.name)
            if stem in seen:
                raise ValueError(
                    f"the methods {seen[stem]!r} and {file.name!r} would share the file {stem!r}; give each its own "
                    "name"
                )
            seen[stem] = file.name
        return self

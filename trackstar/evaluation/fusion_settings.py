"""The settings of a search for one list that states facts as a lexical method and moves the model as influence does.

Contract: as `config`.

    evaluation: eval-out/facts
    lexical: BM25
    influence: TrackStar
    tail_patch: {model: my-checkpoint, queries: 300}
"""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from trackstar.evaluation.fusion_rules import FAMILIES, Family
from trackstar.evaluation.method_settings import Settings
from trackstar.evaluation.patch_settings import TailPatchSettings


class FusionConfig(Settings):
    """Everything that determines the search. Unknown keys are refused.

    evaluation: the folder that `eval facts` wrote. lexical, influence: the two methods' names there.
    tail_patch: how lists are judged; its `queries` are evaluated ones, and its greatest depth is the one that counts.
    held_out: so many of the held-out queries decide, drawn by the seed; all if None.
    decided_by: the step by which the rule is chosen; all of them, each of which must hold, if None.
    families: which rules are tried (`fusion_rules`). name: of the list that is written.
    """

    evaluation: str
    lexical: str
    influence: str
    tail_patch: TailPatchSettings
    held_out: int | None = Field(default=None, ge=2)
    decided_by: str | None = None
    families: tuple[Family, ...] = Field(default=FAMILIES, min_length=1)
    name: str = Field(default="fusion", min_length=1, max_length=60)
    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=2000, ge=100, le=100_000)

    @field_validator("tail_patch")
    @classmethod
    def _check_depths(cls, given: TailPatchSettings) -> TailPatchSettings:
        if given.depths[-1] < 2:
            raise ValueError("its greatest depth must be 2 at least; with one passage there is nothing to join")
        return given

    @model_validator(mode="after")
    def _check(self) -> FusionConfig:
        if self.lexical == self.influence:
            raise ValueError("lexical and influence name the same method; a fusion needs two")
        return self

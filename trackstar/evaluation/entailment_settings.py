"""The settings of entailment in a YAML file: `entailment: {by: rules}`. It reads no other files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trackstar.evaluation.method_settings import Settings


class AnnotationSettings(Settings):
    """The corpus's triples, or the facts' own lists of sentences."""

    by: Literal["annotation"]


class RulesSettings(Settings):
    """Subject and object occur; with `relation`, a word of the relation's name does too."""

    by: Literal["rules"]
    relation: bool = False


class NliSettings(Settings):
    """A cross-encoder of natural language inference.

    model: its folder. threshold: of the probability of entailment. batch: pairs at once. max_tokens: of premise and
    hypothesis together; a longer premise is cut at its end.
    """

    by: Literal["nli"]
    model: str
    device: str = "cpu"
    threshold: float = Field(default=0.5, gt=0, le=1)
    batch: int = Field(default=32, ge=1)
    max_tokens: int = Field(default=512, ge=8)


class RecordsSettings(Settings):
    """What retrieval records say themselves: `proponent_correct`, or `proponent_ais_scores` of 0.5 or more."""

    by: Literal["records"]


EntailmentSettings = Annotated[AnnotationSettings | RulesSettings | NliSettings, Field(discriminator="by")]
RecordEntailmentSettings = Annotated[
    AnnotationSettings | RulesSettings | NliSettings | RecordsSettings, Field(discriminator="by")
]

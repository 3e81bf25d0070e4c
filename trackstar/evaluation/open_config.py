"""The settings of an evaluation on an open set, and of categories, from a YAML file.

Contract: as `config`.

    facts: facts.jsonl
    corpus: {paths: [c4/]}
    entailment: {by: nli, model: path/to/nli}
    methods:
      - {name: BM25, kind: lexical}
"""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from trackstar.corpus import CorpusConfig
from trackstar.evaluation.categories import DEPTH
from trackstar.evaluation.config import PredictionSettings
from trackstar.evaluation.entailment_settings import EntailmentSettings, RecordEntailmentSettings
from trackstar.evaluation.facts import BUCKET_STARTS, GoldSource
from trackstar.evaluation.measures import DEPTHS
from trackstar.evaluation.method_settings import (
    FusionSettings,
    GoldSettings,
    MethodSettings,
    Settings,
    check_methods,
    some_methods,
)


class OpenConfig(Settings):
    """Everything that determines an evaluation on an open set. Unknown keys are refused.

    facts: the facts file, with or without gold sentences. corpus: the passages, as of `index`. entailment: who says
    that a passage states a fact. depth: how many passages of each list are judged; k: depth of the rankings, from which
    fusions are made. gold: where annotations come from, if there are any.
    The rest is as of `config.FactsConfig`.
    """

    facts: str
    corpus: CorpusConfig
    entailment: EntailmentSettings
    gold: GoldSource = "auto"
    prompt: int = Field(default=0, ge=0, le=2)
    queries: int | None = Field(default=None, ge=1)
    task_queries: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    k: int = Field(default=100, ge=1, le=10_000)
    depth: int = Field(default=10, ge=1, le=1000)
    depths: tuple[int, ...] = Field(default=DEPTHS, min_length=1)
    bucket_starts: tuple[int, ...] = Field(default=BUCKET_STARTS, min_length=1)
    resamples: int = Field(default=2000, ge=100, le=100_000)
    predictions: PredictionSettings | None = None
    methods: tuple[MethodSettings, ...]

    _some = field_validator("methods", mode="before")(some_methods)

    @property
    def held_out(self) -> int:
        """No query is held out: learnt weights need gold."""
        return 0

    @model_validator(mode="after")
    def _check(self) -> OpenConfig:
        if self.depth > self.k:
            raise ValueError(f"depth, which is {self.depth}, must not be above k, which is {self.k}")
        if any(depth < 1 or depth > self.depth for depth in self.depths):
            raise ValueError(f"depths must lie between 1 and depth, which is {self.depth}")
        if list(self.depths) != sorted(set(self.depths)):
            raise ValueError("depths must ascend")
        if self.bucket_starts[0] < 1 or list(self.bucket_starts) != sorted(set(self.bucket_starts)):
            raise ValueError("bucket_starts must ascend from 1 or more")
        refuse_gold(self.methods)
        check_methods(self.methods, held_out=0, task_queries=self.task_queries)
        return self


class CategoriesConfig(Settings):
    """What is parted into categories.

    facts: the facts file. retrievals: JSONL files in the release's format, by the method's name. entailment: as of
    `OpenConfig`, or `records`: what the files say themselves. depth: how many proponents of each record count.
    corpus: read only for annotation by `fact_triples`; without it the facts' own `trex_sentences` count.
    prompt: the template whose text is the hypothesis of nli.
    """

    facts: str
    retrievals: dict[str, str] = Field(min_length=1)
    entailment: RecordEntailmentSettings
    depth: int = Field(default=DEPTH, ge=1, le=1000)
    corpus: CorpusConfig | None = None
    prompt: int = Field(default=0, ge=0, le=2)
    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=2000, ge=100, le=100_000)


def refuse_gold(methods: tuple[MethodSettings, ...]) -> None:
    """Refuse methods that need gold sentences.

    Raises:
        ValueError: there is one.
    """
    for settings in methods:
        if isinstance(settings, GoldSettings):
            raise ValueError(
                f"the method {settings.name!r} is the gold sentences, and none are known here; leave it out"
            )
        if isinstance(settings, FusionSettings) and settings.rule == "weights":
            raise ValueError(
                f"the fusion {settings.name!r} learns its weights from gold sentences, and none are known here; set "
                "its rule to rank"
            )

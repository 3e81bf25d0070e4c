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

from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from trackstar.corpus import CorpusConfig
from trackstar.errors import InvalidRequest
from trackstar.evaluation.facts import BUCKET_STARTS, GoldSource
from trackstar.evaluation.measures import DEPTHS
from trackstar.evaluation.method_settings import MethodSettings, Settings, check_methods, some_methods
from trackstar.evaluation.patch_settings import TailPatchSettings
from trackstar.index_config import refusal

_Config = TypeVar("_Config", bound=Settings)


class PredictionSettings(Settings):
    """The model whose own answers part the queries into right and wrong; `max_new_tokens` of each answer."""

    model: str
    device: str = "cpu"
    trust_remote_code: bool = False
    max_new_tokens: int = Field(default=16, ge=1, le=256)


class QueriesConfig(Settings):
    """What is asked, of which corpus, and how it is measured.

    facts: the facts file. corpus: the sentences, as of `index`. gold: where gold sentences come from; see `facts`.
    prompt: which of the templates prompt0 … prompt2 is asked.
    queries: facts that are evaluated, drawn by `seed`; all that the next two leave if None. held_out: facts that only
    fusions are fitted on. task_queries: facts that only task mixes are made of. No fact is in two of these.
    k: depth of the rankings. depths: the k of Recall@k and the like. bucket_starts: lowest frequencies of the buckets.
    resamples: of the bootstrap.
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

    @model_validator(mode="after")
    def _check_depths(self) -> Self:
        if any(depth < 1 or depth > self.k for depth in self.depths):
            raise ValueError(f"depths must lie between 1 and k, which is {self.k}")
        if list(self.depths) != sorted(set(self.depths)):
            raise ValueError("depths must ascend")
        if self.bucket_starts[0] < 1 or list(self.bucket_starts) != sorted(set(self.bucket_starts)):
            raise ValueError("bucket_starts must ascend from 1 or more")
        return self


class FactsConfig(QueriesConfig):
    """Everything that determines an evaluation of facts. Unknown keys are refused.

    predictions: the model whose answers are right or wrong; the facts' own `is_8b_correct` if None. tail_patch: judge
    every method's lists by tail-patch too. compare: pairs of methods whose difference, the first less the second, is
    measured query by query.
    """

    predictions: PredictionSettings | None = None
    tail_patch: TailPatchSettings | None = None
    methods: tuple[MethodSettings, ...]
    compare: tuple[tuple[str, str], ...] = ()

    _some = field_validator("methods", mode="before")(some_methods)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tail_patch is not None and self.tail_patch.depths[-1] > self.k:
            raise ValueError(f"the depths of tail_patch must be at most k, which is {self.k}")
        check_methods(self.methods, held_out=self.held_out, task_queries=self.task_queries)
        names = [settings.name for settings in self.methods]
        for name in (name for pair in self.compare for name in pair):
            if name not in names:
                raise ValueError(f"compare: there is no method {name!r}; there are {', '.join(names)}")
        return self


def make_config(kind: type[_Config], content: dict[str, Any]) -> _Config:
    """Validate settings of a kind.

    Raises:
        InvalidRequest: an unknown key, or a value out of range; the message names it.
    """
    try:
        return kind(**content)
    except ValidationError as error:
        raise refusal(error) from error
    except TypeError as error:
        raise InvalidRequest("the config's keys must be texts") from error

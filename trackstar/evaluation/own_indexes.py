"""Indexes that an evaluation builds for itself: rows alone, which it scans and fits R on.

Contract: what is finished is used again; a folder that holds an index of other settings is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from trackstar.build import build_rows
from trackstar.corpus import CorpusConfig
from trackstar.evaluation.method import OnStep, unheard
from trackstar.evaluation.method_settings import Settings
from trackstar.evaluation.outputs import ObjectiveName
from trackstar.index_config import IndexConfig, MomentsConfig, ProjectionConfig

# As the source of moments: the optimizer state that lies beside the weights.
OWN_STATE = "checkpoint"


class RowsSettings(Settings):
    """What rows are like; keys are those of `IndexConfig`. The source of moments may be "checkpoint": its own state."""

    objective: ObjectiveName = "loss"
    moments: MomentsConfig = MomentsConfig()
    projection: ProjectionConfig = ProjectionConfig()
    window_tokens: int | None = Field(default=None, ge=2)
    row_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    shard_passages: int | None = Field(default=None, ge=1)
    max_batch_tokens: int = Field(default=8192, ge=1)
    exclude: tuple[str, ...] = ()
    trust_remote_code: bool = False
    device: str = "cpu"

    def index_config(self, corpus: CorpusConfig, model: str) -> IndexConfig:
        """The settings of an index of a corpus by a checkpoint."""
        own = {name: getattr(self, name) for name in RowsSettings.model_fields}
        if self.moments.source == OWN_STATE:
            own["moments"] = self.moments.model_copy(update={"source": model})
        return IndexConfig(corpus=corpus, model=model, **own)


def build_own(
    settings: RowsSettings, corpus: CorpusConfig, model: str, folder: Path, on_step: OnStep = unheard
) -> None:
    """Build an index's rows, or finish building them.

    Raises:
        TrackstarError: as `build.build_rows`.
    """
    build_rows(settings.index_config(corpus, model), folder, progress=_Heard(f"indexing {folder.name}", on_step))


class _Heard:
    """A `build.Progress` that tells of encoding."""

    def __init__(self, step: str, on_step: OnStep) -> None:
        self._step, self._on_step = step, on_step
        self._total = 0

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str = "passages"
    ) -> None:
        """See `build.Progress`."""
        self._total = total or 0
        self.advance(step, done, 0)

    def advance(self, step: str, done: int, tokens: int) -> None:
        """See `build.Progress`."""
        if step == "encoding" and self._total:
            self._on_step(self._step, done, self._total)

    def note(self, text: str) -> None:
        """See `build.Progress`; results say what matters."""

    def shards(self, step: str, finished: int, planned: int) -> None:
        """See `build.Progress`."""

"""Time of one call by stage, each within its share of what is left, and what an answer says about itself."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

from services.gateway.generations import ServedGeneration
from services.gateway.request import RequestContext
from services.timing import within
from trackstar.v1 import common_pb2

Answer = TypeVar("Answer")


class StageObserver(Protocol):
    """Hears how long stages took, how many passages were scored, and how far the best stood out."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage of one call took so long in all."""

    def candidates(self, count: int) -> None:
        """One call had so many passages scored exactly."""

    def best_z_score(self, z_score: float) -> None:
        """The best proponent of one call, among all passages, stands so far above the background."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """Around the work of a stage, for whoever traces calls."""


class Unobserved:
    """An observer that ignores everything."""

    def stage(self, name: str, seconds: float) -> None:
        """Nothing."""

    def candidates(self, count: int) -> None:
        """Nothing."""

    def best_z_score(self, z_score: float) -> None:
        """Nothing."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


class Stages:
    """Time of one call by stage, each within its share of what is left."""

    def __init__(self, context: RequestContext, observer: StageObserver | None = None) -> None:
        self._context = context
        self._observer = observer or Unobserved()
        self.seconds: dict[str, float] = {}

    async def run(
        self, stage: str, what: str, call: Callable[[float], Awaitable[Answer]], *, budget: str | None = None
    ) -> Answer:
        """Run `call` with the seconds it may take, counted under `stage`.

        Args:
            stage: name of the stage.
            what: what is done, for the error.
            call: gets its seconds.
            budget: takes this stage's share instead.

        Raises:
            DeadlineExceeded: its share of the time is over.
        """
        seconds = self._context.stage_seconds(budget or stage)
        with self._counted(stage), self._observer.span(stage):
            async with within(seconds, what):
                return await call(seconds)

    def durations(self) -> list[common_pb2.StageDuration]:
        """Time by stage so far, in the order they first ran."""
        return [common_pb2.StageDuration(stage=name, seconds=seconds) for name, seconds in self.seconds.items()]

    @contextmanager
    def _counted(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def provenance(
    generation: ServedGeneration,
    stages: Stages,
    *,
    exactness: common_pb2.Exactness.ValueType = common_pb2.EXACTNESS_UNSPECIFIED,
    examined: int = 0,
    left_out: Sequence[str] = (),
) -> common_pb2.Provenance:
    """Where an answer of this generation comes from."""
    return common_pb2.Provenance(
        generation=generation.name,
        checkpoint_digest=generation.facts.checkpoint_digest,
        config_digest=generation.facts.config_digest,
        exactness=exactness,
        candidates_examined=examined,
        passages_total=generation.facts.num_passages,
        stages=stages.durations(),
        left_out=left_out,
    )

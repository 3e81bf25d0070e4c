"""The engine on a Ray cluster: each stage is a Ray Data pipeline over the numbers of its items.

Ray does the work: it places actors and tasks, scales the pool of encoders between its bounds, holds back what they
cannot take, gives the items of a process or node that died to another, and starts new ones. An item that is done twice
leaves the same files, so nothing here keeps books.

What a worker refuses for good (a `TrackstarError`) ends the stage with that error; what is not ready (a store, a gang,
a server) is tried again by the same worker for a while.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.exceptions import RayError

from services.reindex.config import Pool, Workers
from trackstar.engine import Answer, Item, Report, Stage
from trackstar.errors import NotReady, Overloaded, TrackstarError

# Items of one pipeline; more come one pipeline after the other, so that the driver's memory does not grow with them.
_ITEMS_AT_ONCE = 1 << 16
# Items of one block are given to an actor together.
_MAX_BLOCKS = 4096
# Neither has annotations.
_dumps: Callable[[Any], bytes] = cloudpickle.dumps
_loads: Callable[[bytes], Any] = cloudpickle.loads
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


class RayEngine:
    """See `trackstar.engine.Engine`; needs `ray.init` before.

    Args:
        workers: pools of actors.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        # It tells of every pipeline.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.enable_operator_progress_bars = False
        context.print_on_execution_start = False

    def map(
        self,
        stage: Stage,
        make: Callable[[Report], Callable[[Item], Answer]],
        items: Sequence[Item],
        *,
        report: Report | None = None,
    ) -> Iterator[Answer]:
        """See `Engine.map`.

        Raises:
            NotReady: Ray gave up; what is finished is kept.
        """
        for start in range(0, len(items), _ITEMS_AT_ONCE):
            yield from self._map(stage, make, items[start : start + _ITEMS_AT_ONCE], report)

    def _map(
        self,
        stage: Stage,
        make: Callable[[Report], Callable[[Item], Answer]],
        items: Sequence[Item],
        report: Report | None,
    ) -> Iterator[Answer]:
        pool = self._pool(stage)
        size = min(pool.max, len(items))
        # What is made and done crosses Ray as bytes, so that Ray need not know its classes.
        rows = [{"item": _dumps(item)} for item in items]
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(items), _MAX_BLOCKS))
        order = _Order(
            stage=uuid.uuid4().hex,
            make=_dumps(make),
            retries=self._workers.retries,
            torch_threads=self._workers.torch_threads,
        )
        resources: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus or None, "memory": pool.memory_bytes}
        if stage == "encoding":
            actor: Any = _EncoderActor
            done = dataset.map(
                actor,
                fn_constructor_args=(order,),
                compute=ActorPoolStrategy(min_size=min(pool.min, size), max_size=size),
                **resources,
            )
        else:
            done = dataset.map(partial(_in_task, order=order), compute=TaskPoolStrategy(size), **resources)
        try:
            for row in done.iter_rows():
                answer, error, tokens = _loads(row["answer"])
                if error is not None:
                    raise error
                if report is not None and tokens:
                    report(tokens)
                yield answer
        except RayError as error:
            raise NotReady(
                f"Ray could not go on with {stage} ({_first_line(error)}); give the same command again, what is "
                "finished is kept"
            ) from error

    def _pool(self, stage: Stage) -> Pool:
        workers = self._workers
        if stage == "planning":
            return workers.readers
        if stage in ("prepare", "encoding", "retraining"):
            return workers.encoders
        if stage == "whitening":
            return workers.whitener
        if stage == "importing":
            return workers.importers
        return workers.scanners


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What the workers of one stage are to do; `make` as bytes."""

    stage: str
    make: bytes
    retries: int
    torch_threads: int


class _Worker:
    """Does items one after the other, in an actor or task."""

    def __init__(self, order: _Order) -> None:
        torch.set_num_threads(order.torch_threads)
        self.order = order
        self._tokens = 0
        self._make = _loads(order.make)
        self._worker: Any = None

    def close(self) -> None:
        """Let go of what the worker holds."""
        if hasattr(self._worker, "close"):
            self._worker.close()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        answer: Any = None
        error: TrackstarError | None = None
        try:
            answer = self._patiently(_loads(row["item"]))
        except TrackstarError as refused:
            # As an answer, so that it arrives as it is and Ray does not take it for its own failure.
            error = refused
        tokens, self._tokens = self._tokens, 0
        return {"answer": _dumps((answer, error, tokens))}

    def _patiently(self, item: Any) -> Any:
        pause = _FIRST_PAUSE_SECONDS
        for left in range(self.order.retries, -1, -1):
            try:
                if self._worker is None:
                    self._worker = self._make(self._count)
                return self._worker(item)
            except (NotReady, Overloaded):
                if not left:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError

    def _count(self, tokens: int) -> None:
        self._tokens += tokens


class _EncoderActor(_Worker):
    """Holds a model for as long as its stage lasts."""


# Processes of tasks are used again by later tasks; a worker is kept there until one of another stage is needed.
_kept: list[_Worker] = []


def _in_task(row: dict[str, Any], *, order: _Order) -> dict[str, Any]:
    if not _kept or _kept[0].order.stage != order.stage:
        while _kept:
            _kept.pop().close()
        _kept.append(_Worker(order))
    return _kept[0](row)


def _first_line(error: RayError) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__

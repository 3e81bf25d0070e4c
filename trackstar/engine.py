"""Who does the work of a build: this process, or the actors of a cluster.

A stage of a build is a list of items, each of which a worker turns into published files and a small answer. Items do
not depend on each other, and an item that is done twice leaves the same files. So an engine may do them in any order,
at once, and again after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# prepare, encoding, retraining: need the model. planning: reads the corpus. All others read rows or codes.
Stage = Literal[
    "prepare",
    "planning",
    "encoding",
    "statistics",
    "whitening",
    "purging",
    "coding",
    "importing",
    "audit",
    "retraining",
]
Report = Callable[[int], None]
"""Told of so many tokens that were processed since the last call."""


class Engine(Protocol):
    """Runs the items of a stage."""

    def map(
        self,
        stage: Stage,
        make: Callable[[Report], Callable[[Item], Answer]],
        items: Sequence[Item],
        *,
        report: Report | None = None,
    ) -> Iterator[Answer]:
        """Answers as they come, in any order.

        Args:
            stage: chooses the resources of a worker.
            make: makes a worker, in the process where it works; picklable, as are items and answers. A worker with a
                method `close` is closed at the end.
            items: what to do.
            report: hears of tokens while items are under way.

        Raises:
            TrackstarError: of the first item that failed. What is finished stays.
        """


class LocalEngine:
    """This process, one item after the other."""

    def map(
        self,
        stage: Stage,
        make: Callable[[Report], Callable[[Item], Answer]],
        items: Sequence[Item],
        *,
        report: Report | None = None,
    ) -> Iterator[Answer]:
        """See `Engine.map`; answers come in order."""
        if not items:
            return
        worker: Any = make(report or (lambda _tokens: None))
        try:
            for item in items:
                yield worker(item)
        finally:
            if hasattr(worker, "close"):
                worker.close()

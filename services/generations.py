"""Opened generations of one index, kept for as long as they are asked for.

Opening reads whiteners, norms and a sample of rows; the most recently used few are kept, each opened once however many
calls ask for it at the same moment.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Opened = TypeVar("Opened")


class OpenedGenerations(Generic[Opened]):
    """What `open_one` makes of a generation's name, by name.

    Args:
        open_one: opens a generation; runs in a thread. Failures are not kept.
        limit: how many are kept.
    """

    def __init__(self, open_one: Callable[[str], Opened], *, limit: int = 2) -> None:
        self._open_one = open_one
        self._limit = limit
        self._tasks: OrderedDict[str, asyncio.Task[Opened]] = OrderedDict()

    async def get(self, name: str) -> Opened:
        """The opened generation.

        Raises:
            TrackstarError: it cannot be opened.
        """
        task = self._tasks.get(name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(asyncio.to_thread(self._open_one, name))
            self._tasks[name] = task
        self._tasks.move_to_end(name)
        while len(self._tasks) > self._limit:
            self._tasks.popitem(last=False)
        # A caller that leaves must not end what others wait for.
        return await asyncio.shield(task)

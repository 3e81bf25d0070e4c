"""Two processes in a gloo group that run functions of the tests together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

WORLD = 2
_ANSWER_SECONDS = 120.0


class Ranks:
    """`run` calls a module-level function with the same arguments on every rank."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "rendezvous"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank; an exception instead of a result where it raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_ANSWER_SECONDS), f"rank {rank} does not answer"
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        """End both processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def _serve(rank: int, rendezvous: str, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = FileStore(rendezvous, WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send(function(*arguments))
        except Exception as error:
            error.add_note(traceback.format_exc())
            pipe.send(error)
    dist.destroy_process_group()

"""A member of a gang: one rank's process with its worker, in step with the other ranks or not at all.

Ranks meet through a store of rank 0 and talk by gloo, or nccl where they have GPUs. A `TrackstarError` that all ranks
raise is an answer; whether they all do, they settle through the store. A rank that failed otherwise takes part in no
later call, whose collectives others could take for those of the call that failed.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from trackstar.errors import TrackstarError
from trackstar.sharding import Strategy

# Ranks that raise an error together raise it at nearly the same time.
_AGREE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What a worker knows of its place; the process group is set up when it is made."""

    rank: int
    world: int
    strategy: Strategy
    device: str


class Member:
    """One rank's process. Calls run one at a time in order; `watch` has a thread of its own."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._store: TCPStore | None = None
        self._context: RankContext | None = None
        self._num_calls = 0
        self._last_refused = 0
        self._failed = False

    def listen(self) -> tuple[str, int]:
        """Open the store where ranks meet, on this node's address only and at a free port. Called on rank 0."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port: int = listener.getsockname()[1]
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        return host, port

    def start(
        self,
        meet: tuple[str, int],
        worker: Callable[..., Any],
        arguments: Sequence[Any],
        context: RankContext,
        timeout_seconds: float,
    ) -> None:
        """Join the group and make the worker."""
        host, port = meet
        if host.startswith("127."):
            # By default gloo takes the interface that the host's name stands for.
            loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        if context.device != "cpu":
            torch.cuda.set_device(context.device)
        self._store = self._store or TCPStore(host, port, is_master=False)
        self._context = context
        dist.init_process_group(
            "gloo" if context.device == "cpu" else "cpu:gloo,cuda:nccl",
            store=PrefixStore("group", self._store),
            rank=context.rank,
            world_size=context.world,
            timeout=timedelta(seconds=timeout_seconds),
        )
        self._worker = worker(context, *arguments)

    def call(self, method: str, arguments: Sequence[Any], wanted: bool) -> Any:
        """Run a method; the result only where it is wanted. What it raises is an answer if every rank raises."""
        if self._failed:
            raise RuntimeError("this rank failed before and is out of step")
        self._num_calls += 1
        try:
            result = getattr(self._worker, method)(*arguments)
        except BaseException as error:
            self._failed = not (isinstance(error, TrackstarError) and self._all_refuse())
            if self._failed and isinstance(error, TrackstarError):
                raise RuntimeError(f"this rank alone raised {error!r}") from error
            raise
        return result if wanted else None

    def _all_refuse(self) -> bool:
        """Whether the other ranks refuse this call too."""
        assert self._store is not None
        assert self._context is not None
        own = "refused/{}/" + str(self._context.rank)
        self._store.set(own.format(self._num_calls), "")
        keys = [f"refused/{self._num_calls}/{rank}" for rank in range(self._context.world)]
        try:
            self._store.wait(keys, timedelta(seconds=_AGREE_SECONDS))
        except RuntimeError:
            return False
        # Everyone is here, so no one waits for what was settled before.
        self._store.delete_key(own.format(self._last_refused))
        self._last_refused = self._num_calls
        return True

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never returns: Ray fails this call when the process dies."""
        threading.Event().wait()

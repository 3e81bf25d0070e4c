"""A gang: Ray actors, one per rank, that hold one sharded model and run every call together.

    Gang ── call(method) ──► rank 0, rank 1, …   each runs the method; rank 0's result is the answer

Ray does the work: a placement group holds the places, each actor runs its calls in the order they were given, and the
death of one is reported by Ray the moment it happens, whether or not a call is under way. No rank waits for a
collective that cannot finish: when one dies, or fails alone, all are killed, calls under way raise `NotReady`, and a
new gang is built in the background.

Contract: a worker is any class that is made as `worker(context, *arguments)` on every rank; its methods do the same on
every rank and depend on their arguments alone. A `TrackstarError` that all ranks raise is an answer, not a failure.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.encoder.member import Member, RankContext
from trackstar.errors import NotReady, TrackstarError
from trackstar.sharding import Strategy

State = Literal["starting", "ready", "lost"]

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
# Failed builds in a row after which the gang's owner should be replaced.
_MAX_FAILURES = 3

_log = logging.getLogger(__name__)


class _Crew:
    """The members of one build. `lost` is set when one died or failed alone, and stays so."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = members
        self.lost = threading.Event()
        for member in members:
            member.watch.remote().future().add_done_callback(lambda _: self.lost.set())

    def call(self, method: str, arguments: Any) -> list[concurrent.futures.Future[Any]]:
        """Run a method on every member; the answers of all, which fail when the crew is lost."""
        answers = [
            member.call.remote(method, arguments, rank == 0).future() for rank, member in enumerate(self.members)
        ]
        for answer in answers:
            # Also when the caller has gone meanwhile.
            answer.add_done_callback(self._hear)
        return answers

    def _hear(self, answer: concurrent.futures.Future[Any]) -> None:
        error = answer.exception()
        if error is not None and not isinstance(_cause(error), TrackstarError):
            if not self.lost.is_set():
                _log.error("the gang is lost: %s", error)
            self.lost.set()

    def kill(self) -> None:
        """End every member; calls under way fail at once."""
        for member in self.members:
            ray.kill(member, no_restart=True)


class Gang:
    """Keeps one gang alive; a `services.encoder.model.ModelBackend`.

    Inside a placement group with more bundles than ranks, ranks take the bundles after the first, which is the caller's
    own; elsewhere the gang makes a group of its own.

    Args:
        worker: class of the workers.
        arguments: its arguments after the context.
        ranks: number of actors.
        strategy: how workers are to cut the model.
        cpus: processors that Ray counts for each rank, in cores; may be a fraction.
        gpus: GPUs of each rank.
        timeout_seconds: longest wait of one rank for others, and longest build.
    """

    def __init__(
        self,
        worker: Callable[..., Any],
        *arguments: Any,
        ranks: int,
        strategy: Strategy,
        cpus: float = 1.0,
        gpus: float = 0.0,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self._worker, self._arguments = worker, arguments
        self._ranks, self._strategy, self._cpus, self._gpus = ranks, strategy, cpus, gpus
        self._timeout_seconds = timeout_seconds
        self._crew: _Crew | None = None
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._failures = 0
        self._failure: BaseException | None = None
        self._own_places: PlacementGroup | None = None
        self._places, self._first_place = self._find_places()
        self._keeper = threading.Thread(target=self._keep, name="gang", daemon=True)
        self._keeper.start()

    @property
    def state(self) -> State:
        """Ready, starting (at first, and while a lost gang is replaced), or lost: the last build failed."""
        if self._usable() is not None:
            return "ready"
        return "lost" if self._failures else "starting"

    async def ready(self, timeout_seconds: float) -> None:
        """Wait until calls can be made.

        Raises:
            NotReady: the time was not enough.
        """
        if not await asyncio.to_thread(self._ready.wait, timeout_seconds):
            raise self._not_ready()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Run a method of the workers on every rank, after the calls before it.

        Returns:
            Rank 0's result.

        Raises:
            NotReady: the gang is being built, or was lost; at once when that happens.
            TrackstarError: every rank raised it.
        """
        crew = self._usable()
        if crew is None:
            raise self._not_ready()
        answers = [asyncio.wrap_future(answer) for answer in crew.call(method, ray.put(arguments))]
        for answer in answers:
            # Errors that come after the caller has gone are no one's.
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
        errors = [_cause(error) for answer in done if (error := answer.exception())]
        if not errors:
            return answers[0].result()
        for error in errors:
            if not isinstance(error, TrackstarError):
                raise NotReady(
                    f"the model's {self._ranks} ranks were lost during the call and are being replaced; try again"
                ) from error
        raise errors[0]

    async def check_health(self) -> None:
        """For the owner's own health check.

        Raises:
            NotReady: the gang could not be built several times in a row; its owner should be replaced.
        """
        if self._failures >= _MAX_FAILURES:
            raise self._not_ready()

    async def close(self) -> None:
        """End the members and give the places back."""
        self._closed.set()
        if self._crew is not None:
            self._crew.lost.set()
            self._crew.kill()
        await asyncio.to_thread(self._keeper.join)
        if self._own_places is not None:
            remove_placement_group(self._own_places)

    def _usable(self) -> _Crew | None:
        crew = self._crew
        return crew if self._ready.is_set() and crew is not None and not crew.lost.is_set() else None

    def _not_ready(self) -> NotReady:
        if self._failure is None:
            return NotReady(f"the model's {self._ranks} ranks are being started; try again")
        return NotReady(f"the model's {self._ranks} ranks could not be started: {self._failure}")

    def _find_places(self) -> tuple[PlacementGroup, int]:
        current = get_current_placement_group()
        if current is not None and current.bundle_count > self._ranks:
            return current, 1
        bundle = {"CPU": self._cpus, **({"GPU": self._gpus} if self._gpus else {})}
        self._own_places = placement_group([bundle] * self._ranks, strategy="PACK")
        return self._own_places, 0

    def _keep(self) -> None:
        """Build a crew, wait until it is lost, and again."""
        while not self._closed.is_set():
            crew = self._crew = _Crew([self._member(rank) for rank in range(self._ranks)])
            try:
                self._start(crew)
                self._failure, self._failures = None, 0
                self._ready.set()
                crew.lost.wait()
            except (RayError, NotReady) as error:
                self._failure = _cause(error)
                self._failures += 1
                _log.error("the gang could not be started: %s", self._failure)
            self._ready.clear()
            crew.kill()
            if self._failures:
                self._closed.wait(min(_FIRST_PAUSE_SECONDS * 2**self._failures, _LONGEST_PAUSE_SECONDS))

    def _start(self, crew: _Crew) -> None:
        if self._closed.is_set():
            raise NotReady("the gang was closed")
        (meet,) = self._all([crew.members[0].listen.remote()])
        shared = ray.put(self._arguments)
        contexts = [
            RankContext(rank=rank, world=self._ranks, strategy=self._strategy, device="cuda" if self._gpus else "cpu")
            for rank in range(self._ranks)
        ]
        self._all(
            [
                member.start.remote(meet, self._worker, shared, context, self._timeout_seconds)
                for member, context in zip(crew.members, contexts, strict=True)
            ]
        )

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        """All results, or the first error of any of them. Not by `ray.get`, which warns in the process of an actor."""
        futures = [call.future() for call in calls]
        done, running = concurrent.futures.wait(
            futures, self._timeout_seconds, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        for future in done:
            future.result()
        if running:
            raise NotReady(f"not all ranks started within {self._timeout_seconds:.0f} s")
        return [future.result() for future in futures]

    def _member(self, rank: int) -> Any:
        where = PlacementGroupSchedulingStrategy(self._places, placement_group_bundle_index=self._first_place + rank)
        # Ray's annotations do not know concurrency groups.
        remote: Any = ray.remote
        member = remote(
            max_restarts=0,
            concurrency_groups={"watch": 1},
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            scheduling_strategy=where,
        )(Member)
        return member.remote()


def _cause(error: BaseException) -> BaseException:
    """What a rank raised; Ray's copy of it carries the rank's traceback as its message."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error

"""Places and queue: bounds, order, and nothing lost when callers leave."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from services.gateway.admission import Admission
from services.gateway.metrics import GatewayMetrics
from tests.service.scripted import ScriptedTraceService, ask, failure, sample, serving, until
from trackstar.errors import DeadlineExceeded, Overloaded
from trackstar.rpc_errors import from_call


def _admission(
    places: int, queued: int, wait: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> tuple[Admission, GatewayMetrics]:
    metrics = GatewayMetrics()
    return (
        Admission(max_in_flight=places, max_queued=queued, max_wait_seconds=wait, metrics=metrics, clock=clock),
        metrics,
    )


@contextlib.asynccontextmanager
async def _held(admission: Admission) -> AsyncIterator[None]:
    async with admission.place(time.monotonic() + 60):
        yield


def test_waiting_calls_go_in_the_order_they_came() -> None:
    async def run() -> None:
        admission, _ = _admission(1, 10)
        order: list[int] = []

        async def one(number: int) -> None:
            async with _held(admission):
                order.append(number)
                await asyncio.sleep(0)

        async with _held(admission):
            tasks = [asyncio.create_task(one(number)) for number in range(5)]
            await until(lambda: admission.queued == 5)
            # The place is free for a moment; a newcomer must not overtake.
        tasks.append(asyncio.create_task(one(5)))
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4, 5]
        assert (admission.in_flight, admission.queued) == (0, 0)

    asyncio.run(run())


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    async def run() -> None:
        now = [0.0]
        admission, metrics = _admission(2, 1, clock=lambda: now[0])
        async with admission.place(60):
            now[0] += 4.0
        async with admission.place(60), admission.place(60):
            waiting = asyncio.create_task(_enter(admission, 60))
            await until(lambda: admission.queued == 1)
            assert metrics.registry.get_sample_value("trackstar_admission_queue_length") == 1
            with pytest.raises(Overloaded) as refused:
                await _enter(admission, 60)
            # Two calls to be served by two places, each in the 4 s that the last one took.
            assert refused.value.retry_after_seconds == pytest.approx(4.0)
        await waiting
        assert metrics.registry.get_sample_value("trackstar_rejected_total", {"reason": "queue_full"}) == 1
        assert (admission.in_flight, admission.queued) == (0, 0)

    asyncio.run(run())


def test_waits_end_by_their_longest_by_the_deadline_and_by_leaving() -> None:
    async def run() -> None:
        admission, metrics = _admission(1, 10, wait=0.05)
        async with _held(admission):
            with pytest.raises(Overloaded):
                await _enter(admission, time.monotonic() + 60)
            with pytest.raises(DeadlineExceeded):
                await _enter(admission, time.monotonic() + 0.01)
            leaving = asyncio.create_task(_enter(admission, time.monotonic() + 60))
            await until(lambda: admission.queued == 1)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert (admission.in_flight, admission.queued) == (1, 0)
        assert admission.in_flight == 0
        assert metrics.registry.get_sample_value("trackstar_rejected_total", {"reason": "queue_timeout"}) == 1

    asyncio.run(run())


def test_a_place_given_to_one_who_leaves_at_that_moment_goes_to_the_next() -> None:
    async def run() -> None:
        admission, _ = _admission(1, 10)
        holding = asyncio.Event()

        async def hold() -> None:
            async with _held(admission):
                await holding.wait()

        holder = asyncio.create_task(hold())
        await until(lambda: admission.in_flight == 1)
        first, second = (asyncio.create_task(_enter(admission, time.monotonic() + 60)) for _ in range(2))
        await until(lambda: admission.queued == 2)
        holding.set()
        # `holder` gives its place to `first`, which is cancelled before it hears of it.
        while admission.queued == 2:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([holder, first, second])
        assert second.exception() is None
        assert (admission.in_flight, admission.queued) == (0, 0)

    asyncio.run(run())


def test_random_arrivals_and_departures_lose_no_place() -> None:
    async def run() -> None:
        admission, _ = _admission(3, 8, wait=0.02)
        most = running = 0

        async def one(number: int) -> None:
            nonlocal most, running
            async with admission.place(time.monotonic() + 0.001 * (number % 40)):
                running += 1
                most = max(most, running)
                try:
                    await asyncio.sleep(0.001 * (number % 5))
                finally:
                    running -= 1

        tasks = []
        for number in range(400):
            tasks.append(asyncio.create_task(one(number)))
            if number % 3 == 0:
                await asyncio.sleep(0.0005)
            if number % 7 == 0:
                tasks[number // 2].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = (Overloaded, DeadlineExceeded, asyncio.CancelledError)
        assert all(each is None or isinstance(each, kinds) for each in found)
        assert most == 3
        assert (admission.in_flight, admission.queued, running) == (0, 0, 0)

    asyncio.run(run())


def test_the_excess_is_refused_at_once_and_the_rest_served() -> None:
    async def run() -> None:
        servicer = ScriptedTraceService()
        settings = {"admission": {"max_in_flight": 3, "max_queued": 4, "max_wait_seconds": 30}}
        async with serving(servicer, settings) as served:
            calls = [asyncio.ensure_future(served.traces.Trace(ask("sleep 0.3"))) for _ in range(20)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            refused = [each for each in found if isinstance(each, grpc.aio.AioRpcError)]
            assert len(refused) == 13
            assert servicer.most_running == 3
            assert servicer.done == 7
            for each in refused:
                error = from_call(each)
                assert isinstance(error, Overloaded)
                assert error.retry_after_seconds is not None
                assert error.retry_after_seconds > 0
            assert sample(served.gateway, "trackstar_rejected_total", reason="queue_full") == 13
            assert sample(served.gateway, "trackstar_rpc_in_flight") == 0
            await served.traces.Trace(ask())

    asyncio.run(run())


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    async def run() -> None:
        servicer = ScriptedTraceService()
        settings = {"admission": {"max_in_flight": 1, "max_queued": 1, "max_wait_seconds": 30}}
        async with serving(servicer, settings) as served:
            running = asyncio.ensure_future(served.traces.Trace(ask("sleep 0.5")))
            await until(lambda: servicer.running == 1)
            waiting = served.traces.Trace(ask())
            await until(lambda: sample(served.gateway, "trackstar_admission_queue_length") == 1)
            assert isinstance(from_call(await failure(served.traces.Trace(ask()))), Overloaded)
            waiting.cancel()
            await until(lambda: sample(served.gateway, "trackstar_admission_queue_length") == 0)
            await served.traces.Trace(ask())
            await running

    asyncio.run(run())


async def _enter(admission: Admission, deadline: float) -> None:
    async with admission.place(deadline):
        pass

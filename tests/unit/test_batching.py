"""Batches: order, bounds, callers that leave, failures of one and of all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.encoder.batching import TokenBatcher
from trackstar.errors import InvalidRequest, NotReady, Overloaded


class _Model:
    """Doubles numbers, one batch at a time, when told to go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go_on = asyncio.Event()

    async def run(self, items: Sequence[int]) -> Sequence[int | Exception]:
        self.batches.append(list(items))
        await self.go_on.wait()
        if 13 in items and len(items) == 1:
            raise NotReady("lost")
        return [InvalidRequest("seven") if item == 7 else 2 * item for item in items]


def _batcher(model: _Model, *, lanes: int = 1, max_tokens: int = 10, waiting: int = 1000) -> TokenBatcher[int, int]:
    return TokenBatcher(model.run, max_tokens=max_tokens, max_waiting_tokens=waiting, lanes=lanes)


def test_an_idle_model_starts_at_once_and_the_rest_goes_together() -> None:
    async def main() -> None:
        model = _Model()
        batcher = _batcher(model)
        calls = [asyncio.create_task(batcher.submit(item, tokens=4)) for item in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert model.batches == [[0]]
        model.go_on.set()
        assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8, 10]
        assert model.batches == [[0], [1, 2], [3, 4], [5]]

    asyncio.run(main())


def test_an_item_larger_than_a_batch_goes_alone() -> None:
    async def main() -> None:
        model = _Model()
        batcher = _batcher(model)
        model.go_on.set()
        calls = [asyncio.create_task(batcher.submit(item, tokens=tokens)) for item, tokens in ((1, 2), (2, 99), (3, 2))]
        assert await asyncio.gather(*calls) == [2, 4, 6]
        assert model.batches == [[1], [2], [3]]

    asyncio.run(main())


def test_one_item_fails_alone_and_a_failed_batch_fails_all() -> None:
    async def main() -> None:
        model = _Model()
        batcher = _batcher(model)
        calls = [asyncio.create_task(batcher.submit(item, tokens=1)) for item in (13, 6, 7)]
        model.go_on.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[0], NotReady)
        assert results[1] == 12
        assert isinstance(results[2], InvalidRequest)

    asyncio.run(main())


def test_a_caller_that_left_takes_no_place() -> None:
    async def main() -> None:
        model = _Model()
        batcher = _batcher(model, waiting=20)
        calls = [asyncio.create_task(batcher.submit(item, tokens=8)) for item in range(3)]
        await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.sleep(0)
        model.go_on.set()
        assert await calls[2] == 4
        assert model.batches == [[0], [2]]
        assert batcher.waiting_tokens == 0

    asyncio.run(main())


def test_too_many_waiting_tokens_are_refused_at_once() -> None:
    async def main() -> None:
        model = _Model()
        batcher = _batcher(model, waiting=10)
        calls = [asyncio.create_task(batcher.submit(item, tokens=6)) for item in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit(9, tokens=6)
        model.go_on.set()
        assert await asyncio.gather(*calls) == [0, 2]

    asyncio.run(main())


def test_closing_refuses_what_waits_and_finishes_what_runs() -> None:
    async def main() -> None:
        model = _Model()
        batcher = _batcher(model)
        calls = [asyncio.create_task(batcher.submit(item, tokens=6)) for item in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        model.go_on.set()
        await closing
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[0] == 0
        assert isinstance(results[1], NotReady)
        with pytest.raises(NotReady):
            await batcher.submit(1, tokens=1)

    asyncio.run(main())


@given(sizes=st.lists(st.integers(1, 12), max_size=30), lanes=st.integers(1, 3))
def test_every_item_is_answered_in_order_and_batches_keep_their_bound(sizes: list[int], lanes: int) -> None:
    async def main() -> None:
        model = _Model()
        model.go_on.set()
        batcher = _batcher(model, lanes=lanes, waiting=10_000)
        items = [20 + number for number in range(len(sizes))]
        calls = [
            asyncio.create_task(batcher.submit(item, tokens=size)) for item, size in zip(items, sizes, strict=True)
        ]
        assert await asyncio.gather(*calls) == [2 * item for item in items]
        assert [item for batch in model.batches for item in batch] == items
        for batch in model.batches:
            assert len(batch) == 1 or sum(sizes[item - 20] for item in batch) <= 10

    asyncio.run(main())

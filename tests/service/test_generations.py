"""Switching generations while calls run, and coarse searches that are joined."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from services.gateway.coarse_search import CoarseSearch
from services.gateway.generations import Generations
from services.gateway.request import Principal
from tests.service import honest
from tests.service.honest import CountedIndex, HonestEncoder, add_generation, make_index, serving
from trackstar.blobs import local
from trackstar.catalog import Catalog
from trackstar.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    PermissionDenied,
    TrackstarError,
)
from trackstar.retirement import retire
from trackstar.rpc_errors import from_call
from trackstar.v1 import generation_pb2, trace_pb2


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_index(tmp_path, "alpha", "beta", active="alpha")


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def _request(**fields: Any) -> trace_pb2.TraceRequest:
    return trace_pb2.TraceRequest(query=trace_pb2.Query(target="Paris"), **fields)


async def _refusal(call: Any) -> TrackstarError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_call(caught.value)


async def _until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def _is_right(found: trace_pb2.TraceResponse) -> bool:
    """Whether the scores are those of the generation that the answer names."""
    scores = honest.scores_of(found.provenance.generation, "Paris")
    return all(scores[item.passage.passage_id] == np.float32(item.score) for item in found.proponents)


def test_calls_that_have_begun_end_on_the_old_generation(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, encoder=HonestEncoder(delay=0.3)) as gateway:
            request = _request(candidates=50)
            begun = [asyncio.ensure_future(gateway.trace.Trace(request)) for _ in range(5)]
            await _until(lambda: gateway.encoder.calls == 5)
            switched = await gateway.generation.Activate(generation_pb2.ActivateRequest(name="beta"))
            assert (switched.previous, switched.generation.name) == ("alpha", "beta")
            assert switched.generation.state == generation_pb2.GENERATION_STATE_ACTIVE
            assert not gateway.indexes["alpha"][0].closed
            later = await gateway.trace.Trace(request)
            assert later.provenance.generation == "beta"
            assert _is_right(later)
            for found in await asyncio.gather(*begun):
                assert found.provenance.generation == "alpha"
                assert _is_right(found)
            await _until(lambda: gateway.indexes["alpha"][0].closed)
            assert catalog.active() == "beta"
            assert gateway.generations.active == "beta"

    _run(work())


def test_no_call_fails_and_no_answer_mixes_generations_under_many_switches(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, encoder=HonestEncoder(delay=0.001)) as gateway:
            answered: set[str] = set()
            stop = asyncio.Event()

            async def ask() -> None:
                while not stop.is_set():
                    found = await gateway.trace.Trace(_request(candidates=50, k=5))
                    assert _is_right(found)
                    answered.add(found.provenance.generation)

            callers = [asyncio.create_task(ask()) for _ in range(6)]
            for number in range(12):
                name = ("beta", "alpha")[number % 2]
                await gateway.generation.Activate(generation_pb2.ActivateRequest(name=name))
                await asyncio.sleep(0.03)
            stop.set()
            await asyncio.gather(*callers)
            assert answered == {"alpha", "beta"}
            made = [index for indexes in gateway.indexes.values() for index in indexes]
            await _until(lambda: sum(not index.closed for index in made) == 1)
            assert not gateway.indexes["alpha"][-1].closed

    _run(work())


def test_another_process_s_activation_is_followed(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, poll_seconds=0.02) as gateway:
            Catalog(catalog.root).activate("beta")
            await _until(lambda: gateway.generations.active == "beta")
            assert (await gateway.trace.Trace(_request())).provenance.generation == "beta"
            await _until(lambda: gateway.indexes["alpha"][0].closed)

    _run(work())


def test_a_broken_pointer_is_said_once_and_serving_goes_on(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with serving(catalog, poll_seconds=0.01) as gateway:
            (local(catalog.root) / "active.json").write_text("{")
            await _until(lambda: caplog.records)
            await asyncio.sleep(0.1)
            assert len(caplog.records) == 1
            assert (await gateway.trace.Trace(_request())).provenance.generation == "alpha"
            catalog.activate("beta")
            await _until(lambda: gateway.generations.active == "beta")

    _run(work())


def test_none_is_active_until_one_is(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(make_index(tmp_path, "alpha")) as gateway:
            with pytest.raises(NotReady):
                await gateway.generations.ready()
            assert isinstance(await _refusal(gateway.trace.Trace(_request())), NotReady)
            assert (await gateway.trace.Trace(_request(generation="alpha"))).provenance.generation == "alpha"
            gateway.catalog.activate("alpha")
            assert (await gateway.trace.Trace(_request())).provenance.generation == "alpha"

    _run(work())


def test_tokens_outlive_a_switch_but_not_their_generation(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, poll_seconds=0.02) as gateway:
            first = await gateway.trace.Trace(_request(k=20, page_size=10))
            await gateway.generation.Activate(generation_pb2.ActivateRequest(name="beta"))
            follow = _request(k=20, page_size=10, page_token=first.next_page_token)
            second = await gateway.trace.Trace(follow)
            assert second.provenance.generation == "alpha"
            assert _is_right(second)
            assert [item.rank for item in second.proponents] == list(range(11, 21))
            shutil.rmtree(local(catalog.root) / "generations/alpha")
            await _until(lambda: "alpha" not in gateway.generations._open)
            error = await _refusal(gateway.trace.Trace(follow))
            assert isinstance(error, NotFound)
            assert (error.kind, error.name) == ("generation", "alpha")

    _run(work())


def test_generations_asked_by_name_are_opened_once_and_a_few_are_kept(tmp_path: Path) -> None:
    async def work() -> None:
        catalog = make_index(tmp_path, "alpha", "beta", "gamma", active="alpha")
        async with serving(catalog) as gateway:
            await asyncio.gather(*(gateway.trace.Trace(_request(generation="beta")) for _ in range(8)))
            assert len(gateway.indexes["beta"]) == 1
            assert not gateway.indexes["beta"][0].closed
            await gateway.trace.Trace(_request(generation="gamma"))
            await _until(lambda: gateway.indexes["beta"][0].closed)
            assert not gateway.indexes["gamma"][0].closed
            assert not gateway.indexes["alpha"][0].closed
            await gateway.trace.Trace(_request(generation="beta"))
            assert len(gateway.indexes["beta"]) == 2

    _run(work())


def test_many_callers_of_many_generations_are_all_answered(tmp_path: Path) -> None:
    async def work() -> None:
        names = [f"g{number}" for number in range(4)]
        catalog = make_index(tmp_path, *names, active="g0")
        async with serving(catalog, poll_seconds=0.01) as gateway:

            async def ask(first: int) -> None:
                for number in range(12):
                    name = names[(first + number * number) % len(names)]
                    found = await gateway.trace.Trace(_request(generation=name, candidates=50, k=3))
                    assert found.provenance.generation == name
                    assert _is_right(found)

            callers = [asyncio.create_task(ask(first)) for first in range(8)]
            for name in names:
                catalog.activate(name)
                await asyncio.sleep(0.05)
            await asyncio.gather(*callers)
            made = [index for indexes in gateway.indexes.values() for index in indexes]
            await _until(lambda: sum(not index.closed for index in made) <= 2)

    _run(work())


def test_activation_is_for_those_that_may_and_of_what_is_finished(catalog: Catalog) -> None:
    async def work() -> None:
        (local(catalog.root) / "generations/half").mkdir()
        principals = {"reader": Principal(name="reader"), "tenant": Principal(name="tenant", generations=("b*",))}
        async with serving(catalog, principals=principals) as gateway:

            async def activate(name: str, caller: str = "operator") -> TrackstarError:
                request = generation_pb2.ActivateRequest(name=name)
                return await _refusal(gateway.generation.Activate(request, metadata=(("caller", caller),)))

            assert isinstance(await activate("beta", "reader"), PermissionDenied)
            assert isinstance(await activate("gamma"), NotFound)
            assert isinstance(await activate("half"), NotReady)
            for name in ("", "active", "../x"):
                error = await activate(name)
                assert isinstance(error, InvalidRequest)
                assert error.field == "name"
            assert catalog.active() == "alpha"

            listed = await gateway.generation.List(generation_pb2.ListRequest())
            states = {item.name: item.state for item in listed.generations}
            assert states == {
                "alpha": generation_pb2.GENERATION_STATE_ACTIVE,
                "beta": generation_pb2.GENERATION_STATE_READY,
                "half": generation_pb2.GENERATION_STATE_BUILDING,
            }
            tenant = (("caller", "tenant"),)
            listed = await gateway.generation.List(generation_pb2.ListRequest(), metadata=tenant)
            assert [item.name for item in listed.generations] == ["beta"]
            for name in ("alpha", "", "half"):
                request = generation_pb2.GetRequest(name=name)
                assert isinstance(await _refusal(gateway.generation.Get(request, metadata=tenant)), PermissionDenied)
            found = (await gateway.generation.Get(generation_pb2.GetRequest(name="active"))).generation
            assert (found.name, found.num_passages, found.dim) == ("alpha", honest.NUM, honest.DIM)
            assert (found.code_kind, found.code_size, found.mix, found.damping) == ("prefix", 16, "train", 0.1)

    _run(work())


def test_the_list_comes_in_pages(tmp_path: Path) -> None:
    async def work() -> None:
        names = [f"g{number}" for number in range(5)]
        async with serving(make_index(tmp_path, *names)) as gateway:
            request, seen = generation_pb2.ListRequest(page_size=2), []
            while True:
                page = await gateway.generation.List(request)
                seen += [item.name for item in page.generations]
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
                add_generation(tmp_path, "g00")  # behind where the list has come to
            assert seen == names
            request.page_token = "!"
            error = await _refusal(gateway.generation.List(request))
            assert isinstance(error, InvalidRequest)
            assert error.field == "page_token"

    _run(work())


def test_a_generation_that_cannot_be_opened_changes_nothing(catalog: Catalog) -> None:
    async def work() -> None:
        broken = True

        def open_coarse(facts: Any) -> CountedIndex:
            if broken and facts.name == "beta":
                raise NotReady("the coarse index cannot be reached")
            return CountedIndex(facts.name)

        heard: list[str] = []
        generations = Generations(catalog, open_coarse, on_active=lambda facts: heard.append(facts.name))
        await generations.start()
        await generations.ready()
        with pytest.raises(NotReady, match="cannot be reached"):
            await generations.activate("beta")
        assert (generations.active, catalog.active()) == ("alpha", "alpha")
        broken = False
        facts, previous = await generations.activate("beta")
        assert (facts.name, facts.state, previous, catalog.active()) == ("beta", "active", "alpha", "beta")
        assert (await generations.activate("beta"))[1] == "beta"
        assert heard == ["alpha", "beta"]
        async with generations.hold() as held:
            assert held.name == "beta"
        await generations.close()

    _run(work())


class _Held:
    """A counted index whose searches wait until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.index = CountedIndex("alpha")
        self.index.hold = lambda: self.go.wait(20)
        self.threads = ThreadPoolExecutor(max_workers=2)


def _codes(text: str) -> Any:
    return honest.query_vector(text)[None, : honest.SIZE]


def test_searches_that_wait_are_joined_and_answered_each_by_itself() -> None:
    async def work() -> None:
        held = _Held()
        search = CoarseSearch(held.index, held.threads, max_batch=8)
        calls = [
            asyncio.create_task(search.search(_codes(str(number)), 20, timeout_seconds=20)) for number in range(12)
        ]
        other = asyncio.create_task(search.search(np.concatenate([_codes("a"), _codes("b")]), 5, timeout_seconds=20))
        await _until(lambda: held.index.batches)
        held.go.set()
        plain = CountedIndex("alpha").index
        for number, call in enumerate(calls):
            ids, cosines = await call
            wanted_ids, wanted = plain.search(_codes(str(number)), 20)
            assert np.array_equal(ids, wanted_ids)
            assert cosines == pytest.approx(wanted, abs=1e-6)
        assert (await other)[0].shape == (2, 5)
        assert held.index.batches == [1, 8, 3, 2]
        await search.close()
        assert held.index.closed
        with pytest.raises(NotReady):
            await search.search(_codes("x"), 5, timeout_seconds=1)

    _run(work())


def test_searches_give_up_in_time_and_do_not_pile_up() -> None:
    async def work() -> None:
        held = _Held()
        search = CoarseSearch(held.index, held.threads, max_waiting=3)
        calls = [
            asyncio.create_task(search.search(_codes(str(number)), 20, timeout_seconds=0.1)) for number in range(3)
        ]
        await _until(lambda: held.index.batches)
        calls += [asyncio.create_task(search.search(_codes("y"), 20, timeout_seconds=0.1)) for _ in range(2)]
        failed = await asyncio.gather(*calls, return_exceptions=True)
        kinds = [type(error) for error in failed]
        assert kinds.count(DeadlineExceeded) == 4
        assert kinds.count(Overloaded) == 1
        assert held.index.batches == [1]
        held.go.set()
        ids, _ = await search.search(_codes("z"), 20, timeout_seconds=20)
        assert ids.shape == (1, 20)
        assert held.index.batches == [1, 1], "those whose callers left are not searched for"
        await search.close()

    _run(work())


def test_a_failing_search_fails_its_own_batch_alone() -> None:
    async def work() -> None:
        index = CountedIndex("alpha")
        with ThreadPoolExecutor(max_workers=1) as threads:
            search = CoarseSearch(index, threads)

            def fail() -> None:
                raise NotReady("the coarse index cannot be reached")

            index.hold = fail
            with pytest.raises(NotReady, match="cannot be reached"):
                await search.search(_codes("x"), 20, timeout_seconds=5)
            index.hold = lambda: None
            assert (await search.search(_codes("x"), 20, timeout_seconds=5))[0].shape == (1, 20)
            await search.close()

    _run(work())


def test_a_retired_generation_is_not_opened_and_one_that_is_held_goes_on(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, poll_seconds=0.02) as gateway:
            async with gateway.generations.hold("beta") as held:
                retire(catalog, "beta")
                refusal: TrackstarError | None = None
                while refusal is None:
                    # Until the gateway has looked at the folder again.
                    with contextlib.suppress(pytest.fail.Exception):
                        refusal = await _refusal(gateway.trace.Trace(_request(generation="beta")))
                assert not gateway.indexes["beta"][0].closed
                assert isinstance(refusal, NotFound)
                assert str(refusal) == "there is no generation 'beta'; it may have been retired"
                assert (await held.search.search(np.zeros((1, honest.SIZE), np.float32), 3, timeout_seconds=5))[0].size
            await _until(lambda: gateway.indexes["beta"][0].closed)

    _run(work())


def test_a_generation_that_is_being_collected_is_not_listed(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            retire(catalog, "beta")
            (local(catalog.generations) / "beta" / "generation.json").unlink()
            listed = await gateway.generation.List(generation_pb2.ListRequest())
            assert [item.name for item in listed.generations] == ["alpha"]

    _run(work())

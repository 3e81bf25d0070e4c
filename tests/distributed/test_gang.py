"""A gang answers as one, and is replaced as one when a member dies or fails alone."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from services.encoder.gang import Gang
from services.encoder.model import ModelWorker
from services.encoder.rank import RankWorker
from services.serve.config import ServeConfig
from tests import tiny
from tests.distributed import jobs
from tests.distributed.test_sharding import TWO_HEADS, error_of
from tests.distributed.workers import Rows
from tests.service import demo_index
from trackstar.errors import InvalidRequest, NotReady, UnsupportedModel
from trackstar.index import Index
from trackstar.sharding import Strategy
from trackstar.tail_patch import PatchStep

RANKS = 2
START_SECONDS = 120.0
# Far above what Ray needs to report a death, far below the sleep or the timeout that would otherwise end the call.
AT_ONCE_SECONDS = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # Short, because sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=80 * 2**20,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("gang") / "model", "llama", **TWO_HEADS)


@asynccontextmanager
async def gang_of(folder: Path, strategy: Strategy) -> AsyncIterator[Gang]:
    gang = Gang(Rows, str(folder), ranks=RANKS, strategy=strategy, cpus=0.25)
    try:
        yield gang
    finally:
        await gang.close()


def test_a_gang_answers_and_survives_its_members(cluster: None, model: Path) -> None:
    """One gang for all of it, since starting one takes seconds."""
    whole = jobs.compute(model, None).rows["none"]

    async def scenario() -> None:
        async with gang_of(model, "tensor") as gang:
            assert state_of(gang) == "starting"
            with pytest.raises(NotReady, match="2 ranks are being started"):
                await gang.call("rows")
            await gang.ready(START_SECONDS)
            assert state_of(gang) == "ready"
            await gang.check_health()
            rows = await gang.call("rows")
            assert error_of(rows, whole) < 1e-5
            several = await asyncio.gather(*(gang.call("rows") for _ in range(3)))
            assert all(np.array_equal(rows, other) for other in several)

            for _ in range(3):
                with pytest.raises(InvalidRequest, match=r"^no$"):
                    await gang.call("refuse")
            assert np.array_equal(await gang.call("rows"), rows)
            pids = await gang.call("pids")

            # In the middle of a call; the other rank waits in a collective.
            began = time.monotonic()
            waiting = asyncio.create_task(gang.call("wait_for_rank", 1, 600.0))
            behind = asyncio.create_task(gang.call("rows"))
            await asyncio.sleep(1.0)
            os.kill(pids[1], signal.SIGKILL)
            for pending in (waiting, behind):
                with pytest.raises(NotReady, match="lost during the call"):
                    await pending
            assert time.monotonic() - began < AT_ONCE_SECONDS
            assert state_of(gang) == "starting"
            pids = await renewed(gang, pids)
            assert np.array_equal(await gang.call("rows"), rows)

            # Between calls: nobody asks, and still the gang is replaced.
            os.kill(pids[0], signal.SIGKILL)
            pids = await renewed(gang, pids)
            assert np.array_equal(await gang.call("rows"), rows)

            # One rank is out of step with the others; calls behind it get no wrong answer.
            calls = [gang.call("fail_alone", 0), *(gang.call("rows") for _ in range(3))]
            for found in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(found, NotReady)
            pids = await renewed(gang, pids)
            assert np.array_equal(await gang.call("rows"), rows)

            # The caller has gone when it happens.
            given_up = asyncio.create_task(gang.call("refuse_alone", 1))
            await asyncio.sleep(0.1)
            given_up.cancel()
            await renewed(gang, pids)
            assert np.array_equal(await gang.call("rows"), rows)
        with pytest.raises(NotReady):
            await gang.call("rows")

    asyncio.run(scenario())


def state_of(gang: Gang) -> str:
    """A call, lest mypy takes the state for constant."""
    return gang.state


async def renewed(gang: Gang, before: list[int]) -> list[int]:
    """Process ids after all members were replaced."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            pids: list[int] = await gang.call("pids")
        except NotReady:
            await asyncio.sleep(0.2)
            continue
        if not set(pids) & set(before):
            return pids
    raise AssertionError("the gang was not replaced")


@pytest.mark.slow
def test_a_gang_spreads_a_model_by_fsdp(cluster: None, model: Path) -> None:
    whole = jobs.compute(model, None).rows["none"]

    async def scenario() -> None:
        async with gang_of(model, "fsdp") as gang:
            await gang.ready(START_SECONDS)
            assert error_of(await gang.call("rows"), whole) < 1e-5

    asyncio.run(scenario())


def test_a_model_that_cannot_be_cut_is_said_to_the_owner(cluster: None, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "gpt2")

    async def scenario() -> None:
        async with gang_of(folder, "tensor") as gang:
            while gang.state != "lost":
                await asyncio.sleep(0.1)
            with pytest.raises(NotReady, match="GPT2LMHeadModel cannot be cut by 'tensor'"):
                await gang.call("rows")

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_encoders_ranks_answer_as_its_whole_model(cluster: None, tmp_path: Path) -> None:
    folder = demo_index.build(tmp_path, architecture="gpt_neox")
    config = ServeConfig(index=str(folder))
    index = Index(folder)
    whole = ModelWorker(index, index.load_model())
    examples = jobs.examples()[:3]
    dual_d = np.random.default_rng(0).standard_normal(index.layout.dim, dtype=np.float32)
    step = PatchStep()

    async def scenario() -> None:
        gang = Gang(RankWorker, config, ranks=RANKS, strategy="tensor", cpus=0.25)
        try:
            await gang.ready(START_SECONDS)
            rows = await gang.call("encode", examples)
            assert error_of(rows.rows_Nd, whole.encode(examples).rows_Nd) < 1e-5
            shares = await gang.call("contributions", examples, dual_d)
            for found, expected in zip(shares, whole.contributions(examples, dual_d), strict=True):
                scale = float(np.abs(expected.by_token_Tb).max())
                np.testing.assert_allclose(found.by_token_Tb, expected.by_token_Tb, rtol=0, atol=1e-5 * scale)
            said = await gang.call("complete", examples[0].tokens, 5, ())
            np.testing.assert_array_equal(said.tokens, whole.complete(examples[0].tokens, 5, ()).tokens)
            with pytest.raises(UnsupportedModel, match="needs the whole model"):
                await gang.call("tail_patch", examples[0], examples[1], step)
            assert gang.state == "ready"
        finally:
            await gang.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_ranks_take_the_free_places_of_their_owner(cluster: None, model: Path) -> None:
    """An owner whose placement group has a bundle for every rank makes none of its own."""
    places = ray.util.placement_group([{"CPU": 0.25}] * (RANKS + 1), strategy="PACK")
    where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=0)
    owner: Any = ray.remote(Owner)
    remote = owner.options(num_cpus=0.25, scheduling_strategy=where).remote(str(model))
    own_places, rows = ray.get(remote.rows.remote(), timeout=START_SECONDS)
    assert not own_places
    assert error_of(rows, jobs.compute(model, None).rows["none"]) < 1e-5
    ray.get(remote.close.remote(), timeout=START_SECONDS)
    ray.util.remove_placement_group(places)


class Owner:
    """An actor with a gang, as a replica of Serve is."""

    def __init__(self, folder: str) -> None:
        self._gang = Gang(Rows, folder, ranks=RANKS, strategy="tensor", cpus=0.25)

    async def rows(self) -> tuple[bool, Any]:
        """Whether the gang has places of its own, and rows."""
        await self._gang.ready(START_SECONDS)
        return self._gang._own_places is not None, await self._gang.call("rows")

    async def close(self) -> None:
        """End the gang."""
        await self._gang.close()

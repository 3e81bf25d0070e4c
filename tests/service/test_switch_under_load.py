"""Generations switched, rolled back, built, retired and collected, and documents deleted, while clients trace."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from services.gateway.coarse_milvus import alias_of, collection_of, connect, fill_collection
from services.gateway.config import MilvusConfig
from services.reindex.collections import unused_collections
from tests.milvus_process import MilvusProcess
from tests.service import switching
from tests.service.backend_process import BackendProcess
from tests.service.serve_process import ServeProcess
from tests.service.switching import Expected, Load
from trackstar.catalog import Catalog
from trackstar.client import Client
from trackstar.milvus_alias import AliasPointer
from trackstar.milvus_collection import drop
from trackstar.retirement import collect, retire
from trackstar.tracer import Tracer

_TRACKSTAR = str(Path(sys.executable).with_name("trackstar"))


def command(*words: str) -> subprocess.Popen[str]:
    """A command of ours as a process of its own."""
    return subprocess.Popen([_TRACKSTAR, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


def foremost_document(index: Path, name: str) -> str:
    """The document that a query finds first."""
    tracer = Tracer.open(str(index), generation=name)
    found = tracer.trace(switching.query(0), k=1, evidence=False).proponents[0].passage.doc_id
    tracer.close()
    return found


@pytest.mark.parametrize("rounds", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_serving_switches_rolls_back_and_forgets_without_a_failed_or_mixed_answer(tmp_path: Path, rounds: int) -> None:
    index, names = switching.build(tmp_path)
    doc_id = foremost_document(index, names.plain)
    expected = Expected(tmp_path / "expected", index, [doc_id])
    server = ServeProcess(index, tmp_path)
    catalog, switches = Catalog(index), 0
    with closing(server):
        with (
            Load(server.address, named=(names.damped, names.grown)) as load,
            Client(server.address, timeout_seconds=60) as client,
        ):

            def activate(name: str) -> None:
                nonlocal switches
                client.activate(name)
                switches += 1

            load.wait_for(names.plain)
            for name in (names.damped, names.grown, names.purged, names.plain, names.purged, names.damped) * rounds:
                activate(name)
                load.wait_for(name)
            # Back and forth without waiting: what is being opened is no longer wanted.
            for name in (names.plain, names.grown, names.damped) * 2 * rounds:
                activate(name)
            began = time.monotonic()
            switching.delete(index, doc_id)
            deleted = time.monotonic()
            for name in (names.grown, names.plain):
                ended(command("activate", str(index), name))
                switches += 1
                load.wait_for(name)
            # Another generation is built beside those that answer, and takes over.
            config = tmp_path / "another.yaml"
            config.write_text(yaml.safe_dump(switching.grown(tmp_path, mix={"damping": 0.4})))
            building = command("index", "--config", str(config), "--out", str(index))
            while building.poll() is None:
                for name in (names.grown, names.plain):
                    activate(name)
                    time.sleep(0.5)
            ended(building)
            (another,) = set(catalog.finished()) - set(names.all)
            activate(another)
            load.wait_for(another)
            activate(names.purged)
            load.wait_for(names.purged)
            # What nobody is given any more goes, files and all.
            load.named = (names.purged,)
            load.wait_without(names.plain, names.damped, names.grown, another)
            expected.adopt(index, another)
            for name in (names.plain, names.damped):
                retire(catalog, name)
            assert collect(catalog)
            assert sorted(catalog.finished()) == sorted([names.grown, names.purged, another])
            for name in (another, names.purged):
                activate(name)
                load.wait_for(name)
        load.check()
        assert server.metrics()["trackstar_defects_total"] == 0
    assert server.close() == 0
    counted = expected.judge(load.answers, began, deleted)
    expected.close()
    print(f"{len(load.answers)} answers, {load.listings} listings, {switches} switches: {dict(counted)}")
    assert counted.keys() == {*names.all, another}
    assert min(counted.values()) >= 3
    assert switches > 20


@pytest.mark.slow
def test_a_gateway_over_milvus_follows_the_alias_without_a_failed_or_mixed_answer(
    tmp_path: Path, milvus: MilvusProcess
) -> None:
    index, names = switching.build(tmp_path)
    doc_id = foremost_document(index, names.plain)
    expected = Expected(tmp_path / "expected", index, [doc_id])
    secret = tmp_path / "secret"
    secret.write_text(f"{milvus.access.user}:{milvus.access.password}")
    config = MilvusConfig(address=milvus.access.address, token_file=secret, collection_prefix="switching_")
    catalog, switches = Catalog(index), 0
    for name in names.all:
        fill_collection(config, catalog, name)
    with connect(config) as link, closing(BackendProcess(index)) as backends:
        alias = AliasPointer(link, alias_of(config))
        alias.set(collection_of(config, names.plain))
        gateway = ServeProcess(
            index,
            tmp_path,
            role="gateway",
            BACKENDS__ENCODER_ADDRESS=backends.address,
            BACKENDS__RERANKER_ADDRESS=backends.address,
            MILVUS__ADDRESS=milvus.access.address,
            MILVUS__TOKEN_FILE=str(secret),
            MILVUS__COLLECTION_PREFIX=config.collection_prefix,
        )
        with closing(gateway):
            with (
                Load(gateway.address, named=(names.damped, names.grown)) as load,
                Client(gateway.address, timeout_seconds=60) as client,
            ):
                load.wait_for(names.plain)
                for name in (names.damped, names.grown, names.purged, names.plain, names.damped):
                    client.activate(name)
                    assert alias.get() == collection_of(config, name)
                    assert catalog.pointer() == name
                    switches += 1
                    load.wait_for(name)
                for name in (names.purged, names.grown, names.plain) * 2:
                    client.activate(name)
                    switches += 1
                began = time.monotonic()
                switching.delete(index, doc_id)
                deleted = time.monotonic()
                # A job of the deployment moves the alias; the gateway is told by nobody.
                for name in (names.grown, names.plain, names.purged):
                    alias.set(collection_of(config, name))
                    catalog.activate(name)
                    switches += 1
                    load.wait_for(name)
                load.named = (names.purged,)
                load.wait_without(names.plain, names.damped, names.grown)
                retire(catalog, names.damped)
                assert collect(catalog)
                gone = unused_collections(config, catalog, delete=True)
                assert gone == [collection_of(config, names.damped)]
                for name in (names.grown, names.purged):
                    client.activate(name)
                    switches += 1
                    load.wait_for(name)
            load.check()
            assert gateway.metrics()["trackstar_defects_total"] == 0
        assert gateway.close() == 0
        assert backends.close() == 0
        alias.drop()
        for name in (names.plain, names.grown, names.purged):
            drop(link, collection_of(config, name))
    counted = expected.judge(load.answers, began, deleted)
    expected.close()
    print(f"{len(load.answers)} answers, {load.listings} listings, {switches} switches: {dict(counted)}")
    assert counted.keys() == set(names.all)
    assert min(counted.values()) >= 3
    assert switches >= 16

"""Kills whatever takes part in a reindex job, at random moments, and compares what is left in the end.

    python -m tests.distributed.reindex_kills --kills 32 --seed 1

One Ray cluster of two nodes and one Milvus server serve all builds. A build is interrupted a few times: its driver is
killed and started again, a worker process is killed, a node is taken away and another added, or Milvus is killed and
started again. Afterwards the index folder must have the same bytes as one built in peace, and the collection the same
codes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import yaml
from pymilvus.grpc_gen import common_pb2, milvus_pb2
from ray.cluster_utils import Cluster

from tests import tiny
from tests.milvus_process import MilvusProcess
from trackstar.jobs import PIPELINE_STATES, PipelineState
from trackstar.milvus_link import MilvusLink

Kind = Literal["driver", "worker", "node", "milvus"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BUILD_SECONDS = 600.0
_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}
_WORDS = ["river", "bridge", "snow", "hills", "night", "birds", "sang", "sea", "stone", "wind"]


@dataclass(slots=True)
class Kill:
    """One kill: what, how far the job was, and how long after its start."""

    kind: Kind
    state: str
    seconds: float


@dataclass(slots=True)
class Blow:
    """What is to be killed, so long after the job has come to a state."""

    kind: Kind
    state: PipelineState
    seconds: float


@dataclass(slots=True)
class World:
    """A cluster, a Milvus server, a model and a corpus, in one folder."""

    folder: Path
    milvus: MilvusProcess
    cluster: Any
    kills: list[Kill] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    restarts: int = 0

    @classmethod
    def make(cls, folder: Path) -> World:
        """Start everything."""
        tiny.save_model(folder / "model", "gpt2")
        generator = random.Random(0)
        texts = (" ".join(generator.choices(_WORDS, k=generator.randint(3, 40))) for _ in range(150))
        lines = [json.dumps({"id": f"d{number}", "text": text}) + "\n" for number, text in enumerate(texts)]
        for part in range(3):
            (folder / f"corpus-{part}.jsonl").write_text("".join(lines[part::3]))
        milvus = MilvusProcess(folder / "milvus")
        milvus.start()
        (folder / "token").write_text(f"{milvus.access.user}:{milvus.access.password}")
        cluster: Any = Cluster(initialize_head=True, head_node_args={**_NODE, "include_dashboard": False})
        world = cls(folder, milvus, cluster)
        world.nodes.append(cluster.add_node(**_NODE))
        return world

    def close(self) -> None:
        """End everything."""
        self.cluster.shutdown()
        self.milvus.kill()

    def config(self, name: str) -> Path:
        """The job that builds the index `name`."""
        path = self.folder / f"{name}.yaml"
        pool = {"cpus": 0.5, "max": 2}
        content = {
            "index": str(self.folder / name),
            "build": {
                "corpus": {"paths": [str(self.folder / f"corpus-{part}.jsonl") for part in range(3)]},
                "model": str(self.folder / "model"),
                "projection": {"layer_blocks": 2, "rows": 8, "cols": 8},
                "code": {"kind": "bits", "store": "milvus"},
                "shard_passages": 16,
                "background": 20,
                "audit": {"queries": 8, "codes": 32},
            },
            "workers": dict.fromkeys(("readers", "encoders", "scanners", "whitener", "importers"), pool),
            "milvus": {
                "address": self.milvus.access.address,
                "token_file": str(self.folder / "token"),
                # Collections of different indexes would share their names: the generation is the same.
                "collection_prefix": f"{name}_",
            },
            "ray_address": self.cluster.address,
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def build(self, name: str, plan: list[Blow], seed: int) -> None:
        """Build an index while the blows of the plan come, one after the other."""
        generator = random.Random(seed)
        config, started = self.config(name), time.monotonic()
        driver = self._drive(config)
        try:
            for blow in plan:
                kind = blow.kind
                while driver.poll() is None and self._place(name) < PIPELINE_STATES.index(blow.state):
                    time.sleep(0.05)
                due = time.monotonic() + blow.seconds
                while driver.poll() is None and time.monotonic() < due:
                    time.sleep(0.05)
                if driver.poll() not in (None, 0):
                    self.restarts += 1
                    driver = self._drive(config)
                elif driver.poll() == 0:
                    break
                driver = self._kill(kind, config, driver, generator, name, time.monotonic() - started)
            code = driver.wait(timeout=_BUILD_SECONDS)
            if code != 0 and any(kill.kind == "node" for kill in self.kills):
                # Both nodes are this machine, and a driver dies with the node it is connected to: it is started again.
                self.restarts += 1
                driver = self._drive(config)
                code = driver.wait(timeout=_BUILD_SECONDS)
        finally:
            driver.kill()
        # Ray's own processes write between, at length.
        log = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        assert code == 0, "\n".join(line for line in log if "state-dump" not in line)[-6000:]

    def _place(self, name: str) -> int:
        """How far the job is, as a place among the pipeline's states."""
        record = self.folder / name / "jobs" / "job" / "progress.json"
        return PIPELINE_STATES.index(json.loads(record.read_text())["state"]) if record.is_file() else 0

    def _drive(self, config: Path) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("trackstar")), "reindex", str(config), "--job-id", "job"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with config.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def _kill(
        self,
        kind: Kind,
        config: Path,
        driver: subprocess.Popen[bytes],
        generator: random.Random,
        name: str,
        seconds: float,
    ) -> subprocess.Popen[bytes]:
        state = PIPELINE_STATES[self._place(name)]
        if kind == "driver":
            driver.kill()
            driver.wait()
            driver = self._drive(config)
        elif kind == "worker":
            found = list(self._workers())
            if not found:
                return driver
            generator.choice(found).kill()
        elif kind == "node":
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
            self.nodes.append(self.cluster.add_node(**_NODE))
        else:
            self.milvus.kill()
            self.milvus.start()
        self.kills.append(Kill(kind, state, seconds))
        return driver

    def _workers(self) -> Iterator[psutil.Process]:
        """Processes of Ray that do an item now, or hold a model."""
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            # Tasks and actors; not Ray's own agents, which take their node with them.
            if title.startswith("ray::") and "IDLE" not in title and "Agent" not in title:
                yield process

    def files(self, name: str) -> dict[str, bytes]:
        """What the index folder holds, but for records of this very run: the job's, and those with Milvus's numbers."""
        root = self.folder / name
        found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        kept = {key: data for key, data in found.items() if not key.startswith("jobs/") and "/imports/" not in key}
        # The audit names the collection, which differs in its prefix.
        return {key: data.replace(f"{name}_".encode(), b"_") for key, data in kept.items()}

    def codes(self, name: str) -> dict[int, bytes]:
        """What the collection holds: codes by passage id. Counted, so that doubles show."""
        generation = json.loads((self.folder / name / "active.json").read_text())["generation"]
        with MilvusLink(self.milvus.access) as link:
            alias = link.call(
                "DescribeAlias", milvus_pb2.DescribeAliasRequest(alias=f"{name}_active"), link.deadline(60)
            )
            assert alias.collection == f"{name}_{generation}"

            def ask(*fields: str, **more: Any) -> Any:
                request = milvus_pb2.QueryRequest(
                    collection_name=alias.collection,
                    output_fields=fields,
                    consistency_level=common_pb2.Strong,
                    use_default_consistency=False,
                    **more,
                )
                return link.call("Query", request, link.deadline(60), patient=True)

            (count,) = ask("count(*)").fields_data[0].scalars.long_data.data
            answer = {item.field_name: item for item in ask("passage_id", "code", expr="passage_id >= 0").fields_data}
        ids = list(answer["passage_id"].scalars.long_data.data)
        assert len(ids) == len(set(ids)) == count
        vectors = answer["code"].vectors
        size = vectors.dim // 8
        return {
            passage_id: vectors.binary_vector[place * size : (place + 1) * size] for place, passage_id in enumerate(ids)
        }


def run(num_kills: int, seed: int, kills_per_build: int) -> list[Kill]:
    """Kill so many times; returns what was killed. Raises AssertionError if a build differs from the one in peace."""
    generator = random.Random(seed)
    with ExitStack() as held:
        folder = Path(tempfile.mkdtemp(prefix="tsk", dir="/tmp"))
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        world = World.make(folder)
        held.callback(world.close)
        started = time.monotonic()
        world.build("peace", [], 0)
        seconds = time.monotonic() - started
        files, codes = world.files("peace"), world.codes("peace")
        (facts,) = (json.loads(data) for key, data in files.items() if key.endswith("generation.json"))
        assert len(codes) == facts["num_codes"] >= 150
        print(f"in peace: {seconds:.0f} s, {len(files)} files, {len(codes)} codes", flush=True)
        number = 0
        while len(world.kills) < num_kills:
            number += 1
            name, before = f"kills{number}", len(world.kills)
            kinds = [KINDS[(len(world.kills) + step) % len(KINDS)] for step in range(kills_per_build)]
            generator.shuffle(kinds)
            states = sorted(generator.choices(range(len(PIPELINE_STATES) - 1), k=len(kinds)))
            plan = [
                Blow(kind, PIPELINE_STATES[state], generator.uniform(0.0, seconds / 20))
                for kind, state in zip(kinds, states, strict=True)
            ]
            world.build(name, plan, generator.randrange(1 << 30))
            found = world.files(name)
            assert found.keys() == files.keys(), sorted(found.keys() ^ files.keys())
            assert [key for key in files if found[key] != files[key]] == []
            assert world.codes(name) == codes
            told = ", ".join(f"{kill.kind} at {kill.seconds:.1f} s ({kill.state})" for kill in world.kills[before:])
            print(f"{name}: the same after {told}; {world.restarts} drivers died with their node so far", flush=True)
        return world.kills


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=32, help="kills in all")
    parser.add_argument("--per-build", type=int, default=4, help="kills of one build")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    kills = run(arguments.kills, arguments.seed, arguments.per_build)
    by_kind, by_state = Counter(kill.kind for kill in kills), Counter(kill.state for kill in kills)
    print(f"{len(kills)} kills: {dict(by_kind)}; while {dict(by_state)}; every build the same")


if __name__ == "__main__":
    main()

"""A reindex job on a real Ray: the bytes of a build in one process, a gang's rows within rounding, kills in between."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from services.reindex import config as reindex_config
from services.reindex.job import Outcome, run_job
from services.reindex.progress import JobReporter
from tests import tiny
from tests.distributed.test_sharding import TWO_HEADS
from trackstar.blobs import location
from trackstar.build import Silent, build_index
from trackstar.errors import Incompatible, InvalidRequest, NotReady
from trackstar.index import Index
from trackstar.jobs import JobStore
from trackstar.locks import writing

WORDS = ["river", "bridge", "snow", "hills", "night", "birds", "sang", "sea"]
_KILL_SECONDS = 900

# Ray Data's own settings warn of each other when they are made.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")


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
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reindex")
    tiny.save_model(root / "model", "llama", **TWO_HEADS)
    for part in range(2):
        lines = [
            json.dumps(
                {"id": f"{part}-{row}", "text": " ".join(WORDS[(row * step) % 8] for step in range(1, 4 + row % 9))}
            )
            for row in range(20)
        ]
        (root / f"corpus-{part}.jsonl").write_text("\n".join(lines))
    return root


def settings(world: Path, index: Path, **changes: Any) -> dict[str, Any]:
    pool = {"cpus": 0.2, "max": 2}
    return {
        "index": str(index),
        "build": {
            "corpus": {"paths": [str(world / f"corpus-{part}.jsonl") for part in range(2)]},
            "model": str(world / "model"),
            "projection": {"layer_blocks": 2, "rows": 4, "cols": 4},
            "code": {"kind": "bits", "size": 32, "store": "memory"},
            "shard_passages": 8,
            "background": 6,
            "row_dtype": "float32",
            "audit": {"queries": 4, "codes": 8},
        },
        "workers": dict.fromkeys(("readers", "encoders", "scanners", "whitener", "importers"), pool),
        **changes,
    }


def run(content: dict[str, Any], job_id: str = "job") -> tuple[Outcome, JobReporter]:
    config = reindex_config.make(content)
    reporter = JobReporter(JobStore(location(config.index)), job_id, Silent())
    return run_job(config, reporter), reporter


def snapshot(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("jobs/")}


def test_ray_builds_the_bytes_of_one_process(cluster: None, world: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path / "ray")
    build_index(reindex_config.make(content).build, tmp_path / "alone").close()
    outcome, reporter = run(content)
    assert (outcome.is_active, outcome.recall, outcome.collection) == (True, 1.0, "")
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "alone")
    progress = reporter.progress
    assert progress.state == "ACTIVE"
    assert progress.generation == outcome.generation == Index(tmp_path / "ray").active()
    shards = len(Index(tmp_path / "ray").rows().receipts)
    assert progress.shards == {"planned": shards, "encoded": shards, "coded": shards, "imported": 0}
    assert JobStore(tmp_path / "ray").progress("job") is not None
    # Given again it finds everything there.
    assert run(content)[0] == outcome
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "alone")


def test_a_refusal_in_a_worker_is_the_jobs_own_sentence(cluster: None, world: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"other": 1}\n')
    content = settings(world, tmp_path / "index")
    content["build"]["corpus"] = {"paths": [str(bad)]}
    with pytest.raises(InvalidRequest, match=r"bad\.jsonl, line 2: .* mend it, or leave bad records out"):
        run(content)
    content["build"]["corpus"]["skip_bad"] = True
    with pytest.raises(InvalidRequest, match=r"has an unknown key 'build\.projektion'"):
        reindex_config.make({**content, "build": {**content["build"], "projektion": {}}})
    other = tiny.save_model(tmp_path / "other", "llama", seed=7, **TWO_HEADS)
    run(content)
    content["build"]["model"] = str(other)
    with pytest.raises(Incompatible, match=r"was started with model\.digest = '.*', this command has"):
        run(content)
    content["build"]["model"] = str(world / "model")
    with writing(tmp_path / "index"), pytest.raises(NotReady, match="another process builds"):
        run(content)


def test_a_gang_encodes_the_same_rows_within_rounding(cluster: None, world: Path, tmp_path: Path) -> None:
    build_index(reindex_config.make(settings(world, tmp_path / "alone")).build, tmp_path / "alone").close()
    content = settings(world, tmp_path / "gang")
    content["workers"] = {**content["workers"], "encoders": {"cpus": 0.2}, "gang": {"ranks": 2, "cpus": 0.4}}
    run(content)
    one, two = Index(tmp_path / "alone").rows(), Index(tmp_path / "gang").rows()
    everything = np.arange(one.num_passages)
    alone_ND, gang_ND = one.read(everything).numpy(), two.read(everything).numpy()
    assert np.linalg.norm(alone_ND - gang_ND) / np.linalg.norm(alone_ND) < 1e-5
    assert [passage.text for passage in one.passages(everything)] == [
        passage.text for passage in two.passages(everything)
    ]


def kills(arguments: list[str]) -> str:
    """Run the kill test in a process tree and, where that is possible, a network of its own."""
    command = [sys.executable, "-m", "tests.distributed.reindex_kills", *arguments]
    isolated = ["unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child"]
    if os.geteuid() == 0 and subprocess.run([*isolated, "ip", "link", "set", "lo", "up"], check=False).returncode == 0:
        command = [*isolated, "sh", "-c", f"ip link set lo up && exec {shlex.join(command)}"]
    found = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3 * _KILL_SECONDS, check=False
    )
    assert found.returncode == 0, found.stdout[-6000:]
    return found.stdout


@pytest.mark.slow
def test_killing_everything_once_changes_nothing() -> None:
    assert "every build the same" in kills(["--kills", "4", "--per-build", "4", "--seed", "3"])


@pytest.mark.slow
def test_killing_at_random_thirty_two_times_changes_nothing() -> None:
    assert "every build the same" in kills(["--kills", "32", "--per-build", "4", "--seed", "1"])

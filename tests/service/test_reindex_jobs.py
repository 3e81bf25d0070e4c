"""Reindex jobs from the client to the generation that answers: `trackstar serve`, the process runner, a real Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.service import demo_index, switching
from tests.service.serve_process import ServeProcess
from trackstar.catalog import Catalog
from trackstar.client import Client
from trackstar.client_job_types import JobInfo
from trackstar.errors import InvalidRequest
from trackstar.jobs import PIPELINE_STATES
from trackstar.tracer import Tracer

_MORE = switching.MORE_PASSAGES
_JOB_SECONDS = 300.0


class Served:
    """A server whose operator lets jobs append what lies in one folder."""

    def __init__(self, root: Path) -> None:
        self.index = demo_index.build(root)
        (root / "given").mkdir()
        self.given = root / "given"
        demo_index.write_corpus(self.given / "more.jsonl", demo_index.NUM_PASSAGES, _MORE)
        # Encoding it takes a while.
        demo_index.write_corpus(self.given / "much.jsonl", demo_index.NUM_PASSAGES + _MORE, 1000)
        pool = {"cpus": 0.2}
        base = {
            "build": {
                **demo_index.settings(root),
                "mix": {"damping": 0.1},
                "audit": {"queries": 16, "codes": 16, "k": 5, "candidates": 40},
            },
            "workers": dict.fromkeys(("readers", "encoders", "scanners", "whitener", "importers"), pool),
        }
        (root / "reindex.yaml").write_text(yaml.safe_dump(base))
        self.server = ServeProcess(
            self.index,
            root,
            REINDEX__CONFIG_FILE=str(root / "reindex.yaml"),
            REINDEX__ALLOWED_PATHS=yaml.safe_dump([str(self.given)]),
            REINDEX__POLL_SECONDS="0.05",
        )
        self.client = Client(self.server.address, timeout_seconds=60)

    def watch(self, job: JobInfo) -> list[JobInfo]:
        """All that is heard of a job to its end."""
        return list(self.client.watch_job(job.job_id, timeout_seconds=_JOB_SECONDS))

    def answers(self, generation: str, num_passages: int) -> None:
        """The server answers from a generation, without having been told: as the library, and with every passage."""
        prompt, target = demo_index.QUERIES[0]
        until = time.monotonic() + 30
        while True:
            answer = self.client.trace(prompt, target, k=num_passages, exactness="exhaustive", evidence=())
            if answer.provenance.generation == generation:
                break
            assert time.monotonic() < until, f"{answer.provenance.generation} still answers"
            time.sleep(0.1)
        tracer = Tracer.open(str(self.index), generation=generation)
        expected = tracer.trace(switching.query(0), k=num_passages, exact=True, evidence=False)
        tracer.close()
        found = answer.trace.proponents
        assert switching.ids(found) == switching.ids(expected.proponents)
        assert sorted(switching.ids(found)) == list(range(num_passages))
        assert [item.score for item in found] == pytest.approx([item.score for item in expected.proponents], abs=1e-5)

    def close(self) -> None:
        """End it."""
        self.client.close()
        assert self.server.metrics()["trackstar_defects_total"] == 0
        assert self.server.close() == 0


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


def places(seen: list[JobInfo]) -> list[int]:
    """Where the pipeline was, as places among its states."""
    return [PIPELINE_STATES.index(job.pipeline_state) for job in seen if job.pipeline_state in PIPELINE_STATES]


def test_a_job_that_appends_answers_at_its_end_and_one_that_fails_its_audit_does_not(served: Served) -> None:
    asked: Any = {"append_paths": [str(served.given / "more.jsonl")], "damping": 0.3, "activate": True}
    before = Catalog(served.index).active()
    job = served.client.create_reindex_job("grow", **asked)
    again = served.client.create_reindex_job("grow", **asked)
    assert again.job_id == job.job_id
    seen = served.watch(job)
    last = seen[-1]
    assert (last.state, last.pipeline_state, last.error) == ("succeeded", "ACTIVE", ""), last
    assert places(seen) == sorted(places(seen))
    assert len(set(places(seen))) > 3
    assert last.shards == {"planned": 6, "encoded": 6, "coded": 6, "imported": 0}
    encoding = [item for item in seen if item.pipeline_state == "ENCODING"]
    assert encoding[-1].passages_total == _MORE
    assert all(item.tokens_total for item in encoding)
    assert encoding[-1].tokens_done == encoding[-1].tokens_total
    assert last.recall is not None
    assert last.recall >= 0.9
    assert last.generation not in ("", before)
    served.answers(last.generation, demo_index.NUM_PASSAGES + _MORE)
    # The request is known: nothing starts, now or in a job's folder.
    assert served.client.create_reindex_job("grow", **asked) == last
    with pytest.raises(InvalidRequest, match="was asked for something else"):
        served.client.create_reindex_job("grow", damping=0.2)
    assert [item.job_id for item in served.client.jobs()] == [job.job_id]

    failing = served.watch(served.client.create_reindex_job("coarser", code="bits", code_size=8, activate=True))
    last_failing = failing[-1]
    assert last_failing.state == "failed"
    assert "does not become active: coarse search and rerank find" in last_failing.error
    assert "\n" not in last_failing.error
    assert last_failing.recall is not None
    assert last_failing.recall < 0.9
    assert last_failing.generation in Catalog(served.index).finished()
    assert Catalog(served.index).active() == last.generation
    served.answers(last.generation, demo_index.NUM_PASSAGES + _MORE)


@pytest.mark.slow
def test_what_a_cancelled_job_has_begun_the_next_one_finishes(served: Served) -> None:
    asked: Any = {"append_paths": [str(served.given / "much.jsonl")], "activate": True}
    before = Catalog(served.index).active()
    job = served.client.create_reindex_job("much", **asked)
    for heard in served.client.watch_job(job.job_id, timeout_seconds=_JOB_SECONDS):
        if heard.pipeline_state == "ENCODING" and heard.shards["encoded"] > 5:
            served.client.cancel_job(job.job_id)
    assert (heard.state, heard.error) == ("cancelled", "")
    assert Catalog(served.index).active() == before
    served.answers(before, demo_index.NUM_PASSAGES)
    begun = sorted(path.name for path in (served.index / "rows").glob("[0-9]*.json"))
    assert 4 < len(begun) < 4 + 1000 // 32
    seen = served.watch(served.client.create_reindex_job("much again", **asked))
    assert (seen[-1].state, seen[-1].pipeline_state) == ("succeeded", "ACTIVE"), seen[-1]
    first = next(item for item in seen if item.pipeline_state == "ENCODING")
    assert first.passages_done >= 32 * (len(begun) - 4)
    served.answers(seen[-1].generation, demo_index.NUM_PASSAGES + 1000)

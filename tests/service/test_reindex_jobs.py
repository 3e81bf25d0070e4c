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
from trackstar.row_shards import finished_shards
from trackstar.tracer import Tracer

_MUCH = 1500
# Of 40 candidates, 256 bits find 0.89 of the exact best 5, and 8 bits 0.45.
_MIN_RECALL = 0.75
_JOB_SECONDS = 300.0


class Served:
    """A server whose operator lets jobs append what lies in one folder."""

    def __init__(self, root: Path) -> None:
        self.index = demo_index.build(root)
        (root / "given").mkdir()
        self.given = root / "given"
        demo_index.write_corpus(self.given / "more.jsonl", demo_index.NUM_PASSAGES, switching.MORE_PASSAGES)
        # Encoding it takes a while.
        demo_index.write_corpus(self.given / "much.jsonl", 1000, _MUCH)
        pool = {"cpus": 0.2}
        base = {
            "build": {
                **demo_index.settings(root),
                "mix": {"damping": 0.1},
                "audit": {"queries": 16, "codes": 16, "k": 5, "candidates": 40, "min_recall": _MIN_RECALL},
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

    def active(self) -> tuple[str, int]:
        """The generation that answers, and its passages."""
        catalog = Catalog(self.index)
        return catalog.active(), catalog.describe(catalog.active()).num_passages

    def shards(self) -> int:
        """How many shards of rows are finished."""
        return len(finished_shards(self.index / "rows"))

    def answers(self) -> None:
        """The server answers from that generation, without having been told: as the library, and every passage."""
        generation, num_passages = self.active()
        k = min(1000, num_passages)
        prompt, target = demo_index.QUERIES[0]
        until = time.monotonic() + 30
        while True:
            answer = self.client.trace(prompt, target, k=k, ends="proponents", exactness="exhaustive", evidence=())
            if answer.provenance.generation == generation:
                break
            assert time.monotonic() < until, f"{answer.provenance.generation} still answers"
            time.sleep(0.1)
        tracer = Tracer.open(str(self.index), generation=generation)
        expected = tracer.trace(switching.query(0), k=k, exact=True, evidence=False, opponents=False)
        tracer.close()
        found = answer.trace.proponents
        assert answer.provenance.candidates_examined == num_passages
        assert switching.ids(found) == switching.ids(expected.proponents)
        assert [item.score for item in found] == pytest.approx([item.score for item in expected.proponents], abs=1e-5)

    def close(self) -> None:
        """End it."""
        self.client.close()
        assert self.server.metrics()["trackstar_defects_total"] == 0
        assert self.server.close() == 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("jobs"))
    yield made
    made.close()


def places(seen: list[JobInfo]) -> list[int]:
    """Where the pipeline was, as places among its states."""
    return [PIPELINE_STATES.index(job.pipeline_state) for job in seen if job.pipeline_state in PIPELINE_STATES]


@pytest.mark.slow
def test_a_job_that_appends_answers_at_its_end(served: Served) -> None:
    asked: Any = {"append_paths": [str(served.given / "more.jsonl")], "damping": 0.3, "activate": True}
    before, num_before = served.active()
    job = served.client.create_reindex_job("grow", **asked)
    assert served.client.create_reindex_job("grow", **asked).job_id == job.job_id
    seen = served.watch(job)
    last = seen[-1]
    assert (last.state, last.pipeline_state, last.error) == ("succeeded", "ACTIVE", ""), last
    assert places(seen) == sorted(places(seen))
    assert len(set(places(seen))) > 3
    assert last.shards == {"planned": 6, "encoded": 6, "coded": 6, "imported": 0}
    encoding = [item for item in seen if item.pipeline_state == "ENCODING"]
    totals = {item.tokens_total for item in encoding}
    assert len(totals) == 1
    # How much of so short a step is seen is a matter of when it was looked at.
    total = max(known or 0 for known in totals)
    assert total > 0
    assert all(0 <= item.tokens_done <= total for item in encoding)
    assert last.recall is not None
    assert last.recall >= _MIN_RECALL
    assert last.generation not in ("", before)
    assert served.active() == (last.generation, num_before + switching.MORE_PASSAGES)
    served.answers()
    # The request is known: nothing is started.
    assert served.client.create_reindex_job("grow", **asked) == last
    with pytest.raises(InvalidRequest, match="was asked for something else"):
        served.client.create_reindex_job("grow", damping=0.2)
    assert [item.job_id for item in served.client.jobs()] == [job.job_id]


@pytest.mark.slow
def test_a_job_that_fails_its_audit_leaves_what_answers(served: Served) -> None:
    before = served.active()
    seen = served.watch(served.client.create_reindex_job("coarser", code="bits", code_size=8, activate=True))
    last = seen[-1]
    assert last.state == "failed"
    assert "does not become active: coarse search and rerank find" in last.error
    assert "\n" not in last.error
    assert last.recall is not None
    assert last.recall < _MIN_RECALL
    assert last.generation in Catalog(served.index).finished()
    assert served.active() == before
    served.answers()


@pytest.mark.slow
def test_what_a_cancelled_job_has_begun_the_next_one_finishes(served: Served) -> None:
    asked: Any = {"append_paths": [str(served.given / "much.jsonl")], "activate": True}
    before, there = served.active(), served.shards()
    job = served.client.create_reindex_job("much", **asked)
    for heard in served.client.watch_job(job.job_id, timeout_seconds=_JOB_SECONDS):
        if heard.pipeline_state == "ENCODING" and served.shards() > there + 2 and not heard.ended:
            served.client.cancel_job(job.job_id)
    assert (heard.state, heard.error) == ("cancelled", "")
    begun = served.shards() - there
    assert 2 < begun < _MUCH // 32
    assert served.active() == before
    served.answers()
    seen = served.watch(served.client.create_reindex_job("much again", **asked))
    assert (seen[-1].state, seen[-1].pipeline_state) == ("succeeded", "ACTIVE"), seen[-1]
    first = next(item for item in seen if item.pipeline_state == "ENCODING")
    assert first.passages_done >= 32 * begun
    assert served.active() == (seen[-1].generation, before[1] + _MUCH)
    served.answers()

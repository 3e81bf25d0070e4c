"""Clients that trace without a pause while generations come and go, and what the library answers to the same queries.

Every answer is kept with its time and judged at the end: it must be, wholly, what `Tracer` gives for the generation
that its provenance names, without the passages that were deleted by the time it was asked.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from tests.service import demo_index
from trackstar.build import build_index, make_config
from trackstar.catalog import Catalog
from trackstar.client import Client
from trackstar.client_retry import RetryPolicy
from trackstar.client_types import ALL_EVIDENCE, Answer, DonePart, TraceOptions
from trackstar.index import Index
from trackstar.results import Influence, Query, Trace
from trackstar.storage import read_json
from trackstar.tombstones import delete_documents
from trackstar.tracer import Tracer

MORE_PASSAGES = 40
K = 6
# How old a service's list of deletions may be.
REFRESH_SECONDS = 2.0

State = Literal["before", "after"]
STATES: tuple[State, ...] = get_args(State)
How = Literal["whole", "streamed", "paged"]
HOWS: tuple[How, ...] = get_args(How)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """Names of generations: two dampings, one with appended passages, one purged after a deletion."""

    plain: str
    damped: str
    grown: str
    purged: str

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return self.plain, self.damped, self.grown, self.purged


def build(root: Path) -> tuple[Path, Generations]:
    """Build `root`/index with four generations, the first of them active; returns its folder and their names."""
    index = demo_index.build(root)
    names = [read_json(index / "active.json")["generation"], demo_index.other_generation(index)]
    demo_index.write_corpus(root / "more.jsonl", demo_index.NUM_PASSAGES, MORE_PASSAGES)
    for changes in ({}, {"purge": True}):
        if changes:
            delete(index, "doc-3", "doc-61")
        generation = build_index(make_config(grown(root, **changes)), index)
        generation.close()
        names.append(generation.name)
    Catalog(index).activate(names[0])
    return index, Generations(plain=names[0], damped=names[1], grown=names[2], purged=names[3])


def grown(root: Path, **changes: Any) -> dict[str, Any]:
    """Settings of an index that has both corpora."""
    return {
        **demo_index.settings(root),
        "append": [demo_index.corpus(root / "more.jsonl")],
        "mix": {"damping": 0.1},
        **changes,
    }


def query(number: int) -> Query:
    """One of the queries."""
    prompt, target = demo_index.QUERIES[number]
    return Query(query_id="q", prompt=prompt, target=target)


def delete(index: Path, *doc_ids: str) -> None:
    """Delete documents, as `trackstar delete` does."""
    opened = Index(index)
    rows = opened.rows()
    delete_documents(opened.root, rows, doc_ids)
    rows.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question. `generation`: "" for the active one."""

    query: int
    how: How
    exact: bool
    opponents: bool
    evidence: bool
    generation: str = ""

    @property
    def candidates(self) -> int:
        """In a stream enough that they are reranked in several batches; few enough that not everything is scored."""
        return 66 if self.how == "streamed" else 20

    @property
    def options(self) -> TraceOptions:
        """For the client."""
        return {
            "k": K,
            "candidates": self.candidates,
            "exactness": "exhaustive" if self.exact else "auto",
            "ends": "both" if self.opponents else "proponents",
            "evidence": ALL_EVIDENCE if self.evidence else (),
            "generation": self.generation,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Rankings, the generation that is said to have given them, and the monotonic times of the call."""

    ask: Ask
    generation: str
    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]
    began: float
    ended: float


class Load:
    """Clients that ask again and again until told to stop; no call is tried twice.

    Args:
        address: of the gateway.
        clients: how many.
        named: generations that are also asked by name; may be changed.
    """

    def __init__(self, address: str, *, clients: int = 4, named: Sequence[str] = ()) -> None:
        self.named = tuple(named)
        self.answers: list[Answered] = []
        self.failures: list[tuple[object, Exception]] = []
        self.listings = 0
        self._address, self._stop = address, threading.Event()
        self._threads = ThreadPoolExecutor(max_workers=clients)
        self._running = [self._threads.submit(self._ask, number) for number in range(clients)]

    def wait_for(self, generation: str, *, answers: int = 3, seconds: float = 60.0) -> None:
        """Until a generation has given so many more answers."""
        first, until = len(self.answers), time.monotonic() + seconds
        while sum(item.generation == generation for item in self.answers[first:]) < answers and not self.failures:
            assert time.monotonic() < until, f"{generation} does not answer"
            time.sleep(0.02)
        self.check()

    def wait_without(self, *generations: str, seconds: float = 60.0) -> None:
        """Until every call that was under way has ended and none of these generations answers any more."""
        until = time.monotonic() + seconds
        while True:
            first, began = len(self.answers), time.monotonic()
            while sum(item.began > began for item in self.answers[first:]) < 3 * len(self._running):
                self.check()
                assert time.monotonic() < until
                time.sleep(0.02)
            if not {item.generation for item in self.answers[first:]} & set(generations):
                return

    def check(self) -> None:
        """No call has failed."""
        assert not self.failures, self.failures[:3]

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for task in self._running:
            task.result(timeout=90)
        self._threads.shutdown()

    def _ask(self, seed: int) -> None:
        generator = random.Random(seed)
        with Client(self._address, timeout_seconds=60, retry=RetryPolicy(attempts=1)) as client:
            while not self._stop.is_set():
                ask = Ask(
                    query=generator.randrange(len(demo_index.QUERIES)),
                    how=generator.choice(HOWS),
                    exact=generator.random() < 0.25,
                    opponents=generator.random() < 0.5,
                    evidence=generator.random() < 0.5,
                    generation=generator.choice(self.named) if self.named and generator.random() < 0.25 else "",
                )
                try:
                    self.answers.append(answer(client, ask))
                    if generator.random() < 0.1:
                        assert client.generations()
                        self.listings += 1
                except Exception as error:
                    self.failures.append((ask, error))
                    return


def answer(client: Client, ask: Ask) -> Answered:
    """Ask, in one of the ways there are."""
    began = time.monotonic()
    prompt, target = demo_index.QUERIES[ask.query]
    found: list[Answer] = []
    if ask.how == "streamed":
        last = list(client.trace_stream(prompt, target, **ask.options))[-1]
        assert isinstance(last, DonePart)
        found.append(last.answer)
    elif ask.how == "whole":
        found.append(client.trace(prompt, target, **ask.options))
    else:
        found.append(client.trace(prompt, target, page_size=4, **ask.options))
        while token := found[-1].next_page_token:
            found.append(client.trace(prompt, target, page_size=4, page_token=token, **ask.options))
    (generation,) = {item.provenance.generation for item in found}
    assert not any(item.provenance.left_out for item in found)
    return Answered(
        ask=ask,
        generation=generation,
        proponents=tuple(item for page in found for item in page.trace.proponents),
        opponents=tuple(item for page in found for item in page.trace.opponents),
        began=began,
        ended=time.monotonic(),
    )


class Expected:
    """What the library answers, from copies of the index without and with a deletion.

    Args:
        folder: where the copies go.
        index: as it is before.
        doc_ids: the documents that are deleted.
    """

    def __init__(self, folder: Path, index: Path, doc_ids: Sequence[str]) -> None:
        self._folder, self._doc_ids = folder, tuple(doc_ids)
        self._tracers: dict[tuple[State, str], Tracer] = {}
        self._traces: dict[tuple[State, str, int, int, bool, bool, bool], Trace] = {}
        self._copy(index, index / "generations")

    def adopt(self, index: Path, name: str) -> None:
        """A generation that was made meanwhile, and the rows it stands on."""
        self._copy(index, index / "generations" / name)

    def trace(self, state: State, name: str, ask: Ask) -> Trace:
        """The library's answer."""
        key = (state, name, ask.query, ask.candidates, ask.exact, ask.opponents, ask.evidence)
        if key not in self._traces:
            self._traces[key] = self._tracer(state, name).trace(
                query(ask.query),
                k=K,
                candidates=ask.candidates,
                exact=ask.exact,
                opponents=ask.opponents,
                evidence=ask.evidence,
            )
        return self._traces[key]

    def judge(self, answers: Sequence[Answered], began: float, ended: float) -> Counter[str]:
        """Compare every answer; returns how many each generation gave.

        Args:
            answers: all of them.
            began: monotonic time when the deletion began.
            ended: when it had ended.
        """
        for item in answers:
            before, after = (self.trace(state, item.generation, item.ask) for state in STATES)
            for found, old, new in (
                (item.proponents, before.proponents, after.proponents),
                (item.opponents, before.opponents, after.opponents),
            ):
                if item.ended < began:
                    assert ids(found) == ids(old), item
                    _same(found, old)
                elif item.began > ended + REFRESH_SECONDS:
                    assert ids(found) == ids(new), item
                    _same(found, new)
                else:
                    # What was deleted while it ran may be in it, wholly or not.
                    gone = set(ids(old)) - set(ids(new))
                    assert ids(found) in (ids(old), ids(new)) or set(ids(found)) - gone <= set(ids(new)), item
                    known = {influence.passage.passage_id: influence for influence in (*old, *new)}
                    _same(found, [known[passage_id] for passage_id in ids(found)])
        return Counter(item.generation for item in answers)

    def close(self) -> None:
        """Close everything."""
        for tracer in self._tracers.values():
            tracer.close()

    def _copy(self, index: Path, generations: Path) -> None:
        for state in STATES:
            target = self._folder / state
            for folder in (index / "rows", generations):
                shutil.copytree(
                    folder,
                    target / folder.relative_to(index),
                    ignore=shutil.ignore_patterns(".*"),
                    dirs_exist_ok=True,
                )
            for path in index.iterdir():
                if path.is_file() and path.name[0] != "." and not (target / path.name).exists():
                    shutil.copy(path, target)
        if not self._tracers:
            delete(self._folder / "after", *self._doc_ids)

    def _tracer(self, state: State, name: str) -> Tracer:
        if (state, name) not in self._tracers:
            index = Index(self._folder / state)
            self._tracers[state, name] = Tracer(index, index.load_model(), generation=name)
        return self._tracers[state, name]


def ids(ranking: Sequence[Influence]) -> list[int]:
    """Of the passages, in order."""
    return [item.passage.passage_id for item in ranking]


def _same(found: Sequence[Influence], expected: Sequence[Influence]) -> None:
    assert [item.score for item in found] == pytest.approx([item.score for item in expected], abs=1e-5)
    for theirs, ours in zip(found, expected, strict=True):
        assert theirs.passage.text == ours.passage.text
        assert (theirs.evidence is None) == (ours.evidence is None)
        if theirs.evidence is not None and ours.evidence is not None:
            for part in ("tokens", "blocks"):
                shares = ([share for _, share in getattr(side.evidence, part)] for side in (theirs, ours))
                assert next(shares) == pytest.approx(next(shares), abs=1e-5)

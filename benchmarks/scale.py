"""Does a build grow linearly with the corpus, and stay flat in memory?

    python -m benchmarks.scale [--small 100000] [--large 1000000] [--no-milvus] [--json FILE]

Builds of two sizes take turns, stage by stage: small, large, small again, each in a process of its own. No model
takes part: `benchmarks.synthetic` writes the corpus and makes cheap vectors of its tokens; all else is the product's
own code: planning, row shards, the tree of R_train, whitening, codes, the generation, the import into a Milvus server
(that of the tests, started for this; with --no-milvus codes in memory), and the audit with its scan of all rows.

    time     CPU seconds of the build, and of the server meanwhile; "linear" is the sum of both for a row of the large
             build over that for one of the small ones: 1 for what is linear, less where something is done once a build
    memory   resident memory of the build: its peak in each stage, and the highest sample of every tenth of a stage
    scan     see `benchmarks.scan_speed`; of the large build
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.resident import cpu_seconds, forget_peak, peak_bytes, resident_bytes
from benchmarks.scan_speed import Scan, measure, table
from benchmarks.synthetic import TableEncoder, write_corpus
from tests.milvus_process import milvus_server
from tests.tiny import save_model
from trackstar.audit import audit_generation
from trackstar.build import Build, make_config
from trackstar.coarse import CoarseIndex, MemoryIndex
from trackstar.code_store import fill
from trackstar.engine import LocalEngine
from trackstar.generation import Generation
from trackstar.index import Index
from trackstar.milvus_import import CollectionImport
from trackstar.milvus_link import MilvusAccess, MilvusLink, RetryPolicy
from trackstar.milvus_server import MilvusServerIndex
from trackstar.workers import PassageEncoder

STAGES = (
    *("corpus", "preparing", "planning", "encoding", "statistics", "whitening", "coding", "finishing"),
    *("importing", "loading", "audit", "scan"),
)
_SAMPLE_SECONDS = 0.1
_TENTHS = 10
_TIMEOUT_SECONDS = 1800.0
# A machine that others use too may take longer than a service would wait.
_POLICY = RetryPolicy(timeout_seconds=300.0, attempt_seconds=120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A build: its size, that of its parts, and whether scans are measured at the end."""

    passages: int
    layer_blocks: int = 8
    side: int = 8
    shard_passages: int = 4096
    file_documents: int = 100_000
    family: int = 10
    queries: int = 64
    candidates: int = 1000
    scan_rounds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A Milvus server that runs."""

    access: MilvusAccess
    process_id: int


@dataclass(slots=True, kw_only=True)
class Stage:
    """What a stage took: seconds by the wall and of CPU, here and of the server; bytes of resident memory, likewise.

    `tenths`: the highest sample in every tenth of its time; shorter where there were fewer samples.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    server_cpu: float = 0.0
    peak: int = 0
    server_peak: int = 0
    tenths: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A build that is done: what it holds, and what its stages took."""

    passages: int
    tokens: int
    shards: int
    codes: int
    searched: int
    recall: float
    row_bytes: int
    code_bytes: int
    corpus_bytes: int
    stages: dict[str, Stage]
    scans: list[Scan]


class Clock:
    """Hears of a build's steps (a `Progress`) and times them as stages.

    Args:
        gate: called in front of a stage; it may wait, and answers with the server if one runs.
    """

    def __init__(self, gate: Callable[[str], Server | None]) -> None:
        self.stages: dict[str, Stage] = {}
        self.server: Server | None = None
        self._gate, self._now = gate, ""
        self._started = (0.0, 0.0, 0.0)
        self._samples: list[int] = []
        self._server_high = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def enter(self, stage: str) -> None:
        """End the stage that runs, wait until the next may begin, and begin it."""
        self.end()
        assert stage in STAGES, stage
        self.server = self._gate(stage)
        forget_peak()
        self._samples, self._server_high = [resident_bytes()], 0
        self._started = (time.perf_counter(), time.process_time(), self._server_cpu())
        self._now = stage

    def end(self) -> None:
        """End the stage that runs, if any."""
        if not self._now:
            return
        now = (time.perf_counter(), time.process_time(), self._server_cpu())
        seconds, cpu, server_cpu = (after - before for after, before in zip(now, self._started, strict=True))
        samples = [*self._samples, resident_bytes()]
        size = -(-len(samples) // _TENTHS)
        self.stages[self._now] = Stage(
            seconds=seconds,
            cpu=cpu,
            server_cpu=server_cpu,
            peak=peak_bytes(),
            server_peak=self._server_high,
            tenths=[max(samples[at : at + size]) for at in range(0, len(samples), size)],
        )
        self._now = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Samples memory for the time of a block, and ends the last stage."""
        self._sampler.start()
        try:
            yield
            self.end()
        finally:
            self._ended.set()
            self._sampler.join()

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str = "passages"
    ) -> None:
        """See `Progress.start`."""
        if step in STAGES and step != self._now:
            self.enter(step)

    def advance(self, step: str, done: int, tokens: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def shards(self, step: str, finished: int, planned: int) -> None:
        """See `Progress.shards`; behind the last shard's codes a generation is finished."""
        if step == "coding" and finished == planned:
            self.enter("finishing")

    def _server_cpu(self) -> float:
        return cpu_seconds(self.server.process_id) if self.server else 0.0

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._samples.append(resident_bytes())
            if (server := self.server) is not None:
                self._server_high = max(self._server_high, resident_bytes(server.process_id))


def run(folder: Path, settings: Settings, gate: Callable[[str], Server | None] = lambda _stage: None) -> Turn:
    """Build an index of a size, from writing its corpus to auditing its generation.

    Args:
        folder: an empty one.
        settings: of the build.
        gate: as of `Clock`; without a server, codes are held and searched in memory.
    """
    clock = Clock(gate)
    dim = 2 * settings.layer_blocks * settings.side**2
    with clock.running(), contextlib.ExitStack() as held:
        clock.enter("corpus")
        model = save_model(folder / "model", "llama", num_hidden_layers=settings.layer_blocks)
        write_corpus(
            folder / "corpus", settings.passages, family=settings.family, file_documents=settings.file_documents
        )
        config = make_config(
            {
                "corpus": {"paths": (str(folder / "corpus"),)},
                "model": str(model),
                "projection": {"layer_blocks": settings.layer_blocks, "rows": settings.side, "cols": settings.side},
                "code": {"kind": "bits", "store": "milvus"},
                "shard_passages": settings.shard_passages,
                # What is near to what is made up here, so that no recall is asked for.
                "audit": {"queries": settings.queries, "candidates": settings.candidates, "min_recall": 0.0},
            }
        )
        root = folder / "index"
        build = Build(config, root, engine=LocalEngine(), progress=clock, make_encoder=partial(_encoder, dim))
        name = build.run()
        del build
        clock.enter("importing")
        index = Index(root)
        generation = held.enter_context(contextlib.closing(index.generation(name, searched=False)))
        rows = held.enter_context(contextlib.closing(index.rows(name)))
        link = held.enter_context(MilvusLink(clock.server.access, policy=_POLICY)) if clock.server else None
        coarse = held.enter_context(contextlib.closing(_import(link, generation, clock)))
        clock.enter("audit")
        found = audit_generation(
            generation, rows, coarse, config.audit, codes=generation.codes, coarse_name="benchmark"
        )
        assert found.passed, found.reasons
        scans = list[Scan]()
        if settings.scan_rounds:
            clock.enter("scan")
            process_id = clock.server.process_id if clock.server else None
            scans = measure(generation, rows, None if link is None else coarse, process_id, rounds=settings.scan_rounds)
    return Turn(
        passages=rows.num_passages,
        tokens=rows.num_tokens,
        shards=rows.num_shards,
        codes=generation.codes.num_codes,
        searched=found.num_codes,
        recall=found.recall,
        row_bytes=_size(root / "rows", "*.safetensors"),
        code_bytes=generation.spec.row_bytes * generation.codes.num_codes,
        corpus_bytes=_size(folder / "corpus", "*.jsonl"),
        stages=clock.stages,
        scans=scans,
    )


def _encoder(dim: int, _index: Index) -> PassageEncoder:
    return TableEncoder(dim)


def _import(link: MilvusLink | None, generation: Generation, clock: Clock) -> CoarseIndex:
    """The index of a generation's codes, filled."""
    codes, spec, dim = generation.codes, generation.spec, generation.layout.dim
    if link is None:
        memory = MemoryIndex(spec, dim)
        fill(memory, codes)
        return memory
    name = f"scale_{generation.name}"
    importing = CollectionImport(
        link,
        name,
        spec=spec,
        dim=dim,
        receipts=generation.home / "imports" / name,
        timeout_seconds=_TIMEOUT_SECONDS,
    )
    importing.prepare()
    for number in importing.missing(range(codes.num_shards)):
        importing.add(number, codes.shard(number), codes.digest(number))
    clock.enter("loading")
    importing.finish(codes.num_codes)
    return MilvusServerIndex.open(link, name, spec=spec, dim=dim, timeout_seconds=_TIMEOUT_SECONDS)


def take_turns(folder: Path, runs: Sequence[Settings], *, milvus: bool) -> list[Turn]:
    """Builds of these settings, each in a process of its own; one works at a time, stage by stage, in this order."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as held:
        server: Server | None = None
        ends: list[Connection] = []
        for number, settings in enumerate(runs):
            here, there = context.Pipe()
            child = context.Process(target=_child, args=(there, folder / f"{number}", settings), daemon=True)
            child.start()
            there.close()
            held.callback(child.terminate)
            ends.append(here)
        waiting, turns = [_receive(end) for end in ends], dict[int, Turn]()
        while len(turns) < len(runs):
            stage = min((at for at in waiting if isinstance(at, str)), key=STAGES.index)
            if stage == "importing" and milvus and server is None:
                process = held.enter_context(milvus_server())
                server = Server(access=process.access, process_id=process.process_id)
            for number, end in enumerate(ends):
                if waiting[number] == stage:
                    end.send(server)
                    waiting[number] = answer = _receive(end)
                    if isinstance(answer, Turn):
                        turns[number] = answer
    return [turns[number] for number in range(len(runs))]


def _receive(end: Connection) -> str | Turn:
    try:
        found: str | Turn = end.recv()
    except EOFError as error:
        raise RuntimeError("a build failed; its own words stand above") from error
    return found


def _child(parent: Connection, folder: Path, settings: Settings) -> None:
    torch.set_num_threads(1)

    def gate(stage: str) -> Server | None:
        parent.send(stage)
        server: Server | None = parent.recv()
        return server

    parent.send(run(folder, settings, gate))


def report(turns: Sequence[Turn]) -> str:
    """Tables in Markdown of builds, the large one in the middle of small ones."""
    large = max(turns, key=lambda turn: turn.passages)
    small = [turn for turn in turns if turn is not large]
    size, other = f"{large.passages:,}", f"{small[0].passages:,}"
    bytes_of = {
        **dict.fromkeys(("corpus", "planning"), large.corpus_bytes),
        **dict.fromkeys(("encoding", "statistics", "coding", "audit"), large.row_bytes),
        "importing": large.code_bytes,
    }
    lines = [
        f"| stage | us a row | of the server | rows/s | MB/s | linear | peak MiB, {other} | peak MiB, {size} | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, stage in large.stages.items():
        if name == "scan":
            continue
        spent = stage.cpu + stage.server_cpu
        before = [turn.stages[name] for turn in small]
        least = sum(one.cpu + one.server_cpu for one in before) / sum(turn.passages for turn in small)
        low = max(one.peak for one in before)
        moved = f"{bytes_of[name] / spent / 1e6:,.0f}" if name in bytes_of else ""
        lines.append(
            f"| {name} | {1e6 * stage.cpu / large.passages:.2f} | {1e6 * stage.server_cpu / large.passages:.2f} | "
            f"{large.passages / spent:,.0f} | {moved} | "
            f"{spent / large.passages / least:.2f} | {low / 2**20:,.0f} | {stage.peak / 2**20:,.0f} | "
            f"{stage.peak / low:.2f} |"
        )
    lines += ["", f"| stage, {size} rows | " + " | ".join(map(str, range(1, _TENTHS + 1))) + " |"]
    lines.append("| --- |" + " --- |" * _TENTHS)
    for name, stage in large.stages.items():
        # Scans hold arrays of their own.
        if len(stage.tenths) >= _TENTHS // 2 and name != "scan":
            lines.append(f"| {name} | " + " | ".join(f"{value / 2**20:,.0f}" for value in stage.tenths) + " |")
    if any(turn.stages["importing"].server_peak for turn in turns):
        shown = ", ".join(
            f"{turn.passages:,} rows: " + " / ".join(f"{turn.stages[at].server_peak / 2**20:,.0f}" for at in _SERVED)
            for turn in turns
        )
        lines += ["", f"Highest sample of the server's resident MiB while {' / '.join(_SERVED)}, in turn: {shown}."]
    lines += ["", *(f"{turn.passages:,} rows: recall@10 {turn.recall:.3f}." for turn in turns)]
    if large.scans:
        lines += ["", table(large.scans)]
    return "\n".join(lines)


_SERVED = ("importing", "loading", "audit")


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--shard-passages", type=int, default=4096)
    parser.add_argument("--file-documents", type=int, default=100_000)
    parser.add_argument("--scan-rounds", type=int, default=5)
    parser.add_argument("--no-milvus", action="store_true")
    parser.add_argument("--folder", type=Path, help="where everything is written and deleted again")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)

    def settings(passages: int, scan_rounds: int) -> Settings:
        return Settings(
            passages=passages,
            shard_passages=given.shard_passages,
            file_documents=given.file_documents,
            scan_rounds=scan_rounds,
        )

    runs = [settings(given.small, 0), settings(given.large, given.scan_rounds), settings(given.small, 0)]
    with tempfile.TemporaryDirectory(prefix="trackstar-scale-", dir=given.folder) as folder:
        turns = take_turns(Path(folder), runs, milvus=not given.no_milvus)
    print(report(turns))
    if given.json:
        found: list[dict[str, Any]] = [asdict(turn) for turn in turns]
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

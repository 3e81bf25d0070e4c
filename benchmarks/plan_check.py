"""Is what `trackstar plan` predicts what a small index takes?

    python -m benchmarks.plan_check [--passages 4000] [--milvus [--milvus-codes 100000x8192 ...]] [--json FILE]

An index of the demo's corpus and model is built by the library; every figure of the plan for it that can be seen here
stands beside what was seen:

    bytes     sizes of the files, and of what a reranker holds
    FLOP      counted by torch's FlopCounterMode (products only) over the passages' real tokens, padding included
    seconds   the plan's FLOP at the FLOP/s that the bare pass (forward, backward to activations) keeps up in the same
              run, against the process' CPU time: medians of interleaved rounds
    Milvus    with --milvus, on a real server (that of the tests, started for this): resident memory of the server with
              a loaded collection after a restart, its peak while codes came in, files, and speed of the import

Only ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.index_speed import FLOOR, TRAIN, Settings, make_contestant
from benchmarks.resident import peak_bytes, resident_bytes
from trackstar.build import build_index, make_config
from trackstar.codes import CodeSpec, Rotation, encode_codes
from trackstar.costs import Assumptions, Workload, costs
from trackstar.encode import Example
from trackstar.hessian import Whitener, autocorrelation
from trackstar.index import Index
from trackstar.milvus_link import MilvusLink
from trackstar.milvus_server import MilvusServerIndex
from trackstar.model import LoadedModel
from trackstar.model_size import model_size
from trackstar.planner import Plan, options

DEMO = Path(__file__).parent.parent / "examples" / "demo"
# Passages whose rows are summed, whitened and coded in a turn.
_CODED = 1024
_IMPORTED = 8192
_SETTLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the plan beside what was seen."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def build(folder: Path, *, passages: int, layer_blocks: int, rows: int, cols: int) -> Index:
    """An index of the first documents of the demo's corpus, coded in all the bits that there are."""
    corpus = folder / "corpus.jsonl"
    with gzip.open(DEMO / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        corpus.write_text("".join(line for line, _ in zip(lines, range(passages), strict=False)), encoding="utf-8")
    config = make_config(
        {
            "corpus": {"paths": (str(corpus),)},
            "model": str(DEMO / "model"),
            "projection": {"layer_blocks": layer_blocks, "rows": rows, "cols": cols},
            "code": {"kind": "bits", "store": "memory"},
        }
    )
    build_index(config, folder / "index").close()
    return Index(str(folder / "index"))


def predict(index: Index) -> dict[tuple[str, str], float]:
    """The plan's figures for an index, hours as FLOP, by group and name."""
    rows, blocks = index.rows(), index.layout.blocks
    layers, parameters = model_size(index.facts["model"]["path"])
    work = Workload(
        num_passages=rows.num_passages,
        tokens_per_passage=rows.num_tokens / rows.num_passages,
        num_layers=layers,
        num_parameters=parameters,
        num_layer_blocks=len(blocks) // 2,
        rows=blocks[0].rows,
        cols=blocks[0].cols,
    )
    spec = index.generation().spec
    # One FLOP an hour, so that GPU-hours are FLOP.
    found = costs(_plan(rows.num_passages, work.dim, spec), work, Assumptions(sustained_flops=1 / 3600))
    return {(cost.group, cost.name): cost.value for cost in found}


def byte_figures(index: Index) -> list[Figure]:
    """Files and memory of an index."""
    plan, root = predict(index), Path(str(index.root))
    generation = index.generation()
    home = root / "generations" / generation.name
    seen = {
        ("disk", "gradient rows"): _size(root.glob("rows/*.safetensors")),
        # An id and a norm, 12 bytes, stand beside each code.
        ("disk", "coarse codes"): _size(home.glob("codes/*.safetensors")) - 12 * len(generation.norms_N),
        ("disk", "texts and spans"): _size(root.glob("rows/*.parquet")),
        ("disk", "statistics"): _size(root.glob("statistics/*.safetensors")),
        ("disk", "whitener"): _size([home / "whitener.safetensors"]),
        ("disk", "background sample"): _size([home / "background.safetensors"]),
        ("disk", "all on disk"): _size(path for path in root.rglob("*") if path.is_file()),
        ("memory", "norms in each reranker"): generation.norms_N.nbytes,
        ("memory", "whitener in memory"): sum(root.nbytes for root in generation.whitener.inverse_roots),
    }
    return [
        Figure(name=name, unit="bytes", predicted=plan[group, name], measured=found)
        for (group, name), found in seen.items()
    ]


def compute_figures(index: Index, *, passages: int, rounds: int) -> list[Figure]:
    """FLOP and seconds of encoding, statistics and coding."""
    plan, loaded, rows = predict(index), index.load_model(), index.rows()
    examples = [Example(tokens=tokens) for tokens in _tokens(index, passages)]
    num_tokens = sum(len(example.tokens) for example in examples)
    turns = _turns(index, loaded, examples)
    flop = {name: _flop(run) for name, run in turns.items()}
    project = sum(
        2.0 * (block.rows * member.out_features + block.cols * member.in_features + block.rows * block.cols)
        for member in loaded.members
        for block in [index.layout.blocks[loaded.block_of(member, index.layout)]]
    )
    share = min(_CODED, rows.num_passages) / rows.num_passages
    per_token = plan["build", "encoding, per token"] + plan["build", "projecting, per token"]
    work = {
        "encoding": per_token * num_tokens,
        "statistics": plan["build", "statistics"] * share,
        "eigenvectors": plan["build", "eigenvectors"],
        "coding": plan["build", "coding"] * share,
    }
    figures = [
        _figure("training, per token", "FLOP", plan["build", "training, per token"], flop[TRAIN] / num_tokens),
        _figure("encoding, per token", "FLOP", plan["build", "encoding, per token"], flop[FLOOR] / num_tokens),
        _figure("projecting, per token", "FLOP", plan["build", "projecting, per token"], project),
        _figure("encoding and projecting", "FLOP", work["encoding"], flop["encoding"]),
        _figure("statistics", "FLOP", work["statistics"], flop["statistics"]),
        _figure("coding", "FLOP", work["coding"], flop["coding"]),
    ]
    spent = _spent({name: run for name, run in turns.items() if name != TRAIN}, rounds)
    sustained = flop[FLOOR] / spent[FLOOR]
    return figures + [_figure(name, "seconds", of / sustained, spent[name]) for name, of in work.items()]


def milvus_figures(num: int, bits: int) -> list[Figure]:
    """Memory, files and import of `num` codes of `bits` on a Milvus server."""
    from tests.milvus_process import milvus_server

    spec, dim = CodeSpec(kind="bits", size=bits, seed=0), bits
    work = Workload(
        num_passages=num,
        tokens_per_passage=1,
        num_layers=1,
        num_parameters=1,
        num_layer_blocks=1,
        rows=1,
        cols=bits // 2,
    )
    plan = {cost.name: cost for cost in costs(_plan(num, dim, spec), work)}
    draw = np.random.default_rng(0)
    with milvus_server() as server:
        seconds = 0.0
        with MilvusLink(server.access) as link:
            index = MilvusServerIndex.create(link, "codes", spec=spec, dim=dim, timeout_seconds=120)
            for first in range(0, num, _IMPORTED):
                ids = np.arange(first, min(num, first + _IMPORTED), dtype=np.int64)
                codes = draw.integers(0, 256, (len(ids), bits // 8), dtype=np.uint8)
                started = time.perf_counter()
                index.add(ids, codes, timeout_seconds=120)
                seconds += time.perf_counter() - started
            index.flush(timeout_seconds=300)
            index.count(timeout_seconds=300)
            peak = peak_bytes(server.process_id)
            store = _size(path for path in (server.folder / "data" / "insert_log").rglob("*") if path.is_file())
        server.stop()
        server.start()
        with MilvusLink(server.access) as link:
            MilvusServerIndex.open(link, "codes", spec=spec, dim=dim, timeout_seconds=300)
            time.sleep(_SETTLE_SECONDS)
            loaded = resident_bytes(server.process_id)
    name = f"{num:,} codes of {bits:,} bits"
    return [
        _figure(f"{name}: loaded", "bytes", plan["one generation, loaded"].value, loaded),
        _figure(f"{name}: peak of the import", "bytes", plan["one generation, loaded"].value, peak),
        _figure(f"{name}: Milvus' own store", "bytes", plan["Milvus' own store"].value, store),
        _figure(f"{name}: import", "seconds", 3600 * plan["import"].value, seconds),
    ]


def table(figures: Sequence[Figure]) -> str:
    """The figures in Markdown."""
    lines = ["| figure | unit | predicted | measured | measured / predicted |", "| --- | --- | --- | --- | --- |"]
    for item in figures:
        numbers = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (item.predicted, item.measured))
        lines.append(f"| {item.name} | {item.unit} | {' | '.join(numbers)} | {item.ratio:.3f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=4000, help="documents of the demo's corpus")
    parser.add_argument("--layer-blocks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--cols", type=int, default=16)
    parser.add_argument("--timed-passages", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--milvus", action="store_true")
    parser.add_argument("--milvus-codes", nargs="+", default=["100000x8192"], metavar="NUMBERxBITS")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="trackstar-plan-") as folder:
        index = build(
            Path(folder), passages=given.passages, layer_blocks=given.layer_blocks, rows=given.rows, cols=given.cols
        )
        figures = byte_figures(index)
        figures += compute_figures(index, passages=given.timed_passages, rounds=given.rounds)
    if given.milvus:
        for num, bits in (map(int, wanted.split("x")) for wanted in given.milvus_codes):
            figures += milvus_figures(num, bits)
    print(table(figures))
    if given.json:
        given.json.write_text(json.dumps([{**asdict(item), "ratio": item.ratio} for item in figures], indent=1) + "\n")


def _plan(num_passages: int, dim: int, spec: CodeSpec) -> Plan:
    return next(plan for plan in options(num_passages, dim, 0.1) if plan.kind == spec.kind and plan.size == spec.size)


def _figure(name: str, unit: str, predicted: float, measured: float) -> Figure:
    return Figure(name=name, unit=unit, predicted=predicted, measured=measured)


def _size(paths: Iterator[Path] | Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _tokens(index: Index, passages: int) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Tokens of passages drawn from the index."""
    rows = index.rows()
    drawn = np.random.default_rng(0).permutation(rows.num_passages)[:passages].astype(np.int64)
    return [np.asarray(passage.tokens, dtype=np.int32) for passage in rows.passages(drawn)]


def _turns(index: Index, loaded: LoadedModel, examples: Sequence[Example]) -> dict[str, Callable[[], object]]:
    """What is counted and timed, by name."""
    layout, generation, rows = index.layout, index.generation(), index.rows()
    settings = Settings(batch_tokens=index.facts["max_batch_tokens"])
    tokens = [example.tokens for example in examples]
    encoder = index.encoder(loaded)
    batch = rows.read(np.arange(min(_CODED, rows.num_passages), dtype=np.int64))
    correlation = autocorrelation([batch], index.layout)

    def code() -> None:
        unit_ND = torch.nn.functional.normalize(generation.whitener.apply(batch), dim=1)
        encode_codes(generation.spec, Rotation(layout.dim, generation.spec.seed), unit_ND)

    bare = index.load_model()
    return {
        TRAIN: make_contestant(Path(), settings, tokens, bare, TRAIN),
        FLOOR: make_contestant(Path(), settings, tokens, bare, FLOOR),
        "encoding": lambda: encoder.encode(examples),
        "statistics": lambda: autocorrelation([batch], index.layout),
        "eigenvectors": lambda: Whitener.fit(correlation, layout, damping=0.1),
        "coding": code,
    }


def _flop(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _spent(turns: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of CPU of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, run in turns.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()

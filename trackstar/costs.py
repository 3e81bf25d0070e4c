"""What a planned index costs: disk, memory, Milvus, a query, the build, the machines, and what is done later.

Every figure is computed by its printed formula (`trackstar.formula`), numbers put in. What depends on hardware is an
assumption that the caller states in `Assumptions`; what was measured is named below with where. A plan measures and
builds nothing; `benchmarks/plan_check.py` compares its figures with a small index, see docs/measurements.md.

Legend: N passages, d coordinates of a row in blocks of D_b, L candidates, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from trackstar.errors import InvalidRequest
from trackstar.formula import Value, amount
from trackstar.planner import Plan

Group = Literal["disk", "memory", "milvus", "query", "build", "machines", "later"]

# Sidecar of a row shard, zstd, measured on English sentences: text and token ids per token, all else per passage.
_SIDECAR_BYTES_PER_TOKEN, _SIDECAR_BYTES_PER_PASSAGE = 4, 24
# Milvus writes an id, a row number and a timestamp beside each code, int64 each.
_MILVUS_ROW_BYTES = 24
# Measured with 2.3.5 (docs/measurements.md): memory of a loaded collection per byte of code and, with the index of its
# ids, per passage; of the server without one; and what lies in the object store, where codes stay as they came and as
# they were compacted.
_MILVUS_OVERHEAD, _MILVUS_LOADED_ROW_BYTES, _MILVUS_IDLE_BYTES, _MILVUS_COPIES = 1.2, 200, 280 << 20, 2
# Of the memory of its query nodes, what Milvus lets collections fill (milvus.io/docs/limitations.md, "Load limits").
_MILVUS_FILL = 0.9
# Both ends of the ranking are searched and reranked: proponents and opponents.
_ENDS = 2
# Rows of the sample that gives z-scores.
_BACKGROUND = 1_000
# An eigendecomposition in float64 and the product that makes the inverse root, in float32 products of the same time per
# cubed dimension (measured on one core).
_EIGEN_FLOP = 25
# A leaf of the sum that makes R covers so many times its own size of rows, so that leaves are small beside the rows.
_ROWS_PER_LEAF = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be indexed, and with which projection.

    `num_parameters` are those a token passes through (of a mixture of experts, only the active ones); the projection
    has `num_layer_blocks` x {attention, MLP} blocks of rows x cols.
    """

    num_passages: int
    tokens_per_passage: float
    num_layers: int
    num_parameters: int
    num_layer_blocks: int
    rows: int
    cols: int

    @property
    def dim(self) -> int:
        """d."""
        return 2 * self.num_layer_blocks * self.rows * self.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the hardware is taken to do and what is wanted of it; every field is above zero.

    sustained_flops: FLOP/s that one GPU keeps up.
    gpus_per_node: GPUs of one machine.
    days: in which the index is to be built.
    node_memory_bytes: of one Milvus query node.
    memory_bandwidth: bytes/s that one query node scans codes at.
    replicas: of the codes in Milvus; they serve more queries at once, not one query sooner.
    import_bytes_per_second: of codes into Milvus over one connection (measured, 2.3.5 on
        one core: 50 MB/s when nothing else ran, 16 MB/s on a busy machine).
    storage_bandwidth: bytes/s between one machine and the store of the rows.
    request_seconds, requests_at_once: of one ranged read of the store, and how many are on their way for one query.
    queries_per_second: at which bandwidth and requests of the store are given.
    audit_queries: queries whose cascade is compared with the exact scan before a generation answers.
    append_passages: M, passages that come later; a hundredth of the corpus if None.
    leaf_passages: whose rows one leaf of the sum that makes R covers; by size if None.
    """

    sustained_flops: float = 1e14
    gpus_per_node: int = 8
    days: float = 7.0
    node_memory_bytes: float = float(256 << 30)
    memory_bandwidth: float = 1e11
    replicas: int = 1
    import_bytes_per_second: float = 3e7
    storage_bandwidth: float = 1e9
    request_seconds: float = 0.03
    requests_at_once: int = 16
    queries_per_second: float = 1.0
    audit_queries: int = 100
    append_passages: int | None = None
    leaf_passages: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (0 < value < math.inf):
                raise InvalidRequest(f"{field.name} must be above zero, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One figure with its unit (bytes, FLOP, hours, GPU-hours, seconds, machines, ...) and the formula, numbers in."""

    group: Group
    name: str
    value: float
    unit: str
    formula: str


def costs(chosen: Plan, work: Workload, assumed: Assumptions | None = None) -> tuple[Cost, ...]:
    """Every figure of an index with the coarse code `chosen`, group by group.

    Raises:
        InvalidRequest: a count of the workload below 1.
    """
    for field in fields(work):
        if not 1 <= getattr(work, field.name) < math.inf:
            raise InvalidRequest(f"{field.name} must be at least 1, not {getattr(work, field.name)}")
    return tuple(_Costs(chosen, work, assumed or Assumptions()).all())


class _Costs:
    """The terms that several figures share, and one method for every group of figures."""

    def __init__(self, chosen: Plan, work: Workload, assumed: Assumptions) -> None:
        self.chosen, self.work, self.assumed = chosen, work, assumed
        side = work.rows * work.cols
        self.num = amount(work.num_passages, "passages")
        self.tokens = amount(work.tokens_per_passage, "tokens")
        self.dim = amount(work.dim, "numbers")
        blocks = amount(2 * work.num_layer_blocks, "blocks")
        self.squares = blocks * amount(side) * amount(side, "numbers")
        self.cubes = blocks * amount(side) * amount(side) * amount(side)
        self.row = self.dim * amount(2, "bytes (bf16)")
        self.code = amount(chosen.code_bytes, "bytes of code")
        self.rows_bytes = (self.num * self.row).named("bytes of rows")
        self.partial = self.squares * amount(8, "bytes (float64)")
        self.flops = amount(assumed.sustained_flops, "FLOP/s") * amount(3600, "s")
        self.appended = assumed.append_passages or max(1, work.num_passages // 100)

    def all(self) -> Iterator[Cost]:
        """All groups."""
        groups: tuple[tuple[Group, Iterator[tuple[str, Value, str]]], ...] = (
            ("disk", self._disk()),
            ("memory", self._memory()),
            ("milvus", self._milvus()),
            ("query", self._query()),
            ("build", self._build()),
            ("machines", self._machines()),
            ("later", self._later()),
        )
        for group, figures in groups:
            for name, found, unit in figures:
                yield Cost(group=group, name=name, value=found.value, unit=unit, formula=found.text)

    def _disk(self) -> Iterator[tuple[str, Value, str]]:
        unit = amount(self.chosen.size, "bits") / amount(8) if self.chosen.kind == "bits" else self._floats()
        texts = self.tokens * amount(_SIDECAR_BYTES_PER_TOKEN) + amount(_SIDECAR_BYTES_PER_PASSAGE, "bytes, compressed")
        parts = {
            "gradient rows": self.num * self.row,
            "coarse codes": self.num * unit,
            "norms": self.num * (amount(4, "bytes beside the codes") + amount(4, "together")),
            "ids of the codes": self.num * amount(8, "bytes"),
            "texts and spans": self.num * texts,
            "statistics": self.partial,
            "whitener": self._whitener(),
            "background sample": self._background(2),
        }
        for name, found in parts.items():
            yield name, found, "bytes"
        first, *others = (found.named("") for found in parts.values())
        yield "all on disk", sum(others, first), "bytes"

    def _memory(self) -> Iterator[tuple[str, Value, str]]:
        yield "one partial sum of R", self.partial, "bytes"
        leaves = self._leaves()
        yield "leaves of R", leaves, "leaves"
        yield "leaves of R, together", leaves.named("leaves") * self.partial.named("bytes"), "bytes"
        yield "model weights", amount(self.work.num_parameters, "parameters") * amount(2, "bytes (bf16)"), "bytes"
        norms = self.num * amount(4, "bytes")
        yield "norms in each reranker", norms, "bytes"
        yield "whitener in memory", self._whitener(), "bytes"
        whitener, background = self._whitener().named("bytes of whitener"), self._background(4).named("of background")
        yield "each reranker", norms.named("bytes of norms") + whitener + background, "bytes"

    def _milvus(self) -> Iterator[tuple[str, Value, str]]:
        raw = self.num * (self.code + amount(_MILVUS_ROW_BYTES, "bytes of id, row number and time"))
        loaded, replicas = self._loaded().named("bytes"), amount(self.assumed.replicas, "replicas")
        yield "codes and ids, raw", raw, "bytes"
        yield "one generation, loaded", self._loaded(), "bytes"
        yield "all replicas", replicas * loaded, "bytes"
        yield "while a generation is replaced", amount(2, "generations") * replicas * loaded, "bytes"
        yield (
            "Milvus' own store",
            raw.named("bytes") * amount(_MILVUS_COPIES, "copies (until compacted ones are removed)"),
            "bytes",
        )
        yield "import", self._import(self.num), "hours"

    def _query(self) -> Iterator[tuple[str, Value, str]]:
        ends = amount(_ENDS, "ends of the ranking")
        scanned = ends * self.num * self.code
        yield "codes scanned", scanned, "bytes"
        bandwidth = amount(self.assumed.memory_bandwidth, "bytes/s")
        yield "scan", scanned.named("bytes") / (self._nodes(1).named("query nodes") * bandwidth), "seconds"
        requests = ends * amount(self.chosen.candidates, "candidates")
        moved = requests * self.row
        yield "rows read", moved, "bytes"
        yield "ranged reads", requests, "requests"
        latency = amount(self.assumed.request_seconds, "s")
        at_once = amount(self.assumed.requests_at_once, "at once")
        yield "rerank, waiting for the store", requests.named("requests") / at_once * latency, "seconds"
        storage = amount(self.assumed.storage_bandwidth, "bytes/s")
        yield "rerank, moving the rows", moved.named("bytes") / storage, "seconds"
        rate = amount(self.assumed.queries_per_second, "queries/s")
        yield "store bandwidth", rate * moved.named("bytes"), "bytes/s"
        yield "store requests", rate * requests.named("requests"), "requests/s"

    def _build(self) -> Iterator[tuple[str, Value, str]]:
        parameters = amount(self.work.num_parameters, "parameters")
        yield "training, per token", amount(6, "FLOP") * parameters, "FLOP"
        yield "encoding, per token", amount(4, "FLOP") * parameters, "FLOP"
        yield "projecting, per token", self._project_flop(), "FLOP"
        yield "encoding", self._encode_hours(self.num), "GPU-hours"
        yield "statistics", self._statistics_hours(), "GPU-hours"
        yield "eigenvectors", self._eigen_hours(), "GPU-hours"
        yield "coding", self._code_hours(self.num), "GPU-hours"
        yield "audit", self._audit_hours(), "GPU-hours"
        yield "all GPU time", self._gpu_hours(), "GPU-hours"
        yield "written", self._written(), "bytes"
        yield "read", self._read(), "bytes"
        storage = amount(self.assumed.storage_bandwidth, "bytes/s") * amount(3600, "s")
        moved = self._written().named("bytes written") + self._read().named("bytes read")
        yield "moving it", moved / (self._gpu_nodes().named("machines") * storage), "hours"

    def _machines(self) -> Iterator[tuple[str, Value, str]]:
        yield "GPUs", self._gpus(), "GPUs"
        yield "GPU machines", self._gpu_nodes(), "machines"
        yield "Milvus query nodes", self._all_nodes(1), "machines"
        yield "query nodes while a generation is replaced", self._all_nodes(2), "machines"

    def _later(self) -> Iterator[tuple[str, Value, str]]:
        recode = self._eigen_hours().named("h of eigenvectors") + self._code_hours(self.num).named("h of coding")
        yield "another mix or code: GPU time", recode, "GPU-hours"
        yield "another mix or code: read", self.rows_bytes, "bytes"
        yield "another mix or code: import", self._import(self.num), "hours"
        more = amount(self.appended, "more passages")
        append = self._encode_hours(more).named("h of encoding") + self._code_hours(more).named("h of coding")
        yield "appending: GPU time", append, "GPU-hours"
        yield "appending: rows and codes", more * (self.row + self.code + amount(4, "bytes of norm")), "bytes"
        yield "appending: import", self._import(more), "hours"
        yield "another audit: GPU time", self._audit_hours(), "GPU-hours"
        yield "another audit: read", self.rows_bytes, "bytes"

    def _floats(self) -> Value:
        return amount(self.chosen.size, "floats") * amount(4, "bytes")

    def _whitener(self) -> Value:
        return self.squares * amount(4, "bytes (float32)")

    def _background(self, width: int) -> Value:
        return amount(min(_BACKGROUND, self.work.num_passages), "rows") * self.dim * amount(width, "bytes")

    def _leaves(self) -> Value:
        if self.assumed.leaf_passages is not None:
            return (self.num / amount(self.assumed.leaf_passages, "passages")).rounded_up()
        covered = amount(_ROWS_PER_LEAF) * self.partial.named("bytes of a partial sum")
        return (self.rows_bytes / covered).rounded_up()

    def _loaded(self) -> Value:
        row = self.code * amount(_MILVUS_OVERHEAD) + amount(_MILVUS_LOADED_ROW_BYTES, "bytes beside it")
        return self.num * row + amount(_MILVUS_IDLE_BYTES, "bytes of an idle server")

    def _nodes(self, generations: int) -> Value:
        """Query nodes that hold one replica."""
        usable = amount(_MILVUS_FILL) * amount(self.assumed.node_memory_bytes, "bytes")
        needed = self._loaded().named("bytes")
        return ((amount(generations, "generations") * needed if generations > 1 else needed) / usable).rounded_up()

    def _all_nodes(self, generations: int) -> Value:
        return amount(self.assumed.replicas, "replicas") * self._nodes(generations)

    def _import(self, num: Value) -> Value:
        speed = amount(self.assumed.import_bytes_per_second, "bytes/s") * amount(3600, "s")
        return num * (self.code + amount(8, "bytes of id")) / speed

    def _project_flop(self) -> Value:
        """Of the two sides of every matrix and their product; see docs/measurements.md, "Projection products"."""
        work = self.work
        # A layer of width w has matrices of 9 w rows and 9 w columns in all, 12 w^2 elements.
        width = amount(round(math.sqrt(work.num_parameters / (12 * work.num_layers))), "width")
        rows, cols = amount(work.rows), amount(work.cols)
        layer = amount(9) * width * (rows + cols) + amount(6, "matrices") * rows * cols
        return amount(2, "FLOP") * amount(work.num_layers, "layers") * layer

    def _encode_hours(self, num: Value) -> Value:
        model = (amount(4) * amount(self.work.num_parameters)).named("FLOP")
        return num * self.tokens * (model + self._project_flop().named("FLOP")) / self.flops

    def _statistics_hours(self) -> Value:
        return self.num * amount(2, "FLOP") * self.squares / self.flops

    def _eigen_hours(self) -> Value:
        return amount(_EIGEN_FLOP, "FLOP") * self.cubes / self.flops

    def _code_hours(self, num: Value) -> Value:
        """Whitening, and a rotation of two rounds over a padded row seen as a matrix of a x b."""
        exponent = (self.work.dim - 1).bit_length()
        sides = amount((1 << exponent // 2) + (1 << exponent - exponent // 2))
        whiten = (amount(2) * self.squares).named("FLOP to whiten")
        rotate = amount(4, "FLOP to rotate") * amount(1 << exponent) * sides
        return num * (whiten + rotate) / self.flops

    def _audit_hours(self) -> Value:
        queries = amount(self.assumed.audit_queries, "queries")
        return amount(2, "FLOP") * queries * self.num * self.dim / self.flops

    def _gpu_hours(self) -> Value:
        first, *others = (
            hours.named("")
            for hours in (
                self._encode_hours(self.num),
                self._statistics_hours(),
                self._eigen_hours(),
                self._code_hours(self.num),
                self._audit_hours(),
            )
        )
        return sum(others, first)

    def _gpus(self) -> Value:
        return (
            self._gpu_hours().named("GPU hours") / (amount(self.assumed.days, "days") * amount(24, "h"))
        ).rounded_up()

    def _gpu_nodes(self) -> Value:
        return (self._gpus().named("GPUs") / amount(self.assumed.gpus_per_node, "per machine")).rounded_up()

    def _written(self) -> Value:
        texts = self.tokens * amount(_SIDECAR_BYTES_PER_TOKEN) + amount(_SIDECAR_BYTES_PER_PASSAGE, "bytes of text")
        return self.num * (self.row + self.code + amount(4, "bytes of norm") + texts)

    def _read(self) -> Value:
        return amount(3, "times (statistics, coding, audit)") * self.rows_bytes

"""Cuts a corpus into runs: contiguous passages that become one shard each, readable from the middle of the corpus.

    corpus file ─► outline (where every document stands, how many tokens it has) ─┬─► plan: one run per shard
    corpus file ─► outline ───────────────────────────────────────────────────────┘

Outlines are made file by file in any order and by any process; the plan joins them in corpus order, so shard and
passage numbers are the same however the work was shared out. Everything is published, so an interrupted plan goes on.

    rows/outline-000/000012.parquet   record number, byte offset and tokens of every document of one file
    rows/plan-000.parquet             the runs of a part
    rows/plan-000.json                the corpus they were planned from, and totals; written last

Memory: one file's outline (24 bytes a document) and the plan (some 800 bytes a shard).
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trackstar.blobs import Location, each
from trackstar.corpus import Corpus, Document
from trackstar.corpus_files import Mark
from trackstar.errors import CorruptArtifact, Incompatible, NotFound
from trackstar.passages import Cursor, Passage, begin_token, count_tokens, read_passages
from trackstar.storage import publish, publish_json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """The documents of one file: where each stands and how many tokens it has, int64 [documents].

    `bad_records` counts records that are no documents; `bad_examples` has sentences about the first of them.
    """

    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    tokens: NDArray[np.int64]
    bad_records: int = 0
    bad_examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One shard's passages: `num_passages` from window `window` of the document at (file, number, offset) on.

    `document` is that document's ordinal in the corpus, `first_passage` the id of the run's first passage.
    """

    shard: int
    first_passage: int
    num_passages: int
    num_tokens: int
    file: int
    number: int
    offset: int
    document: int
    window: int

    @property
    def mark(self) -> Mark:
        """In front of the run's first document."""
        return Mark(number=self.number, offset=self.offset)


_RUNS = pa.schema([(name, pa.int64()) for name in Run.__slots__])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The runs of a part, in order, and what is known of its corpus."""

    runs: Sequence[Run]
    corpus: Mapping[str, Any]
    bad_records: int
    bad_examples: tuple[str, ...]

    @property
    def num_passages(self) -> int:
        """Of all runs."""
        return sum(run.num_passages for run in self.runs)

    @property
    def num_tokens(self) -> int:
        """Of all runs, begin tokens included."""
        return sum(run.num_tokens for run in self.runs)


def make_outline(corpus: Corpus, file: int, tokenizer: PreTrainedTokenizerBase) -> Outline:
    """Reads and tokenises one file of the corpus; raises as `Corpus.documents`."""
    bad, examples = corpus.bad_records, len(corpus.bad_examples)
    # As numbers of a Python list they would take ten times the outline.
    numbers, offsets, tokens = array("q"), array("q"), array("q")

    def noted() -> Iterator[Document]:
        for mark, document in corpus.file_documents(file):
            numbers.append(mark.number)
            offsets.append(mark.offset)
            yield document

    tokens.extend(count_tokens(noted(), tokenizer))
    return Outline(
        numbers=np.frombuffer(numbers, dtype=np.int64),
        offsets=np.frombuffer(offsets, dtype=np.int64),
        tokens=np.frombuffer(tokens, dtype=np.int64),
        bad_records=corpus.bad_records - bad,
        bad_examples=corpus.bad_examples[examples:],
    )


def outline_path(folder: Location, part: int, file: int) -> Location:
    """Where a file's outline lies; `folder` is the `rows` folder."""
    return folder / f"outline-{part:03d}" / f"{file:06d}.parquet"


def save_outline(path: Location, outline: Outline) -> None:
    """Publish an outline."""
    table = pa.table({"number": outline.numbers, "offset": outline.offsets, "tokens": outline.tokens})
    note = json.dumps({"bad_records": outline.bad_records, "bad_examples": outline.bad_examples})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"bad": note}), buffer, compression="zstd")
    publish(path, buffer.getvalue())


def load_outline(path: Location) -> Outline:
    """What `save_outline` wrote.

    Raises:
        CorruptArtifact: it cannot be read.
    """
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        note = json.loads(table.schema.metadata[b"bad"])
        return Outline(
            numbers=table["number"].to_numpy(),
            offsets=table["offset"].to_numpy(),
            tokens=table["tokens"].to_numpy(),
            bad_records=note["bad_records"],
            bad_examples=tuple(note["bad_examples"]),
        )
    except (NotFound, OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{str(path)!r} cannot be read; delete it and give the same command again") from error


def cut_runs(
    outlines: Iterable[Outline],
    *,
    window_tokens: int,
    add_bos: bool,
    shard_passages: int,
    first_shard: int,
    first_passage: int,
) -> Iterator[Run]:
    """The runs of a corpus whose files have these outlines, in order.

    Args:
        outlines: of all files, in corpus order.
        window_tokens: of a passage, begin token included.
        add_bos: whether a begin token leads every passage.
        shard_passages: passages of every run but the last.
        first_shard, first_passage: numbers that the first run gets.
    """
    span = window_tokens - add_bos
    # A run that began in an earlier file and is not full yet: its start, and what it holds so far.
    start: tuple[int, int, int, int, int] | None = None
    held_passages = held_tokens = documents = 0
    shard, passage = first_shard, first_passage

    def run() -> Run:
        assert start is not None
        file, number, offset, document, window = start
        return Run(
            shard=shard,
            first_passage=passage,
            num_passages=held_passages,
            num_tokens=held_tokens,
            file=file,
            number=number,
            offset=offset,
            document=document,
            window=window,
        )

    for file, outline in enumerate(outlines):
        windows_D = -(-outline.tokens // span)
        # Passages and tokens in front of every document of this file, and behind the last.
        passages_before = np.concatenate([[0], np.cumsum(windows_D)])
        tokens_before = np.concatenate([[0], np.cumsum(outline.tokens + add_bos * windows_D)])
        total, at, tokens_at = int(passages_before[-1]), 0, 0
        while at < total:
            document = int(np.searchsorted(passages_before, at, side="right")) - 1
            if start is None:
                window = at - int(passages_before[document])
                start = (
                    file,
                    int(outline.numbers[document]),
                    int(outline.offsets[document]),
                    documents + document,
                    window,
                )
            stop = min(total, at + shard_passages - held_passages)
            last = int(np.searchsorted(passages_before, stop, side="right")) - 1
            inside = stop - int(passages_before[last])
            tokens_stop = int(tokens_before[last]) + inside * window_tokens
            held_passages += stop - at
            held_tokens += tokens_stop - tokens_at
            at, tokens_at = stop, tokens_stop
            if held_passages == shard_passages:
                yield run()
                shard, passage = shard + 1, passage + held_passages
                start, held_passages, held_tokens = None, 0, 0
        documents += len(outline.tokens)
    if held_passages:
        yield run()


def save_plan(folder: Location, part: int, plan: Plan) -> None:
    """Publish a plan; `folder` is the `rows` folder."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(run) for run in plan.runs], schema=_RUNS), buffer, compression="zstd")
    path = _plan_path(folder, part)
    publish(path.with_suffix(".parquet"), buffer.getvalue())
    note = {"corpus": plan.corpus, "bad_records": plan.bad_records, "bad_examples": plan.bad_examples}
    publish_json(path, note)


def load_plan(folder: Location, part: int) -> Plan | None:
    """A part's plan; None if there is none yet.

    Raises:
        CorruptArtifact: it cannot be read.
    """
    path = _plan_path(folder, part)
    try:
        note = read_json(path)
    except NotFound:
        return None
    try:
        table = pq.read_table(io.BytesIO(path.with_suffix(".parquet").read_bytes()), schema=_RUNS)
        return Plan(
            runs=[Run(**row) for row in table.to_pylist()],
            corpus=note["corpus"],
            bad_records=note["bad_records"],
            bad_examples=tuple(note["bad_examples"]),
        )
    except (NotFound, OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{str(path)!r} cannot be read; delete it and give the same command again") from error


def planned_corpora(folder: Location) -> list[dict[str, Any]]:
    """What the parts 0, 1, … of the `rows` folder are made of: settings and fingerprints of corpora, as planned.

    Raises:
        CorruptArtifact: a plan cannot be read.
    """
    found: list[dict[str, Any]] = []
    while True:
        path = _plan_path(folder, len(found))
        try:
            found.append(dict(read_json(path)["corpus"]))
        except NotFound:
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{str(path)!r} cannot be read; delete it and give the same command again") from error


class RunReader:
    """Reads the passages of runs, going on where it stands if a run begins there.

    Args:
        corpus: they were planned from.
        tokenizer: they were planned with.
        window_tokens: of a passage.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, window_tokens: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._window_tokens = window_tokens
        self._passages: Iterator[tuple[Passage, Cursor]] = iter(())
        self._next_shard = -1

    def read(self, run: Run) -> list[Passage]:
        """The run's passages.

        Raises:
            Incompatible: the corpus no longer has them.
            InvalidRequest: the corpus cannot be read.
        """
        if run.shard != self._next_shard:
            self._passages = read_passages(
                _From(self._corpus, run),
                self._tokenizer,
                window_tokens=self._window_tokens,
                add_bos=True,
                start=Cursor(run.document, run.window),
                first_id=run.first_passage,
            )
        self._next_shard = -1
        found = [passage for passage, _ in islice(self._passages, run.num_passages)]
        if len(found) != run.num_passages or sum(len(passage.tokens) for passage in found) != run.num_tokens:
            raise Incompatible(
                f"the corpus has changed since it was planned: shard {run.shard} should hold {run.num_passages:,} "
                f"passages of {run.num_tokens:,} tokens; bring the corpus back, or build a new index"
            )
        self._next_shard = run.shard + 1
        return found


class _From:
    """The documents from a run's first one on."""

    def __init__(self, corpus: Corpus, run: Run) -> None:
        self._corpus, self._run = corpus, run

    def documents(self, start: int) -> Iterator[Document]:
        assert start == self._run.document
        return self._corpus.documents_from(self._run.file, self._run.mark, start)


def has_begin_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether passages are led by a begin token."""
    return begin_token(tokenizer) is not None


def all_outlines(folder: Location, part: int, num_files: int) -> Iterator[Outline]:
    """The outlines of all files of a part, one in memory at a time."""
    return (load_outline(outline_path(folder, part, file)) for file in range(num_files))


def missing_outlines(folder: Location, part: int, num_files: int) -> list[int]:
    """Files of a part that have no outline yet."""
    files = range(num_files)
    there = each(folder, lambda file: outline_path(folder, part, file).is_file(), files)
    return [file for file, found in zip(files, there, strict=True) if not found]


def _plan_path(folder: Location, part: int) -> Location:
    return folder / f"plan-{part:03d}.json"

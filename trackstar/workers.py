"""What the workers of a build do: each turns items into published files, in whatever process an engine puts it.

A worker is made from an index folder and settings alone, so that it can be made anywhere; items and answers are small.
Every worker leaves alone what is there already, publishes whole files, and writes what makes a thing exist last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trackstar.blobs import Location
from trackstar.code_config import CodeConfig
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.correlation_tree import (
    Node,
    add_children,
    load_autocorrelation,
    load_sums,
    node_path,
    save_autocorrelation,
    save_sums,
)
from trackstar.encode import Encoded, Example
from trackstar.engine import Report
from trackstar.errors import InvalidRequest
from trackstar.generation import open_rows
from trackstar.generation_files import Coder, make_whitener
from trackstar.hessian import Autocorrelation, MixConfig, autocorrelation, product_sums
from trackstar.index import COMPUTE_DTYPES, Index
from trackstar.index_config import IndexConfig
from trackstar.model import LoadedModel, load_model, load_tokenizer
from trackstar.passages import Passage
from trackstar.row_shards import Receipt, blank, read_receipt, write_shard
from trackstar.rows import RowStore
from trackstar.runs import Run, RunReader, make_outline, outline_path, save_outline

_TASK_BATCH = 512


class PassageEncoder(Protocol):
    """Makes rows of passages; `trackstar.encode.Encoder` is one, a gang's another."""

    def encode(self, examples: Sequence[Example], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """See `Encoder.encode`."""

    def close(self) -> None:
        """Let go of the model."""


@dataclass(slots=True)
class ModelLoader:
    """Loads the checkpoint that settings name, once in each process."""

    config: IndexConfig
    _loaded: LoadedModel | None = field(default=None, repr=False)

    def __call__(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = load_model(
                self.config.model,
                dtype=COMPUTE_DTYPES[self.config.compute_dtype],
                device=self.config.device,
                trust_remote_code=self.config.trust_remote_code,
                exclude=self.config.exclude,
            )
        return self._loaded

    def encoder(self, index: Index) -> PassageEncoder:
        """An encoder of the index's rows.

        Raises:
            Incompatible: the checkpoint is another than the index was begun with.
        """
        loaded = self()
        index.check_model(self.config.model, loaded)
        return index.encoder(loaded)

    def __getstate__(self) -> tuple[IndexConfig, None]:
        # Another process loads it again.
        return self.config, None

    def __setstate__(self, state: tuple[IndexConfig, None]) -> None:
        self.config, self._loaded = state


EncoderMaker = Callable[[Index], PassageEncoder]


class OutlineWorker:
    """Reads a file of a corpus and publishes its outline; items are numbers of files."""

    def __init__(self, report: Report, *, rows: Location, part: int, corpus: CorpusConfig, config: IndexConfig) -> None:
        self._rows, self._part, self._report = rows, part, report
        self._corpus = Corpus(corpus)
        self._tokenizer, _ = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)

    def __call__(self, file: int) -> int:
        """Returns the number of documents."""
        outline = make_outline(self._corpus, file, self._tokenizer)
        save_outline(outline_path(self._rows, self._part, file), outline)
        return len(outline.tokens)


class EncodeWorker:
    """Turns runs into row shards; answers are receipts."""

    def __init__(
        self, report: Report, *, root: Location, corpus: CorpusConfig, config: IndexConfig, make: EncoderMaker
    ):
        self._report = report
        index = Index(root)
        self._rows = index.root / "rows"
        self._dtype: str = index.facts["row_dtype"]
        tokenizer, _ = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        self._reader = RunReader(Corpus(corpus), tokenizer, window_tokens=index.facts["window_tokens"])
        self._encoder = make(index)

    def __call__(self, run: Run) -> Receipt:
        """Encodes a run, unless it is there.

        Raises:
            InvalidRequest: a gradient is not finite; the message names the passage.
        """
        if (receipt := read_receipt(self._rows, run.shard)) is not None:
            return receipt
        passages = self._reader.read(run)
        examples = [Example(tokens=passage.tokens) for passage in passages]
        encoded = self._encoder.encode(examples, on_batch=self._report)
        finite = torch.isfinite(encoded.rows_ND).all(dim=1)
        if not bool(finite.all()):
            bad = passages[int((~finite).nonzero()[0])]
            raise InvalidRequest(
                f"the gradient of document {bad.doc_id!r} (passage {bad.passage_id}) is not finite; "
                "the checkpoint may be damaged, or a compute dtype of higher precision is needed"
            )
        return write_shard(self._rows, run.shard, passages, encoded.rows_ND, encoded.loss_N, dtype=self._dtype)

    def close(self) -> None:
        """Let go of the model."""
        self._encoder.close()


class TaskWorker:
    """Makes R_task; the item is (examples, where it goes, digest of the examples)."""

    def __init__(self, report: Report, *, root: Location, make: EncoderMaker) -> None:
        self._layout = Index(root).layout
        self._encoder = make(Index(root))

    def __call__(self, item: tuple[Sequence[Example], Location, str]) -> str:
        """Returns the digest."""
        examples, path, digest = item
        starts = range(0, len(examples), _TASK_BATCH)
        batches = (self._encoder.encode(examples[start : start + _TASK_BATCH]).rows_ND for start in starts)
        save_autocorrelation(path, autocorrelation(batches, self._layout), digest)
        return digest

    def close(self) -> None:
        """Let go of the model."""
        self._encoder.close()


class SumWorker:
    """Makes nodes of the tree of R_train; answers are numbers of rows added, 0 above the leaves."""

    def __init__(
        self,
        report: Report,
        *,
        root: Location,
        parts: int,
        versions: Mapping[int, str],
        folder: Location,
        device: str,
    ) -> None:
        index = Index(root)
        self._layout, self._rows = index.layout, RowStore(index.root / "rows", parts=parts, versions=versions)
        self._folder, self._device = folder, device

    def __call__(self, node: Node) -> int:
        """Makes a node, unless it is there.

        Raises:
            CorruptArtifact: a shard is not what was written.
        """
        path = node_path(self._folder, node)
        if not path.is_file():
            if node.level:
                add_children(self._folder, node)
            else:
                batches = (self._rows.shard(shard, verify=True) for shard in node.shards)
                save_sums(path, product_sums(batches, self._layout, device=self._device))
        return sum(self._rows.receipts[shard].num_passages for shard in node.shards)

    def close(self) -> None:
        """Close the rows."""
        self._rows.close()


class WhitenWorker:
    """Makes R_train from the root of the tree, and the whitener of a generation from it."""

    def __init__(self, report: Report, *, root: Location) -> None:
        self._layout = Index(root).layout

    def __call__(self, item: WhitenItem) -> None:
        """Publishes what is missing; raises as `make_whitener`."""
        train: Autocorrelation | None = None
        if item.mix.kind != "none":
            train = load_autocorrelation(item.train, item.statistics)
            if train is None:
                assert item.root_node is not None
                train = load_sums(item.root_node).average()
                save_autocorrelation(item.train, train, item.statistics)
        task = None
        if item.task is not None:
            task = load_autocorrelation(*item.task)
        make_whitener(item.home, self._layout, item.mix, train, task)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhitenItem:
    """What a `WhitenWorker` makes.

    home: the generation's folder. train: where R_train goes, `statistics` what it is of. root_node: the root of its
    tree, unless R_train is there. task: where R_task lies and what it is of, None without.
    """

    home: Location
    mix: MixConfig
    train: Location
    statistics: str
    root_node: Location | None
    task: tuple[Location, str] | None


class CodeWorker:
    """Makes the codes of shards; answers are numbers of passages."""

    def __init__(
        self,
        report: Report,
        *,
        root: Location,
        home: Location,
        spec: dict[str, Any],
        coding: str,
        others: Sequence[Location],
        device: str,
    ) -> None:
        index = Index(root)
        self._rows = open_rows(index.root / "rows", spec)
        code = CodeConfig(**spec["code"])
        self._coder = Coder(home, self._rows, index.layout, code, coding, others=others, device=device)

    def __call__(self, shard: int) -> int:
        """Makes a shard's codes, unless they are there."""
        return self._coder.code(shard)

    def close(self) -> None:
        """Close the rows."""
        self._rows.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Purge:
    """A shard, and which passages of it are to go."""

    shard: int
    version: str
    passage_ids: tuple[int, ...]


class PurgeWorker:
    """Writes new versions of shards, with nothing left of purged passages; answers are receipts."""

    def __init__(self, report: Report, *, root: Location, parts: int, versions: Mapping[int, str]) -> None:
        self._rows = RowStore(Index(root).root / "rows", parts=parts, versions=versions)

    def __call__(self, item: Purge) -> Receipt:
        """Writes a version, unless it is there.

        Raises:
            CorruptArtifact: the shard is not what was written.
        """
        rows = self._rows
        if (receipt := read_receipt(rows.folder, item.shard, item.version)) is not None:
            return receipt
        first, count = rows.first(item.shard), rows.receipts[item.shard].num_passages
        gone = np.isin(np.arange(first, first + count), item.passage_ids)
        rows_ND: Tensor = rows.shard(item.shard, verify=True).float()
        rows_ND[torch.from_numpy(gone)] = 0
        loss_N = torch.from_numpy(rows.shard_column(item.shard, "loss").to_numpy().copy())
        loss_N[torch.from_numpy(gone)] = 0
        found: Iterator[Passage] = iter(rows.passages(np.arange(first, first + count)))
        passages = [blank(passage) if away else passage for passage, away in zip(found, gone.tolist(), strict=True)]
        return write_shard(rows.folder, item.shard, passages, rows_ND, loss_N, dtype=rows.dtype, version=item.version)

    def close(self) -> None:
        """Close the rows."""
        self._rows.close()

"""Building an index: corpus in, active generation out. Every step continues where an interruption left it.

    corpus ─ plan ─► encode ─► row shards ─► R_train ─┬─► whitener ─► codes ─► coarse index ─► active
                                  task queries ─► R_task ┘

The unit of work is a shard: a run of `shard_passages` consecutive passages, encoded in batches that depend on its own
passages only and published atomically. What is finished is never built again; the finished folder has the same bytes
however often the build was interrupted and whoever did the work: an `Engine` spreads items over this process or a
cluster, and nothing here knows which.

Where an index exists, the same settings with another mix or code give a new generation on the same rows, with `append`
one that stands on the old rows and new ones, and with `purge` one without the deleted passages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trackstar.audit import AuditConfig, audit_generation
from trackstar.audit_record import publish_audit, read_audit
from trackstar.blobs import Location, each, location
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.correlation_tree import Node, leaves_of, level_above, node_path, remove_tree
from trackstar.encode import Example
from trackstar.engine import Engine, LocalEngine
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound
from trackstar.generation import Generation, read_facts
from trackstar.generation_files import (
    GenerationSpec,
    finish_generation,
    publish_background,
    read_excluded,
    start_generation,
)
from trackstar.index import Index, differences
from trackstar.index_config import IndexConfig
from trackstar.index_config import make_config as make_config
from trackstar.index_config import read_config as read_config
from trackstar.locks import writing
from trackstar.model import load_tokenizer
from trackstar.passages import begin_token
from trackstar.prepare import PrepareWorker
from trackstar.prepare import default_shard_passages as default_shard_passages
from trackstar.queries import read_queries, tokenize
from trackstar.row_shards import (
    Receipt,
    complete_part,
    finished_shards,
    purged_shards,
    read_part,
    read_receipt,
    read_receipts,
    stem,
)
from trackstar.rows import RowStore
from trackstar.runs import (
    Outline,
    Plan,
    all_outlines,
    cut_runs,
    load_plan,
    missing_outlines,
    outline_path,
    save_plan,
)
from trackstar.storage import digest_of, leftovers, read_json
from trackstar.tombstones import read_deleted
from trackstar.workers import (
    CodeWorker,
    EncoderMaker,
    EncodeWorker,
    ModelLoader,
    OutlineWorker,
    Purge,
    PurgeWorker,
    SumWorker,
    TaskWorker,
    WhitenItem,
    WhitenWorker,
)


class Progress(Protocol):
    """Hears how far a build is; all counts are of this run and of the whole."""

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str = "passages"
    ) -> None:
        """A step begins with `done` of `total` units finished, None if the total is not known.

        `tokens`: how many are still to be processed, where a step goes by tokens. `unit`: what is counted, in plural.
        """

    def advance(self, step: str, done: int, tokens: int) -> None:
        """`done` units in all are finished; `tokens` were processed since the last call."""

    def note(self, text: str) -> None:
        """Something worth telling once."""

    def shards(self, step: str, finished: int, planned: int) -> None:
        """So many shards have come through a step, of all there are."""


class Silent:
    """A progress that says nothing."""

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str = "passages"
    ) -> None:
        """Nothing."""

    def advance(self, step: str, done: int, tokens: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def shards(self, step: str, finished: int, planned: int) -> None:
        """Nothing."""


class Build:
    """One build of one index, in steps.

    Args:
        config: what to build.
        root: the index folder or URL.
        engine: who does the work.
        progress: hears of it.
        make_encoder: what encodes passages; the model in the process of the worker if None.
    """

    def __init__(
        self,
        config: IndexConfig,
        root: Location,
        *,
        engine: Engine,
        progress: Progress,
        make_encoder: EncoderMaker | None = None,
    ) -> None:
        self.config, self.root, self.engine, self.progress = config, root, engine, progress
        # Where a gang encodes, the whole model is only looked at, and may be too large for one device.
        self._loader = ModelLoader(config if make_encoder is None else config.model_copy(update={"device": "cpu"}))
        self._make_encoder = make_encoder or self._loader.encoder

    def run(self, *, verify: bool = False) -> str:
        """Build, or finish building, a generation; returns its name. It answers nothing yet.

        Args:
            verify: compare every finished shard with its digests and build altered ones again.

        Raises:
            TrackstarError: see the modules; nothing that was finished before is lost.
        """
        task = self.encode(verify=verify)
        spec, excluded = self._spec(task)
        home = self.root / "generations" / spec.name
        if not (home / "generation.json").is_file():
            start_generation(home, spec, excluded)
            self._whiten(home, spec, task)
            self._code(home, spec)
        return spec.name

    def encode(self, *, verify: bool = False) -> Sequence[Example]:
        """Make all rows, or finish making them; returns the task queries that a generation on them is to be mixed with.

        Args, Raises:
            as `run`.
        """
        self._prepare()
        # Read before anything expensive, so that a bad query file is known at once.
        task = self._task_examples()
        if verify:
            self._drop_altered()
        first_shard = first_passage = 0
        for number, corpus in enumerate(self.config.corpora):
            plan = self._plan(number, corpus, first_shard, first_passage)
            self._encode(number, corpus, plan)
            first_shard, first_passage = first_shard + len(plan.runs), first_passage + plan.num_passages
        return task

    def _prepare(self) -> None:
        self.progress.start("preparing", 0, None, unit="models")
        report = partial(self.progress.advance, "preparing", 0)
        for notes in self.engine.map("prepare", partial(PrepareWorker, load=self._loader), [self.root], report=report):
            for note in notes:
                self.progress.note(note)
        self._index = Index(self.root)
        self._rows = self.root / "rows"

    # --- rows -------------------------------------------------------------------------------------------------------

    def _plan(self, number: int, config: CorpusConfig, first_shard: int, first_passage: int) -> Plan:
        """The part's runs; the corpus is compared with what they were planned from."""
        plan = load_plan(self._rows, number)
        try:
            corpus = Corpus(config)
            facts = {**config.model_dump(mode="json"), "fingerprint": corpus.fingerprint()}
        except (NotFound, InvalidRequest):
            if plan is None or not self._is_encoded(number, plan):
                raise
            facts = {**config.model_dump(mode="json"), "fingerprint": plan.corpus["fingerprint"]}
        if plan is not None:
            for name, then, now in differences(dict(plan.corpus), facts, "corpus"):
                key = name if number == 0 else f"append.{number - 1}{name.removeprefix('corpus')}"
                raise Incompatible(
                    f"{str(self.root)!r} was started with {key} = {then!r}, this command has {now!r}; use the same or "
                    "build into another folder"
                )
            return plan
        files = missing_outlines(self._rows, number, corpus.num_files)
        done = corpus.num_files - len(files)
        self.progress.start("planning", done, corpus.num_files, unit="files")
        make = partial(OutlineWorker, rows=self._rows, part=number, corpus=config, config=self.config)
        for _ in self.engine.map("planning", make, files):
            done += 1
            self.progress.advance("planning", done, 0)
        tokenizer, _ = load_tokenizer(self.config.model, trust_remote_code=self.config.trust_remote_code)
        bad, examples, num_documents = 0, list[str](), 0

        def noted() -> Iterator[Outline]:
            nonlocal bad, num_documents
            for outline in all_outlines(self._rows, number, corpus.num_files):
                bad, num_documents = bad + outline.bad_records, num_documents + len(outline.tokens)
                examples.extend(outline.bad_examples)
                yield outline

        runs = list(
            cut_runs(
                noted(),
                window_tokens=self._index.facts["window_tokens"],
                add_bos=begin_token(tokenizer) is not None,
                shard_passages=self._index.facts["shard_passages"],
                first_shard=first_shard,
                first_passage=first_passage,
            )
        )
        if not num_documents:
            raise InvalidRequest(
                f"The corpus {', '.join(config.paths)} holds no documents"
                + (f": every record is bad, such as {examples[0]}" if examples else ".")
            )
        plan = Plan(runs=runs, corpus=facts, bad_records=bad, bad_examples=tuple(examples[:5]))
        save_plan(self._rows, number, plan)
        for file in range(corpus.num_files):
            outline_path(self._rows, number, file).unlink(missing_ok=True)
        return plan

    def _encode(self, number: int, corpus: CorpusConfig, plan: Plan) -> None:
        if self._is_encoded(number, plan):
            return
        finished, part = self._finished(number), read_part(self._rows, number)
        missing = [run for run in plan.runs if run.shard not in finished]
        done = plan.num_passages - sum(run.num_passages for run in missing)
        left = sum(run.num_tokens for run in missing)
        self.progress.start("encoding", done, plan.num_passages, tokens=left)
        make = partial(EncodeWorker, root=self.root, corpus=corpus, config=self.config, make=self._make_encoder)

        def report(tokens: int) -> None:
            self.progress.advance("encoding", done, tokens)

        first, planned = plan.runs[0].shard, plan.runs[-1].shard + 1
        encoded = first + len(plan.runs) - len(missing)
        self.progress.shards("encoding", encoded, planned)
        for receipt in self.engine.map("encoding", make, missing, report=report):
            done, encoded = done + receipt.num_passages, encoded + 1
            self.progress.advance("encoding", done, 0)
            self.progress.shards("encoding", encoded, planned)
        if plan.bad_records:
            self.progress.note(f"{plan.bad_records} bad records were skipped: {'; '.join(plan.bad_examples)}")
        facts = self._index.facts
        collected = {} if part is None else {receipt.shard: receipt for receipt in read_receipts(self._rows, part)}
        for shard in finished_shards(self._rows):
            collected.pop(shard, None)
        complete_part(
            self._rows,
            number,
            each(
                self._rows,
                lambda run: collected.get(run.shard) or self._receipt(run.shard, run.num_passages),
                plan.runs,
            ),
            first_shard=plan.runs[0].shard if plan.runs else 0,
            shard_passages=facts["shard_passages"],
            dim=facts["dim"],
            dtype=facts["row_dtype"],
            corpus=plan.corpus,
        )

    def _is_encoded(self, number: int, plan: Plan) -> bool:
        finished = self._finished(number)
        return read_part(self._rows, number) is not None and all(run.shard in finished for run in plan.runs)

    def _finished(self, number: int) -> set[int]:
        """Shards that need no encoding; of a finished part those too of which only a purged version is left."""
        finished = set(finished_shards(self._rows))
        if read_part(self._rows, number) is not None:
            finished |= {shard for shard, _ in purged_shards(self._rows)}
        return finished

    def _receipt(self, shard: int, num_passages: int) -> Receipt:
        receipt = read_receipt(self._rows, shard)
        if receipt is None or receipt.num_passages != num_passages:
            raise CorruptArtifact(
                f"shard {shard} of {str(self._rows)!r} is not the one that was planned; delete its receipt "
                f"{stem(self._rows, shard).name}.json and give the same command again"
            )
        return receipt

    def _drop_altered(self) -> None:
        """Delete the receipts of shards whose files are not what they say, so that they are built again."""
        for shard in finished_shards(self._rows):
            path = stem(self._rows, shard).with_suffix(".json")
            try:
                RowStore.verify_files(path, read_json(path))
            except CorruptArtifact:
                self.progress.note(f"building shard {shard} again, its files are not what was written")
                path.unlink()
        for shard, version in purged_shards(self._rows):
            path = stem(self._rows, shard, version).with_suffix(".json")
            try:
                RowStore.verify_files(path, read_json(path))
            except CorruptArtifact:
                self.progress.note(f"purging shard {shard} again, its files are not what was written")
                path.unlink()

    # --- generation -------------------------------------------------------------------------------------------------

    def _spec(self, task: Sequence[Example]) -> tuple[GenerationSpec, NDArray[np.int64]]:
        """What the generation is, and which passages it leaves out."""
        parts = len(self.config.corpora)
        before = self._active_facts()
        versions = {int(shard): version for shard, version in before.get("versions", {}).items()}
        # One that is not there any more is purged again, from the shard that was encoded.
        base = {shard: version for shard, version in versions.items() if read_receipt(self._rows, shard, version)}
        rows = RowStore(self._rows, parts=parts, versions=base)
        excluded = np.empty(0, dtype=np.int64)
        # What was purged once stays away: its old shards may be gone.
        if self.config.purge or before.get("excluded") is not None:
            deleted = read_deleted(self.root).passage_ids
            excluded = deleted[deleted < rows.num_passages]
        versions = self._purge(rows, excluded) if len(excluded) else {}
        rows.close()
        whole = RowStore(self._rows, parts=parts, versions=versions)
        first = read_part(self._rows, 0)
        assert first is not None
        spec = GenerationSpec(
            rows=whole.digest,
            parts=parts,
            versions=versions,
            excluded=digest_of(excluded.tolist()) if len(excluded) else None,
            statistics=whole.digest if self.config.refit else first.digest,
            task=_digest_of_examples(task) if task else None,
            mix=self.config.mix,
            code=self.config.code,
            background=self.config.background,
        )
        whole.close()
        return spec, excluded

    def _active_facts(self) -> dict[str, Any]:
        """What the generation that answers now says of itself; nothing if there is none."""
        name = self._index.catalog.pointer()
        if name is None or name not in self._index.generation_names():
            return {}
        return read_facts(self._index.catalog.home(name))

    def _purge(self, rows: RowStore, excluded: NDArray[np.int64]) -> dict[int, str]:
        """Write the shards of deleted passages anew; returns their versions."""
        # Ids ascend, so that those of a shard stand together.
        numbers, firsts = np.unique(np.searchsorted(rows.starts, excluded, side="right") - 1, return_index=True)
        items = []
        for shard, some in zip(numbers.tolist(), np.split(excluded, firsts[1:]), strict=True):
            ids = tuple(some.tolist())
            items.append(Purge(shard=shard, version=digest_of(ids)[:8], passage_ids=ids))
        self.progress.start("purging", 0, len(items), unit="shards")
        make = partial(PurgeWorker, root=self.root, parts=len(rows.parts), versions=rows.versions)
        for done, _ in enumerate(self.engine.map("purging", make, items), start=1):
            self.progress.advance("purging", done, 0)
        return {item.shard: item.version for item in items}

    def _whiten(self, home: Location, spec: GenerationSpec, task: Sequence[Example]) -> None:
        if (home / "whitener.json").is_file():
            return
        known_task = self._task_statistics(task, spec.task) if spec.task is not None else None
        train = self.root / "statistics" / f"train-{spec.statistics[:12]}.safetensors"
        root_node, nodes = None, list[Node]()
        if spec.mix.kind != "none" and not train.with_suffix(".json").is_file():
            nodes = self._sum(train.parent / train.name.removesuffix(".safetensors"), spec)
            root_node = node_path(train.parent / train.name.removesuffix(".safetensors"), nodes[-1])
        item = WhitenItem(
            home=home, mix=spec.mix, train=train, statistics=spec.statistics, root_node=root_node, task=known_task
        )
        self.progress.start("whitening", 0, 1, unit="generations")
        for _ in self.engine.map("whitening", partial(WhitenWorker, root=self.root), [item]):
            self.progress.advance("whitening", 1, 0)
        if nodes:
            remove_tree(train.parent / train.name.removesuffix(".safetensors"), nodes)

    def _sum(self, folder: Location, spec: GenerationSpec) -> list[Node]:
        """Make the tree of R_train; returns its nodes, the root last."""
        parts, versions = (spec.parts, spec.versions) if self.config.refit else (1, {})
        rows = RowStore(self._rows, parts=parts, versions=versions)
        level = leaves_of(rows.num_shards, self._index.facts["shard_passages"], self._index.layout)
        total, num_leaves = rows.num_passages, len(level)
        rows.close()
        self.progress.start("statistics", 0, total)
        make = partial(
            SumWorker, root=self.root, parts=parts, versions=versions, folder=folder, device=self.config.device
        )
        nodes, done = list(level), 0
        while True:
            for count in self.engine.map("statistics", make, level):
                done += count
                self.progress.advance("statistics", done, 0)
            if len(level) == 1:
                assert num_leaves
                return nodes
            level = level_above(level)
            nodes += level

    def _code(self, home: Location, spec: GenerationSpec) -> None:
        rows = RowStore(self._rows, parts=spec.parts, versions=spec.versions)
        others = [
            self._index.catalog.home(name)
            for name in self._index.generation_names()
            if name != spec.name and read_facts(self._index.catalog.home(name)).get("coding") == spec.coding
        ]
        make = partial(
            CodeWorker,
            root=self.root,
            home=home,
            spec=spec.identity(),
            coding=spec.coding,
            others=others,
            device=self.config.device,
        )
        done = 0
        self.progress.start("coding", 0, rows.num_passages)
        for coded, count in enumerate(self.engine.map("coding", make, range(rows.num_shards)), start=1):
            done += count
            self.progress.advance("coding", done, 0)
            self.progress.shards("coding", coded, rows.num_shards)
        publish_background(home, rows, spec.background, read_excluded(home))
        finish_generation(home, spec, rows)
        rows.close()

    def _task_examples(self) -> list[Example]:
        config = self.config
        if config.mix.kind != "task":
            return []
        if config.task_queries is None:
            raise InvalidRequest("a task mix needs task queries; give them with --task-queries")
        tokenizer, _ = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        window = self._index.facts["window_tokens"]
        queries = read_queries(config.task_queries)
        return [tokenize(query, tokenizer, add_bos=True, max_tokens=window) for query in queries]

    def _task_statistics(self, task: Sequence[Example], digest: str) -> tuple[Location, str]:
        """Where R_task lies, and what it is of."""
        path = self.root / "statistics" / f"task-{digest[:12]}.safetensors"
        if not path.with_suffix(".json").is_file():
            self.progress.start("task queries", 0, len(task), unit="queries")
            make = partial(TaskWorker, root=self.root, make=self._make_encoder)
            for _ in self.engine.map("encoding", make, [(task, path, digest)]):
                self.progress.advance("task queries", len(task), 0)
        return path, digest


def build_index(
    config: IndexConfig,
    out: str | Location,
    *,
    progress: Progress | None = None,
    verify: bool = False,
    engine: Engine | None = None,
) -> Generation:
    """Build, or finish building, an index and make its generation active.

    Args:
        config: what to build.
        out: the index folder, or the URL of one in an object store.
        progress: hears how far it is.
        verify: compare every finished shard with its digests and build altered ones again.
        engine: who does the work; this process if None.

    Raises:
        TrackstarError: see the modules; nothing that was finished before is lost.
        NotReady: another process builds there, or the audit did not pass; then what answered before still does.
    """
    progress, root = progress or Silent(), location(out)
    if isinstance(root, Path) and root.exists() and not root.is_dir():
        raise InvalidRequest(f"{str(root)!r} is not a folder; give another --out")
    with writing(root):
        build = Build(config, root, engine=engine or LocalEngine(), progress=progress)
        name = build.run(verify=verify)
        generation = Index(root).generation(name)
        generation.import_codes(lambda step, done, _total: progress.advance(step, done, 0))
        _audit(config.audit, generation, progress)
        if isinstance(root, Path):
            for path in leftovers(root):
                path.unlink(missing_ok=True)
        if config.activate:
            Index(root).catalog.activate(name)
    return generation


def build_rows(config: IndexConfig, out: str | Location, *, progress: Progress | None = None) -> None:
    """Build, or finish building, an index's rows and nothing else: for whoever reads all rows and fits R on its own.

    Args:
        config: what to build; its mix, code and audit are of no account.
        out: the index folder, or the URL of one in an object store.
        progress: hears how far it is.

    Raises:
        TrackstarError: see the modules; nothing that was finished before is lost.
        NotReady: another process builds there.
    """
    root = location(out)
    with writing(root):
        Build(config, root, engine=LocalEngine(), progress=progress or Silent()).encode()


def _audit(config: AuditConfig, generation: Generation, progress: Progress) -> None:
    """Audit a generation, unless its last audit passed as strict a one, and keep what was found."""
    known = read_audit(generation.home)
    if known is not None and known.passed and known.min_recall >= config.min_recall and known.k == config.k:
        return
    progress.start("audit", 0, generation.rows.num_passages)

    def on_step(step: str, done: int, _total: int) -> None:
        if step == "scanning":
            progress.advance("audit", done, 0)

    found = audit_generation(
        generation,
        generation.rows,
        generation.coarse,
        config,
        codes=generation.codes,
        coarse_name=generation.code.store,
        on_step=on_step,
    )
    publish_audit(generation.home, found)


def _digest_of_examples(examples: Iterable[Example]) -> str:
    return digest_of([[example.tokens.tolist(), example.first_target] for example in examples])

"""Building an index: corpus in, active generation out. Every step continues where an interruption left it.

    corpus ─ passages ─► encode ─► row shards ─► R_train ─┬─► whitener ─► codes ─► coarse index ─► active
                                      task queries ─► R_task ┘

The unit of work is a shard: a run of `shard_passages` consecutive passages, encoded in batches that depend on its own
passages only and published atomically. What is finished is never built again; the finished folder has the same bytes
however often the build was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trackstar.codes import check_size
from trackstar.corpus import Corpus, CorpusConfig
from trackstar.encode import Encoder, Example, fold_factors
from trackstar.errors import CorruptArtifact, InvalidRequest, NotFound
from trackstar.estimate import estimate_moments
from trackstar.generation import CodeConfig, Generation, GenerationConfig, build_generation
from trackstar.hessian import Autocorrelation, MixConfig, autocorrelation
from trackstar.index import (
    COMPUTE_DTYPES,
    FORMAT,
    Correction,
    check_identity,
    fix_identity,
    load_correction,
    save_correction,
)
from trackstar.model import LoadedModel, load_model
from trackstar.moments import load_moments
from trackstar.passages import Cursor, Passage, begin_token, read_passages
from trackstar.planner import propose_projection
from trackstar.projection import BlockLayout
from trackstar.queries import read_queries, tokenize
from trackstar.rows import ROW_DTYPES, RowStore, finished_shards, mark_complete, write_shard
from trackstar.storage import digest_of, publish, publish_json, read_json

_COUNTED_DOCUMENTS = 20_000


class ProjectionConfig(BaseModel):
    """P_d. Numbers left out are proposed from the model and explained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer_blocks: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)
    cols: int | None = Field(default=None, ge=1)
    seed: int = 0


class MomentsConfig(BaseModel):
    """V. `source`: "none", "estimate", a Trainer checkpoint folder or its optimizer.pt, or a safetensors file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "none"
    rank: int = Field(default=1, ge=1, le=64)
    exact: bool = False
    sample: int = Field(default=1024, ge=1)


class IndexConfig(BaseModel):
    """Everything that determines an index. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: CorpusConfig
    model: str
    moments: MomentsConfig = MomentsConfig()
    projection: ProjectionConfig = ProjectionConfig()
    mix: MixConfig = MixConfig()
    task_queries: str | None = None
    code: CodeConfig = CodeConfig()
    background: int = Field(default=1000, ge=2)
    window_tokens: int | None = Field(default=None, ge=2)
    row_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    shard_passages: int | None = Field(default=None, ge=1)
    max_batch_tokens: int = Field(default=8192, ge=1)
    exclude: tuple[str, ...] = ()
    trust_remote_code: bool = False
    device: str = "cpu"


def read_config(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dictionary for `IndexConfig`.

    Raises:
        NotFound: no such file.
        InvalidRequest: it is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no config file {str(path)!r}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{str(path)!r} is not valid YAML") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{str(path)!r} must hold a mapping of settings")
    return content


def make_config(content: dict[str, Any]) -> IndexConfig:
    """Validate settings.

    Raises:
        InvalidRequest: an unknown key, or a value out of range; the message names it.
    """
    try:
        return IndexConfig(**content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(f"the config has an unknown key {place!r}; remove it or correct its name") from error
        raise InvalidRequest(f"the config's {place or 'settings'}: {first['msg']}") from error


class Progress(Protocol):
    """Hears how far a build is; all counts are of this run and of the whole."""

    def start(self, step: str, done: int, total: int | None) -> None:
        """A step begins with `done` of `total` units finished; None if the total is not known."""

    def advance(self, step: str, done: int, tokens: int) -> None:
        """`done` units in all are finished; `tokens` were processed since the last call."""

    def note(self, text: str) -> None:
        """Something worth telling once."""


class Silent:
    """A progress that says nothing."""

    def start(self, step: str, done: int, total: int | None) -> None:
        """Nothing."""

    def advance(self, step: str, done: int, tokens: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def build_index(
    config: IndexConfig, out: str | Path, *, progress: Progress | None = None, verify: bool = False
) -> Generation:
    """Build, or finish building, an index and make its generation active.

    Args:
        config: what to build.
        out: the index folder.
        progress: hears how far it is.
        verify: compare every finished shard with its digests and build altered ones again.

    Raises:
        TrackstarError: see the modules; nothing that was finished before is lost.
    """
    progress, root = progress or Silent(), Path(out)
    corpus = Corpus(config.corpus)
    loaded = load_model(
        config.model,
        dtype=COMPUTE_DTYPES[config.compute_dtype],
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        exclude=config.exclude,
    )
    layout = _layout(config, loaded, corpus, progress)
    check_size(config.code.spec(layout.dim).size, layout.dim)
    window = min(config.window_tokens or loaded.max_tokens, loaded.max_tokens)
    identity = _identity(config, loaded, corpus, layout, window)
    check_identity(root, identity)
    correction = _correction(root, config, loaded, corpus, window, progress)
    fix_identity(root, identity)
    save_correction(root / "correction.safetensors", correction)
    encoder = Encoder(
        loaded,
        layout,
        fold_factors(loaded, layout, correction, seed=config.projection.seed),
        max_batch_tokens=config.max_batch_tokens,
    )
    # Read before anything expensive, so that a bad query file is known at once.
    task_examples = _task_examples(config, loaded, window)
    shard_passages = config.shard_passages or default_shard_passages(layout.dim, config.row_dtype)
    folder = root / "rows"
    if verify:
        _drop_altered(folder, progress)
    _encode_rows(folder, config, corpus, loaded, encoder, window, shard_passages, progress)
    rows = RowStore(folder)
    progress.start("coding", 0, rows.num_passages)
    generation = build_generation(
        root / "generations",
        rows,
        layout,
        GenerationConfig(mix=config.mix, code=config.code, background=config.background),
        train=lambda: _train_statistics(root, rows, layout, progress),
        task=_task_statistics(root, task_examples, encoder) if task_examples else None,
        on_rows=lambda step, done, _total: progress.advance(step, done, 0),
    )
    publish_json(root / "active.json", {"generation": generation.name})
    encoder.close()
    return generation


def default_shard_passages(dim: int, row_dtype: str) -> int:
    """Passages per shard so that its rows take about 128 MiB, a power of two between 64 and 16,384."""
    row_bytes = dim * ROW_DTYPES[row_dtype].itemsize
    return int(min(16384, max(64, 1 << ((1 << 27) // row_bytes).bit_length() - 1)))


def _layout(config: IndexConfig, loaded: LoadedModel, corpus: Corpus, progress: Progress) -> BlockLayout:
    wanted = config.projection
    if wanted.layer_blocks and wanted.rows and wanted.cols:
        return loaded.layout(layer_blocks=wanted.layer_blocks, rows=wanted.rows, cols=wanted.cols)
    # Beyond some size the corpus no longer limits the projection, so counting stops there.
    counted = sum(1 for _ in islice(corpus.documents(), _COUNTED_DOCUMENTS))
    layer_blocks, rows, cols, explanation = propose_projection(loaded.num_layers, loaded.num_parameters, counted)
    progress.note(explanation)
    return loaded.layout(
        layer_blocks=wanted.layer_blocks or layer_blocks, rows=wanted.rows or rows, cols=wanted.cols or cols
    )


def _identity(
    config: IndexConfig, loaded: LoadedModel, corpus: Corpus, layout: BlockLayout, window: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": {
            "path": str(Path(config.model).resolve()),
            "digest": loaded.digest,
            "architecture": type(loaded.model).__name__,
            "parameters": loaded.num_parameters,
        },
        "corpus": {**config.corpus.model_dump(mode="json"), "fingerprint": corpus.fingerprint()},
        "moments": config.moments.model_dump(),
        "projection": {"seed": config.projection.seed, "layer_blocks": len(layout.blocks) // 2},
        "blocks": [{"name": block.name, "rows": block.rows, "cols": block.cols} for block in layout.blocks],
        "dim": layout.dim,
        "window_tokens": window,
        "add_bos": begin_token(loaded.tokenizer) is not None,
        "row_dtype": config.row_dtype,
        "compute_dtype": config.compute_dtype,
        "shard_passages": config.shard_passages or default_shard_passages(layout.dim, config.row_dtype),
        "max_batch_tokens": config.max_batch_tokens,
        "exclude": list(config.exclude),
    }


def _correction(
    root: Path, config: IndexConfig, loaded: LoadedModel, corpus: Corpus, window: int, progress: Progress
) -> Correction:
    path = root / "correction.safetensors"
    if path.is_file():
        return load_correction(path)
    if config.moments.source == "estimate":
        sample = [_example(passage) for passage in _sample(loaded, corpus, window, config.moments.sample)]
        progress.start("moments", 0, len(sample))
        moments = estimate_moments(
            loaded,
            sample,
            max_batch_tokens=config.max_batch_tokens,
            on_batch=lambda done: progress.advance("moments", done, 0),
        )
    else:
        names = [member.name for member in loaded.members]
        moments = load_moments(config.moments.source, loaded.model, names=names)
    correction: Correction = {}
    errors: list[tuple[float, int]] = []
    for member in loaded.members:
        shape = (member.out_features, member.in_features)
        if config.moments.exact and member.name in moments.full:
            correction[member.name] = moments.exact(member.name, shape)
            continue
        scale = moments.scale(member.name, shape, config.moments.rank)
        correction[member.name] = scale
        errors.append((scale.error, shape[0] * shape[1]))
    if moments.full and errors:
        mean = sum(error * size for error, size in errors) / sum(size for _, size in errors)
        progress.note(
            f"Adam's second moments fitted by {config.moments.rank} separable term(s) per weight: expected "
            f"relative squared error of the corrected gradient {mean:.4f} on average, "
            f"{max(error for error, _ in errors):.4f} at worst"
        )
    return correction


def _sample(loaded: LoadedModel, corpus: Corpus, window: int, size: int) -> list[Passage]:
    """A reservoir sample of the first 64 * size passages, the same for the same corpus."""
    generator = np.random.Generator(np.random.Philox(key=1))
    kept: list[Passage] = []
    passages = read_passages(
        corpus, loaded.tokenizer, window_tokens=window, add_bos=True, start=Cursor(0, 0), first_id=0
    )
    for seen, (passage, _) in enumerate(islice(passages, 64 * size)):
        if len(kept) < size:
            kept.append(passage)
        elif (slot := int(generator.integers(0, seen + 1))) < size:
            kept[slot] = passage
    return kept


def _example(passage: Passage) -> Example:
    return Example(tokens=passage.tokens)


def _encode_rows(
    folder: Path,
    config: IndexConfig,
    corpus: Corpus,
    loaded: LoadedModel,
    encoder: Encoder,
    window: int,
    shard_passages: int,
    progress: Progress,
) -> None:
    if (folder / "complete.json").is_file() and _all_receipts(folder):
        return
    finished = sum(receipt.num_passages for receipt in finished_shards(folder))
    progress.start("encoding", finished, None)
    for shard, passages, cursor in _missing_shards(folder, corpus, loaded, window, shard_passages):
        on_batch = partial(progress.advance, "encoding", finished)
        encoded = encoder.encode([_example(passage) for passage in passages], on_batch=on_batch)
        finite = torch.isfinite(encoded.rows_ND).all(dim=1)
        if not bool(finite.all()):
            bad = passages[int((~finite).nonzero()[0])]
            raise InvalidRequest(
                f"the gradient of document {bad.doc_id!r} (passage {bad.passage_id}) is not finite; "
                "the checkpoint may be damaged, or a compute dtype of higher precision is needed"
            )
        write_shard(
            folder, shard, passages, encoded.rows_ND, encoded.loss_N, dtype=config.row_dtype, next_cursor=cursor
        )
        finished += len(passages)
        progress.advance("encoding", finished, 0)
    if corpus.bad_records:
        examples = "; ".join(corpus.bad_examples)
        progress.note(f"{corpus.bad_records} bad records were skipped: {examples}")
    mark_complete(folder, shard_passages=shard_passages, dim=encoder.layout.dim, dtype=config.row_dtype)


def _missing_shards(
    folder: Path, corpus: Corpus, loaded: LoadedModel, window: int, shard_passages: int
) -> Iterator[tuple[int, Sequence[Passage], Cursor]]:
    """Number, passages and end of every shard that has no receipt; the corpus is read on from the last known cursor."""
    cursor, shard = Cursor(0, 0), 0
    stream: Iterator[tuple[Passage, Cursor]] | None = None
    while True:
        receipts = _receipt(folder, shard)
        if receipts is not None:
            count, cursor = receipts
            stream = None
            shard += 1
            if count < shard_passages:
                return
            continue
        if stream is None:
            stream = read_passages(
                corpus,
                loaded.tokenizer,
                window_tokens=window,
                add_bos=True,
                start=cursor,
                first_id=shard * shard_passages,
            )
        found = list(islice(stream, shard_passages))
        if not found:
            return
        cursor = found[-1][1]
        yield shard, [passage for passage, _ in found], cursor
        shard += 1


def _receipt(folder: Path, shard: int) -> tuple[int, Cursor] | None:
    path = folder / f"{shard:06d}.json"
    if not path.is_file():
        return None
    content = read_json(path)
    return content["num_passages"], Cursor(*content["next_cursor"])


def _all_receipts(folder: Path) -> bool:
    return len(finished_shards(folder)) == int(read_json(folder / "complete.json")["num_shards"])


def _drop_altered(folder: Path, progress: Progress) -> None:
    """Delete the receipts of shards whose files are not what they say, so that they are built again."""
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            RowStore.verify_files(path, read_json(path))
        except CorruptArtifact:
            progress.note(f"building shard {int(path.stem)} again, its files are not what was written")
            path.unlink()


def _train_statistics(root: Path, rows: RowStore, layout: BlockLayout, progress: Progress) -> Autocorrelation:
    path = root / "statistics" / "train.safetensors"
    if (known := _load_statistics(path, rows.digest)) is not None:
        return known
    progress.start("statistics", 0, rows.num_passages)

    def batches() -> Iterator[torch.Tensor]:
        for first, batch in rows.batches(verify=True):
            yield batch
            progress.advance("statistics", first + len(batch), 0)

    found = autocorrelation(batches(), layout)
    _save_statistics(path, found, rows.digest)
    return found


def _task_examples(config: IndexConfig, loaded: LoadedModel, window: int) -> list[Example]:
    if config.mix.kind != "task":
        return []
    if config.task_queries is None:
        raise InvalidRequest("a task mix needs task queries; give them with --task-queries")
    queries = read_queries(config.task_queries)
    return [tokenize(query, loaded.tokenizer, add_bos=True, max_tokens=window) for query in queries]


def _task_statistics(root: Path, examples: Sequence[Example], encoder: Encoder) -> tuple[Autocorrelation, str]:
    """R_task and a digest of the queries it was made from."""
    digest = digest_of([[example.tokens.tolist(), example.first_target] for example in examples])
    path = root / "statistics" / f"task-{digest[:12]}.safetensors"
    if (known := _load_statistics(path, digest)) is not None:
        return known, digest
    batches = (encoder.encode(examples[start : start + 512]).rows_ND for start in range(0, len(examples), 512))
    found = autocorrelation(batches, encoder.layout)
    _save_statistics(path, found, digest)
    return found, digest


def _save_statistics(path: Path, found: Autocorrelation, digest: str) -> None:
    blocks = {f"{index:03d}": block for index, block in enumerate(found.blocks)}
    publish(path, safetensors.torch.save(blocks, {"of": digest}))
    publish_json(path.with_suffix(".json"), {"of": digest, "count": found.count})


def _load_statistics(path: Path, digest: str) -> Autocorrelation | None:
    note = path.with_suffix(".json")
    if not note.is_file() or (content := read_json(note))["of"] != digest:
        return None
    blocks = safetensors.torch.load_file(path)
    return Autocorrelation(blocks=tuple(block for _, block in sorted(blocks.items())), count=content["count"])

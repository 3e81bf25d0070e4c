"""The first step of a build: what rows are to be like, from checkpoint and corpus, fixed before any is made.

Publishes index.json, which later runs are compared with, and the optimizer correction. It holds the whole model, so on
a cluster it runs where models run.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.blobs import Location
from trackstar.codes import check_size
from trackstar.corpus import Corpus
from trackstar.encode import Example
from trackstar.engine import Report
from trackstar.errors import InvalidRequest, NotFound
from trackstar.estimate import estimate_moments
from trackstar.index import FORMAT, Correction, check_identity, fix_identity, save_correction
from trackstar.index_config import IndexConfig
from trackstar.model import LoadedModel
from trackstar.moments import load_moments
from trackstar.passages import Cursor, Passage, begin_token, read_passages
from trackstar.planner import propose_projection
from trackstar.projection import BlockLayout
from trackstar.row_shards import ROW_DTYPES, read_part
from trackstar.storage import read_json
from trackstar.workers import ModelLoader

_COUNTED_DOCUMENTS = 20_000


class PrepareWorker:
    """Prepares an index; the item is its folder, the answer what is worth telling."""

    def __init__(self, report: Report, *, load: ModelLoader) -> None:
        self._load, self._report = load, report

    def __call__(self, root: Location) -> list[str]:
        """Publishes what is missing.

        Raises:
            Incompatible: the folder holds an index of other things.
            TrackstarError: checkpoint, corpus or moments cannot be used.
        """
        config, notes = self._load.config, list[str]()
        loaded = self._load()
        known = _known(root)
        try:
            corpus = Corpus(config.corpus)
            fingerprint = corpus.fingerprint()
        except (NotFound, InvalidRequest):
            # What was read to its end need not be kept for ever.
            if known is None or read_part(root / "rows", 0) is None:
                raise
            fingerprint = known["corpus"]["fingerprint"]
            notes.append("the corpus that the index began with cannot be read any more; its rows are kept as they are")
        layout = _layout(config, loaded, None if known else corpus, known, notes)
        check_size(config.code.spec(layout.dim).size, layout.dim)
        window = min(config.window_tokens or loaded.max_tokens, loaded.max_tokens)
        identity = _identity(config, loaded, fingerprint, layout, window)
        check_identity(root, identity)
        path = root / "correction.safetensors"
        if not path.is_file():
            correction = _correction(config, loaded, corpus, window, self._report, notes)
            fix_identity(root, identity)
            save_correction(path, correction)
        fix_identity(root, identity)
        return notes


def default_shard_passages(dim: int, row_dtype: str) -> int:
    """Passages per shard so that its rows take about 128 MiB, a power of two between 64 and 16,384."""
    row_bytes = dim * ROW_DTYPES[row_dtype].itemsize
    return int(min(16384, max(64, 1 << ((1 << 27) // row_bytes).bit_length() - 1)))


def _known(root: Location) -> dict[str, Any] | None:
    """What index.json says already; None at first. Whether it is one is for `check_identity` to say."""
    try:
        found = read_json(root / "index.json")
    except NotFound:
        return None
    return found if isinstance(found, dict) and {"corpus", "projection", "blocks"} <= found.keys() else None


def _layout(
    config: IndexConfig, loaded: LoadedModel, corpus: Corpus | None, known: dict[str, Any] | None, notes: list[str]
) -> BlockLayout:
    wanted = config.projection
    if known is not None:
        return loaded.layout(
            layer_blocks=wanted.layer_blocks or known["projection"]["layer_blocks"],
            rows=wanted.rows or known["blocks"][0]["rows"],
            cols=wanted.cols or known["blocks"][0]["cols"],
        )
    assert corpus is not None
    if wanted.layer_blocks and wanted.rows and wanted.cols:
        return loaded.layout(layer_blocks=wanted.layer_blocks, rows=wanted.rows, cols=wanted.cols)
    # Beyond some size the corpus no longer limits the projection, so counting stops there.
    counted = sum(1 for _ in islice(corpus.documents(), _COUNTED_DOCUMENTS))
    layer_blocks, rows, cols, explanation = propose_projection(loaded.num_layers, loaded.num_parameters, counted)
    notes.append(explanation)
    return loaded.layout(
        layer_blocks=wanted.layer_blocks or layer_blocks, rows=wanted.rows or rows, cols=wanted.cols or cols
    )


def _identity(
    config: IndexConfig, loaded: LoadedModel, fingerprint: str, layout: BlockLayout, window: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": {
            "path": str(Path(config.model).resolve()),
            "digest": loaded.digest,
            "architecture": type(loaded.model).__name__,
            "parameters": loaded.num_parameters,
        },
        "corpus": {**config.corpus.model_dump(mode="json"), "fingerprint": fingerprint},
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
        # An index of the loss does not say so, as before there was a choice.
        **({} if config.objective == "loss" else {"objective": config.objective}),
    }


def _correction(
    config: IndexConfig,
    loaded: LoadedModel,
    corpus: Corpus,
    window: int,
    report: Report,
    notes: list[str],
) -> Correction:
    if config.moments.source == "estimate":
        sample = [Example(tokens=passage.tokens) for passage in _sample(loaded, corpus, window, config.moments.sample)]
        per_example = sum(len(example.tokens) for example in sample) / max(1, len(sample))
        told = 0

        def on_batch(done: int) -> None:
            nonlocal told
            report(round(per_example * (done - told)))
            told = done

        moments = estimate_moments(loaded, sample, max_batch_tokens=config.max_batch_tokens, on_batch=on_batch)
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
        notes.append(
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

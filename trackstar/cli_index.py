"""The command `trackstar index`: its options become an `IndexConfig`, which is built.

Contract: options override the YAML file of --config, or the settings of the index that is there if neither corpus nor
model nor a file is named; what is named nowhere keeps its default. Requests that could only
fail after hours of encoding, such as a task mix without queries, fail here at once.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from trackstar.console import print_summary
from trackstar.errors import InvalidRequest
from trackstar.progress import StepProgress

if TYPE_CHECKING:
    from trackstar.index_config import IndexConfig

_OUT = "Where it goes"
_MODEL = "Model and correction"
_PROJECTION = "Projection and whitening"
_CORPUS = "Corpus"
_WORK = "How the work is done"


def index(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders or URLs: JSONL, Parquet, Hugging Face dataset folders, text; .gz and .zst too."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder of the checkpoint.", rich_help_panel=_MODEL)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the index.", rich_help_panel=_OUT)] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options override it.")] = None,
    moments: Annotated[
        str | None,
        typer.Option(
            metavar="none|estimate|PATH",
            help="Optimizer correction V: a checkpoint folder with optimizer.pt, that file, or a safetensors file.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    moments_rank: Annotated[
        int | None, typer.Option(help="Terms of the separable fit of Adam's V.", rich_help_panel=_MODEL)
    ] = None,
    exact_moments: Annotated[
        bool,
        typer.Option("--exact-moments", help="Apply V to every per-example gradient: slow.", rich_help_panel=_MODEL),
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave modules of this pattern out; repeat.", rich_help_panel=_MODEL)
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.", rich_help_panel=_MODEL),
    ] = False,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="loss|margin|logit", help="What rows hold the gradient of; loss by default.", rich_help_panel=_MODEL
        ),
    ] = None,
    layer_blocks: Annotated[
        int | None, typer.Option(help="Groups of layers; proposed if left out.", rich_help_panel=_PROJECTION)
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Projected output side per block.", rich_help_panel=_PROJECTION)
    ] = None,
    cols: Annotated[
        int | None, typer.Option(help="Projected input side per block.", rich_help_panel=_PROJECTION)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the projection.", rich_help_panel=_PROJECTION)] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="train|task|none",
            help="What R is made of; task by default if --task-queries is given.",
            rich_help_panel=_PROJECTION,
        ),
    ] = None,
    task_queries: Annotated[
        str | None, typer.Option(help="JSONL of queries that R_task is made of.", rich_help_panel=_PROJECTION)
    ] = None,
    mix_weight: Annotated[
        str | None,
        typer.Option(metavar="FLOAT|crossing", help="Share lambda of R_task.", rich_help_panel=_PROJECTION),
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Damping, in mean eigenvalues.", rich_help_panel=_PROJECTION)
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(metavar="prefix|bits", help="Coarse code; bits are searched in memory.", rich_help_panel=_WORK),
    ] = None,
    code_size: Annotated[int | None, typer.Option(help="Floats or bits of the code.", rich_help_panel=_WORK)] = None,
    store: Annotated[
        str | None, typer.Option(metavar="milvus-lite|memory", help="Coarse index.", rich_help_panel=_WORK)
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of the text.", rich_help_panel=_CORPUS)] = None,
    id_field: Annotated[str | None, typer.Option(help="Field of the document's id.", rich_help_panel=_CORPUS)] = None,
    source_field: Annotated[str | None, typer.Option(help="Field of the source.", rich_help_panel=_CORPUS)] = None,
    metadata_field: Annotated[
        list[str] | None, typer.Option(help="Field to keep beside the text; repeat.", rich_help_panel=_CORPUS)
    ] = None,
    text_unit: Annotated[
        str | None,
        typer.Option(metavar="line|paragraph|file", help="A document of a text file.", rich_help_panel=_CORPUS),
    ] = None,
    append: Annotated[
        list[str] | None,
        typer.Option(help="Add what this holds to the index that is there; repeat.", rich_help_panel=_CORPUS),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count bad records and go on.", rich_help_panel=_CORPUS)
    ] = False,
    window: Annotated[
        int | None, typer.Option(help="Tokens per passage; the model's window by default.", rich_help_panel=_CORPUS)
    ] = None,
    row_dtype: Annotated[
        str | None, typer.Option(metavar="bfloat16|float32", help="Stored rows.", rich_help_panel=_WORK)
    ] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float64", help="Model and gradients.", rich_help_panel=_WORK)
    ] = None,
    shard_passages: Annotated[int | None, typer.Option(help="Passages per shard.", rich_help_panel=_WORK)] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens per batch.", rich_help_panel=_WORK)] = None,
    device: Annotated[
        str | None, typer.Option(help="A torch device, such as cpu or cuda.", rich_help_panel=_WORK)
    ] = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="With --append: make R of all passages anew.", rich_help_panel=_PROJECTION),
    ] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Leave deleted documents out for good.", rich_help_panel=_CORPUS)
    ] = False,
    min_recall: Annotated[
        float | None,
        typer.Option(
            help="Share of the exact best that the cascade must find before it answers.", rich_help_panel=_WORK
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check finished shards and build altered ones again.", rich_help_panel=_OUT)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Describe the index as JSON.", rich_help_panel=_OUT)] = False,
) -> None:
    """Build an index from a corpus and a checkpoint, or build on one; the same command continues where one stopped."""
    from trackstar.index_config import read_config
    from trackstar.index_settings import settings_of

    settings = {
        "corpus.paths": corpus,
        "corpus.text_field": text_field,
        "corpus.id_field": id_field,
        "corpus.source_field": source_field,
        "corpus.metadata_fields": metadata_field,
        "corpus.text_unit": text_unit,
        "corpus.skip_bad": skip_bad or None,
        "model": model,
        "moments.source": moments,
        "moments.rank": moments_rank,
        "moments.exact": exact_moments or None,
        "exclude": exclude,
        "objective": objective,
        "trust_remote_code": trust_remote_code or None,
        "projection.layer_blocks": layer_blocks,
        "projection.rows": rows,
        "projection.cols": cols,
        "projection.seed": seed,
        "mix.kind": mix,
        "mix.weight": mix_weight,
        "mix.damping": damping,
        "task_queries": task_queries,
        "code.kind": code,
        "code.size": code_size,
        "code.store": store,
        "window_tokens": window,
        "row_dtype": row_dtype,
        "compute_dtype": compute_dtype,
        "shard_passages": shard_passages,
        "max_batch_tokens": batch_tokens,
        "device": device,
        "refit": refit or None,
        "purge": purge or None,
        "audit.min_recall": min_recall,
    }
    if out is None:
        raise InvalidRequest("say where the index is to be built with --out DIR")
    base = read_config(config) if config is not None else {}
    if config is None and corpus is None and model is None and (out / "index.json").is_file():
        # What is there is built on.
        base = settings_of(out)
    found = _index_config(base, settings)
    if append:
        known = {path for part in found.corpora for path in part.paths}
        new = [found.corpus_like(path) for path in append if path not in known]
        found = found.model_copy(update={"append": (*found.append, *new)})
    _index(found, out, verify=verify, as_json=as_json)


def _index_config(content: dict[str, Any], settings: dict[str, Any]) -> IndexConfig:
    """The settings of a file or index, overridden by the options that were given."""
    from trackstar.index_config import make_config
    from trackstar.queries import read_queries

    for place, value in settings.items():
        if value is None or value == []:
            continue
        *groups, name = place.split(".")
        inner = content
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise InvalidRequest(f"the config's {group} must be a mapping of settings")
        inner[name] = value
    for place, option in (("corpus", "CORPUS"), ("model", "--model DIR")):
        if place not in content:
            raise InvalidRequest(f"nothing says which {place} to index; give {option}")
    if content.get("task_queries") is not None and "kind" not in content.get("mix", {}):
        content.setdefault("mix", {})["kind"] = "task"
    if content.get("code", {}).get("kind") == "bits" and "store" not in content["code"]:
        content["code"]["store"] = "memory"
    config = make_config(content)
    if config.mix.kind == "task" and config.task_queries is None:
        raise InvalidRequest("a task mix needs the task's queries; give --task-queries FILE.jsonl or another --mix")
    if config.task_queries is not None:
        read_queries(config.task_queries)  # a bad line shall not wait until all rows are encoded
    return config


def _index(config: IndexConfig, out: Path, *, verify: bool, as_json: bool) -> None:
    from trackstar.build import build_index
    from trackstar.describe import describe_index

    quieten()
    with StepProgress(Console(stderr=True)) as progress:
        build_index(config, out, progress=progress, verify=verify).close()
    facts = describe_index(out)
    if as_json:
        print_json(facts)
        return
    print_summary(Console(), facts)
    print(f"\nNow ask it:  trackstar trace --index {shlex.quote(str(out))} --prompt 'The capital of France is'")


def print_json(content: Any) -> None:
    """Content as indented JSON on standard output."""
    print(json.dumps(content, ensure_ascii=False, indent=2))


def quieten() -> None:
    """Keep progress bars and advice of transformers from between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

"""`trackstar audit`: compares a generation's cascade with the exact scan, and keeps what was found beside it.

Contract: as `cli`. It ends with exit code 4 and the reasons if the audit failed; what was found is printed and kept
either way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from trackstar.cli_index import print_json, quieten
from trackstar.console import print_audit
from trackstar.errors import CorruptArtifact, InvalidRequest, NotReady
from trackstar.progress import StepProgress

if TYPE_CHECKING:
    from torch import Tensor

    from trackstar.audit import AuditConfig
    from trackstar.coarse import CoarseIndex
    from trackstar.generation import Generation
    from trackstar.index import Index

AuditedGeneration = Annotated[
    str | None, typer.Option(help="Another generation than the active one, or than the only one.")
]
Sample = Annotated[int | None, typer.Option(min=1, help="Passages to ask, without --queries.")]
NumBest = Annotated[int | None, typer.Option(min=1, help="Passages per ranking.")]
Candidates = Annotated[int | None, typer.Option(min=1, help="Candidates of a coarse search, as served with.")]
MinRecall = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of the exact best that must be found.")]


def audit(
    index: Annotated[str, typer.Argument(help="Folder or URL of the index.")],
    generation: AuditedGeneration = None,
    queries: Annotated[Path | None, typer.Option(help="JSONL file of queries to ask, instead of passages.")] = None,
    sample: Sample = None,
    k: NumBest = None,
    candidates: Candidates = None,
    min_recall: MinRecall = None,
    codes: Annotated[int | None, typer.Option(min=1, help="Passages whose code is computed again.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the samples.")] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint's folder, if it has moved.")] = None,
    device: Annotated[str, typer.Option(help="A torch device for the model of --queries.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Audit a generation: recall against the exact scan, codes against their rows, counts."""
    if queries is None and (model is not None or device != "cpu"):
        raise InvalidRequest("--model and --device belong to --queries; without queries no model is needed")
    if queries is not None and sample is not None:
        raise InvalidRequest("give either --queries, or --sample passages to ask")
    from trackstar.index import Index

    config = audit_config(queries=sample, k=k, candidates=candidates, min_recall=min_recall, codes=codes, seed=seed)
    opened = Index(index)
    audit_and_keep(
        opened,
        generation or the_generation(opened, opened.catalog.pointer()),
        config,
        query_rows=None if queries is None else _encoded(opened, queries, model, device),
        as_json=as_json,
    )


def audit_config(**wanted: Any) -> AuditConfig:
    """Settings of an audit; None leaves one as it is."""
    from trackstar.audit import make_audit_config

    return make_audit_config({name: value for name, value in wanted.items() if value is not None})


def audit_and_keep(
    opened: Index,
    name: str,
    config: AuditConfig,
    *,
    query_rows: Tensor | None = None,
    elsewhere: Callable[[Generation], tuple[CoarseIndex, str]] | None = None,
    as_json: bool = False,
) -> None:
    """Audit a generation in this process, show what was found and keep it beside the generation.

    Args:
        opened: the index.
        name: the generation.
        config: what is audited.
        query_rows: as of `audit_generation`.
        elsewhere: opens the coarse index and says what it is called, where it is not in the index folder.
        as_json: print JSON.

    Raises:
        TrackstarError: the audit failed, or could not be made.
    """
    from trackstar.audit import audit_generation
    from trackstar.audit_record import check_audited, publish_audit, withdraw_audit
    from trackstar.code_store import CodeStore

    home = opened.catalog.home(name)
    with contextlib.ExitStack() as held:
        progress = held.enter_context(StepProgress(Console(stderr=True)))
        rows = opened.rows(name)
        held.callback(rows.close)
        try:
            chosen = opened.generation(name, rows=rows, searched=elsewhere is None)
            held.callback(chosen.close)
            coarse, coarse_name = (chosen.coarse, str(chosen.code.store)) if elsewhere is None else elsewhere(chosen)
            if elsewhere is not None:
                held.callback(coarse.close)
            found = audit_generation(
                chosen,
                rows,
                coarse,
                config,
                codes=CodeStore.open(opened.catalog, name),
                coarse_name=coarse_name,
                query_rows=query_rows,
                on_step=progress.at,
            )
        except CorruptArtifact:
            withdraw_audit(home)
            raise
    publish_audit(home, found)
    if as_json:
        print_json(found.to_dict())
    else:
        print_audit(Console(), found)
    check_audited(home)


def the_generation(index: Index, name: str | None) -> str:
    """The active generation, which is `name`, or the only finished one while none is active."""
    finished = index.catalog.finished()
    if name is not None:
        return name
    if not finished:
        raise NotReady(f"{str(index.root)!r} has no finished generation yet; give the index command again")
    if len(finished) > 1:
        raise InvalidRequest(f"no generation is active; give --generation, one of {', '.join(finished)}")
    return finished[0]


def _encoded(index: Index, path: Path, model: str | None, device: str) -> Tensor:
    """Rows float32 [Q, d] of the queries in a file."""
    from trackstar.encode import QUERY_LENGTH_STEP
    from trackstar.queries import read_queries, tokenize

    asked = read_queries(path)
    quieten()
    loaded = index.load_model(model, device=device)
    add_bos = index.facts["add_bos"]
    examples = [tokenize(query, loaded.tokenizer, add_bos=add_bos, max_tokens=loaded.max_tokens) for query in asked]
    with contextlib.closing(index.encoder(loaded, length_step=QUERY_LENGTH_STEP)) as encoder:
        return encoder.encode(examples).rows_ND.float().cpu()

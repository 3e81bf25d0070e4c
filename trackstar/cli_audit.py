"""`trackstar audit`: compares a generation's cascade with the exact scan, and keeps what was found beside it.

Contract: as `cli`. It ends with exit code 4 and the reasons if the audit failed; what was found is printed and kept
either way.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trackstar.cli_index import print_json, quieten
from trackstar.console import print_audit
from trackstar.errors import CorruptArtifact, InvalidRequest, NotReady
from trackstar.progress import StepProgress

if TYPE_CHECKING:
    from torch import Tensor

    from trackstar.index import Index


def audit(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    generation: Annotated[
        str | None, typer.Option(help="Another generation than the active one, or than the only one.")
    ] = None,
    queries: Annotated[Path | None, typer.Option(help="JSONL file of queries to ask, instead of passages.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Passages to ask, without --queries.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Passages per ranking.")] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Candidates of a coarse search, as served with.")
    ] = None,
    min_recall: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the exact best that must be found.")
    ] = None,
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
    from trackstar.audit import audit_generation, make_audit_config
    from trackstar.audit_record import check_audited, publish_audit, withdraw_audit
    from trackstar.code_store import CodeStore
    from trackstar.index import Index

    wanted = {"queries": sample, "k": k, "candidates": candidates, "min_recall": min_recall, "codes": codes}
    config = make_audit_config({name: value for name, value in {**wanted, "seed": seed}.items() if value is not None})
    opened = Index(str(index))
    name = generation or _the_generation(opened)
    home = opened.catalog.home(name)
    query_rows = None if queries is None else _encoded(opened, queries, model, device)
    with contextlib.ExitStack() as held:
        progress = held.enter_context(StepProgress(Console(stderr=True)))
        rows = opened.rows(name)
        held.callback(rows.close)
        try:
            chosen = opened.generation(name, rows=rows)
            held.callback(chosen.close)
            found = audit_generation(
                chosen,
                rows,
                chosen.coarse,
                config,
                codes=CodeStore.open(opened.catalog, name),
                coarse_name=chosen.code.store,
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


def _the_generation(index: Index) -> str:
    """The active generation, or the only finished one while none is active."""
    name, finished = index.catalog.pointer(), index.catalog.finished()
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

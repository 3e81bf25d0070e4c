"""`trackstar scan`: exact answers for a whole evaluation set, every row read once for all queries.

Contract: as `cli`. Records are those of `trackstar trace --queries --exact`, which reads all rows once for every 64
queries. Where its answers are asked for in a file, the file appears when the first scan is over.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trackstar.cli_index import quieten
from trackstar.cli_trace import written
from trackstar.progress import StepProgress
from trackstar.records import release_record


def scan(
    index: Annotated[str, typer.Argument(help="Folder of the index.")],
    queries: Annotated[Path, typer.Option(help="JSONL file of queries.")],
    out: Annotated[Path | None, typer.Option(help="Write the records to this JSONL file.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Passages per ranking.")] = 10,
    opponents: Annotated[bool, typer.Option("--opponents/--no-opponents", help="Rank opponents too.")] = True,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Queries that go through one scan; as many as take 4 GiB if left out.")
    ] = None,
    generation: Annotated[str | None, typer.Option(help="Another generation than the active one.")] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint's folder, if it has moved.")] = None,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda.")] = "cpu",
    prompt_field: Annotated[str | None, typer.Option(help="Field of the prompt in --queries.")] = None,
    target_field: Annotated[str | None, typer.Option(help="Field of the target in --queries.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Scan for the first queries only.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
) -> None:
    """Answer a file of queries exactly, reading every row once for all of them."""
    from trackstar.queries import read_queries

    asked = read_queries(queries, prompt_field=prompt_field, target_field=target_field, limit=limit)
    from trackstar.index import Index
    from trackstar.tracer import Tracer, scan_batch

    quieten()
    opened = Index(index)
    name = generation or opened.active()
    opened.catalog.home(name)  # a generation that is not there shows before the model is loaded
    loaded = opened.load_model(model, device=device, trust_remote_code=trust_remote_code)
    console, steps = Console(stderr=True), {"encoding": "queries"}
    with contextlib.ExitStack() as held:
        tracer = held.enter_context(contextlib.closing(Tracer(opened, loaded, generation=name, searched=False)))
        progress = held.enter_context(StepProgress(console))
        found = tracer.trace_many(
            asked,
            k=k,
            candidates=k,
            opponents=opponents,
            exact=True,
            batch=batch or scan_batch(tracer.rows.dim),
            on_step=lambda step, done, total: progress.at(step, done, total, unit=steps.get(step, "passages")),
        )
        stream = None
        for trace in found:
            # Opened with the first answer, so that a failure before it leaves an older file alone.
            stream = stream or held.enter_context(written(out))
            print(json.dumps(release_record(trace, query_set=queries.stem), ensure_ascii=False), file=stream)
    if out is not None:
        console.print(f"{len(asked):,} records in {out}", highlight=False)

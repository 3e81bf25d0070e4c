"""`trackstar trace`: one prompt as a table or JSON, or a file of queries as records; from an index or from a gateway.

Contract: as `cli`. Both ways print the same.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from trackstar.cli_index import print_json, quieten
from trackstar.cli_remote import Address, Gateway, Timeout, TlsCa, TokenFile, UseTls, trace_many, trace_one
from trackstar.console import print_trace
from trackstar.errors import InvalidRequest
from trackstar.progress import StepProgress
from trackstar.records import release_record, to_dict

if TYPE_CHECKING:
    from trackstar.client_types import TraceOptions
    from trackstar.results import Trace
    from trackstar.tracer import Tracer


def trace(
    index: Annotated[str | None, typer.Option(help="Folder of the index.")] = None,
    address: Address = None,
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    target: Annotated[str | None, typer.Option(help="What it said; the model's own continuation if left out.")] = None,
    queries: Annotated[Path | None, typer.Option(help="JSONL file of queries instead.")] = None,
    k: Annotated[int, typer.Option(help="Passages per ranking.")] = 10,
    candidates: Annotated[int, typer.Option(help="Passages the coarse search proposes for each ranking.")] = 1000,
    exact: Annotated[bool, typer.Option("--exact", help="Score every passage.")] = False,
    no_opponents: Annotated[bool, typer.Option("--no-opponents", help="Rank proponents only.")] = False,
    no_evidence: Annotated[bool, typer.Option("--no-evidence", help="Leave token contributions out.")] = False,
    model: Annotated[str | None, typer.Option(help="The checkpoint's folder, if it has moved.")] = None,
    generation: Annotated[str | None, typer.Option(help="Another generation than the active one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the records of --queries to this JSONL file.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="Field of the prompt in --queries.")] = None,
    target_field: Annotated[str | None, typer.Option(help="Field of the target in --queries.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Trace only the first queries.")] = None,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls: UseTls = False,
    timeout: Timeout = 60.0,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Queries that a gateway is asked at once.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer a prompt as JSON; --queries always gives JSON lines.")
    ] = False,
) -> None:
    """Show the passages that pushed the model towards a target, and those that pushed it away."""
    if (index is None) == (address is None):
        raise InvalidRequest("give either --index DIR, or --address HOST:PORT of a gateway")
    if address is not None and (model is not None or device != "cpu" or trust_remote_code):
        raise InvalidRequest("--model, --device and --trust-remote-code belong to --index; a gateway has its own model")
    if (prompt is None) == (queries is None):
        raise InvalidRequest("give either --prompt (and --target), or --queries FILE.jsonl")
    if queries is not None and target is not None:
        raise InvalidRequest("--target belongs to --prompt; the targets of --queries stand in its file")
    if queries is None and output is not None:
        raise InvalidRequest("--output belongs to --queries; for one prompt, redirect what --json prints")
    if k < 1 or candidates < k:
        raise InvalidRequest(f"--k must be at least 1 and --candidates at least --k; they are {k} and {candidates}")
    from trackstar.queries import read_queries

    asked = None
    if queries is not None:
        asked = read_queries(queries, prompt_field=prompt_field, target_field=target_field, limit=limit)
    query_set = "" if queries is None else queries.stem
    if address is not None:
        gateway = Gateway(address=address, token_file=token_file, tls_ca=tls_ca, tls=tls, timeout_seconds=timeout)
        remote: TraceOptions = {
            "k": k,
            "candidates": candidates,
            "exactness": "exhaustive" if exact else "auto",
            "ends": "proponents" if no_opponents else "both",
            "generation": generation or "",
            # As with an index: many queries are answered without evidence.
            "complete": asked is None,
            "evidence": () if no_evidence or asked is not None else ("tokens", "blocks", "overlap"),
        }
        if asked is not None:
            found = trace_many(gateway, asked, remote, concurrency=concurrency)
            _write_records(found, len(asked), query_set, output)
            return
        assert prompt is not None
        answer, prediction = trace_one(gateway, prompt, target, remote)
        if target is None:
            _say_own(prediction)
        _show(answer, prediction, as_json=as_json)
        return
    assert index is not None
    from trackstar.index import Index
    from trackstar.tracer import Tracer

    quieten()
    opened = Index(index)
    opened.generation(generation).close()  # what is missing or damaged shows before the model is loaded
    loaded = opened.load_model(model, device=device, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"k": k, "candidates": candidates, "exact": exact, "opponents": not no_opponents}
    with contextlib.closing(Tracer(opened, loaded, generation=generation)) as tracer:
        if asked is not None:
            _write_records(tracer.trace_many(asked, **options), len(asked), query_set, output)
        else:
            assert prompt is not None
            _trace_one(tracer, prompt, target, evidence=not no_evidence, options=options, as_json=as_json)


def _trace_one(
    tracer: Tracer, prompt: str, target: str | None, *, evidence: bool, options: dict[str, Any], as_json: bool
) -> None:
    if target is not None and not target.strip():
        raise InvalidRequest("the target is empty; say which words are to be explained, or leave --target out")
    from trackstar.results import Query

    prediction = tracer.predict(prompt)
    if target is None and not prediction:
        raise InvalidRequest(f"the model says nothing after {prompt!r}; give a --target to explain")
    query = Query(query_id="command line", prompt=prompt, target=prediction if target is None else target)
    if target is None:
        _say_own(prediction)
    found = tracer.trace(query, evidence=evidence, **options)
    _show(found, prediction, as_json=as_json)


def _say_own(prediction: str) -> None:
    print(f"no --target: explaining the model's own continuation, {prediction!r}", file=sys.stderr)


def _show(found: Trace, prediction: str, *, as_json: bool) -> None:
    if as_json:
        print_json({**to_dict(found), "prediction": prediction})
    else:
        print_trace(Console(), found, prediction=prediction)


def _write_records(found: Iterator[Trace], num_queries: int, query_set: str, output: Path | None) -> None:
    console = Console(stderr=True)
    with contextlib.ExitStack() as held:
        progress = held.enter_context(StepProgress(console, unit="queries"))
        progress.start("tracing", 0, num_queries)
        stream = None
        for number, trace in enumerate(found, start=1):
            if stream is None:
                # Opened with the first answer, so that a failure before it leaves an older file alone.
                stream = held.enter_context(written(output))
            print(json.dumps(release_record(trace, query_set=query_set), ensure_ascii=False), file=stream)
            progress.advance("tracing", number, 0)
    if output is not None:
        console.print(f"{num_queries:,} records in {output}", highlight=False)


@contextlib.contextmanager
def written(path: Path | None) -> Iterator[Any]:
    """The file, or standard output for None."""
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as stream:
            yield stream

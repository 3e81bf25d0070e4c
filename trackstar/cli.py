"""The command line: `trackstar index`, `trace`, `plan` and `show`.

Contract: answers go to standard output, as tables or with --json as JSON; progress, notes and errors go to standard
error. How commands end, and with which exit code, is told in `exits`.

It computes nothing: options become an `IndexConfig` or a `Query`, answers become tables (`console`) or records
(`records`). What is heavy to import is imported inside the commands, so that help and `plan` are quick and need no
torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from trackstar.cli_index import index, print_json, quieten
from trackstar.console import print_generations, print_plan, print_summary, print_trace
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.exits import Debug, run
from trackstar.progress import StepProgress

if TYPE_CHECKING:
    from trackstar.results import Query
    from trackstar.tracer import Tracer

app = typer.Typer(
    name="trackstar",
    help="Finds the pretraining passages that made a language model say something.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command()(index)

_DEBUG = Debug()
# The paper's largest model, assumed where a plan is asked for without one.
_ASSUMED_LAYERS, _ASSUMED_PARAMETERS = 32, 8_000_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process by default) and return its exit code."""
    # OpenMP's threads spin while they wait, which on a machine with other work to do costs more than the work itself:
    # an eigendecomposition of 1,024 dimensions took 17 s instead of 0.5 s. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return run(app, _DEBUG, arguments)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    _DEBUG.wanted = debug
    if show_version:
        try:
            print(version("trackstar"))
        except PackageNotFoundError:
            print("not installed, run from its source")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command()
def trace(
    index: Annotated[str, typer.Option(help="Folder of the index.")],
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer a prompt as JSON; --queries always gives JSON lines.")
    ] = False,
) -> None:
    """Show the passages that pushed the model towards a target, and those that pushed it away."""
    if (prompt is None) == (queries is None):
        raise InvalidRequest("give either --prompt (and --target), or --queries FILE.jsonl")
    if queries is not None and target is not None:
        raise InvalidRequest("--target belongs to --prompt; the targets of --queries stand in its file")
    if queries is None and output is not None:
        raise InvalidRequest("--output belongs to --queries; for one prompt, redirect what --json prints")
    if k < 1 or candidates < k:
        raise InvalidRequest(f"--k must be at least 1 and --candidates at least --k; they are {k} and {candidates}")
    from trackstar.index import Index
    from trackstar.queries import read_queries
    from trackstar.results import Query
    from trackstar.tracer import Tracer

    quieten()
    asked = None
    if queries is not None:
        asked = read_queries(queries, prompt_field=prompt_field, target_field=target_field, limit=limit)
    opened = Index(index)
    opened.generation(generation).close()  # what is missing or damaged shows before the model is loaded
    loaded = opened.load_model(model, device=device, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"k": k, "candidates": candidates, "exact": exact, "opponents": not no_opponents}
    with contextlib.closing(Tracer(opened, loaded, generation=generation)) as tracer:
        if asked is not None:
            assert queries is not None
            _trace_file(tracer, asked, queries.stem, output, options)
        else:
            assert prompt is not None
            query = Query(query_id="command line", prompt=prompt, target=target or "")
            _trace_one(
                tracer, query, explain_own=target is None, evidence=not no_evidence, options=options, as_json=as_json
            )


def _trace_one(
    tracer: Tracer, query: Query, *, explain_own: bool, evidence: bool, options: dict[str, Any], as_json: bool
) -> None:
    from dataclasses import replace

    from trackstar.records import to_dict

    if not explain_own and not query.target.strip():
        raise InvalidRequest("the target is empty; say which words are to be explained, or leave --target out")
    prediction = tracer.predict(query.prompt)
    if explain_own:
        if not prediction:
            raise InvalidRequest(f"the model says nothing after {query.prompt!r}; give a --target to explain")
        query = replace(query, target=prediction)
        print(f"no --target: explaining the model's own continuation, {prediction!r}", file=sys.stderr)
    found = tracer.trace(query, evidence=evidence, **options)
    if as_json:
        print_json({**to_dict(found), "prediction": prediction})
    else:
        print_trace(Console(), found, prediction=prediction)


def _trace_file(
    tracer: Tracer, queries: Sequence[Query], query_set: str, output: Path | None, options: dict[str, Any]
) -> None:
    from trackstar.records import release_record

    console = Console(stderr=True)
    with contextlib.ExitStack() as held:
        progress = held.enter_context(StepProgress(console, unit="queries"))
        progress.start("tracing", 0, len(queries))
        stream = None
        for number, found in enumerate(tracer.trace_many(queries, **options), start=1):
            if stream is None:
                # Opened with the first answer, so that a failure before it leaves an older file alone.
                stream = held.enter_context(_written(output))
            print(json.dumps(release_record(found, query_set=query_set), ensure_ascii=False), file=stream)
            progress.advance("tracing", number, 0)
    if output is not None:
        console.print(f"{len(queries):,} records in {output}", highlight=False)


@contextlib.contextmanager
def _written(path: Path | None) -> Iterator[Any]:
    """The file, or standard output for None."""
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as stream:
            yield stream


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="Folder of an index, finished or not.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its digest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Show what an index holds and what it was built from."""
    from trackstar.describe import damaged_files, describe_index

    facts = describe_index(directory)
    if as_json:
        print_json(facts)
    else:
        console = Console()
        print_summary(console, facts)
        print_generations(console, facts)
    if verify and (damaged := damaged_files(directory)):
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise CorruptArtifact(f"{damaged[0]}{more}; give the index command again with --verify to build it anew")
    if verify and not as_json:
        print("\nevery file is what was written", file=sys.stderr)


@app.command()
def plan(
    passages: Annotated[int, typer.Option(min=1, help="Passages of the corpus.")],
    model: Annotated[str | None, typer.Option(help="Folder of the checkpoint; only its headers are read.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the model, instead of --model.")] = None,
    params: Annotated[float | None, typer.Option(min=1, help="Parameters of the model, such as 8e9.")] = None,
    tokens_per_passage: Annotated[float, typer.Option(min=1, help="Mean length of a passage.")] = 128.0,
    score: Annotated[float, typer.Option(help="Cosine of the passages that must be found.")] = 0.05,
    recall: Annotated[float, typer.Option(help="Probability with which the coarse search must find them.")] = 0.95,
    code: Annotated[
        str | None, typer.Option(metavar="prefix|bits", help="Consider one kind of code; Milvus Lite holds prefixes.")
    ] = None,
    flops: Annotated[float, typer.Option(min=1, help="FLOP/s that one device keeps up.")] = 1e14,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Plan an index: projection, coarse code, disk, memory and compute, each number with its formula."""
    from dataclasses import asdict

    from trackstar import planner
    from trackstar.model_size import model_size

    if code not in (None, "prefix", "bits"):
        raise InvalidRequest(f"--code is prefix or bits, not {code!r}")
    if model is not None and (layers is not None or params is not None):
        raise InvalidRequest("give either --model, or --layers and --params")
    if (layers is None) != (params is None):
        raise InvalidRequest("--layers and --params belong together; give both, or --model")
    num_layers, num_parameters = (layers, int(params)) if layers and params else (_ASSUMED_LAYERS, _ASSUMED_PARAMETERS)
    if model is not None:
        num_layers, num_parameters = model_size(model)
    proposal = planner.propose_projection(num_layers, num_parameters, passages)
    block_dims = [proposal.rows * proposal.cols] * (2 * proposal.num_layer_blocks)
    kinds: Any = ("bits", "prefix") if code is None else (code,)
    dim = sum(block_dims)
    chosen = planner.plan(passages, dim, score, recall_target=recall, kinds=kinds)
    costs = planner.costs(
        chosen,
        num_passages=passages,
        tokens_per_passage=tokens_per_passage,
        block_dims=block_dims,
        num_parameters=num_parameters,
        sustained_flops=flops,
    )
    content = {
        "passages": passages,
        "tokens_per_passage": tokens_per_passage,
        "model": {
            "layers": num_layers,
            "parameters": num_parameters,
            "assumed": model is None and layers is None,
        },
        "projection": {**proposal._asdict(), "dim": dim},
        "target": {"score": score, "recall": recall},
        "code": asdict(chosen),
        "options": [asdict(item) for item in planner.options(passages, dim, score, recall_target=recall, kinds=kinds)],
        "costs": [asdict(item) for item in costs],
    }
    if as_json:
        print_json(content)
    else:
        print_plan(Console(), content)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `trackstar index`, `trace`, `scan`, `audit`, `generations`, `jobs`, `plan` and `show`.

Contract: answers go to standard output, as tables or with --json as JSON; progress, notes and errors go to standard
error. How commands end, and with which exit code, is told in `exits`.

It computes nothing: options become an `IndexConfig` or a `Query`, answers become tables (`console`) or records
(`records`). What is heavy to import is imported inside the commands, so that help and `plan` are quick and need no
torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trackstar.cli_audit import audit
from trackstar.cli_index import index, print_json
from trackstar.cli_jobs import jobs
from trackstar.cli_remote import generations
from trackstar.cli_scan import scan
from trackstar.cli_trace import trace
from trackstar.console import print_generations, print_plan, print_summary
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.exits import Debug, run

app = typer.Typer(
    name="trackstar",
    help="Finds the pretraining passages that made a language model say something.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command()(index)
app.command()(trace)
app.command()(scan)
app.command()(audit)
app.command()(generations)
app.add_typer(jobs, name="jobs")
# What other packages add, such as the services' `serve`; they keep their own imports light.
for _point in sorted(entry_points(group="trackstar.commands"), key=lambda point: point.name):
    app.command(_point.name)(_point.load())

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

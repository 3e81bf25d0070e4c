"""The command line: `trackstar index`, `trace`, `scan`, `audit`, `generations`, `jobs`, `eval`, `plan` and `show`.

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
from typing import Annotated

import typer
from rich.console import Console

from trackstar.cli_audit import audit
from trackstar.cli_eval import evaluation
from trackstar.cli_generations import activate, collect, delete, retire
from trackstar.cli_index import index, print_json
from trackstar.cli_jobs import jobs
from trackstar.cli_plan import plan
from trackstar.cli_remote import generations
from trackstar.cli_scan import scan
from trackstar.cli_trace import trace
from trackstar.console import print_generations, print_summary
from trackstar.errors import CorruptArtifact
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
for _command in (activate, delete, retire, collect):
    app.command()(_command)
app.command()(plan)
app.add_typer(jobs, name="jobs")
app.add_typer(evaluation, name="eval")
# What other packages add, such as the services' `serve`; they keep their own imports light.
for _point in sorted(entry_points(group="trackstar.commands"), key=lambda point: point.name):
    app.command(_point.name)(_point.load())

_DEBUG = Debug()


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


if __name__ == "__main__":
    sys.exit(main())

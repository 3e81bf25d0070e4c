"""`trackstar eval`: which method finds the passages that state a fact, on facts and sentences in the release's format.

Contract: as `cli`. Every subcommand takes a YAML file of settings and writes its files into --out; what is finished
there is used again by the same command.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trackstar.cli_index import print_json, quieten
from trackstar.errors import InvalidRequest
from trackstar.progress import StepProgress

if TYPE_CHECKING:
    from trackstar.evaluation.method import OnStep

evaluation = typer.Typer(help="Compare methods on the same queries.", no_args_is_help=True)

_UNITS = {
    "encoding": "queries",
    "predicting": "queries",
    "judging": "pairs",
    "reading targets": "targets",
    "tail-patching": "passages",
    "training": "steps",
    "retraining": "runs",
}

_Config = Annotated[Path, typer.Argument(help="YAML file of settings; see docs/evaluation.md.")]
_Out = Annotated[Path, typer.Option(help="Folder for results, tables, plots and retrievals.")]
_Queries = Annotated[int | None, typer.Option(min=1, help="Evaluate so many queries instead.")]
_Seed = Annotated[int | None, typer.Option(min=0, help="Draw queries and resamples by another seed.")]
_Json = Annotated[bool, typer.Option("--json", help="Answer with the content of results.json.")]


@evaluation.command()
def facts(
    config: _Config,
    out: _Out,
    queries: _Queries = None,
    seed: _Seed = None,
    as_json: _Json = False,
) -> None:
    """Rank every sentence for every fact by every method, and measure which rankings find the gold sentences."""
    from trackstar.evaluation.config import FactsConfig, make_config

    settings = make_config(FactsConfig, _content(config, queries=queries, seed=seed))
    from trackstar.evaluation.run import evaluate_facts

    results = _run(lambda on_step: evaluate_facts(settings, out, on_step=on_step))
    _answer(results, out, _show, "results, tables, plots and retrievals", as_json=as_json)


@evaluation.command(name="tail-patch")
def tail_patch(
    config: _Config,
    out: _Out,
    as_json: _Json = False,
) -> None:
    """Measure how much the passages of lists from files move the model, one training step on each."""
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.patch_settings import TailPatchConfig

    settings = make_config(TailPatchConfig, _content(config))
    from trackstar.evaluation.tail_patch_run import evaluate_tail_patch

    results = _run(lambda on_step: evaluate_tail_patch(settings, out, on_step=on_step))
    _answer(results, out, _show_patches, "results, tables, plots and retrievals", as_json=as_json)


@evaluation.command()
def fusion(
    config: _Config,
    out: Annotated[Path, typer.Option(help="Folder for results, tables, plots and the list.")],
    as_json: _Json = False,
) -> None:
    """Look for one list that states facts as a lexical method does and moves the model as influence does."""
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.fusion_settings import FusionConfig

    settings = make_config(FusionConfig, _content(config))
    from trackstar.evaluation.fusion_run import evaluate_fusion

    results = _run(lambda on_step: evaluate_fusion(settings, out, on_step=on_step))
    _answer(results, out, _show_verdict, "results, tables, plots and the list", as_json=as_json)


def _show_verdict(console: Console, results: dict[str, Any]) -> None:
    from trackstar.evaluation.fusion_report import verdict

    console.print(verdict(results), highlight=False)


def _show_patches(console: Console, results: dict[str, Any]) -> None:
    section = results["tail_patch"]
    deepest = section["depths"][-1]
    table = Table(title=f"tail-patch@{deepest}, percentage points", show_edge=False)
    table.add_column("method")
    for step in section["steps"]:
        table.add_column(step["name"], justify="right")
    for item in section["methods"]:
        found = [part["overall"][f"probability_at_{deepest}"] for part in item["steps"]]
        table.add_row(
            item["name"],
            *(f"{100 * one['mean']:+.3f} ({100 * one['low']:+.3f} to {100 * one['high']:+.3f})" for one in found),
        )
    console.print(table)


@evaluation.command("open")
def open_set(
    config: _Config,
    out: _Out,
    queries: _Queries = None,
    seed: _Seed = None,
    as_json: _Json = False,
) -> None:
    """Rank a corpus without annotated facts by every method, and judge the first proponents by entailment."""
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.open_config import OpenConfig

    settings = make_config(OpenConfig, _content(config, queries=queries, seed=seed))
    from trackstar.evaluation.open_set import evaluate_open

    results = _run(lambda on_step: evaluate_open(settings, out, on_step=on_step))
    _answer(results, out, _show, "results, tables and plots", as_json=as_json)


@evaluation.command()
def categories(config: _Config, out: _Out, as_json: _Json = False) -> None:
    """Part the first proponents of retrieval files: entails the fact, names both entities, one, or neither."""
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.open_config import CategoriesConfig

    settings = make_config(CategoriesConfig, _content(config))
    from trackstar.evaluation.categories_run import evaluate_categories

    results = _run(lambda on_step: evaluate_categories(settings, out, on_step=on_step))
    _answer(results, out, _show_categories, "results, tables and plots", as_json=as_json)


@evaluation.command()
def tasks(config: _Config, out: _Out, as_json: _Json = False) -> None:
    """Trace prompt sets beyond facts: what the model answers, what methods find, and how far they differ."""
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.task_settings import TasksConfig

    settings = make_config(TasksConfig, _content(config))
    from trackstar.evaluation.tasks_run import evaluate_tasks

    results = _run(lambda on_step: evaluate_tasks(settings, out, on_step=on_step))
    _answer(results, out, _show_tasks, "results, tables and plots", as_json=as_json)


def _content(config: Path, **over: int | None) -> dict[str, Any]:
    """What a file of settings says, with what options say in its place."""
    from trackstar.index_config import read_config

    return read_config(config) | {name: value for name, value in over.items() if value is not None}


def _run(evaluate: Callable[[OnStep], dict[str, Any]], *, unit: str | None = "units") -> dict[str, Any]:
    """Evaluate and show progress; `unit` is of steps that are not known by name."""
    quieten()
    with StepProgress(Console(stderr=True)) as progress:
        return evaluate(lambda step, done, total: progress.at(step, done, total, unit=_UNITS.get(step, unit)))


def _answer(
    results: dict[str, Any], out: Path, show: Callable[[Console, dict[str, Any]], None], left: str, *, as_json: bool
) -> None:
    """Show what was found, and say what was left where."""
    if as_json:
        print_json(results)
    else:
        show(Console(), results)
    Console(stderr=True).print(f"{left} are in {out}", highlight=False)


def _show_tasks(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="share of the target's words in what was found", show_edge=False)
    table.add_column("method")
    for task in results["tasks"]:
        table.add_column(task["name"], justify="right")
    for item in results["methods"]:
        table.add_row(item["name"], *(_text(part["target_words"]) for part in item["by"]["task"]))
    console.print(table)


def _show_categories(console: Console, results: dict[str, Any]) -> None:
    from trackstar.evaluation.categories import CATEGORIES

    table = Table(title=None, show_edge=False)
    table.add_column("method")
    for name in CATEGORIES:
        table.add_column(name, justify="right")
    for item in results["methods"]:
        table.add_row(item["name"], *(_text(item["categories"][name]) for name in CATEGORIES))
    console.print(table)


@evaluation.command()
def ablate(
    config: _Config,
    out: Annotated[Path, typer.Option(help="Folder for results, tables, plot, retrievals and indexes.")],
    seed: _Seed = None,
    as_json: _Json = False,
) -> None:
    """Measure influence against the size d of its rows, training steps and model size, building every index."""
    from trackstar.evaluation.ablate_config import AblateConfig
    from trackstar.evaluation.config import make_config

    settings = make_config(AblateConfig, _content(config, seed=seed))
    from trackstar.evaluation.ablate_run import evaluate_ablation

    results = _run(lambda on_step: evaluate_ablation(settings, out, on_step=on_step), unit=None)
    _answer(results, out, _show_ablation, "results, tables, plot and retrievals", as_json=as_json)


def _show_ablation(console: Console, results: dict[str, Any]) -> None:
    table = Table(title=None, show_edge=False)
    for head in ("axis", "at", "MRR", "answered rightly"):
        table.add_column(head, justify="left" if head == "axis" else "right")
    for panel in results["axes"]:
        for point in panel["points"]:
            mrr, accuracy = _text(point["quality"]["mrr"]), _text(point["accuracy"])
            table.add_row(panel["axis"], f"{point['at']:,}", mrr, accuracy)
    console.print(table)


@evaluation.command()
def lds(
    config: _Config,
    out: Annotated[Path, typer.Option(help="Folder for results, tables, plots, retrievals, model and indexes.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Draw queries, passages and subsets by another seed.")] = None,
    as_json: _Json = False,
) -> None:
    """Retrain a small model without some of its passages, and measure which method's scores foretell what that does."""
    from trackstar.evaluation.config import make_config
    from trackstar.evaluation.lds_config import LdsConfig

    settings = make_config(LdsConfig, _content(config, seed=seed))
    from trackstar.evaluation.lds_run import evaluate_lds

    def evaluate(on_step: OnStep) -> dict[str, Any]:
        with _ray(settings.workers) if settings.engine == "ray" else contextlib.nullcontext() as engine:
            return evaluate_lds(settings, out, engine=engine, on_step=on_step)

    results = _run(evaluate)
    _answer(results, out, _show_retraining, "results, tables, plots and retrievals", as_json=as_json)


def _ray(workers: int) -> Any:
    """Ray as an engine, for as long as a block runs; it comes with the services, which need not be installed."""
    try:
        ray_cluster = importlib.import_module("services.reindex.ray_cluster")
    except ImportError as error:
        raise InvalidRequest("the engine ray needs the package ray and the services; use the engine local") from error
    return ray_cluster.engine(workers)


def _show_retraining(console: Console, results: dict[str, Any]) -> None:
    deepest = results["methods"][0]["removals"][-1]["depth"]
    table = Table(title=None, show_edge=False)
    table.add_column("method")
    for head in ("LDS", f"loss rise without first {deepest}", "MRR"):
        table.add_column(head, justify="right")
    for item in results["methods"]:
        table.add_row(
            item["name"], *(_text(found) for found in (item["lds"], item["removals"][-1]["rise"], item["mrr"]))
        )
    console.print(table)


def _show(console: Console, results: dict[str, Any]) -> None:
    from trackstar.evaluation.measures import title_of

    measures = [name for name in ("mrr", "recall_at_10", "precision_at_1", "map") if name in _overall(results, 0)]
    table = Table(title=None, show_edge=False)
    table.add_column("method")
    for name in measures:
        table.add_column(title_of(name), justify="right")
    for number, item in enumerate(results["methods"]):
        overall = _overall(results, number)
        table.add_row(item["name"], *(_text(overall[name]) for name in measures))
    console.print(table)


def _overall(results: dict[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = results["methods"][number]["overall"]
    return found


def _text(numbers: dict[str, float]) -> str:
    return f"{numbers['mean']:.3f} ({numbers['low']:.3f} to {numbers['high']:.3f})"

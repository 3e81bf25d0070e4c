"""The command `trackstar plan`: what an index of N passages needs, each figure with its formula.

Contract: nothing is built and no weights are read; it needs no torch. What depends on hardware is an option with a
default, so every figure can be argued with; `--json` gives the same figures to machines.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from trackstar import planner
from trackstar.cli_index import print_json
from trackstar.console import print_plan
from trackstar.costs import Assumptions, Workload, costs
from trackstar.errors import InvalidRequest
from trackstar.model_size import model_size

_MODEL = "Model and corpus"
_TARGET = "What must be found"
_BUILD = "Building it"
_SERVE = "Serving it"
# The paper's largest model, assumed where a plan is asked for without one.
_ASSUMED_LAYERS, _ASSUMED_PARAMETERS = 32, 8_000_000_000
_DEFAULT = Assumptions()


def plan(
    passages: Annotated[int, typer.Option(min=1, help="Passages of the corpus.", rich_help_panel=_MODEL)],
    model: Annotated[
        str | None,
        typer.Option(help="Folder of the checkpoint; only its headers are read.", rich_help_panel=_MODEL),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the model, instead of --model.", rich_help_panel=_MODEL)
    ] = None,
    params: Annotated[
        float | None, typer.Option(min=1, help="Parameters of the model, such as 8e9.", rich_help_panel=_MODEL)
    ] = None,
    tokens_per_passage: Annotated[
        float, typer.Option(min=1, help="Mean length of a passage.", rich_help_panel=_MODEL)
    ] = 128.0,
    score: Annotated[
        float, typer.Option(help="Cosine of the passages that must be found.", rich_help_panel=_TARGET)
    ] = 0.05,
    recall: Annotated[
        float,
        typer.Option(help="Probability with which the coarse search must find them.", rich_help_panel=_TARGET),
    ] = 0.95,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="prefix|bits",
            help="Consider one kind of code; Milvus Lite holds prefixes.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    max_bits: Annotated[
        int,
        typer.Option(min=8, help="Largest code the Milvus server takes: 32768 with 2.3.5.", rich_help_panel=_TARGET),
    ] = planner.MAX_BITS,
    max_candidates: Annotated[
        int, typer.Option(min=1, help="Most candidates for one end of a ranking.", rich_help_panel=_TARGET)
    ] = planner.MAX_CANDIDATES,
    flops: Annotated[
        float, typer.Option(help="FLOP/s that one GPU keeps up.", rich_help_panel=_BUILD)
    ] = _DEFAULT.sustained_flops,
    days: Annotated[float, typer.Option(help="Days to build it in.", rich_help_panel=_BUILD)] = _DEFAULT.days,
    gpus_per_node: Annotated[
        int, typer.Option(help="GPUs of one machine.", rich_help_panel=_BUILD)
    ] = _DEFAULT.gpus_per_node,
    leaf_passages: Annotated[
        int | None,
        typer.Option(help="Passages of one partial sum of R; by size if left out.", rich_help_panel=_BUILD),
    ] = None,
    import_rate: Annotated[
        float, typer.Option(help="Bytes/s of codes into Milvus.", rich_help_panel=_BUILD)
    ] = _DEFAULT.import_bytes_per_second,
    audit_queries: Annotated[
        int, typer.Option(help="Queries of an audit.", rich_help_panel=_BUILD)
    ] = _DEFAULT.audit_queries,
    append: Annotated[
        int | None,
        typer.Option(help="Passages that come later; a hundredth if left out.", rich_help_panel=_BUILD),
    ] = None,
    node_memory: Annotated[
        float, typer.Option(help="GiB of memory of one Milvus query node.", rich_help_panel=_SERVE)
    ] = _DEFAULT.node_memory_bytes / 2**30,
    replicas: Annotated[
        int, typer.Option(help="Replicas of the codes in Milvus.", rich_help_panel=_SERVE)
    ] = _DEFAULT.replicas,
    memory_bandwidth: Annotated[
        float, typer.Option(help="Bytes/s that a query node scans.", rich_help_panel=_SERVE)
    ] = _DEFAULT.memory_bandwidth,
    storage_bandwidth: Annotated[
        float, typer.Option(help="Bytes/s between a machine and the store of the rows.", rich_help_panel=_SERVE)
    ] = _DEFAULT.storage_bandwidth,
    request_seconds: Annotated[
        float, typer.Option(help="Time of one ranged read of the store.", rich_help_panel=_SERVE)
    ] = _DEFAULT.request_seconds,
    requests_at_once: Annotated[
        int, typer.Option(help="Ranged reads on their way for one query.", rich_help_panel=_SERVE)
    ] = _DEFAULT.requests_at_once,
    queries_per_second: Annotated[
        float, typer.Option(help="Queries per second to size the store for.", rich_help_panel=_SERVE)
    ] = _DEFAULT.queries_per_second,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Plan an index: projection, coarse code, disk, memory, Milvus, compute and machines, each with its formula."""
    num_layers, num_parameters = _size(model, layers, params)
    if code not in (None, "prefix", "bits"):
        raise InvalidRequest(f"--code is prefix or bits, not {code!r}")
    kinds: Any = ("bits", "prefix") if code is None else (code,)
    proposal = planner.propose_projection(num_layers, num_parameters, passages)
    work = Workload(
        num_passages=passages,
        tokens_per_passage=tokens_per_passage,
        num_layers=num_layers,
        num_parameters=num_parameters,
        num_layer_blocks=proposal.num_layer_blocks,
        rows=proposal.rows,
        cols=proposal.cols,
    )
    limits: dict[str, Any] = {
        "recall_target": recall,
        "kinds": kinds,
        "max_candidates": max_candidates,
        "max_bits": max_bits,
    }
    chosen = planner.plan(passages, work.dim, score, **limits)
    assumed = Assumptions(
        sustained_flops=flops,
        gpus_per_node=gpus_per_node,
        days=days,
        node_memory_bytes=node_memory * 2**30,
        memory_bandwidth=memory_bandwidth,
        replicas=replicas,
        import_bytes_per_second=import_rate,
        storage_bandwidth=storage_bandwidth,
        request_seconds=request_seconds,
        requests_at_once=requests_at_once,
        queries_per_second=queries_per_second,
        audit_queries=audit_queries,
        append_passages=append,
        leaf_passages=leaf_passages,
    )
    content = {
        "passages": passages,
        "tokens_per_passage": tokens_per_passage,
        "model": {
            "layers": num_layers,
            "parameters": num_parameters,
            "assumed": model is None and layers is None,
        },
        "projection": {**proposal._asdict(), "dim": work.dim},
        "target": {"score": score, "recall": recall},
        "limits": {"max_bits": max_bits, "max_candidates": max_candidates},
        "assumptions": asdict(assumed),
        "code": asdict(chosen),
        "options": [asdict(item) for item in planner.options(passages, work.dim, score, **limits)],
        "costs": [asdict(item) for item in costs(chosen, work, assumed)],
    }
    if as_json:
        print_json(content)
    else:
        print_plan(Console(), content)


def _size(model: str | None, layers: int | None, params: float | None) -> tuple[int, int]:
    """Layers and parameters of the model that was named, or of the assumed one."""
    if model is not None:
        if layers is not None or params is not None:
            raise InvalidRequest("give either --model, or --layers and --params")
        return model_size(model)
    if (layers is None) != (params is None):
        raise InvalidRequest("--layers and --params belong together; give both, or --model")
    return (layers, int(params)) if layers and params else (_ASSUMED_LAYERS, _ASSUMED_PARAMETERS)

"""Commands that the services add to `trackstar`: serve an index, run a gateway of its own, digest a token.

The command line finds them through the entry point group `trackstar.commands`, so the library knows nothing of them.
What is heavy to import is imported inside.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trackstar.cli_audit import AuditedGeneration, Candidates, MinRecall, NumBest, Sample

if TYPE_CHECKING:
    from services.gateway.config import GatewayConfig, MilvusConfig
    from services.gateway.server import Ports

_Address = Annotated[str | None, typer.Option(help="HOST:PORT of gRPC; 127.0.0.1:50051 if nothing says otherwise.")]
_Metrics = Annotated[str | None, typer.Option(help="HOST:PORT of Prometheus metrics; 'none' for none.")]
_Config = Annotated[Path | None, typer.Option(help="YAML file of the gateway's settings; options override it.")]


def serve(
    index: Annotated[str, typer.Option(help="Folder or URL of the index.")],
    address: _Address = None,
    metrics_address: _Metrics = None,
    config: _Config = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint's folder, if it has moved.")] = None,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
) -> None:
    """Serve an index over gRPC: gateway, model and rows in this one process."""
    from services.gateway.command import run_gateway

    settings = _settings(config, address, metrics_address)
    from services.embedded import embedded_services

    services = embedded_services(index, model=model, device=device, trust_remote_code=trust_remote_code)
    raise typer.Exit(run_gateway(settings, services, started=_announce(settings)))


def gateway(
    index: Annotated[str, typer.Option(help="Folder or URL of the index, for its generations and coarse codes.")],
    address: _Address = None,
    metrics_address: _Metrics = None,
    config: _Config = None,
) -> None:
    """Run a gateway in front of encoders and rerankers elsewhere; needs no torch."""
    from services.gateway.command import run_gateway
    from services.gateway.remote_assembly import remote_services

    settings = _settings(config, address, metrics_address)
    raise typer.Exit(run_gateway(settings, remote_services(index), started=_announce(settings)))


def fill_milvus(
    index: Annotated[str, typer.Option(help="Folder or URL of the index.")],
    config: _Config = None,
    milvus: Annotated[str | None, typer.Option(help="HOST:PORT of the Milvus server.")] = None,
    generation: Annotated[str | None, typer.Option(help="Another generation than the active one.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Drop the collection first.")] = False,
) -> None:
    """Put a generation's coarse codes into a Milvus server; the same command continues an interrupted one."""
    from rich.console import Console

    from services.gateway.coarse_milvus import fill_collection
    from trackstar.catalog import Catalog
    from trackstar.progress import StepProgress

    settings = _milvus(config, milvus)
    catalog = Catalog(index)
    name = generation or catalog.active()
    console = Console(stderr=True)
    with StepProgress(console, unit="passages") as progress:
        progress.start("importing", 0, catalog.describe(name).num_passages)
        collection = fill_collection(
            settings, catalog, name, anew=anew, on_rows=lambda done, _total: progress.advance("importing", done, 0)
        )
    console.print(f"generation {name} is in the collection {collection}", highlight=False)


def reindex(
    config: Annotated[Path, typer.Argument(help="YAML file of the job; see docs/reindexing.md.")],
    job_id: Annotated[str, typer.Option(help="Keep a record of the job below the index's folder.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Say what was made as JSON.")] = False,
) -> None:
    """Build a generation with Ray, prove it, and make it the one that answers; given again, it does what is missing."""
    from dataclasses import asdict

    from services.reindex.command import reindex as run
    from services.reindex.config import load

    found = run(load(config), job_id=job_id)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    where = f", its codes in the collection {found.collection}" if found.collection else ""
    state = "active" if found.is_active else "finished"
    print(f"generation {found.generation} is {state}{where}; the cascade finds {found.recall:.3f} of the exact best")


def collect_milvus(
    index: Annotated[str, typer.Argument(help="Folder or URL of the index.")],
    milvus: Annotated[str | None, typer.Option(help="HOST:PORT of the Milvus server.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the gateway's settings.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Delete what is listed.")] = False,
) -> None:
    """List collections on a Milvus server that no generation of an index needs; --apply deletes them."""
    from services.reindex.collections import unused_collections
    from trackstar.catalog import Catalog

    settings = _milvus(config, milvus)
    found = unused_collections(settings, Catalog(index), delete=apply)
    for name in found:
        print(name)
    print(f"{len(found)} collections {'were deleted' if apply else 'would go with --apply'}", file=sys.stderr)


def audit_milvus(
    index: Annotated[str, typer.Argument(help="Folder or URL of the index.")],
    milvus: Annotated[str | None, typer.Option(help="HOST:PORT of the Milvus server.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the gateway's settings.")] = None,
    generation: AuditedGeneration = None,
    sample: Sample = None,
    k: NumBest = None,
    candidates: Candidates = None,
    min_recall: MinRecall = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Audit a generation whose codes are on a Milvus server; otherwise as `trackstar audit`."""
    from services.gateway.coarse_milvus import collection_of, connect
    from services.gateway.pointer import MilvusPointer
    from trackstar.cli_audit import audit_and_keep, audit_config, the_generation
    from trackstar.coarse import CoarseIndex
    from trackstar.generation import Generation
    from trackstar.index import Index
    from trackstar.milvus_server import MilvusServerIndex

    settings = _milvus(config, milvus)
    wanted = audit_config(queries=sample, k=k, candidates=candidates, min_recall=min_recall)
    opened = Index(index)
    with connect(settings) as link:

        def on_the_server(chosen: Generation) -> tuple[CoarseIndex, str]:
            collection = collection_of(settings, chosen.name)
            return MilvusServerIndex.open(link, collection, spec=chosen.spec, dim=chosen.layout.dim), collection

        active = MilvusPointer(settings, link, opened.catalog).pointer() if generation is None else generation
        audit_and_keep(
            opened,
            the_generation(opened, active),
            wanted,
            elsewhere=on_the_server,
            as_json=as_json,
        )


def hash_token(
    new: Annotated[bool, typer.Option("--new", help="Make a token and show it once, on standard error.")] = False,
) -> None:
    """Print the digest of a token for the file of principals; without --new the token is read from standard input."""
    from services.gateway.command import hash_token as hash_it

    hash_it(new)


def _milvus(config: Path | None, address: str | None) -> MilvusConfig:
    """The section `milvus` of a file of the gateway's settings, the environment over it, and an address over both."""
    from services.gateway import config as gateway_config
    from trackstar.errors import InvalidRequest

    over = {} if address is None else {f"{gateway_config.PREFIX}MILVUS__ADDRESS": address}
    settings = gateway_config.load(config, {**os.environ, **over}).milvus
    if settings.address is None:
        raise InvalidRequest("name the Milvus server with --milvus HOST:PORT, or in the settings as milvus.address")
    return settings


def _settings(config: Path | None, address: str | None, metrics_address: str | None) -> GatewayConfig:
    """Settings of a file, the environment over them, and options over both."""
    from services.gateway import config as gateway_config

    options: dict[str, str] = {}
    if address is not None:
        options["LISTEN__ADDRESS"] = address
    if metrics_address is not None:
        options["LISTEN__METRICS_ADDRESS"] = "null" if metrics_address == "none" else metrics_address
    over: Mapping[str, str] = {gateway_config.PREFIX + key: value for key, value in options.items()}
    return gateway_config.load(config, {**os.environ, **over})


def _announce(settings: GatewayConfig) -> Callable[[Ports], None]:
    from services.gateway.server import address_of

    def started(ports: Ports) -> None:
        where = address_of(settings, ports)
        metrics = "" if ports.metrics is None else f"; metrics on port {ports.metrics}"
        print(f"serving on {where}{metrics}", file=sys.stderr, flush=True)

    return started

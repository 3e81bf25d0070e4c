"""The command line's way to a gateway: connecting, tracing many queries at once, and the generations it serves.

Contract: as `cli`; what the server left out is said on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trackstar.cli_index import print_json
from trackstar.console import fact_table
from trackstar.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from trackstar.client import Client
    from trackstar.client_types import Answer, GenerationInfo, TraceOptions
    from trackstar.results import Query, Trace

Address = Annotated[str | None, typer.Option(help="HOST:PORT of a gateway to ask instead of an index.")]
TokenFile = Annotated[Path | None, typer.Option(help="File that holds the gateway's token.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM file of who signed the gateway; turns TLS on.")]
UseTls = Annotated[bool, typer.Option("--tls", help="Use TLS with the system's authorities.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds that one answer of a gateway may take.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Where a gateway is and how it is reached."""

    address: str
    token_file: Path | None
    tls_ca: Path | None
    tls: bool
    timeout_seconds: float

    def connect(self) -> Client:
        """A client; nothing is sent yet.

        Raises:
            InvalidRequest: a token or certificate that cannot be used.
            NotFound: there is no certificate.
        """
        from trackstar.client import Client
        from trackstar.client_connection import read_token
        from trackstar.client_types import Tls

        ca = None
        if self.tls_ca is not None:
            try:
                ca = self.tls_ca.read_bytes()
            except FileNotFoundError as error:
                raise NotFound(f"there is no certificate {str(self.tls_ca)!r}") from error
        return Client(
            self.address,
            token=None if self.token_file is None else read_token(self.token_file),
            tls=Tls(ca=ca) if self.tls or ca is not None else None,
            timeout_seconds=self.timeout_seconds,
        )


def trace_one(gateway: Gateway, prompt: str, target: str | None, options: TraceOptions) -> tuple[Trace, str]:
    """The answer to one prompt, and what the model itself says after it if `options` ask for that.

    Raises:
        InvalidRequest: the target is empty, or the gateway refuses the request.
    """
    from trackstar.client_types import Own

    if target is not None and not target.strip():
        raise InvalidRequest("the target is empty; say which words are to be explained, or leave --target out")
    with gateway.connect() as client:
        explained = Own() if target is None else target
        answer = client.trace(prompt, explained, query_id="command line", **options)
    _say_left_out(answer)
    return answer.trace, answer.explained.model_completion


def trace_many(
    gateway: Gateway, queries: Sequence[Query], options: TraceOptions, *, concurrency: int
) -> Iterator[Trace]:
    """Answers in the order of the queries, `concurrency` of them asked at once."""
    pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="trace")
    with gateway.connect() as client:

        def ask(query: Query) -> Answer:
            return client.trace(query.prompt, query.target, query_id=query.query_id, **options)

        try:
            for query, answer in zip(queries, pool.map(ask, queries), strict=True):
                _say_left_out(answer)
                # The query's own fields go into its record.
                yield replace(answer.trace, query=query)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def generations(
    address: Annotated[str, typer.Option(help="HOST:PORT of the gateway.")],
    activate: Annotated[str | None, typer.Option(help="First make this generation the one that answers.")] = None,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    tls: UseTls = False,
    timeout: Timeout = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Show the generations that a gateway serves."""
    gateway = Gateway(address=address, token_file=token_file, tls_ca=tls_ca, tls=tls, timeout_seconds=timeout)
    with gateway.connect() as client:
        if activate is not None:
            switched, before = client.activate(activate)
            print(f"{switched.name} answers now, before it {before or 'none'}", file=sys.stderr)
        found = client.generations()
    if as_json:
        print_json([asdict(item) for item in found])
        return
    console = Console()
    for number, item in enumerate(found):
        if number:
            console.print()
        console.print(fact_table(_facts(item)))
    if not found:
        print("the gateway serves no generation that you may ask", file=sys.stderr)


def _facts(item: GenerationInfo) -> Iterator[tuple[str, str]]:
    yield "generation", f"{item.name} ({item.state})"
    yield "checkpoint", item.checkpoint_digest[:12]
    if item.state == "building":
        return
    yield "config", item.config_digest[:12]
    yield "passages", f"{item.num_passages:,}, d = {item.dim:,}"
    share = f", share of the task {item.mix_weight:.3f}" if item.mix == "task" else ""
    yield "mix", f"{item.mix}{share}, damping {item.damping:g}"
    yield "code", f"{item.code_size:,} {'floats' if item.code_kind == 'prefix' else 'sign bits'}"


def _say_left_out(answer: Answer) -> None:
    for sentence in answer.provenance.left_out:
        print(f"left out: {' '.join(sentence.splitlines())}", file=sys.stderr)

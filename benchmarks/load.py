"""How the service bears load: latency by stage and throughput against concurrency, and what happens past saturation.

    python -m benchmarks.load INDEX --queries FILE.jsonl [--concurrency 1 2 4 8 16 32 64] [--json FILE]

It starts `trackstar serve` on free loopback ports, asks it over gRPC with so many calls at once (closed loop, a bounded
number of calls at each level), and ends it. Three things are reported:

    levels      per concurrency: calls, failures by code, calls per second, percentiles of the whole call and of every
                stage as the answers' provenance tells it; at one call at a time also the gateway's overhead, which is
                what of a call's time is in no stage
    batching    queries per second through the service's encoder with 64 calls at once, over the rate of the same
                encoder alone on the same queries, 64 a batch, taking turns in one process
    saturation  a server that admits few calls, asked by many more clients at once, who come back a little later when
                they are refused: how long admitted calls take beside what admission promises, and what a refusal takes

Ratios only: the absolute times of one machine mean nothing on another. Nothing leaves the loopback interface.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from services.encoder.core import EncoderCore
from services.encoder.model import LocalModel, ModelWorker
from trackstar.dual import make_code, make_duals
from trackstar.encode import QUERY_LENGTH_STEP, Encoder
from trackstar.index import Index
from trackstar.queries import read_queries, tokenize
from trackstar.results import Query
from trackstar.v1 import encoder_pb2, trace_pb2
from trackstar.v1.trace_pb2_grpc import TraceServiceStub

# Calls at once in the comparison of encoders, and queries in each batch of the encoder alone.
_BATCH = 64
# How long the storm lasts, and when a client that was refused comes back, on average.
_STORM_SECONDS, _REFUSED_PAUSE_SECONDS = 20.0, 0.2
STAGES = ("encode", "search", "rerank", "evidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One call: its code, seconds, and seconds by stage."""

    code: str
    seconds: float
    stages: dict[str, float]


@contextmanager
def serving(index: Path, threads: int, settings: dict[str, str]) -> Iterator[str]:
    """A server of its own on loopback, ended on the way out; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [str(Path(sys.executable).with_name("trackstar")), "serve", "--index", str(index), "--address", address]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRACKSTAR_GATEWAY__LOG_LEVEL": "error", **settings}
    server = subprocess.Popen([*command, "--metrics-address", "127.0.0.1:0"], env=environment)
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=120)
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def request(query: Query, options: argparse.Namespace) -> trace_pb2.TraceRequest:
    """What every call asks."""
    return trace_pb2.TraceRequest(
        query=trace_pb2.Query(prompt=query.prompt, target=query.target),
        k=options.k,
        candidates=options.candidates,
        ends=trace_pb2.ENDS_PROPONENTS if options.proponents else trace_pb2.ENDS_BOTH,
        evidence=trace_pb2.EvidenceOptions(tokens=options.evidence, blocks=options.evidence, overlap=options.evidence),
    )


async def ask(stub: Any, message: trace_pb2.TraceRequest, timeout: float) -> Outcome:
    """One call, timed."""
    began = time.perf_counter()
    try:
        answer = await stub.Trace(message, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        return Outcome(code=error.code().name, seconds=time.perf_counter() - began, stages={})
    seconds = time.perf_counter() - began
    stages = {stage.stage: stage.seconds for stage in answer.provenance.stages}
    return Outcome(code="OK", seconds=seconds, stages=stages)


async def closed_loop(
    address: str,
    messages: Sequence[trace_pb2.TraceRequest],
    *,
    concurrency: int,
    calls: int,
    timeout: float,
    seconds: float = float("inf"),
) -> tuple[list[Outcome], float]:
    """`calls` calls, `concurrency` at once, for so many seconds at most, and the seconds they took together."""
    work = iter(list(islice(cycle(messages), calls)))
    until = time.perf_counter() + seconds
    outcomes: list[Outcome] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = TraceServiceStub(channel)

        async def client() -> None:
            for message in work:
                outcome = await ask(stub, message, timeout)
                outcomes.append(outcome)
                if time.perf_counter() > until:
                    return
                if outcome.code == "RESOURCE_EXHAUSTED":
                    await asyncio.sleep(_REFUSED_PAUSE_SECONDS * random.uniform(0.5, 1.5))

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return outcomes, time.perf_counter() - began


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile and the largest, in seconds."""
    if not values:
        return {}
    found = np.quantile(values, [0.5, 0.9, 0.99, 1.0])
    return dict(zip(("p50", "p90", "p99", "max"), map(float, found), strict=True))


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """What a level came to."""
    answered = [outcome for outcome in outcomes if outcome.code == "OK"]
    outside = [1 - sum(outcome.stages.values()) / outcome.seconds for outcome in answered]
    return {
        "calls": len(outcomes),
        "codes": dict(Counter(outcome.code for outcome in outcomes)),
        "calls_per_second": len(answered) / seconds,
        "call": percentiles([outcome.seconds for outcome in answered]),
        "stages": {stage: percentiles([outcome.stages.get(stage, 0.0) for outcome in answered]) for stage in STAGES},
        "outside_stages": statistics.median(outside) if outside else None,
        "refused": percentiles([outcome.seconds for outcome in outcomes if outcome.code == "RESOURCE_EXHAUSTED"]),
    }


def measure_levels(index: Path, queries: Sequence[Query], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every concurrency, one after another, on one server."""
    messages = [request(query, options) for query in queries]
    levels = []
    room = {"TRACKSTAR_GATEWAY__ADMISSION__MAX_IN_FLIGHT": str(max(options.concurrency))}
    with serving(index, options.threads, room) as address:
        asyncio.run(closed_loop(address, messages, concurrency=2, calls=8, timeout=options.timeout))
        for concurrency in options.concurrency:
            calls = max(options.calls, 3 * concurrency)
            found = asyncio.run(
                closed_loop(address, messages, concurrency=concurrency, calls=calls, timeout=options.timeout)
            )
            levels.append({"concurrency": concurrency, **summary(*found)})
    return levels


def measure_saturation(index: Path, queries: Sequence[Query], options: argparse.Namespace) -> dict[str, Any]:
    """Few admitted, many asking."""
    messages = [request(query, options) for query in queries]
    in_flight, queued, wait_seconds = 2, 4, 1.0
    settings = {
        "TRACKSTAR_GATEWAY__ADMISSION__MAX_IN_FLIGHT": str(in_flight),
        "TRACKSTAR_GATEWAY__ADMISSION__MAX_QUEUED": str(queued),
        "TRACKSTAR_GATEWAY__ADMISSION__MAX_WAIT_SECONDS": str(wait_seconds),
    }
    with serving(index, options.threads, settings) as address:
        asyncio.run(closed_loop(address, messages, concurrency=2, calls=8, timeout=options.timeout))
        calm = asyncio.run(
            closed_loop(address, messages, concurrency=in_flight, calls=options.calls, timeout=options.timeout)
        )
        stormy = asyncio.run(
            closed_loop(
                address,
                messages,
                concurrency=64,
                calls=1000 * options.calls,
                timeout=options.timeout,
                seconds=_STORM_SECONDS,
            )
        )
    return {
        "max_in_flight": in_flight,
        "max_queued": queued,
        "max_wait_seconds": wait_seconds,
        "calm": summary(*calm),
        "stormy": summary(*stormy),
    }


def measure_batching(index: Path, queries: Sequence[Query], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of the encoder alone, then of the service's encoder with 64 calls at once, on the same queries."""
    torch.set_num_threads(options.threads)
    opened = Index(index)
    loaded = opened.load_model()
    generation = opened.generation()
    examples = [
        tokenize(query, loaded.tokenizer, add_bos=opened.facts["add_bos"], max_tokens=loaded.max_tokens)
        for query in queries
    ]
    encoder: Encoder = opened.encoder(loaded, length_step=QUERY_LENGTH_STEP)
    other = opened.load_model()

    def alone() -> None:
        for start in range(0, len(examples), _BATCH):
            found = encoder.encode(examples[start : start + _BATCH])
            for dual in make_duals(generation.whitener, found.rows_ND, found.loss_N):
                assert not isinstance(dual, Exception)
                make_code(generation.spec, generation.rotation, dual)

    async def rounds() -> dict[str, list[float]]:
        core = EncoderCore(opened, other.tokenizer, other.max_tokens, LocalModel(ModelWorker(opened, other)))
        messages = [
            encoder_pb2.EncodeRequest(
                generation=generation.name, query=trace_pb2.Query(prompt=query.prompt, target=query.target)
            )
            for query in queries
        ]

        async def together() -> None:
            work = iter(messages)

            async def client() -> None:
                for message in work:
                    await core.encode(message, timeout_seconds=600)

            await asyncio.gather(*(client() for _ in range(_BATCH)))

        times: dict[str, list[float]] = {"alone": [], "service": []}
        alone()
        await together()
        for _ in range(options.rounds):
            began = time.perf_counter()
            alone()
            times["alone"].append(time.perf_counter() - began)
            began = time.perf_counter()
            await together()
            times["service"].append(time.perf_counter() - began)
        await core.close()
        return times

    times = asyncio.run(rounds())
    ratios = [a / s for a, s in zip(times["alone"], times["service"], strict=True)]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "queries": len(queries),
        "tokens": sum(len(example.tokens) for example in examples),
        "service_over_alone": float(middle),
        "quartiles": [float(low), float(high)],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(title="levels (ms)")
    for name in ("at once", "calls/s", "ok", "p50", "p90", "p99", *(f"{stage} p50" for stage in STAGES), "outside"):
        table.add_column(name, justify="right")
    for level in report["levels"]:
        call = level["call"]
        table.add_row(
            str(level["concurrency"]),
            f"{level['calls_per_second']:.1f}",
            f"{level['codes'].get('OK', 0)}/{level['calls']}",
            *(f"{1000 * call[name]:.0f}" for name in ("p50", "p90", "p99")),
            *(f"{1000 * level['stages'][stage]['p50']:.1f}" for stage in STAGES),
            f"{100 * level['outside_stages']:.1f} %",
        )
    console.print(table)
    console.print(json.dumps({name: report[name] for name in ("batching", "saturation")}, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description="Latency and throughput of the service under load.")
    parser.add_argument("index", type=Path)
    parser.add_argument("--queries", type=Path, required=True, help="JSONL of prompts and targets")
    parser.add_argument("--limit", type=int, default=64, help="how many of them")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--calls", type=int, default=64, help="calls at each level, at least")
    parser.add_argument("--rounds", type=int, default=9, help="turns of the comparison of encoders")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--proponents", action="store_true", help="only proponents")
    parser.add_argument("--evidence", action="store_true", help="ask for evidence")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a call may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    queries = read_queries(options.queries, limit=options.limit)
    report = {
        "batching": measure_batching(options.index, queries, options),
        "levels": measure_levels(options.index, queries, options),
        "saturation": measure_saturation(options.index, queries, options),
    }
    show(report, Console(width=150))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

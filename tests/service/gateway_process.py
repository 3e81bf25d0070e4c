"""A gateway as a process of its own, for tests that send it signals: `python -m tests.service.gateway_process`.

It says its port on standard output; settings come from the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.command import Parts, Served, run_gateway
from services.gateway.config import load
from services.gateway.server import Ports, Service
from tests.service.scripted import DESCRIPTOR, ScriptedTraceService
from trackstar.v1 import trace_pb2_grpc


@asynccontextmanager
async def scripted(parts: Parts) -> AsyncIterator[Served]:
    """One scripted service; says when it is closed."""
    service = Service(
        add=trace_pb2_grpc.add_TraceServiceServicer_to_server, servicer=ScriptedTraceService(), descriptor=DESCRIPTOR
    )
    yield Served(services=[service])
    print("closed", flush=True)


def told(ports: Ports) -> None:
    """Say the port."""
    print(ports.grpc, flush=True)


if __name__ == "__main__":
    sys.exit(run_gateway(load(None, os.environ), scripted, started=told))

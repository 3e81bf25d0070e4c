"""Encoder and reranker of an index over gRPC as a process of its own: `python -m tests.service.backend_process INDEX`.

The cores and the contract of the Serve application, without Ray between them. It says its port on standard output and
runs until its standard input ends.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch
from google.protobuf.message import Message

from services.backends import TIMEOUT_KEY
from services.encoder.core import EncoderCore
from services.encoder.model import LocalModel, ModelWorker
from services.gateway.errors import status_of
from services.reranker.core import RerankerCore
from trackstar.errors import TrackstarError
from trackstar.index import Index
from trackstar.v1 import encoder_pb2, encoder_pb2_grpc, reranker_pb2, reranker_pb2_grpc

Response = TypeVar("Response", bound=Message)


class Servicer(encoder_pb2_grpc.EncoderServiceServicer, reranker_pb2_grpc.RerankerServiceServicer):
    """Both services over their cores."""

    def __init__(self, encoder: EncoderCore, reranker: RerankerCore) -> None:
        self._encoder, self._reranker = encoder, reranker

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Any) -> encoder_pb2.EncodeResponse:
        """See the protos."""
        return await _answer(self._encoder.encode, request, context)

    async def TailPatch(self, request: encoder_pb2.TailPatchRequest, context: Any) -> encoder_pb2.TailPatchResponse:
        """See the protos."""
        return await _answer(self._encoder.tail_patch, request, context)

    async def Rerank(self, request: reranker_pb2.RerankRequest, context: Any) -> reranker_pb2.RerankResponse:
        """See the protos."""
        return await _answer(self._reranker.rerank, request, context)

    async def Explain(self, request: reranker_pb2.ExplainRequest, context: Any) -> reranker_pb2.ExplainResponse:
        """See the protos."""
        return await _answer(self._reranker.explain, request, context)

    async def ReadPassages(
        self, request: reranker_pb2.ReadPassagesRequest, context: Any
    ) -> reranker_pb2.ReadPassagesResponse:
        """See the protos."""
        return await _answer(self._reranker.read_passages, request, context)


async def _answer(method: Callable[..., Awaitable[Response]], request: Message, context: Any) -> Response:
    seconds = float(dict(context.invocation_metadata())[TIMEOUT_KEY])
    try:
        return await method(request, timeout_seconds=seconds)
    except TrackstarError as error:
        await context.abort_with_status(status_of(error, request_id=""))
        raise AssertionError from error


async def main(folder: str) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    index = Index(folder)
    loaded = index.load_model()
    model = LocalModel(ModelWorker(index, loaded))
    encoder = EncoderCore(index, loaded.tokenizer, loaded.max_tokens, model)
    reranker = RerankerCore(index, encoder)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1 << 26)])
    servicer = Servicer(encoder, reranker)
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
    reranker_pb2_grpc.add_RerankerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(5)
    await reranker.close()
    await encoder.close()


class BackendProcess:
    """Such a process until `close`."""

    def __init__(self, index: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.backend_process", str(index)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "the backends did not start"
        self.address = f"127.0.0.1:{port}"

    def close(self) -> int:
        """End it; returns its exit code."""
        if self._process.poll() is None:
            self._process.communicate(timeout=60)
        return self._process.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

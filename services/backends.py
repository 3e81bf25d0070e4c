"""What the gateway needs behind it: a model and the rows, each as a protocol of a few verbs.

Contract: arguments and answers are the messages of `protos/`; every failure is a `TrackstarError` (`NotReady` where the
same call may succeed on another try); `timeout_seconds` is what is left of the caller's deadline, and an implementation
gives up by then. Implementations: the cores in this process (`encoder.core`, `reranker.core`), and clients of the same
services elsewhere (`gateway.remote`).
"""

from __future__ import annotations

from typing import Protocol

from trackstar.v1 import encoder_pb2, reranker_pb2

# Metadata of a call to a backend elsewhere: the seconds that are left. Serve's proxy passes no deadline on.
TIMEOUT_KEY = "trackstar-timeout-seconds"


class EncoderBackend(Protocol):
    """Runs the model."""

    async def encode(self, request: encoder_pb2.EncodeRequest, *, timeout_seconds: float) -> encoder_pb2.EncodeResponse:
        """Read a query, complete it if asked, and whiten its gradient.

        Raises:
            InvalidRequest: the query cannot be tokenised, or its gradient is zero.
            NotFound: no such generation.
            NotReady: no replica can answer now.
            Overloaded: too many queries wait.
            DeadlineExceeded: it took longer than `timeout_seconds`.
        """

    async def tail_patch(
        self, request: encoder_pb2.TailPatchRequest, *, timeout_seconds: float
    ) -> encoder_pb2.TailPatchResponse:
        """Take one training step on each passage, on a copy; passages that there is no time for are left out."""


class RerankerBackend(Protocol):
    """Reads rows and passages."""

    async def rerank(
        self, request: reranker_pb2.RerankRequest, *, timeout_seconds: float
    ) -> reranker_pb2.RerankResponse:
        """Score candidates exactly, or every passage.

        Raises:
            InvalidRequest: a vector of the wrong size or type.
            NotFound: no such generation or passage.
            NotReady: the rows cannot be reached now.
            CorruptArtifact: a row is not what was written.
            DeadlineExceeded: it took longer than `timeout_seconds`.
        """

    async def explain(
        self, request: reranker_pb2.ExplainRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ExplainResponse:
        """Passages with evidence for their scores."""

    async def read_passages(
        self, request: reranker_pb2.ReadPassagesRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ReadPassagesResponse:
        """Passages with their tokens, by id or by listing."""

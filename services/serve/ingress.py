"""The application's face to Serve's gRPC proxy: every method of both services, handed to the deployment that does it.

The proxy calls the method that bears the name of the rpc. What is left of the caller's deadline comes in the call's
metadata, and so does its trace context. Errors leave as status and details, by the same table as the gateway's.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from google.protobuf.message import Message
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from services.backends import TIMEOUT_KEY
from services.gateway.errors import status_of
from services.serve.calls import call
from services.serve.config import ServeConfig
from services.serve.telemetry import Spans
from trackstar.errors import TrackstarError
from trackstar.rpc_errors import REQUEST_ID
from trackstar.v1 import encoder_pb2, reranker_pb2

_LOG = logging.getLogger(__name__)

Response = TypeVar("Response", bound=Message)

_DEFAULT_SECONDS = 30.0


class Ingress:
    """Implements EncoderService and RerankerService for Serve."""

    def __init__(self, config: ServeConfig, encoder: DeploymentHandle[Any], reranker: DeploymentHandle[Any]) -> None:
        self._encoder = encoder
        self._reranker = reranker
        self._spans = Spans(config.tracing_endpoint)

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.EncodeResponse:
        """EncoderService.Encode."""
        return await self._answer(self._encoder.encode, request, grpc_context, encoder_pb2.EncodeResponse(), "encoding")

    async def TailPatch(
        self, request: encoder_pb2.TailPatchRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.TailPatchResponse:
        """EncoderService.TailPatch."""
        return await self._answer(
            self._encoder.tail_patch, request, grpc_context, encoder_pb2.TailPatchResponse(), "tail-patching"
        )

    async def Rerank(
        self, request: reranker_pb2.RerankRequest, grpc_context: RayServegRPCContext
    ) -> reranker_pb2.RerankResponse:
        """RerankerService.Rerank."""
        return await self._answer(
            self._reranker.rerank, request, grpc_context, reranker_pb2.RerankResponse(), "reranking"
        )

    async def Explain(
        self, request: reranker_pb2.ExplainRequest, grpc_context: RayServegRPCContext
    ) -> reranker_pb2.ExplainResponse:
        """RerankerService.Explain."""
        return await self._answer(
            self._reranker.explain, request, grpc_context, reranker_pb2.ExplainResponse(), "explaining"
        )

    async def ReadPassages(
        self, request: reranker_pb2.ReadPassagesRequest, grpc_context: RayServegRPCContext
    ) -> reranker_pb2.ReadPassagesResponse:
        """RerankerService.ReadPassages."""
        return await self._answer(
            self._reranker.read_passages, request, grpc_context, reranker_pb2.ReadPassagesResponse(), "reading"
        )

    async def _answer(
        self, method: Any, request: Message, context: RayServegRPCContext, empty: Response, what: str
    ) -> Response:
        metadata = dict(context.invocation_metadata())
        with self._spans.of(what, metadata):
            try:
                answer: Response = await call(method, request, timeout_seconds=_timeout(metadata), what=what)
                return answer
            except Exception as error:
                if not isinstance(error, TrackstarError):
                    _LOG.exception("a defect while %s", what)
                status = status_of(error, request_id=metadata.get(REQUEST_ID, ""))
                context.set_code(status.code)
                context.set_details(status.details)
                # Serve declares text only, and passes bytes on all the same.
                trailing: Any = list(status.trailing_metadata)
                context.set_trailing_metadata(trailing)
                return empty


def _timeout(metadata: dict[str, str]) -> float:
    try:
        return float(metadata[TIMEOUT_KEY])
    except (KeyError, ValueError):
        return _DEFAULT_SECONDS

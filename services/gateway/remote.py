"""Encoder and reranker elsewhere: the backends' protocols over gRPC, such as to the ingress of Ray Serve.

Contract: as `services.backends`. A call takes no longer than `timeout_seconds`, all its attempts included, and passes
on what is left. What only a lost connection or a lost replica caused is tried again, which is harmless because backends
change nothing that stays; an overloaded backend is not, because that would load it more. While a backend does not
answer at all, calls fail at once, with the time after which to ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from services.backends import TIMEOUT_KEY
from services.gateway.request import current
from services.gateway.telemetry import outgoing
from services.timing import within
from trackstar.breaker import CircuitBreaker, CircuitOpen
from trackstar.client_retry import Attempts, RetryPolicy
from trackstar.errors import DeadlineExceeded, Incompatible, NotReady, Overloaded, TrackstarError
from trackstar.rpc_errors import DETAILS_KEY, from_call
from trackstar.v1 import encoder_pb2, encoder_pb2_grpc, reranker_pb2, reranker_pb2_grpc

Response = TypeVar("Response", bound=Message)

_MESSAGE_BYTES = 1 << 26
# An answer that did not come within this is a sign against the backend; with less time it tells nothing.
_TELLING_SECONDS = 5.0
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    # A name that stands for several proxies, as a headless service does, spreads calls over all of them.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Notices a peer that has gone without a word.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


class BackendLink:
    """A connection to one backend; used from one event loop, and made in it.

    Args:
        address: `host:port` or any gRPC target.
        name: of the backend, in messages.
        application: name of the Ray Serve application behind the address, if there is one.
        breaker: refuses calls while the backend is down; one of its own if None.
        policy: how often and how far apart calls are tried.
        credentials: encrypts; in the clear if None.
        on_retry: hears of every try after a first one.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str,
        application: str | None = None,
        breaker: CircuitBreaker | None = None,
        policy: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.breaker = breaker or CircuitBreaker(f"the {name}")
        self._policy = policy or RetryPolicy(attempts=6, first_seconds=0.05, longest_seconds=1.0)
        self._metadata: Sequence[tuple[str, str]] = (("application", application),) if application else ()
        self._on_retry = on_retry
        self.channel = (
            grpc.aio.insecure_channel(address, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        )

    async def close(self) -> None:
        """Close the connection; calls that run fail."""
        await self.channel.close()

    async def ready(self) -> None:
        """Return if the connection stands; a probe for health.

        Raises:
            NotReady: it does not.
        """
        if self.channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            raise NotReady(f"the {self.name} cannot be reached")

    async def call(self, method: Any, request: Message, *, timeout_seconds: float) -> Any:
        """The answer of `method`, a stub's multi-callable.

        Raises:
            DeadlineExceeded: none within `timeout_seconds`.
            NotReady: nobody answers.
            TrackstarError: what the backend says.
        """
        attempts = Attempts(self._policy, timeout_seconds)
        async with within(timeout_seconds, f"asking the {self.name}"):
            while True:
                try:
                    return await self._attempt(method, request, attempts.seconds_left())
                except CircuitOpen as error:
                    raise NotReady(str(error), retry_after_seconds=error.retry_seconds) from error
                except NotReady as error:
                    pause = attempts.pause_after_error(error, cause=error.__cause__)
                self._on_retry()
                await asyncio.sleep(pause)

    async def _attempt(self, method: Any, request: Message, seconds: float) -> Any:
        metadata = (*self._metadata, (TIMEOUT_KEY, f"{seconds:.3f}"), *outgoing(current().request_id))
        with self.breaker.attempt() as attempt:
            try:
                answer = await method(request, timeout=seconds, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                code, answered = error.code(), _is_ours(error)
                if not answered and (
                    code is grpc.StatusCode.UNAVAILABLE
                    or (code is grpc.StatusCode.DEADLINE_EXCEEDED and seconds >= _TELLING_SECONDS)
                ):
                    attempt.failed()
                elif answered:
                    attempt.succeeded()
                raise (from_call(error) if answered else self._of_elsewhere(error)) from error
            attempt.succeeded()
            return answer

    def _of_elsewhere(self, error: grpc.aio.AioRpcError) -> TrackstarError:
        """What gRPC itself or a proxy said; nothing that it says is the caller's fault."""
        said = f"{error.code().name}: {error.details()}"
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceeded(f"the {self.name} did not answer in time")
            case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in said:
                return Incompatible(f"the {self.name} takes no messages of this size; raise its limit ({said})")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return Overloaded(f"the {self.name} cannot take more now ({said})")
            case grpc.StatusCode.UNIMPLEMENTED:
                return Incompatible(f"the {self.name} speaks another version of the contract ({said})")
        # Also a proxy that has not heard of the application yet, or whose replica died under the call.
        return NotReady(f"the {self.name} does not answer ({said})")


class RemoteEncoder:
    """`services.backends.EncoderBackend` over a link."""

    def __init__(self, link: BackendLink) -> None:
        self._link = link
        self._stub: encoder_pb2_grpc.EncoderServiceAsyncStub = encoder_pb2_grpc.EncoderServiceStub(link.channel)

    async def encode(self, request: encoder_pb2.EncodeRequest, *, timeout_seconds: float) -> encoder_pb2.EncodeResponse:
        """See `EncoderBackend.encode`."""
        answer: encoder_pb2.EncodeResponse = await self._link.call(
            self._stub.Encode, request, timeout_seconds=timeout_seconds
        )
        return answer

    async def tail_patch(
        self, request: encoder_pb2.TailPatchRequest, *, timeout_seconds: float
    ) -> encoder_pb2.TailPatchResponse:
        """See `EncoderBackend.tail_patch`."""
        answer: encoder_pb2.TailPatchResponse = await self._link.call(
            self._stub.TailPatch, request, timeout_seconds=timeout_seconds
        )
        return answer


class RemoteReranker:
    """`services.backends.RerankerBackend` over a link."""

    def __init__(self, link: BackendLink) -> None:
        self._link = link
        self._stub: reranker_pb2_grpc.RerankerServiceAsyncStub = reranker_pb2_grpc.RerankerServiceStub(link.channel)

    async def rerank(
        self, request: reranker_pb2.RerankRequest, *, timeout_seconds: float
    ) -> reranker_pb2.RerankResponse:
        """See `RerankerBackend.rerank`."""
        answer: reranker_pb2.RerankResponse = await self._link.call(
            self._stub.Rerank, request, timeout_seconds=timeout_seconds
        )
        return answer

    async def explain(
        self, request: reranker_pb2.ExplainRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ExplainResponse:
        """See `RerankerBackend.explain`."""
        answer: reranker_pb2.ExplainResponse = await self._link.call(
            self._stub.Explain, request, timeout_seconds=timeout_seconds
        )
        return answer

    async def read_passages(
        self, request: reranker_pb2.ReadPassagesRequest, *, timeout_seconds: float
    ) -> reranker_pb2.ReadPassagesResponse:
        """See `RerankerBackend.read_passages`."""
        answer: reranker_pb2.ReadPassagesResponse = await self._link.call(
            self._stub.ReadPassages, request, timeout_seconds=timeout_seconds
        )
        return answer


def _is_ours(error: grpc.aio.AioRpcError) -> bool:
    """Whether a backend of ours said this, and not gRPC or a proxy in between."""
    return any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())

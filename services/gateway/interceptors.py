"""What happens around every call, in one place and in this order:

    request id, trace context ─► counted, logged ─► deadline ─► caller ─► message ─► place ─► servicer
                errors of all that follows ◄─┘

Contract: a servicer's method runs with its `RequestContext` entered, in a task that is cancelled at the deadline or
when the client has gone; it raises `TrackstarError`s and knows no status. A unary method is a coroutine, a streaming
one an async generator. Every call that comes in is counted, timed and logged exactly once, and gives back its place,
however it ends. Health and reflection pass untouched: they need no token and no place. The log line names method, code,
caller, generation and times, nothing of the request's text.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Never, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError, Message

from services.gateway.admission import Admission
from services.gateway.auth import Authenticator, Credentials
from services.gateway.config import DeadlineConfig
from services.gateway.errors import one_line, status_of
from services.gateway.metrics import GatewayMetrics, Rejected
from services.gateway.request import RequestContext, enter
from services.gateway.running import RunningCalls
from services.gateway.telemetry import Telemetry, finish, trace_id_of
from trackstar.errors import InvalidRequest, NotReady, TrackstarError, Unauthenticated
from trackstar.rpc_errors import REQUEST_ID

_LOG = logging.getLogger(__name__)

# These wait for what changes elsewhere: they take no place, and end when the server begins to shut down.
_WATCHES = ("/trackstar.v1.JobService/Watch",)
_OPEN = ("/grpc.health.", "/grpc.reflection.")
_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")
_LOGGED_BYTES = 128
# gRPC rounds a client's timeout up on the wire by about a hundredth, and the client itself does not wait for that.
_EARLY_SECONDS, _EARLY_SHARE = 0.02, 0.02
# A client that reads nothing must not keep a call alive by not taking its status either.
_SENDING_SECONDS = 1.0
# Codes that are the server's fault.
_FAILURES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)

# Generic in the annotations only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(slots=True, kw_only=True)
class _Call:
    """What is told about a call when it has ended. Times are monotonic."""

    method: str
    request_id: str
    began: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    principal: str = ""
    generation: str = ""
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def is_late(self) -> bool:
        """Whether a cancellation now is the client's own clock at its deadline, which comes a little before ours."""
        return time.monotonic() >= self.deadline - _EARLY_SECONDS - _EARLY_SHARE * (self.deadline - self.began)


class GatewayInterceptor(grpc.aio.ServerInterceptor):
    """Stands around every call.

    Args:
        metrics, telemetry: hear of calls.
        authenticator: tells who calls.
        admission: gives places.
        deadlines: bounds of a call's time.
        max_response_bytes: longest answer that can be sent.
        running: counts calls, and says when the server shuts down.
    """

    def __init__(
        self,
        *,
        metrics: GatewayMetrics,
        telemetry: Telemetry,
        authenticator: Authenticator,
        admission: Admission,
        deadlines: DeadlineConfig,
        max_response_bytes: int,
        running: RunningCalls,
    ) -> None:
        self._metrics = metrics
        self._telemetry = telemetry
        self._authenticator = authenticator
        self._admission = admission
        self._deadlines = deadlines
        self._max_response_bytes = max_response_bytes
        self._running = running

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Put this around the method's handler."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            self._metrics.handled(method, grpc.StatusCode.UNIMPLEMENTED.name, 0.0)
            return None
        if method.startswith(_OPEN):
            return handler
        assert not handler.request_streaming, "the contract has no streams of requests"
        return self._streaming(method, handler) if handler.response_streaming else self._unary(method, handler)

    def _unary(self, method: str, handler: Handler) -> Handler:
        # The annotations know synchronous handlers only.
        behaviour = cast(Callable[[Message, Context], Awaitable[Message]], handler.unary_unary)

        async def answer(data: bytes, context: Context) -> Any:
            async def body(request: Message) -> Message:
                return self._short_enough(await behaviour(request, context))

            return await self._serve(method, handler, data, context, body)

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    def _streaming(self, method: str, handler: Handler) -> Handler:
        behaviour = cast(Callable[[Message, Context], AsyncGenerator[Message, None]], handler.unary_stream)

        # A coroutine that writes, not a generator: a write that is cancelled unwinds here, and nothing is left open.
        async def answer(data: bytes, context: Context) -> None:
            async def body(request: Message) -> None:
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(self._short_enough(response))

            await self._serve(method, handler, data, context, body)

        return grpc.unary_stream_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    async def _serve(
        self, method: str, handler: Handler, data: bytes, context: Context, body: Callable[[Any], Awaitable[Any]]
    ) -> Any:
        """One call from its arrival to its end."""
        metadata = [(str(key), value) for key, value in context.invocation_metadata() or ()]
        call = _Call(method=method, request_id=_id_of_metadata(metadata) or uuid.uuid4().hex)
        with self._telemetry.rpc(method, metadata) as span, self._told(call, trace_id_of(span)):
            try:
                answer = await self._admitted(call, handler, data, context, metadata, body)
                call.code = grpc.StatusCode.OK
                context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
                return answer
            except (asyncio.CancelledError, grpc.aio.InternalError):
                # The latter: a write to a client that has gone, before this task was cancelled for it.
                call.code = grpc.StatusCode.DEADLINE_EXCEEDED if call.is_late() else grpc.StatusCode.CANCELLED
                raise
            except Exception as error:
                await self._abort(call, context, error)
            finally:
                finish(span, call.code.name, failed=call.code in _FAILURES)

    async def _admitted(
        self,
        call: _Call,
        handler: Handler,
        data: bytes,
        context: Context,
        metadata: list[tuple[str, str | bytes]],
        body: Callable[[Any], Awaitable[Any]],
    ) -> Any:
        """The answer of the servicer, once everything before it has let the call pass."""
        if self._running.draining:
            self._metrics.rejected(Rejected.DRAINING)
            raise NotReady("this server shuts down; ask another")
        # None if the client named no deadline, whatever the annotation says.
        wanted = cast(float | None, context.time_remaining())
        seconds = self._deadlines.default_seconds if wanted is None else min(wanted, self._deadlines.max_seconds)
        call.deadline = call.began + seconds
        watches = call.method in _WATCHES
        async with self._running.enter(seconds, watches=watches):
            try:
                principal = self._authenticator.identify(Credentials.of_call(metadata, context.auth_context()))
            except Unauthenticated:
                self._metrics.rejected(Rejected.UNAUTHENTICATED)
                raise
            call.principal = principal.name
            request = _read(handler, data)
            asked = getattr(request, "trace", request)
            call.request_id = _valid_id(getattr(asked, "request_id", "")) or call.request_id
            call.generation = one_line(getattr(asked, "generation", ""), max_bytes=_LOGGED_BYTES)
            enter(RequestContext(request_id=call.request_id, principal=principal, deadline=call.deadline))
            async with nullcontext() if watches else self._admission.place(call.deadline):
                return await body(request)

    async def _abort(self, call: _Call, context: Context, error: Exception) -> Never:
        """End the call with the status of `error`."""
        if isinstance(error, grpc.aio.AbortError):
            # A status has been sent already, by the servicer itself.
            call.code = _code(context.code())
            raise error
        if not isinstance(error, TrackstarError):
            self._metrics.defects.inc()
            _LOG.error("a defect ended a call", exc_info=error, extra={"fields": {"request_id": call.request_id}})
        status = status_of(error, request_id=call.request_id)
        call.code = status.code
        try:
            async with asyncio.timeout(_SENDING_SECONDS):
                await context.abort_with_status(status)
        except (TimeoutError, grpc.aio.InternalError):
            # The client does not read, or has gone. gRPC keeps the status behind what waits, or drops it.
            raise asyncio.CancelledError from None

    def _short_enough(self, response: Message) -> Message:
        size = response.ByteSize()
        if size > self._max_response_bytes:
            raise InvalidRequest(
                f"the answer has {size:,} bytes and at most {self._max_response_bytes:,} can be sent; ask for less",
                field="page_size",
            )
        return response

    @contextmanager
    def _told(self, call: _Call, trace_id: str) -> Iterator[None]:
        """Count the call and log it when it ends."""
        with self._metrics.in_flight.track_inprogress():
            try:
                yield
            finally:
                seconds = time.monotonic() - call.began
                self._metrics.handled(call.method, call.code.name, seconds)
                fields = {
                    "method": call.method,
                    "code": call.code.name,
                    "seconds": round(seconds, 6),
                    "request_id": call.request_id,
                    "principal": call.principal,
                    "trace_id": trace_id,
                    "generation": call.generation,
                }
                _LOG.info("rpc", extra={"fields": {key: value for key, value in fields.items() if value != ""}})


def _read(handler: Handler, data: bytes) -> Message:
    """The message, read here rather than by gRPC so that a broken one is the caller's error."""
    assert handler.request_deserializer is not None
    try:
        request: Message = handler.request_deserializer(data)
    except DecodeError as error:
        raise InvalidRequest("the message cannot be read; client and server may not share the same protos") from error
    return request


def _code(code: Any) -> grpc.StatusCode:
    """A code as gRPC gives it back: a number, or one of the enumeration."""
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return next((known for known in grpc.StatusCode if known.value[0] == number), grpc.StatusCode.UNKNOWN)


def _id_of_metadata(metadata: list[tuple[str, str | bytes]]) -> str:
    return next((_valid_id(value) for key, value in metadata if key == REQUEST_ID and isinstance(value, str)), "")


def _valid_id(text: str) -> str:
    """`text` if it can name a request, else nothing."""
    return text if _REQUEST_ID.fullmatch(text) else ""

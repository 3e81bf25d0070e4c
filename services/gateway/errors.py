"""Exceptions to statuses: the one place where the gateway decides what a caller hears of a failure.

Contract: codes and reasons are those of `trackstar.rpc_errors`, which also holds the way back. Every status fits the 8
KiB that HTTP/2 clients accept as metadata, and its message is one line. What nobody raised on purpose becomes INTERNAL
and says nothing but the request's id; the log of the server tells the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from trackstar.errors import InvalidRequest, NotFound, NotReady, Overloaded, TrackstarError
from trackstar.rpc_errors import DEFECT, DOMAIN, REQUEST_ID, code_of

# A message travels twice, percent-encoded (up to three bytes for one) and in the details (base64).
_MESSAGE_BYTES = 1000
_NAME_BYTES = 200
_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 60.0


class _Status(NamedTuple("_Fields", [("code", Any), ("details", str), ("trailing_metadata", Any)]), grpc.Status):
    """What gRPC ends a call with."""


def status_of(error: BaseException, *, request_id: str) -> grpc.Status:
    """The status of a failed call, with details.

    Args:
        error: what ended the call.
        request_id: named in the details, so that a caller can quote it.
    """
    if not isinstance(error, TrackstarError):
        message = f"an error of the server; its log has request {request_id!r}"
        return _status(grpc.StatusCode.INTERNAL, message, DEFECT, request_id, [])
    code, reason = code_of(error)
    message = one_line(str(error), max_bytes=_MESSAGE_BYTES) or reason.lower().replace("_", " ")
    return _status(code, message, reason, request_id, _details(error, message))


def one_line(text: str, *, max_bytes: int) -> str:
    """`text` without control characters and lone surrogates, cut to `max_bytes` of UTF-8."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 4 * max_bytes])
    data = " ".join(printable.split()).encode("utf-8", errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    return data[: max_bytes - 3].decode("utf-8", errors="ignore") + "..."


def _details(error: TrackstarError, message: str) -> list[Message]:
    if isinstance(error, InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=one_line(error.field, max_bytes=_NAME_BYTES), description=message
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, NotFound):
        kind, name = (one_line(text or "", max_bytes=_NAME_BYTES) for text in (error.kind, error.name))
        return [error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name, description=message)]
    if isinstance(error, NotReady | Overloaded):
        wait = _RETRY_SECONDS if error.retry_after_seconds is None else error.retry_after_seconds
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1000 * min(max(0.0, wait), _MAX_RETRY_SECONDS)))
        return [retry]
    return []


def _status(code: grpc.StatusCode, message: str, reason: str, request_id: str, details: list[Message]) -> grpc.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    request = error_details_pb2.RequestInfo(request_id=one_line(request_id, max_bytes=_NAME_BYTES))
    for detail in (info, *details, request):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    made = rpc_status.to_status(status)
    # The message is in the details too; the id is a plain trailer as well, as after calls that succeed.
    trailers = ((REQUEST_ID, request_id),) if request_id.isascii() and request_id.isprintable() else ()
    return _Status(code=made.code, details=made.details, trailing_metadata=(*made.trailing_metadata, *trailers))

"""Errors across the wire: which status each of ours becomes, and the way back.

    InvalidRequest     INVALID_ARGUMENT       BadRequest with the field
    NotFound           NOT_FOUND              ResourceInfo
    NotReady           UNAVAILABLE            RetryInfo
    Overloaded         RESOURCE_EXHAUSTED     RetryInfo
    CorruptArtifact    DATA_LOSS
    Incompatible       FAILED_PRECONDITION
    UnsupportedModel   FAILED_PRECONDITION
    StorageFull        RESOURCE_EXHAUSTED
    DeadlineExceeded   DEADLINE_EXCEEDED
    Unauthenticated    UNAUTHENTICATED
    PermissionDenied   PERMISSION_DENIED

Every one carries an ErrorInfo of the domain `trackstar` whose reason names the class, so the way back is exact between
our own processes. Statuses from elsewhere (gRPC itself, a proxy) go by their code. Contract: `from_call` never fails,
whatever the details hold. Servers make statuses with `services.gateway.errors`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from trackstar.errors import (
    CorruptArtifact,
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    PermissionDenied,
    StorageFull,
    TrackstarError,
    Unauthenticated,
    UnsupportedModel,
)

Detail = TypeVar("Detail", bound=Message)

DOMAIN = "trackstar"
DETAILS_KEY = "grpc-status-details-bin"
# Metadata key of a request's id, both ways.
REQUEST_ID = "x-request-id"
# Reason of a defect: an error that nobody raised on purpose.
DEFECT = "DEFECT"

# The reason is stable: clients of other languages compare it.
TABLE: dict[type[TrackstarError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    NotFound: (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    NotReady: (grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    CorruptArtifact: (grpc.StatusCode.DATA_LOSS, "CORRUPT_ARTIFACT"),
    Incompatible: (grpc.StatusCode.FAILED_PRECONDITION, "INCOMPATIBLE"),
    UnsupportedModel: (grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_MODEL"),
    StorageFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDenied: (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    TrackstarError: (grpc.StatusCode.FAILED_PRECONDITION, "FAILED"),
}

_OF_REASON = {reason: kind for kind, (_, reason) in TABLE.items()}
# What a code means when no reason of ours comes with it.
_OF_CODE: dict[grpc.StatusCode, type[TrackstarError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    # The connection was lost, or a server that shuts down gave the call up.
    grpc.StatusCode.UNAVAILABLE: NotReady,
    grpc.StatusCode.CANCELLED: NotReady,
    grpc.StatusCode.ABORTED: NotReady,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DATA_LOSS: CorruptArtifact,
    grpc.StatusCode.FAILED_PRECONDITION: Incompatible,
    # The other side speaks another version of the contract.
    grpc.StatusCode.UNIMPLEMENTED: Incompatible,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def code_of(error: TrackstarError) -> tuple[grpc.StatusCode, str]:
    """Code and reason of an error of ours; a subclass goes by its nearest ancestor in the table."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    raise AssertionError("every TrackstarError has an ancestor in the table")


def from_call(error: grpc.RpcError) -> TrackstarError:
    """The error that a failed call stands for, of `grpc` or `grpc.aio`; its message is the server's."""
    code = _attribute(error, "code") or grpc.StatusCode.UNKNOWN
    message = _attribute(error, "details") or f"the call failed with {code.name}"
    for key, value in _attribute(error, "trailing_metadata") or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return from_details(code, message, value)
    return from_details(code, message, b"")


def from_details(code: grpc.StatusCode, message: str, details: bytes) -> TrackstarError:
    """The error of a code, a message and a serialised `google.rpc.Status`, which may be empty or anything else."""
    try:
        packed = status_pb2.Status.FromString(details).details
        info = _first(packed, error_details_pb2.ErrorInfo())
        retry = _first(packed, error_details_pb2.RetryInfo())
        bad = _first(packed, error_details_pb2.BadRequest())
        resource = _first(packed, error_details_pb2.ResourceInfo())
    except DecodeError:
        info = retry = bad = resource = None
    # gRPC's own refusal of a long message: trying again would not help.
    too_long = code is grpc.StatusCode.RESOURCE_EXHAUSTED and info is None and "message larger than max" in message
    kind = InvalidRequest if too_long else _OF_CODE.get(code, TrackstarError)
    if info is not None and info.domain == DOMAIN:
        kind = _OF_REASON.get(info.reason, kind)
    if issubclass(kind, InvalidRequest):
        field = bad.field_violations[0].field if bad is not None and bad.field_violations else None
        return kind(message, field=field or None)
    if issubclass(kind, NotFound):
        found = resource or error_details_pb2.ResourceInfo()
        return kind(message, kind=found.resource_type or None, name=found.resource_name or None)
    if issubclass(kind, NotReady | Overloaded):
        wait = None if retry is None else max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
        return kind(message, retry_after_seconds=wait)
    return kind(message)


def _attribute(error: grpc.RpcError, name: str) -> Any:
    """What `error.name()` returns, None where the error is of a kind without it."""
    method = getattr(error, name, None)
    return method() if callable(method) else None


def _first(packed: Iterable[any_pb2.Any], empty: Detail) -> Detail | None:
    """The first detail of the type of `empty`, None if there is none."""
    return next((empty for detail in packed if detail.Unpack(empty)), None)

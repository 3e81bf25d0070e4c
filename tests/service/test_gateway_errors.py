"""Every error of ours over the wire: its code, its details, and itself again at the client."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.errors import one_line, status_of
from services.gateway.logs import JsonFormatter
from tests.service.scripted import ScriptedTraceService, ask, failure, raising, sample, serving
from trackstar import errors
from trackstar.rpc_errors import TABLE, from_call, from_details
from trackstar.v1 import trace_pb2

CASES: list[tuple[errors.TrackstarError, grpc.StatusCode]] = [
    (errors.InvalidRequest("k is too large", field="k"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidRequest("no field"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound("no generation 'g'", kind="generation", name="g"), grpc.StatusCode.NOT_FOUND),
    (errors.NotReady("being built", retry_after_seconds=2.5), grpc.StatusCode.UNAVAILABLE),
    (errors.Overloaded("full", retry_after_seconds=0.25), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.CorruptArtifact("a row was altered"), grpc.StatusCode.DATA_LOSS),
    (errors.Incompatible("another checkpoint"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.UnsupportedModel("no weights"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StorageFull("no space"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded("too slow"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Unauthenticated("who?"), grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied("not you"), grpc.StatusCode.PERMISSION_DENIED),
    (errors.TrackstarError("something else"), grpc.StatusCode.FAILED_PRECONDITION),
]


def test_every_error_has_a_row() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds == set(TABLE) == {type(error) for error, _ in CASES}
    assert len({reason for _, reason in TABLE.values()}) == len(TABLE)


def test_every_error_arrives_with_its_details() -> None:
    async def run() -> None:
        actions = {str(number): raising(error) for number, (error, _) in enumerate(CASES)}
        async with serving(ScriptedTraceService(actions)) as served:
            for number, (error, code) in enumerate(CASES):
                found = await failure(served.traces.Trace(ask(str(number), request_id=f"r{number}")))
                assert found.code() is code
                assert found.details() == str(error)
                details = _details(found)
                assert details["ErrorInfo"] == error_details_pb2.ErrorInfo(
                    reason=TABLE[type(error)][1], domain="trackstar"
                )
                assert details["RequestInfo"].request_id == f"r{number}"
                again = from_call(found)
                assert type(again) is type(error)
                assert vars(again) == vars(error)
                assert str(again) == str(error)
                _check_details(error, details)
            assert sample(served.gateway, "trackstar_defects_total") == 0

    asyncio.run(run())


def _check_details(error: errors.TrackstarError, details: dict[str, Any]) -> None:
    expected = {"ErrorInfo", "RequestInfo"}
    if isinstance(error, errors.InvalidRequest) and error.field:
        expected.add("BadRequest")
        assert [(each.field, each.description) for each in details["BadRequest"].field_violations] == [
            ("k", str(error))
        ]
    if isinstance(error, errors.NotFound):
        expected.add("ResourceInfo")
        assert (details["ResourceInfo"].resource_type, details["ResourceInfo"].resource_name) == ("generation", "g")
    if isinstance(error, errors.NotReady | errors.Overloaded):
        expected.add("RetryInfo")
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1000 * (error.retry_after_seconds or 0)
    assert details.keys() == expected


def test_a_stream_ends_with_the_same_status() -> None:
    async def run() -> None:
        error = errors.InvalidRequest("bad", field="query.target")
        async with serving(ScriptedTraceService({"fail": raising(error)})) as served:
            call = served.traces.TraceStream(_stream("fail"))
            parts = aiter(call)
            assert (await anext(parts)).encoded.request_id
            found = await failure(anext(parts))
            again = from_call(found)
            assert isinstance(again, errors.InvalidRequest)
            assert again.field == "query.target"

    asyncio.run(run())


def test_a_defect_tells_the_log_and_not_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving(ScriptedTraceService({"fail": raising(KeyError("the secret"))})) as served:
            found = await failure(served.traces.Trace(ask("fail", request_id="r7")))
            assert found.code() is grpc.StatusCode.INTERNAL
            assert _details(found)["ErrorInfo"].reason == "DEFECT"
            assert "secret" not in str(found.details()) + str(found.trailing_metadata())
            assert "r7" in str(found.details())
            assert type(from_call(found)) is errors.TrackstarError
            assert sample(served.gateway, "trackstar_defects_total") == 1

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1
    line = json.loads(JsonFormatter().format(logged[0]))
    assert line["request_id"] == "r7"
    assert "KeyError: 'the secret'" in line["traceback"]


def test_long_and_dirty_messages_arrive() -> None:
    dirty = ["\x00\r\n\t" * 3000, "é" * 5000, "\ud800\udfff" * 200, "日本" * 4000, "a" * 100_000, "", " "]

    async def run() -> None:
        actions = {str(number): raising(errors.InvalidRequest(text, field=text)) for number, text in enumerate(dirty)}
        async with serving(ScriptedTraceService(actions)) as served:
            for number in range(len(dirty)):
                found = await failure(served.traces.Trace(ask(str(number))))
                assert found.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert found.details()
                assert isinstance(from_call(found), errors.InvalidRequest)

    asyncio.run(run())


@given(st.text(), st.integers(10, 300))
def test_a_line_is_printable_and_short(text: str, max_bytes: int) -> None:
    line = one_line(text, max_bytes=max_bytes)
    assert line.isprintable()
    assert len(line.encode()) <= max_bytes
    assert one_line(line, max_bytes=max_bytes) == line


@given(st.text(max_size=5000), st.text(max_size=5000), st.text(max_size=300))
def test_metadata_stay_below_8_kib(message: str, name: str, request_id: str) -> None:
    for error in (errors.InvalidRequest(message, field=name), errors.NotFound(message, kind=name, name=name)):
        status = status_of(error, request_id=request_id)
        percent_encoded = 3 * len(status.details.encode())
        in_base64 = sum(len(value) * 4 // 3 + 4 for _, value in status.trailing_metadata or ())
        assert percent_encoded + in_base64 < 8 << 10


@given(st.sampled_from(list(grpc.StatusCode)), st.text(), st.binary())
def test_any_status_of_others_is_an_error_of_ours(code: grpc.StatusCode, message: str, details: bytes) -> None:
    assert isinstance(from_details(code, message, details), errors.TrackstarError)


def test_errors_survive_pickling() -> None:
    for error, _ in CASES:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def _stream(prompt: str) -> trace_pb2.TraceStreamRequest:
    return trace_pb2.TraceStreamRequest(trace=ask(prompt))


def _details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for packed in status.details:
        name = packed.type_url.rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found
